"""Attention, the state-space recurrence, token log-probabilities: a contract each, a reference, and fast versions.

Floor 1: imports only `llmlab.core`, jax and numpy. `attention`, `ssm` and `logprobs` hold the contracts and choose a
version by platform, shape and options; `check` compares the chosen one with its reference on the machine at hand.
"""
