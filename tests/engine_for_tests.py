"""What tests of the engine share: models of every kind of cache, random schedules, and what each token should be."""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llmlab.core.arrays import named_key
from llmlab.infer.decoder import Decoder, ready
from llmlab.infer.engine import Engine
from llmlab.infer.engine_step import Rows, applied, start
from llmlab.infer.request import Event, Request, Sampling
from llmlab.infer.sampling import filter_logits, penalties
from llmlab.model.config import LatentConfig, ModelConfig
from llmlab.model.routing import ExpertsConfig
from llmlab.model.ssm import SsmConfig
from llmlab.model.transformer import make_model, unembed
from llmlab.model.types import Model, Params
from tests.helpers import VOCAB, random_params, tiny_llama

KINDS: dict[str, ModelConfig] = {
    "dense": tiny_llama(),
    "heads": tiny_llama(kv_heads=4),  # a query for each head of keys, which on CPU are read in their pages
    "window": tiny_llama(pattern=("local", "global"), window=8),
    "experts": tiny_llama(experts=ExpertsConfig(count=4, chosen=2)),
    "latent": tiny_llama(kv_heads=4, latent=LatentConfig(kv_rank=8, nope_dim=4, rope_dim=4, value_dim=6)),
    "mamba": tiny_llama(pattern=("mamba",), positions="none", ssm=SsmConfig(state=8, head_dim=8, chunk=8)),
}


@functools.cache
def model_of(kind: str) -> tuple[Any, Any]:
    model = make_model(KINDS[kind])
    return model, random_params(model)


@functools.cache
def logits_of(kind: str, int8: bool) -> Any:
    """What gives logits_BTV of whole rows: without a cache, or from keys and values in 8 bits, read in one piece."""
    model, params = model_of(kind)
    if int8:
        return lambda rows_BT: logits_in_pages(model, params, rows_BT, (), int8=True)
    return functools.partial(jax.jit(model.logits), params)


