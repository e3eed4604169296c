"""What the engine is asked, and what it answers: a request, and events, one for each token."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple, Protocol

import numpy as np

from llmlab.core.errors import UserError
from llmlab.infer.engine_step import TOP

Finish = Literal["stop", "length", "cancelled", "dead_end"]
CUT: tuple[Finish, ...] = ("length", "dead_end")  # ends of what is not whole


class Limit(Protocol):
    """Which tokens may come next, as a grammar has it. One request has it alone."""

    def fresh(self) -> "Limit":
        """Another one like it, at its beginning."""

    def ready(self, within: float) -> bool:
        """Whether `allowed` need not wait any more, after so many seconds at most."""

    def allowed(self) -> np.ndarray:
        """uint32 [V / 32, rounded up]: bit v mod 32 of word v // 32 says whether token v may be next; all 0 where
        nothing can follow."""

    def accept(self, token: int) -> None:
        """This one it was."""


def token_bits(ids: Iterable[int], vocab_size: int) -> np.ndarray:
    """These tokens alone, as `Limit.allowed` gives them."""
    bits = np.zeros(-(-vocab_size // 32) * 32, bool)
    bits[list(ids)] = True
    return np.packbits(bits, bitorder="little").view("<u4").astype(np.uint32)


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    temperature: 0 takes the likeliest. top_k, top_p, min_p: as in `filter_logits`. repetition, presence, frequency: as
    in `penalties`. bias: added to the logits of these tokens. seed: with the position, what the draw depends on.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0
    bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        ranges = {
            "temperature": (0 <= self.temperature < float("inf"), "0 (the likeliest token) or more"),
            "top_k": (self.top_k >= 0, "0 (all) or more"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1 (all)"),
            "min_p": (0 <= self.min_p <= 1, "from 0 (all) to 1"),
            "repetition": (0 < self.repetition < float("inf"), "above 0; 1 is none"),
            "presence": (abs(self.presence) <= 100, "from -100 to 100; 0 is none"),
            "frequency": (abs(self.frequency) <= 100, "from -100 to 100; 0 is none"),
        }
        for name, (good, wanted) in ranges.items():
            if not good:
                raise UserError(f"{name}={getattr(self, name)} should be {wanted}")
        if wrong := [value for value in self.bias.values() if not abs(value) <= 100]:
            raise UserError(f"a bias of {wrong[0]} should be from -100 to 100")

    @property
    def adjusts(self) -> bool:
        """Whether it looks at what was there before, or at a bias."""
        return bool(self.bias) or (self.repetition, self.presence, self.frequency) != (1, 0, 0)


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt, and how it goes on.

    max_tokens: 0 only scores the prompt. stop_ids: what ends it, each of them given out as the last token. top: so many
    of the likeliest tokens are reported with each. scored: the prompt's own tokens are reported first. limit: what may
    come next.
    """

    prompt: tuple[int, ...]
    max_tokens: int
    sampling: Sampling = Sampling()
    stop_ids: tuple[int, ...] = ()
    top: int = 0
    scored: bool = False
    limit: Limit | None = None

    def __post_init__(self) -> None:
        if not self.prompt:
            raise UserError("the prompt is empty: start with bos_id")
        if self.max_tokens < 0 or (self.max_tokens == 0 and not self.scored):
            raise UserError(f"max_tokens={self.max_tokens} should be at least 1")
        if not 0 <= self.top <= TOP:
            raise UserError(f"top={self.top} should be from 0 to {TOP}")


class Event(NamedTuple):
    """One token of a request, or its end, which comes with the last token or alone.

    number: what `submit` gave. token: None where the end comes alone. logp: of the token, by the model alone. top: the
    likeliest tokens there, with theirs. in_prompt: the token was given; the first one has no logp.
    """

    number: int
    token: int | None = None
    logp: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    in_prompt: bool = False
    finish: Finish | None = None
