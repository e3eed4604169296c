"""What can end a command, and the exit code each ending has.

A mistake of the user's is one line that says what, where and how to mend it. Anything else is a bug, and keeps its
traceback.
"""

import difflib
import errno
from collections.abc import Iterable

EXIT_BUG = 1
EXIT_USER_ERROR = 2
EXIT_DISK_FULL = 74
EXIT_STOPPED_AND_SAVED = 75
EXIT_TRIPWIRE = 76
EXIT_INTERRUPTED = 130


class LlmlabError(Exception):
    """An ending with its own exit code; its text is for the person who typed the command."""

    exit_code = EXIT_BUG


class UserError(LlmlabError):
    """The user's input cannot work. The message is one line: what was given, where, and how to mend it."""

    exit_code = EXIT_USER_ERROR


class DiskFull(LlmlabError):
    """No room to write. What was already committed stays good; the same command goes on once there is room."""

    exit_code = EXIT_DISK_FULL


class StoppedAndSaved(LlmlabError):
    """A signal asked the run to stop, and everything is saved."""

    exit_code = EXIT_STOPPED_AND_SAVED


class Tripwire(LlmlabError):
    """The run stopped itself (diverged, or a kernel disagrees with its reference); the last good state is saved."""

    exit_code = EXIT_TRIPWIRE


def nearest(given: str, choices: Iterable[str]) -> str:
    """A sentence that names the choice most like `given`, or lists them all when none is near."""
    choices = list(choices)
    match = difflib.get_close_matches(given, choices, n=1, cutoff=0.5)
    return f"did you mean {match[0]!r}?" if match else f"choose one of {', '.join(map(repr, choices))}"


def is_disk_full(error: BaseException) -> bool:
    """Whether `error`, or what caused it, says that no space is left: libraries wrap the OSError in their own."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "No space left on device" in str(seen) or "RESOURCE_EXHAUSTED: Error writing" in str(seen):
            return True
        seen = seen.__cause__ or seen.__context__
    return False
