"""A model that says what a test wants: instead of weights, a function from a conversation to the turn that follows."""

from types import SimpleNamespace

from llmlab.data.chat import CHAT_MARKERS, MarkerTemplate, Message, ToolCall
from llmlab.infer import chat
from llmlab.workdir.open import Opened

REACH = 512


class ByteTokenizer:
    """Ids below 256 are bytes, then <s>, </s> and the chat markers."""

    bos_id, eos_id, pad_id, fingerprint = 256, 257, 257, "bytes"
    vocab_size = 258 + len(CHAT_MARKERS)

    def __init__(self):
        self.control = {marker: 258 + i for i, marker in enumerate(CHAT_MARKERS)}

    def encode(self, text):
        return list(text.encode())

    def decode(self, ids):
        return self.decode_bytes(ids).decode(errors="replace")

    def decode_bytes(self, ids):
        return bytes(id for id in ids if id < 256)


TOKENIZER = ByteTokenizer()
TEMPLATE = MarkerTemplate(TOKENIZER)
END = TOKENIZER.control["<|end|>"]
MODEL = SimpleNamespace(config=SimpleNamespace(max_positions=REACH, head="tokens"), partition=None)


def ids_of(text):
    """The ids of a text in which markers are spelt out."""
    names = {name: id for name, id in TOKENIZER.control.items() if name in text}
    ids = []
    while text:
        name = next((name for name in names if text.startswith(name)), "")
        ids += [names[name]] if name else list(text[0].encode())
        text = text[len(name or text[0]) :]
    return ids


def spelt(ids):
    """The reverse, without BOS."""
    names = {id: name for name, id in TOKENIZER.control.items()}
    parts, run = [], []
    for id in [*ids, None]:
        if id is not None and id < 256:
            run.append(id)
            continue
        parts.append(bytes(run).decode(errors="replace"))
        parts.append(names.get(id, ""))
        run = []
    return "".join(parts)


def says(monkeypatch, answer):
    """Lets a model say `answer(prompt, seed)`, all in text with markers spelt out; gives the list of what it was asked.

    What is said may be ids as well. It ends with `<|end|>` where it has no end of its own, unless that is too long.
    """
    asked = []

    def written(prompt, max_tokens, seed, **settings):
        asked.append(spelt(prompt))
        said = answer(spelt(prompt), seed)
        ids = ids_of(said) if isinstance(said, str) else list(said)
        return (ids if ids[-1:] == [END] else [*ids, END])[:max_tokens]

    def stream(model, params, prompt, *, max_tokens, seed, stop_ids, **settings):
        return iter(written(prompt, max_tokens, seed))

    def complete(model, params, prompts, *, max_tokens, seeds, stop_ids, rows, width, **settings):
        return [written(prompt, max_tokens, seed) for prompt, seed in zip(prompts, seeds, strict=True)]

    monkeypatch.setattr(chat, "stream", stream)
    monkeypatch.setattr(chat, "complete", complete)
    return asked


def user(text):
    return Message("user", text)


def assistant(text="", *calls, thinking=""):
    return Message("assistant", text, thinking=thinking, calls=tuple(ToolCall(*call) for call in calls))


def tool(name, text):
    return Message("tool", text, name=name)


def opened(rows="chat"):
    """As a workdir whose last training was on such rows."""
    return Opened(MODEL, {}, TOKENIZER, 7, {"data": {"rows": rows}})
