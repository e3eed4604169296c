"""Where in a conversation that a template wrote each assistant speaks.

Private-use characters, signs, go in around the texts; taken out again, they have to leave the conversation as it was
written without them. Where they do not, turns are found by their header, which nobody can type.
"""

import itertools
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

from llmlab.core.errors import UserError
from llmlab.data.chat import Message

Dicts = Sequence[dict[str, Any]]
Write = Callable[[Dicts, bool], str]  # of messages, and whether an assistant's turn is opened at the end


class Said(NamedTuple):
    """What an assistant says begins at `start`; the token that ends it is at `after` or later, and before `limit`.

    steps: where each of its steps ends.
    """

    start: int
    after: int
    limit: int
    steps: tuple[int, ...] = ()


class Form(NamedTuple):
    """How a template writes an assistant's turn.

    header: what opens an earlier turn. opening: what a turn to be generated has after it, such as "<think>\\n".
    ending: what follows the last turn.
    """

    header: str
    opening: str
    ending: str


class Written(NamedTuple):
    """A conversation as messages, as what a template is given, and as what it wrote.

    breaker: a character that does not count in the texts.
    """

    turns: Sequence[Message]
    dicts: Dicts
    text: str
    generate: bool
    breaker: str


class _Signs(NamedTuple):
    """Of one turn: before its thinking and its content, after its content, after its last call's name, after steps."""

    opens: tuple[str, ...] = ()
    content: tuple[str, ...] = ()
    call: tuple[str, ...] = ()
    steps: tuple[str, ...] = ()

    def around(self) -> tuple[str, ...]:
        return self.opens + self.content + self.call


def form_of(write: Write) -> Form:
    """Seen in a conversation of three turns."""
    x_end, y_start, y_end = map(chr, range(0xF0000, 0xF0003))
    x = {"role": "user", "content": f"x{x_end}"}
    y = {"role": "assistant", "content": f"{y_start}y{y_end}"}
    z = {"role": "user", "content": "z"}
    asked, closed = (write([x], generate).partition(x_end)[2] for generate in (True, False))
    earlier = write([x, y, z], False).partition(x_end)[2].partition(y_start)[0]
    ending = write([x, y], False).partition(y_end)[2]
    if not earlier.startswith(asked) and not asked.startswith(earlier):
        return Form("", "", ending)
    shared = min(earlier, asked, key=len)
    header = shared.removeprefix(closed) if shared.startswith(closed) else ""
    return Form(header, asked[len(shared) :], ending)


def find_said(write: Write, form: Form, written: Written, spare: Iterator[str]) -> list[Said | None]:
    """Where each turn's assistant speaks; None for the other roles.

    Args:
      form: with the header "" where somebody could type it.
      spare: characters that stand in no text.

    Raises:
      UserError: it cannot be told.
    """
    found = _traced(write, form, written, spare) or _by_header(form, written)
    if found is None:
        raise UserError(
            "it cannot be told what the assistant says in this conversation, as the chat template of this model "
            "rewrites it: leave out its empty turns, or use another template"
        )
    return found


def _traced(write: Write, form: Form, written: Written, spare: Iterator[str]) -> list[Said | None] | None:
    pairs = zip(written.turns, written.dicts, strict=True)
    signed, signs = zip(*(_signed(turn, message, written.breaker, spare) for turn, message in pairs), strict=True)
    everything = {sign for own in signs for sign in own.around() + own.steps}
    text, at = _unsigned(write(signed, written.generate), everything)
    if text != written.text:
        return None
    found = list[Said | None]()
    for i, own in enumerate(signs):
        if written.turns[i].role != "assistant":
            found.append(None)
            continue
        header = _header(write, signed[:i], signs[i - 1].content, everything) if i else None
        if header is None or signs[i - 1].content[0] not in at or any(sign not in at for sign in own.steps):
            return None
        asked = at[signs[i - 1].content[0]]
        inside = [at[sign] for sign in own.around() if sign in at]
        after = [at[sign] for follower in signs[i + 1 : i + 2] for sign in follower.around() if sign in at]
        starts = [
            asked + len(opened)
            for opened in (header, header.removesuffix(form.opening))
            if text.startswith(opened, asked) and asked + len(opened) <= min(inside, default=len(text))
        ]
        if not starts or not (after or own is signs[-1]):
            return None
        ends = tuple(at[sign] for sign in own.steps)
        found.append(Said(starts[0], max([starts[0], *inside]), min([*after, len(text)]), ends))
    return found


