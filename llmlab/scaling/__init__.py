"""Floor 6: many runs from one experiment. May import everything below; never report or serve.

Each run is a process of its own, `llmlab train`, so one that fails or is killed takes no other with it. The page of
curves is the report room's: whoever wires both passes it in.
"""

from llmlab.scaling.grid import Grid, check_keys, parse_sweep
from llmlab.scaling.results import Result
from llmlab.scaling.sweep import run_sweep

__all__ = ["Grid", "Result", "check_keys", "parse_sweep", "run_sweep"]
