"""What a model of a published family says, read as its ids come: thinking and calls stand in marks.

A mark that is a token of the vocabulary is spelt with a sign before it here, so that text which spells it stays text. A
mark that is none is text, and then text is a mark.
"""

import codecs
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

from llmlab.core.text import may_become
from llmlab.data.chat import Piece, call_piece
from llmlab.data.chat_calls import WrittenCall, may_be_object, read_calls
from llmlab.data.chat_encoding import Encoder
from llmlab.data.tokenizer_imported import ImportedTokenizer

_SIGN = "\U000ffffd"  # before a mark that is a token of its own
_NEVER = "\U000ffffc"


class Marks(NamedTuple):
    """How a family spells what is no text, with signs.

    ids: the marks that are tokens. think, answer: what begins thinking, and what ends it. call: how calls are written.
    """

    ids: Mapping[int, str]
    think: str
    answer: str
    call: WrittenCall


def marks_of(encoder: Encoder, literals: Sequence[str], call: WrittenCall | None) -> Marks:
    """The marks of a family, whose template holds these texts."""
    control, written = encoder.control, "".join(literals)
    think, answer = (
        _SIGN + name if name in control else name if name in written else _NEVER for name in ("<think>", "</think>")
    )
    ids = {control[name]: _SIGN + name for name in ("<think>", "</think>") if name in control}
    names = {id: name for name, id in control.items()}

    def spell(text: str) -> str:
        pieces = encoder.pieces(text)
        ids.update({id: _SIGN + names[id] for id in pieces if isinstance(id, int)})
        return "".join(piece if isinstance(piece, str) else ids[piece] for piece in pieces)

    never = WrittenCall("", "", "", "", _NEVER, _NEVER, "")
    return Marks(ids, think, answer, call.map(spell) if call else never)


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
    them: line ends of thinking, any of an answer. tools: the names of those that may be called.
    """

    def __init__(self, text: TurnText, marks: Marks, tools: Collection[str], *, thinks: bool):
        self._text, self._marks, self._tools = text, marks, tools
        self._step = self._thinking if thinks else self._start
        self._held = ""  # what cannot be told yet
        self._searched = 0  # characters of it, for the end of a call
        self._first = self._answer if marks.call.opened or not tools else self._object
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
            self._step = self._first
        else:
            return False
        return True

    def _thinking(self, pieces: list[Piece], last: bool) -> bool:
        thought, ended, rest = self._held.partition(self._marks.answer)
        kept = 0 if ended or last else may_become(thought, [self._marks.answer])
        self._say("thinking", thought[: len(thought) - kept], pieces)
        self._held = rest or thought[len(thought) - kept :]
        if ended:
            self._step = self._first
        return bool(ended)

    def _answer(self, pieces: list[Piece], last: bool) -> bool:
        """Up to the next call, without what stands around all of them."""
        call = self._marks.call
        marks = [mark for mark in (call.begin, call.opened, call.end) if mark]
        at, mark = min(((at, mark) for mark in marks if (at := self._held.find(mark)) >= 0), default=(-1, ""))
        if at < 0:
            at = len(self._held) - (0 if last else may_become(self._held, marks))
        self._say("text", self._held[:at], pieces)
        self._held = self._held[at:]
        if mark and mark == call.opened:
            self._step, self._searched = self._call, len(mark)
        elif mark:
            self._held = self._held.removeprefix(mark)
        return bool(mark)

    def _call(self, pieces: list[Piece], last: bool) -> bool:
        """Up to what closes it: where nothing does, the next one or the turn's end."""
        call = self._marks.call
        close = call.closed or call.opened
        end = self._held.find(close, self._searched)
        if end < 0 and not (last and not call.closed):
            self._searched = max(self._searched, len(self._held) - len(close))
            if last:
                self._say("text", self._held, pieces)
            return False
        inside = self._held[len(call.opened) :] if end < 0 else self._held[len(call.opened) : end]
        length = len(call.opened) + len(inside) + len(call.closed)
        whole, self._held = self._held[:length], self._held[length:]
        calls = read_calls(inside, call)
        if calls and not any(_SIGN in call.name for call in calls):
            self._answered.pending = self._answered.pending.removesuffix("\n")
            pieces += [call_piece(call._replace(arguments=call.arguments.replace(_SIGN, ""))) for call in calls]
        else:
            self._say("text", whole, pieces)
        self._step = self._answer
        return True

    def _object(self, pieces: list[Piece], last: bool) -> bool:
        """An answer that is nothing but calls, without marks, of tools that there are."""
        if not last and may_be_object(self._held.lstrip(), self._marks.call):
            return False
        calls = read_calls(self._held, self._marks.call) if last else ()
        if calls and all(call.name in self._tools for call in calls):
            pieces += map(call_piece, calls)
            self._held = ""
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
