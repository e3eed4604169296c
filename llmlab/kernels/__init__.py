"""Attention and token log-probabilities: one contract each, a reference that is obviously right, and fast versions.

Floor 1: imports only `llmlab.core`, jax and numpy. `attention` and `logprobs` hold the contracts and choose a version
by platform, shape and options; `check` compares the chosen one with its reference on the machine at hand.
"""
