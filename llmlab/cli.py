"""The one door: `llmlab VERB`, its help, its errors and its exit codes."""

import io
import logging
import os
import sys
import traceback
from collections.abc import Sequence

from absl.flags import FlagValues

from llmlab.core.errors import (
    EXIT_BUG,
    EXIT_DISK_FULL,
    EXIT_INTERRUPTED,
    EXIT_STOPPED_AND_SAVED,
    LlmlabError,
    UserError,
    is_disk_full,
    nearest,
)
from llmlab.core.flags import parse
from llmlab.verbs import VERBS


def main() -> None:
    """The console script."""
    if sys.argv[1:2] == ["train"] and not {"--help", "-h"} & set(sys.argv):
        from llmlab.core.host_memory import restart_with_huge_pages

        restart_with_huge_pages()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a locale may lack what a text contains
    code = run(sys.argv)
    if code not in (0, EXIT_STOPPED_AND_SAVED) and "jax" in sys.modules:
        from llmlab.core.distributed import leave_if_several

        leave_if_several(code)
    sys.exit(code)


def run(argv: Sequence[str]) -> int:
    """Runs `llmlab VERB …` and returns its exit code; see `llmlab.core.errors` for what each means."""
    arguments = list(argv[1:])
    if not arguments or arguments[0] in ("--help", "-h", "help"):
        print(_overview())
        return 0
    if arguments[0] == "--version":
        from llmlab import __version__

        print(f"llmlab {__version__}")
        return 0
    name = arguments[0]
    debug = "--debug" in arguments
    try:
        if name not in VERBS:
            raise UserError(f"unknown verb {name!r}: {nearest(name, VERBS)}")
        logging.basicConfig(level=logging.WARNING, format="llmlab: %(message)s", stream=sys.stderr)
        logging.getLogger("llmlab").setLevel(logging.INFO)
        flags, rest = parse(VERBS[name].define, arguments[1:])
        if flags.help:
            print(_page(name, flags))
            return 0
        VERBS[name].run(flags, rest)
        return 0
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has seen enough; what is left in the buffer has no one to go to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        return _report_error(name, error, debug)


def _report_error(verb: str, error: Exception, debug: bool) -> int:
    if not debug and "jax" in sys.modules:
        from llmlab.core.distributed import lost_another

        if lost_another(error):
            print(f"llmlab {verb}: another process of this run has ended: its own message says why", file=sys.stderr)
            return EXIT_BUG
    known = isinstance(error, LlmlabError)
    if debug or not (known or is_disk_full(error)):
        traceback.print_exception(error)
    if isinstance(error, LlmlabError):
        print(f"llmlab {verb}: {error}", file=sys.stderr)
        return error.exit_code
    if is_disk_full(error):
        print(f"llmlab {verb}: no space left on the disk: free some, then run the same command again", file=sys.stderr)
        return EXIT_DISK_FULL
    return EXIT_BUG


def _overview() -> str:
    lines = ["llmlab: from raw text to a language model.", "", "usage: llmlab VERB [--flag=value …]", ""]
    lines += [f"  {name:10s} {verb.summary}" for name, verb in VERBS.items()]
    return "\n".join([*lines, "", "`llmlab VERB --help` says more."])


def _page(name: str, flags: FlagValues) -> str:
    verb = VERBS[name]
    lines = [f"llmlab {name}: {verb.summary}", "", f"usage: llmlab {name} {verb.usage}", ""]
    shown = {flag for flag in flags if len(flag) > 1 and "." not in flag}
    for flag in sorted(shown):
        default = "" if flags[flag].default in (None, "", [], False) else f" (default {flags[flag].default})"
        lines.append(f"  --{flag:20s} {flags[flag].help}{default}")
    return "\n".join([*lines, "", verb.details]).rstrip()