def logits_in_pages(
    model: Model, params: Params, rows_BT: np.ndarray, cuts: Sequence[int], *, size: int = 4, int8: bool = False
) -> np.ndarray:
    """The logits of rows that are read piece by piece into pages, which lie anywhere."""
    decoder, (B, T) = Decoder.of(model), rows_BT.shape
    pages = -(-T // size) * B
    table_BP = np.random.default_rng(0).permutation(pages).astype(np.int32).reshape(B, -1)
    state = start(decoder, slots=B, pages=pages, size=size, int8=int8, vocab=model.config.vocab_size)
    params, parts = ready(decoder, params), []
    for begin, end in itertools.pairwise((0, *cuts, T)):
        given: Any = (np.arange(B, dtype=np.int32), np.full(B, begin, np.int32), table_BP)
        state, logits_BTV = _piece(decoder, params, state, Rows(*given), rows_BT[:, begin:end])
        parts.append(np.asarray(logits_BTV))
    return np.concatenate(parts, axis=1)


@functools.partial(jax.jit, static_argnums=0)
def _piece(decoder, params, state, rows, tokens_BT):
    state, hidden_BTD = applied(decoder, params, state, rows, tokens_BT, jnp.full(len(tokens_BT), tokens_BT.shape[1]))
    return state, unembed(hidden_BTD, decoder.head(params), decoder.softcap)


class RandomLimit:
    """At every place other tokens may come, a third of all; nothing after so many; every other time it is late."""

    def __init__(self, seed: int, most: int):
        self._seed, self._most = seed, most
        self._written = self._asked = 0

    def fresh(self) -> "RandomLimit":
        return RandomLimit(self._seed, self._most)

    def ready(self, within: float) -> bool:
        self._asked += 1
        return self._asked % 2 == 0

    def mask(self, place: int) -> np.ndarray:
        """bool [V]: which tokens may be written there."""
        may_V = np.random.default_rng((self._seed, place)).random(VOCAB) < 1 / 3
        may_V[0] = True
        return may_V & (place < self._most)

    def allowed(self) -> np.ndarray:
        bits = np.zeros(-(-VOCAB // 32) * 32, bool)
        bits[:VOCAB] = self.mask(self._written)
        return np.packbits(bits, bitorder="little").view("<u4").astype(np.uint32)

    def accept(self, token: int) -> None:
        assert self.mask(self._written)[token]
        self._written += 1


def random_request(rng: np.random.Generator) -> Request:
    """Of any length and settings; every third prompt begins as others do."""
    length = int(rng.integers(1, 40))
    prompt = rng.integers(VOCAB, size=length)
    if rng.random() < 0.3:
        prompt[: min(length, 20)] = np.arange(min(length, 20))
    sampling = Sampling(temperature=0.0)
    if rng.random() < 0.6:
        sampling = Sampling(
            temperature=float(rng.choice([0.5, 1.0, 1.5])),
            top_k=int(rng.choice([0, 5])),
            top_p=float(rng.choice([1.0, 0.8])),
            min_p=float(rng.choice([0.0, 0.05])),
            seed=int(rng.integers(2**32)),
        )
    if rng.random() < 0.3:
        sampling = Sampling(
            **vars(sampling)
            | {
                "repetition": float(rng.choice([1.0, 1.3])),
                "presence": float(rng.choice([0.0, 0.7])),
                "frequency": float(rng.choice([0.0, 0.4])),
                "bias": {3: 2.0} if rng.random() < 0.5 else {},
            }
        )
    stop_ids = tuple(rng.integers(VOCAB, size=2).tolist()) if rng.random() < 0.5 else ()
    top = int(rng.choice([0, 3]))
    limit = RandomLimit(int(rng.integers(2**32)), int(rng.integers(1, 30))) if rng.random() < 0.2 else None
    scored = bool(rng.random() < 0.2)
    return Request(tuple(prompt.tolist()), int(rng.integers(1, 24)), sampling, stop_ids, top, scored, limit)


def run_schedule(engine: Engine, rng: np.random.Generator, requests: int) -> dict[int, tuple[Request, list[Event]]]:
    """Requests come and go at random until all are done; those that were not cancelled, with their events."""
    events: dict[int, tuple[Request, list[Event]]] = {}
    cancelled = set()
    left = requests
    while left or not engine.idle:
        while left and rng.random() < 0.4:
            request = random_request(rng)
            for copy, number in enumerate(engine.submit(request, n := min(left, int(rng.choice([1, 1, 3]))))):
                sampling = Sampling(**vars(request.sampling) | {"seed": request.sampling.seed + copy})
                scored = request.scored and copy == 0
                events[number] = (Request(**vars(request) | {"sampling": sampling, "scored": scored}), [])
            left -= n
        if events and rng.random() < 0.05:
            number = int(rng.choice(list(events)))
            if engine.cancel(number):
                cancelled.add(number)
        for event in engine.step():
            events[event.number][1].append(event)
    for number in cancelled:
        assert events.pop(number)[1][-1].finish == "cancelled"
    return events


def run_cancels(engine: Engine, rng: np.random.Generator, cancels: int) -> list[tuple[Request, list[Event]]]:
    """So many requests are cancelled wherever they are; those that were spared, with their events.

    The books are exact after every burst, and nothing is left two steps after everybody has gone.
    """
    spared = list[tuple[Request, list[Event]]]()
    while cancels > 0:
        asked = _submit_several(engine, rng)
        gone, stay = set[int](), {number for number in asked if rng.random() < 0.1}

        while here := _unended(asked) - gone - stay:
            _step(engine, int(rng.integers(0, 4)), asked)
            burst = rng.permutation(sorted(here & _unended(asked)))[: int(rng.choice([1, 1, 2, 5, 20]))].tolist()
            assert all(engine.cancel(number) for number in burst)
            assert not any(engine.cancel(number) for number in burst)
            gone.update(burst)
            assert_books(engine)
        while _unended(asked) - gone:
            _step(engine, 1, asked)
        _step(engine, 2, asked)
        assert engine.idle
        assert engine.load == {"running": 0, "waiting": 0, "pages_used": 0, "pages": engine.pages.count}
        assert_books(engine)
        for number, (request, events) in asked.items():
            assert [event.finish for event in events[:-1]] == [None] * (len(events) - 1)
            assert (events[-1].finish == "cancelled") == (number in gone)
            if number not in gone and not request.scored:
                spared.append((request, events))
        cancels -= len(gone)
    return spared


def _step(engine: Engine, times: int, asked: dict[int, tuple[Request, list[Event]]]) -> None:
    for event in [event for _ in range(times) for event in engine.step()]:
        asked[event.number][1].append(event)


def _unended(asked: dict[int, tuple[Request, list[Event]]]) -> set[int]:
    return {number for number, (_, events) in asked.items() if not events or events[-1].finish is None}


def _submit_several(engine: Engine, rng: np.random.Generator) -> dict[int, tuple[Request, list[Event]]]:
    """Alone and as samples of one prompt, some to be scored; each with room for its events."""
    asked: dict[int, tuple[Request, list[Event]]] = {}
    for _ in range(int(rng.integers(2, 9))):
        request, n = random_request(rng), int(rng.choice([1, 1, 3, 6]))
        if n == 1 and rng.random() < 0.2:
            request = dataclasses.replace(request, scored=True)
        for copy, number in enumerate(engine.submit(request, n)):
            sampling = dataclasses.replace(request.sampling, seed=request.sampling.seed + copy)
            asked[number] = (dataclasses.replace(request, sampling=sampling), [])
    return asked


def assert_books(engine: Engine) -> None:
    """Every slot is one request's or free, and every page has as many users as rows that hold it."""
    running, pages = engine._running, engine.pages
    assert sorted([*engine._free_slots, *(run.slot for run in running)]) == list(range(engine.config.slots))
    users = np.bincount([page for run in running for page in run.pages], minlength=pages.count)
    assert pages._users == users.tolist()
    assert sorted([*pages._free, *pages._idle]) == np.flatnonzero(users == 0).tolist()
    assert pages._idle.keys() <= pages._digest_of.keys() == set(pages._page_of.values())


def assert_as_alone(
    kind: str, done: list[tuple[Request, list[Event]]], tolerance: float = 1e-4, *, int8: bool = False
) -> None:
    """Every token is what its request alone would get, up to `tolerance` of the perturbed logits."""
    longest, size = KINDS[kind].max_positions, 32
    for begin in range(0, len(done), size):
        rows_BT = np.zeros((size, longest), np.int32)
        for row, (request, events) in enumerate(done[begin : begin + size]):
            ids = [
                *request.prompt,
                *(event.token for event in events if not event.in_prompt and event.token is not None),
            ]
            rows_BT[row, : len(ids)] = ids
        logits_BTV = np.asarray(logits_of(kind, int8)(rows_BT))
        for (request, events), logits_TV in zip(done[begin : begin + size], logits_BTV, strict=False):
            _assert_request(request, events, logits_TV, tolerance)


def _assert_request(request: Request, events: list[Event], logits_TV: np.ndarray, tolerance: float) -> None:
    prompt = len(request.prompt)
    given = [event for event in events if event.in_prompt]
    assert given == events[: len(given)]
    assert [event.token for event in given] == (list(request.prompt) if request.scored else [])
    written = events[len(given) :]
    assert [event.finish for event in events[:-1]] == [None] * (len(events) - 1)
    if events[-1].finish == "dead_end":
        assert written.pop().token is None
        assert not request.limit.mask(len(written)).any()
    else:
        assert events[-1].finish == ("stop" if events[-1].token in request.stop_ids else "length")
        assert events[-1].finish == "stop" or len(written) == request.max_tokens
    tokens = [event.token for event in written]
    assert not any(token in request.stop_ids for token in tokens[:-1])
    _assert_tokens(request, tokens, logits_TV[prompt - 1 :][: len(tokens)], tolerance)
    logp_TV = np.asarray(jax.nn.log_softmax(logits_TV))
    if given:
        assert given[0].logp is None
    reported = [*zip(given[1:], logp_TV, strict=False), *zip(written, logp_TV[prompt - 1 :], strict=False)]
    for event, logp_V in reported:
        assert abs(event.logp - logp_V[event.token]) < 10 * tolerance
        best = np.sort(logp_V)[::-1][: request.top]
        np.testing.assert_allclose([logp for _, logp in event.top], best, atol=10 * tolerance)
        assert all(abs(logp_V[id] - logp) < 10 * tolerance for id, logp in event.top)


@jax.jit
def _perturbed(logits_TV, in_prompt_TV, count_TV, seed, positions_T, settings, bias_V, may_TV):
    adjusted_TV = penalties(logits_TV, in_prompt_TV, count_TV, **settings["penalties"]) + bias_V[None]
    kept_TV = filter_logits(jnp.where(may_TV, adjusted_TV, -jnp.inf), **settings["filters"])
    noise = jax.vmap(lambda p: jax.random.gumbel(named_key(seed, "sample", p), kept_TV.shape[-1:]))(positions_T)
    return jnp.where(settings["filters"]["temperature"] > 0, kept_TV + noise, kept_TV)


def _assert_tokens(request: Request, tokens: list[int], at_TV: np.ndarray, tolerance: float) -> None:
    s, time, room = request.sampling, len(tokens), 40
    padded_TV = np.zeros((room, VOCAB), np.float32)
    padded_TV[:time] = at_TV
    in_prompt_V = np.isin(np.arange(VOCAB), request.prompt)
    count_TV = np.zeros((room, VOCAB), np.int32)
    for place, token in enumerate(tokens[:-1]):
        count_TV[place + 1 :, token] += 1
    bias_V = np.zeros(VOCAB, np.float32)
    for id, value in s.bias.items():
        bias_V[id] = value
    may_TV = np.ones((room, VOCAB), bool)
    if request.limit is not None:
        may_TV[:time] = [request.limit.mask(place) for place in range(time)]
    settings = {
        "penalties": {"repetition": s.repetition, "presence": s.presence, "frequency": s.frequency},
        "filters": {"temperature": s.temperature, "top_k": s.top_k, "top_p": s.top_p, "min_p": s.min_p},
    }
    settings = jax.tree.map(lambda x: np.asarray([x]), settings)
    positions_T = len(request.prompt) + np.arange(room)
    want_TV = np.asarray(
        _perturbed(
            padded_TV,
            np.tile(in_prompt_V, (room, 1)),
            count_TV,
            np.uint32(s.seed % 2**32),
            positions_T,
            settings,
            bias_V,
            may_TV,
        )
    )
    for place, token in enumerate(tokens):
        gap = want_TV[place].max() - want_TV[place, token]
        assert gap <= tolerance, f"token {place} of {request}: {gap:.2e} below the best"
