"""The settings that completions and chat share: how tokens are drawn, how many, and where they end."""

import secrets
from typing import NamedTuple

from llmlab.infer.request import Sampling
from llmlab.serve.fields import Fields
from llmlab.serve.limits import Limits
from llmlab.serve.models import Served

SETTINGS = (
    *("model", "n", "stop", "seed", "stream", "stream_options", "ignore_eos", "response_format"),
    *("temperature", "top_p", "top_k", "min_p"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias"),
)
_COLDEST = 1e-4  # what is colder draws the likeliest, and would overflow


class Asked(NamedTuple):
    """What was asked for beside the prompt. usage: whether a stream ends with what it took."""

    n: int
    stop: tuple[str, ...]
    sampling: Sampling
    stream: bool
    usage: bool
    ignore_eos: bool


def asked(fields: Fields, model: Served, limits: Limits) -> Asked:
    """The settings of a request.

    Raises:
      ApiError: one of them is of the wrong type or out of its range.
    """
    temperature = fields.number("temperature", 1.0, 0, 100)
    vocab = model.opened.model.config.vocab_size
    sampling = Sampling(
        temperature=temperature if temperature > _COLDEST else 0.0,
        top_k=min(fields.integer("top_k", 0, -1, 2**31), vocab) if fields.get("top_k") != -1 else 0,
        top_p=fields.number("top_p", 1.0, 1e-6, 1),
        min_p=fields.number("min_p", 0.0, 0, 1),
        repetition=fields.number("repetition_penalty", 1.0, 0.01, 100),
        presence=fields.number("presence_penalty", 0.0, -2, 2),
        frequency=fields.number("frequency_penalty", 0.0, -2, 2),
        bias=_bias(fields, vocab, limits),
        seed=fields.integer("seed", secrets.randbits(32), -(2**63), 2**63 - 1),
    )
    stream = fields.flag("stream")
    if "stream_options" in fields and not stream:
        raise fields.wrong("stream_options", "it is for streams: set stream to true")
    options = Fields(fields.get("stream_options") or {}, ("include_usage", "include_obfuscation"), "stream_options")
    return Asked(
        n=fields.integer("n", 1, 1, min(limits.n, model.service.capacity)),
        stop=fields.texts("stop", limits.stops, limits.stop_length),
        sampling=sampling,
        stream=stream,
        usage=options.flag("include_usage"),
        ignore_eos=fields.flag("ignore_eos"),
    )


def room_for(fields: Fields, name: str, default: int, model: Served, prompt: int) -> int:
    """How many tokens may be written after a prompt of so many."""
    wanted = fields.integer(name, default, 0, 2**63)
    if prompt + max(1, wanted) > model.reach:
        most = model.reach - prompt
        mend = f"ask for at most {most:,}" if most > 0 else "shorten the prompt"
        why = f"a prompt of {prompt:,} tokens and {name}={min(wanted, 10**15):,} exceed the model's {model.reach:,}"
        raise fields.wrong(name, f"{why} positions: {mend}", code="context_length_exceeded")
    return wanted


def _bias(fields: Fields, vocab: int, limits: Limits) -> dict[int, float]:
    given = fields.get("logit_bias") or {}
    if not isinstance(given, dict) or len(given) > limits.biases:
        raise fields.wrong("logit_bias", f"it should be an object of at most {limits.biases:,} entries, id to bias")
    entries = Fields(given, given, "logit_bias")
    bias = {}
    for name in given:
        if not (name.isascii() and name.isdecimal() and len(name) < 10 and int(name) < vocab):
            raise entries.wrong(name, f"it is no id of this model: ids are from 0 to {vocab - 1}")
        bias[int(name)] = entries.number(name, 0.0, -100, 100)
    return bias
