"""Floor 3: what a run leaves behind, and how it is opened again: config, tokenizer, checkpoints, metrics.

`files` is the folder itself; `checkpoints` (the only module that knows Orbax) and `manifest` are its weights; `metrics`
its logs; `open` the way back to a model. May import core, kernels, data and model; never
objective or train, so a training state is a plain dict here.
"""
