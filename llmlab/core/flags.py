"""Flags as the field writes them, `--config=FILE:ARG --config.section.key=value`, and their mistakes in one line."""

import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

from absl import flags as f
from absl.flags import FlagValues
from ml_collections import config_flags

from llmlab.core.errors import LlmlabError, UserError, nearest


def parse(define: Callable[[FlagValues, list[str]], None], argv: list[str]) -> tuple[FlagValues, list[str]]:
    """The flags that `define` declares, and the arguments that are none.

    Raises:
      UserError: any mistake in the flags, or in the experiment file that --config names.
    """
    flags = FlagValues()
    f.DEFINE_bool("help", False, "Print this page.", short_name="h", flag_values=flags)
    f.DEFINE_bool("debug", False, "Print the traceback of an error too.", flag_values=flags)
    define(flags, argv)
    # config_flags loads every experiment under one name: what a second one lacks, the first would lend it.
    sys.modules.pop("config_config", None)
    try:
        return flags, flags(["llmlab", *argv])[1:]
    except f.UnrecognizedFlagError as error:
        given = error.flagname
        raise UserError(f"unknown flag --{given}: {nearest(given, [n for n in flags if len(n) > 1])}") from error
    except LlmlabError:
        raise
    except Exception as error:
        if place := _place_in_experiment(error, argv):
            raise UserError(place) from error
        if isinstance(error, (f.Error, AttributeError, KeyError, TypeError, ValueError)):
            raise UserError(_flag_error(str(error), argv)) from error
        raise


def define_config(flags: FlagValues, argv: list[str]) -> None:
    """Declares --config, whose keys become flags too."""
    config_flags.DEFINE_config_file(
        "config",
        None,
        "The experiment, FILE.py or FILE.py:ARG; every key of it is a flag too: --config.section.key=value.",
        flag_values=flags,
        sys_argv=["llmlab", *argv],
    )


def define_workdir(flags: FlagValues, text: str) -> None:
    """Declares --workdir."""
    f.DEFINE_string("workdir", "", text, flag_values=flags)


def overrides(flags: FlagValues) -> list[str]:
    """The --config.section.key=value flags that were given."""
    given: Any = flags["config"]
    return [f"--config.{key}={value}" for key, value in given.override_values.items()]


def required(flags: FlagValues, name: str) -> str:
    """The flag's value, or a UserError that asks for it."""
    if not getattr(flags, name):
        raise UserError(f"--{name} is missing: --help says what it is for")
    return getattr(flags, name)


def none_left(rest: list[str]) -> None:
    """Raises UserError where an argument is no flag."""
    if rest:
        raise UserError(f"{rest[0]!r} is no flag: flags begin with --, as in --workdir=DIR")


def _place_in_experiment(error: Exception, argv: list[str]) -> str:
    """The file, line and error, where the experiment file itself is what fails; empty where it is not."""
    for argument in argv:
        path = argument.removeprefix("-").removeprefix("-config=").partition(":")[0]
        if not os.path.isfile(path):
            continue
        if isinstance(error, SyntaxError) and error.filename == path:
            return f"{path}, line {error.lineno}: {error.msg}"
        if isinstance(error, AttributeError) and "has no attribute 'get_config" in str(error):
            return f"{path} has no function get_config(arg): see experiments/quickstart.py"
        if lines := [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]:
            return f"{path}, line {lines[-1]}: {type(error).__name__}: {' '.join(str(error).split())}"
    return ""


def _flag_error(text: str, argv: list[str]) -> str:
    """What went wrong with a --config override, in one line that names the key."""
    text = " ".join(text.replace("\\'", "'").replace("\\n", " ").split())
    text = text.strip("'\"") if text.count("'") != 2 else text
    if text.startswith("flag --"):
        return text.removeprefix("flag ")
    for argument in argv:
        key = argument.partition("=")[0]
        if argument.startswith("--config.") and text.partition("'")[0].strip("'\"") in key.split(".")[1:]:
            return f"unknown config key {key.removeprefix('--config.')}: {text.partition(' ')[2].lower()}"
    return text
