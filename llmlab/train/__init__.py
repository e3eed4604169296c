"""Floor 4: the optimizer, the state, one step, and the one loop that trains whatever an experiment composes.

May import what is below; never infer or eval: what they do during a run comes in as hooks.
"""
