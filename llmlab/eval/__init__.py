"""Floor 5: how good a model is. Exact held-out loss and bits per byte, tasks from local files, answers in
conversations, samples to read.

May import what is below. `command` is what `llmlab eval` runs; `held_out` and `samples` are also hooks of training.
"""