def _header(write: Write, before: Dicts, content_end: tuple[str, ...], signs: Collection[str]) -> str | None:
    """What opens a turn that follows these: all that comes after the last one's content."""
    try:
        text, at = _unsigned(write(before, True), signs)
    except UserError:  # such as a conversation that ends with the system's turn
        return None
    return text[at[content_end[0]] :] if content_end and content_end[0] in at else None


def _by_header(form: Form, written: Written) -> list[Said | None] | None:
    turns, text = written.turns, written.text
    speaking = [turn for turn in turns if turn.role == "assistant"]
    if not form.header or any(turn.steps for turn in speaking):
        return None
    places = [(header.start(), header.end()) for header in re.finditer(re.escape(form.header), text)]
    if written.generate and text.endswith(form.header + form.opening):
        places.pop()
    if len(places) != len(speaking):
        return None
    limits = itertools.chain((start for start, _ in places[1:]), [len(text)])
    said = (
        Said(start, start, limit)
        for (_, end), limit in zip(places, limits, strict=True)
        for start in [end + len(form.opening) * text.startswith(form.opening, end)]
    )
    return [next(said) if turn.role == "assistant" else None for turn in turns]


def _signed(
    turn: Message, message: dict[str, Any], breaker: str, spare: Iterator[str]
) -> tuple[dict[str, Any], _Signs]:
    """The message with signs at the edges of its texts: inside of blanks there, which templates take away."""
    message, signs = dict(message), _Signs()
    if thinking := message.get("reasoning_content", "").strip():
        signs = signs._replace(opens=(next(spare),))
        message |= dict.fromkeys(
            ("reasoning_content", "thinking"), message["thinking"].replace(thinking, signs.opens[0] + thinking, 1)
        )
    content: str = message["content"]
    core = content.strip()
    first = content.index(core)
    last = first + len(core)
    if core:
        signs = signs._replace(opens=(*signs.opens, next(spare)))
    if core or turn.role != "assistant":
        signs = signs._replace(content=(next(spare),))
    steps = [min(max(place, first), last) for place in _step_ends(turn, content, breaker)]
    signs = signs._replace(steps=tuple(next(spare) for _ in steps))
    places = [*zip(steps, signs.steps, strict=True), *((last, sign) for sign in signs.content)]
    for place, sign in reversed(places):
        content = content[:place] + sign + content[place:]
    if core:
        content = content[:first] + signs.opens[-1] + content[first:]
    message["content"] = content
    if turn.calls:
        signs = signs._replace(call=(next(spare),))
        *calls, call = message["tool_calls"]
        function = call["function"] | {"name": call["function"]["name"] + signs.call[0]}
        message["tool_calls"] = [*calls, call | {"function": function}]
    return message, signs


def _step_ends(turn: Message, content: str, breaker: str) -> list[int]:
    letters = [place for place, letter in enumerate(content) if letter != breaker] if turn.steps else []
    return [[*letters, len(content)][end] for end in itertools.accumulate(len(step.text) for step in turn.steps)]


def _unsigned(text: str, signs: Collection[str]) -> tuple[str, dict[str, int]]:
    """The text without signs, and where in it those stood that occur once."""
    if not signs:
        return text, {}
    places: dict[str, list[int]] = {}
    for count, found in enumerate(re.finditer(f"[{''.join(signs)}]", text)):
        places.setdefault(found[0], []).append(found.start() - count)
    return re.sub(f"[{''.join(signs)}]", "", text), {sign: at[0] for sign, at in places.items() if len(at) == 1}
