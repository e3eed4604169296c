"""What `llmlab tokenize` prints: the pieces of a text, their ids, and what they cost; of a conversation, its mask."""

import itertools
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from etils import epath

from llmlab.core.errors import UserError
from llmlab.data import readers
from llmlab.data.chat import ChatTemplate, Rendered, template_for
from llmlab.data.config import Rows
from llmlab.data.readers import BadInput, Row
from llmlab.data.rows import BadRowError, examples, guess_rows
from llmlab.data.tokenizer import Tokenizer, load_tokenizer

_BACKGROUNDS = ("\x1b[30;48;5;153m", "\x1b[30;48;5;222m", "\x1b[30;48;5;157m", "\x1b[30;48;5;217m")  # all pale
_GREENS = ("\x1b[30;48;5;157m", "\x1b[30;48;5;114m")
_GREYS = ("\x1b[30;48;5;255m", "\x1b[30;48;5;250m")
_BOLD, _DIM, _RESET = "\x1b[1m", "\x1b[2m", "\x1b[0m"


def tokenize_command(path: str | os.PathLike[str], text: str | None, out: TextIO) -> None:
    """Prints how the tokenizer in `path`, a file or a workdir, cuts `text` (None: what standard input holds).

    Colour is for terminals whose user did not set NO_COLOR (https://no-color.org).
    """
    tokenizer = _tokenizer(path)
    if text is None:
        text = _standard_input()
    out.write(render(tokenizer, text, color=_wants_color(out)))


def chat_command(
    path: str | os.PathLike[str],
    file: str | os.PathLike[str],
    out: TextIO,
    *,
    rows: Rows | None = None,
    limit: int = 3,
    system: str = "",
    train_on: str = "assistant",
) -> None:
    """Prints the first rows of `file` as the chat template of the tokenizer in `path` spells them, then a count.

    Args:
      rows: what they are, as in `DataConfig`; None where each row's fields tell.
      limit: how many; 0 for all.
      system, train_on: as in `DataConfig`.

    Raises:
      UserError: one of them is bad.
    """
    tokenizer = _tokenizer(path)
    template, color = template_for(tokenizer), _wants_color(out)
    if limit < 0:
        raise UserError(f"--limit={limit} should be a number of rows, or 0 for all")
    conversations = tokens = learned = 0
    rows_in = iter(_rows_in(Path(file)))
    for row in itertools.islice(rows_in, limit or None):
        if isinstance(row, BadInput):
            raise UserError(str(row))
        kind = rows or guess_rows(row.fields) or "chat"
        try:
            found = examples(row.fields, kind, system=system, train_on=train_on)
        except BadRowError as error:
            raise UserError(str(error.at(row.where))) from None
        for example in found:
            for number, response in enumerate(example.responses, start=1):
                facts = [row.where, kind, example.kind]
                if len(example.responses) > 1:
                    facts.append(f"answer {number} of {len(example.responses)}")
                if response.value or kind == "binary":
                    facts.append(f"value {response.value:g}")
                rendered = template.render(response.conversation)
                body = render_conversation(tokenizer, template, rendered, color=color)
                out.write(f"{', '.join(filter(None, facts))}\n{body}\n")
                conversations += 1
                tokens += len(rendered.ids)
                learned += sum(rendered.mask)
    how = "in green" if color else "in brackets"
    share = f", {learned / tokens:.1%}" if tokens else ""
    more = "; there are more rows: --limit=0 shows all" if next(rows_in, None) is not None else ""
    counted = f"{_plural(conversations, 'conversation')}, {_plural(tokens, 'token')}"
    out.write(f"{counted}, {learned} learned ({how}){share}{more}\n")


def render_conversation(tokenizer: Tokenizer, template: ChatTemplate, rendered: Rendered, *, color: bool) -> str:
    """The pieces of a conversation, line by line as its turns and texts have them; what is learned in green.

    Without colour that is `[piece]`. A step's label comes after its last piece.
    """
    lines: list[list[str]] = [[]]
    labels = dict(rendered.steps)
    markers = {tokenizer.bos_id, tokenizer.eos_id, *tokenizer.control.values()}
    for i, (id, mask) in enumerate(zip(rendered.ids, rendered.mask, strict=True)):
        piece = tokenizer.piece(id)
        if color:
            shown = f"{(_GREENS if mask else _GREYS)[i % 2]}{_BOLD if id in markers else ''}{piece}{_RESET}"
        else:
            shown = f"[{piece}]" if mask else piece
        if i in labels:
            shown += f"{_DIM}={labels[i]:g}{_RESET}" if color else f"={labels[i]:g}"
        lines[-1].append(shown)
        if id in template.stop_ids or tokenizer.decode_bytes([id]).endswith(b"\n"):
            lines.append([])
    return "".join(("" if color else " ").join(line) + "\n" for line in lines if line)


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
    return f"{_plural(tokens, 'token')}, {_plural(size, 'byte')}{rate}"


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


def _tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    given = epath.Path(path)
    return load_tokenizer(given / "tokenizer.model" if given.is_dir() else given)


def _wants_color(out: TextIO) -> bool:
    return out.isatty() and not os.environ.get("NO_COLOR")


def _rows_in(path: Path) -> Iterator[Row | BadInput]:
    """The rows of any file or folder that has some."""
    if path.is_dir():
        return readers.huggingface_rows(path, None)
    return readers.parquet_rows(path, None) if path.suffix == ".parquet" else readers.jsonl_rows(path)


def _standard_input() -> str:
    content = sys.stdin.buffer.read()
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"standard input is not UTF-8: byte {content[error.start]:#04x} at {error.start}; convert it, such as "
            "with iconv -t utf-8"
        ) from None
