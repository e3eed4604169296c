"""What `llmlab tokenize` prints: the pieces of a text, their ids, and what they cost."""

import os
import sys
from typing import TextIO

from etils import epath

from llmlab.core.errors import UserError
from llmlab.data.tokenizer import Tokenizer, load_tokenizer

_BACKGROUNDS = ("\x1b[30;48;5;153m", "\x1b[30;48;5;222m", "\x1b[30;48;5;157m", "\x1b[30;48;5;217m")  # all pale
_DIM, _RESET = "\x1b[2m", "\x1b[0m"


def tokenize_command(path: str | os.PathLike[str], text: str | None, out: TextIO) -> None:
    """Prints how the tokenizer in `path`, a file or a workdir, cuts `text` (None: what standard input holds).

    Colour is for terminals whose user did not set NO_COLOR (https://no-color.org).
    """
    given = epath.Path(path)
    tokenizer = load_tokenizer(given / "tokenizer.model" if given.is_dir() else given)
    if text is None:
        text = _standard_input()
    out.write(render(tokenizer, text, color=out.isatty() and not os.environ.get("NO_COLOR")))


def render(tokenizer: Tokenizer, text: str, *, color: bool, ids: bool = True) -> str:
    """The pieces of `text`, line by line as the text has them, then a line that counts them.

    Without colour a piece is written `piece:id`; `·` is a space and `↵` the end of a line.
    """
    lines: list[list[str]] = [[]]
    tokens = tokenizer.encode(text)
    for i, id in enumerate(tokens):
        piece = tokenizer.piece(id)
        if color:
            shown = f"{_BACKGROUNDS[i % len(_BACKGROUNDS)]}{piece}{_RESET}" + (f"{_DIM}{id}{_RESET}" if ids else "")
        else:
            shown = f"{piece}:{id}" if ids else piece
        lines[-1].append(shown)
        if tokenizer.decode_bytes([id]).endswith(b"\n"):
            lines.append([])
    body = "\n".join(("" if color else " ").join(line) for line in lines if line)
    count = _count(len(tokens), len(text.encode()))
    return f"{body}\n{count}\n" if body else f"{count}\n"


def _count(tokens: int, size: int) -> str:
    rate = f", {size / tokens:.2f} bytes per token" if tokens else ""
    return f"{tokens} token{'s' * (tokens != 1)}, {size} byte{'s' * (size != 1)}{rate}"


def _standard_input() -> str:
    content = sys.stdin.buffer.read()
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"standard input is not UTF-8: byte {content[error.start]:#04x} at {error.start}; convert it, such as "
            "with iconv -t utf-8"
        ) from None
