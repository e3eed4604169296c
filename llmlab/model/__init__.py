"""Floor 2: the language model. Linen stays inside this room. May import core, kernels and data.

What a model is    config, with rope, routing and ssm for their sections; cost: parameters, FLOPs, memory
How it runs        transformer: the stack of layers, as a Model of types; cache: what decoding keeps
A layer            base: how any declares a weight, and norms; block puts together layers (attention, MLP, ends),
                   latent, experts, mamba
A weight           weights, its only reader; matrices: which they are; quantise and adapters, which stand for one
Open weights       hf: load and save; families and family_weights: one entry for each; hf_config, hf_weights and
                   hf_files: settings, tensors and files; peft: adapters
"""
