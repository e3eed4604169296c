"""Floor 4: a trained model writes. Sampling, generation of a batch or of a stream, and text out of tokens as they come.

`chat` lets it answer in conversations, `tools` are what it may call there, `talk` and `rank` let a person at a
`terminal` answer or judge, `kept` writes what comes of it.
May import core, kernels, data, model, objective and workdir; never train or eval.
"""
