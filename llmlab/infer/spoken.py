"""What an assistant says, as its ids come: text, thinking and whole calls, free of markers."""

from typing import Literal

from llmlab.data.chat import ChatTemplate, Message
from llmlab.data.tokenizer import Tokenizer
from llmlab.infer.text_stream import may_become

Kind = Literal["text", "thinking", "call", "result", "note"]
Said = list[tuple[Kind, str]]

# Markers of published models that are no control tokens to their tokenizers, and to some no tokens at all.
_CALL = "<tool_call>"
_PLAIN_MARKERS = ("<think>", "</think>", _CALL, "</tool_call>")


class Spoken:
    """One turn, whose `ids` and `message` grow as ids are added.

    What a turn holds is the template's to say, and it takes an open call for text: so what follows a marker is held
    back until it has shown to be thinking, or another marker has closed it.
    """

    def __init__(self, template: ChatTemplate, markers: frozenset[int]):
        self._template, self._markers = template, markers
        self.ids: list[int] = []
        self.message = self._said = Message("assistant")
        self._held = self._thinking = False

    def add(self, id: int) -> Said:
        """What can be said now; nothing once the turn has ended."""
        self.ids.append(id)
        if self.ended:
            return []
        before, self.message = self.message, self._template.parse(self.ids)
        if id in self._markers:
            self._held, self._thinking = not (self._held or self._thinking), False
        elif len(self.message.thinking) > len(before.thinking):
            self._held, self._thinking = False, True
        elif len(self.message.content) > len(before.content):
            self._thinking = False
        shown = self.message._replace(content=self._said.content) if self._held else self.message
        return self._say(shown, growing="thinking" if self._thinking else "text")

    def end(self) -> Said:
        """The rest, as no more ids come."""
        self.message = self._template.parse(self.ids)
        return self._say(self.message, growing=None)

    @property
    def ended(self) -> bool:
        """Whether the turn has ended by itself."""
        return bool(self.ids) and self.ids[-1] in self._template.stop_ids

    def _say(self, message: Message, *, growing: Literal["thinking", "text"] | None) -> Said:
        """What `message` has and was not said before."""
        thinking = _settled(message.thinking) if growing == "thinking" else message.thinking
        content = _settled(message.content) if growing == "text" else message.content
        said, news = self._said, Said()
        if len(thinking) > len(said.thinking) and thinking.startswith(said.thinking):
            news.append(("thinking", thinking[len(said.thinking) :]))
            said = said._replace(thinking=thinking)
        if len(content) > len(said.content) and content.startswith(said.content):
            news.append(("text", content[len(said.content) :]))
            said = said._replace(content=content)
        for call in message.calls[len(said.calls) :]:
            news.append(("call", f"{call.name} {call.arguments}"))
        self._said = said._replace(calls=message.calls)
        return news


def markers_of(tokenizer: Tokenizer) -> frozenset[int]:
    """The ids that are no text."""
    plain = (tokenizer.encode(marker) for marker in _PLAIN_MARKERS)
    return frozenset([*tokenizer.control.values(), *(ids[0] for ids in plain if len(ids) == 1)])


def _settled(text: str) -> str:
    """`text` without what more of it may change: half a character, half a marker, an open call."""
    text = text.rstrip("\ufffd").partition(_CALL)[0]
    return text[: len(text) - may_become(text, _PLAIN_MARKERS)]
