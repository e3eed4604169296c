"""What a verb is, and what several of them do."""

import atexit
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from absl import flags as f
from absl.flags import FlagValues

from llmlab.core.errors import UserError
from llmlab.core.flags import none_left

if TYPE_CHECKING:
    from llmlab.train.config import Experiment

CHAT_TEMPERATURE = 0.7


class Verb(NamedTuple):
    """`define` declares the flags, with their help; `run` gets them parsed, and what was no flag."""

    summary: str
    usage: str
    details: str
    define: Callable[[Any, list[str]], None]
    run: Callable[[Any, list[str]], None]


def experiment_of(flags: FlagValues, rest: list[str], init_from: str = "") -> "Experiment":
    """The resolved experiment that --config and its overrides describe."""
    none_left(rest)
    given: Any = flags["config"]
    file = given.config_filename if given.present else ""
    if not file:
        raise UserError("--config=FILE.py is missing: name an experiment, such as --config=experiments/quickstart.py")
    if not os.path.isfile(path := file.partition(":")[0]):
        raise UserError(f"--config: there is no file {path}: see the ones in experiments/")
    from llmlab.train.config import resolve

    config = flags.config
    if not hasattr(config, "to_dict"):
        raise UserError(f"--config: get_config in {path} should return a ConfigDict: see experiments/quickstart.py")
    if init_from:
        config.run.init_from = init_from
    return resolve(config)


def define_sampling(flags: FlagValues, *, max_tokens: int, temperature: float) -> None:
    """Declares how tokens are drawn."""
    f.DEFINE_integer("max_tokens", max_tokens, "The most tokens to write at a time.", flag_values=flags)
    f.DEFINE_float("temperature", temperature, "0 always takes the likeliest token.", flag_values=flags)
    f.DEFINE_integer("top_k", 0, "Only the k likeliest tokens; 0 is all.", flag_values=flags)
    f.DEFINE_float("top_p", 1.0, "Only the likeliest tokens that hold this probability.", flag_values=flags)
    f.DEFINE_float("min_p", 0.0, "Only tokens this likely, relative to the likeliest.", flag_values=flags)
    f.DEFINE_float("repetition_penalty", 1.0, "More than 1 makes what was said less likely.", flag_values=flags)
    f.DEFINE_integer("seed", 0, "The same seed gives the same text.", flag_values=flags)


def sampling(flags: FlagValues) -> dict[str, Any]:
    """What `define_sampling` declared, as `generate` takes it."""
    names = ("max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
    return {name: getattr(flags, name) for name in names}


def tools() -> dict[str, Callable[[str], str]]:
    """What an assistant here may call."""
    from llmlab.data.tools import TOOLS

    return {name: tool.run for name, tool in TOOLS.items()}


def start_jax(flags: Any = None) -> None:
    """Joins the other hosts, if any, and keeps what is compiled for the next start."""
    from llmlab.core.host_memory import keep_freed_memory

    keep_freed_memory()
    import jax

    from llmlab.core.compile_cache import look_over
    from llmlab.core.distributed import connect
    from llmlab.core.paths import cache_root

    compiled = cache_root() / "compiled"
    look_over(compiled)
    atexit.register(look_over, compiled)
    jax.config.update("jax_compilation_cache_dir", str(compiled))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    if flags is not None:
        connect(flags.coordinator, flags.processes, flags.process_id)
