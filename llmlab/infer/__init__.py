"""Floor 4: a trained model writes. Sampling, generation of a batch or of a stream, and text out of tokens as they come.

May import core, kernels, data, model, objective and workdir; never train or eval.
"""
