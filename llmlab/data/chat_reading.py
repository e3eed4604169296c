"""What a model of a published family says, read as its ids come: thinking and calls stand in marks.

A mark that is a token of the vocabulary is spelt with a sign before it here, so that text which spells it stays text. A
mark that is none is text, and then text is a mark.
"""

import codecs
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

from llmlab.core.text import may_become
from llmlab.data.chat import Piece, ToolCall, call_piece
from llmlab.data.tokenizer_imported import ImportedTokenizer

_MARKS = ("<think>", "</think>", "<tool_call>", "</tool_call>")
_SIGN = "\U000ffffd"  # before a mark that is a token of its own
_NEVER = "\U000ffffc"


class Marks(NamedTuple):
    """How a family spells what is no text, with signs. ids: those that are tokens."""

    ids: Mapping[int, str]
    think: str
    answer: str
    call: str
    called: str


def marks_of(control: Mapping[str, int], literals: Sequence[str]) -> Marks:
    """The marks that most families share, by the ids of a family's markers and the texts in its template."""
    written = "".join(literals)
    spelt = (_SIGN + name if name in control else name if name in written else _NEVER for name in _MARKS)
    return Marks({control[name]: _SIGN + name for name in _MARKS if name in control}, *spelt)


class TurnText:
    """The text of ids as they come, in whole characters, with the marks that are tokens."""

    def __init__(self, tokenizer: ImportedTokenizer, marks: Mapping[int, str]):
        self._tokenizer, self._marks = tokenizer, marks
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, id: int) -> str:
        if id in self._marks:
            return self.end() + self._marks[id]
        return self._decoder.decode(self._tokenizer.decode_bytes([id]))

    def end(self) -> str:
        """The rest: half a character, as U+FFFD."""
        return self._decoder.decode(b"", final=True)

    def whole(self, ids: Iterable[int]) -> str:
        """Of these ids, and no more."""
        return "".join([*map(self.add, ids), self.end()])


class ImportedReader:
    """A turn, which begins inside of thinking if it `thinks`.

    Thinking comes first, if at all, and calls are taken out of the answer. Both are given out without the blanks around
    them: line ends of thinking, any of an answer.
    """

    def __init__(self, text: TurnText, marks: Marks, *, thinks: bool):
        self._text, self._marks = text, marks
        self._step = self._thinking if thinks else self._start
        self._held = ""  # what cannot be told yet
        self._searched = 0  # characters of it, for the end of a call
        self._thought, self._answered = _Stripped("\n"), _Stripped(None)

    def add(self, id: int) -> list[Piece]:
        return self._read(self._text.add(id), last=False)

    def end(self) -> list[Piece]:
        return self._read(self._text.end(), last=True)

    def _read(self, text: str, *, last: bool) -> list[Piece]:
        self._held += text
        pieces = list[Piece]()
        while self._step(pieces, last):  # each says whether another one goes on
            pass
        return pieces

    def _start(self, pieces: list[Piece], last: bool) -> bool:
        begin = self._held.lstrip()
        if begin.startswith(self._marks.think):
            self._step, self._held = self._thinking, begin.removeprefix(self._marks.think)
        elif last or not self._marks.think.startswith(begin):
            self._step = self._answer
        else:
            return False
        return True

    def _thinking(self, pieces: list[Piece], last: bool) -> bool:
        thought, ended, rest = self._held.partition(self._marks.answer)
        kept = 0 if ended or last else may_become(thought, [self._marks.answer])
        self._say("thinking", thought[: len(thought) - kept], pieces)
        self._held = rest or thought[len(thought) - kept :]
        if ended:
            self._step = self._answer
        return bool(ended)

    def _answer(self, pieces: list[Piece], last: bool) -> bool:
        answer, begun, _ = self._held.partition(self._marks.call)
        kept = 0 if begun or last else may_become(answer, [self._marks.call])
        self._say("text", answer[: len(answer) - kept], pieces)
        self._held = self._held[len(answer) - kept :]
        if begun:
            self._step, self._searched = self._call, len(self._marks.call)
        return bool(begun)

    def _call(self, pieces: list[Piece], last: bool) -> bool:
        end = self._held.find(self._marks.called, self._searched)
        if end < 0:
            self._searched = max(self._searched, len(self._held) - len(self._marks.called))
            if last:
                self._say("text", self._held, pieces)
            return False
        call = _call(self._held[len(self._marks.call) : end])
        whole, self._held = self._held[: end + len(self._marks.called)], self._held[end + len(self._marks.called) :]
        if call:
            self._answered.pending = self._answered.pending.removesuffix("\n")
            pieces.append(call_piece(call))
        else:
            self._say("text", whole, pieces)
        self._step = self._answer
        return True

    def _say(self, kind: Literal["text", "thinking"], text: str, pieces: list[Piece]) -> None:
        said = (self._thought if kind == "thinking" else self._answered).add(text.replace(_SIGN, ""))
        if said:
            pieces.append(Piece(kind, said))


class _Stripped:
    """Text without the blanks around it, as it comes. pending: blanks that nothing has followed yet."""

    def __init__(self, blanks: str | None):
        self._blanks, self._begun, self.pending = blanks, False, ""

    def add(self, text: str) -> str:
        text = self.pending + text
        if not self._begun:
            text = text.lstrip(self._blanks)
        said = text.rstrip(self._blanks)
        self._begun, self.pending = self._begun or bool(said), text[len(said) :]
        return said


def _call(text: str) -> ToolCall | None:
    """The call that a model wrote; None if it is not well formed."""
    try:
        call = json.loads(text)
    except (ValueError, RecursionError):
        # Templates write arguments that are no JSON as they are.
        plain = re.fullmatch(r'\s*\{"name": "([^"\\]+)", "arguments": ([^{\["\s].*)\}\s*', text, re.DOTALL)
        return ToolCall(plain[1], plain[2]) if plain else None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str) or not call["name"]:
        return None
    arguments = call.get("arguments", {})
    return ToolCall(
        call["name"], arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    )
