"""Floor 2: the language model. `config` says what it is, `transformer` builds it, `types` is what others see.

Linen stays inside this room. May import core, kernels and data.
"""
