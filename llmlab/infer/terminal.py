"""What a person types and reads: in colours on a terminal; elsewhere plain lines, so that it can be piped."""

import contextlib
import io
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

from llmlab.infer.spoken import Kind

LABELS: dict[Kind, str] = {"text": "", "thinking": "thinking: ", "call": "calls ", "result": "gets ", "note": "note: "}
# A model may write what a terminal takes for a command: symbols stand for its control characters.
_CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {0x7F: 0x2421}
_CONTROLS |= dict.fromkeys(range(0x80, 0xA0), 0xFFFD)
_DIM, _BOLD, _PLAIN = "\x1b[2m", "\x1b[1m", "\x1b[0m"


class Terminal:
    """Where lines come from, and where text goes. `interactive`: both are a terminal."""

    def __init__(self, source: TextIO | None = None, out: TextIO | None = None):
        self._source, self._out = source or sys.stdin, out or sys.stdout
        if isinstance(self._source, io.TextIOWrapper):
            self._source.reconfigure(errors="replace")  # what was typed in another encoding is still a line
        self.interactive = self._source.isatty() and self._out.isatty()
        self._colours = self.interactive and not os.environ.get("NO_COLOR")
        self._kind: Kind = "text"
        self._line_is_open = False

    def ask(self, prompt: str) -> str:
        """A line that was typed, without its end.

        Raises:
          EOFError: there are no more.
        """
        self.end_line()
        if self.interactive:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401 - gives `input` its editing and its history
            return input(prompt)
        line = self._source.readline()
        if not line:
            raise EOFError
        return line.rstrip("\n")

    def say(self, kind: Kind, text: str) -> None:
        """Adds a piece of what a model says; all but text is dim, and begins with what it is."""
        label = ""
        if kind != self._kind or kind in ("call", "result", "note"):
            self.end_line()
            self._kind, label = kind, LABELS[kind]
        self._write(f"{label}{text}", _DIM if kind != "text" else "")

    def line(self, text: str = "", *, dim: bool = False, bold: bool = False) -> None:
        """A line of its own."""
        self.end_line()
        self._write(text, _DIM if dim else _BOLD if bold else "")
        self._line_is_open = True
        self.end_line()

    def aside(self, text: str) -> None:
        """What is beside the text: a dim line on a terminal; elsewhere it goes to stderr."""
        if self.interactive:
            self.line(text, dim=True)
        else:
            print(text, file=sys.stderr, flush=True)

    def end_line(self) -> None:
        """The next piece begins a line."""
        if self._line_is_open:
            self._out.write("\n")
            self._out.flush()
        self._line_is_open, self._kind = False, "text"

    def edited(self, text: str) -> str:
        """`text` as the person leaves it: from $VISUAL or $EDITOR, or typed anew."""
        editor = os.environ.get("VISUAL") or os.environ.get("EDITOR")
        if self.interactive and editor:
            return _from_editor(editor, text)
        self.line("type the whole text; a line of one full stop ends it", dim=True)
        lines = []
        with contextlib.suppress(EOFError):
            while (line := self.ask("")) != ".":
                lines.append(line)
        return "\n".join(lines)

    def _write(self, text: str, style: str) -> None:
        if self.interactive:
            text = text.translate(_CONTROLS)
        self._out.write(f"{style}{text}{_PLAIN}" if style and self._colours else text)
        self._out.flush()
        self._line_is_open = not text.endswith("\n") if text else self._line_is_open


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Yields whether Ctrl-C was pressed inside. The second one raises KeyboardInterrupt, whatever is running."""
    pressed = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield pressed.is_set
        return

    def note(*_: object) -> None:
        if pressed.is_set():
            raise KeyboardInterrupt
        pressed.set()

    before = signal.signal(signal.SIGINT, note)
    try:
        yield pressed.is_set
    finally:
        signal.signal(signal.SIGINT, before)


def _from_editor(editor: str, text: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "answer.txt"
        path.write_text(f"{text}\n", encoding="utf-8")
        try:
            failed = subprocess.run([*shlex.split(editor), str(path)]).returncode
        except (OSError, ValueError):
            failed = 1
        return text if failed else path.read_text(encoding="utf-8", errors="replace").removesuffix("\n")
