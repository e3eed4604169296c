"""What tests of the engine share: models of every kind of cache, random schedules, and what each token should be."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llmlab.core.arrays import named_key
from llmlab.infer.engine import Engine
from llmlab.infer.request import Event, Request, Sampling
from llmlab.infer.sampling import filter_logits, penalties
from llmlab.model.config import LatentConfig, ModelConfig
from llmlab.model.routing import ExpertsConfig
from llmlab.model.ssm import SsmConfig
from llmlab.model.transformer import make_model
from tests.helpers import VOCAB, random_params, tiny_llama

KINDS: dict[str, ModelConfig] = {
    "dense": tiny_llama(),
    "window": tiny_llama(pattern=("local", "global"), window=8),
    "experts": tiny_llama(experts=ExpertsConfig(count=4, chosen=2)),
    "latent": tiny_llama(kv_heads=4, latent=LatentConfig(kv_rank=8, nope_dim=4, rope_dim=4, value_dim=6)),
    "mamba": tiny_llama(pattern=("mamba",), positions="none", ssm=SsmConfig(state=8, head_dim=8, chunk=8)),
}


@functools.cache
def model_of(kind: str) -> tuple[Any, Any]:
    model = make_model(KINDS[kind])
    return model, random_params(model)


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
    return Request(tuple(prompt.tolist()), int(rng.integers(1, 24)), sampling, stop_ids, top)


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
                events[number] = (Request(**vars(request) | {"sampling": sampling}), [])
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


def assert_as_alone(kind: str, done: list[tuple[Request, list[Event]]], tolerance: float = 1e-4) -> None:
    """Every token is what its request alone would get, up to `tolerance` of the perturbed logits."""
    model, params = model_of(kind)
    longest, size = model.config.max_positions, 32
    logits = jax.jit(lambda p, rows: model.logits(p, rows))
    for begin in range(0, len(done), size):
        rows_BT = np.zeros((size, longest), np.int32)
        for row, (request, events) in enumerate(done[begin : begin + size]):
            ids = [*request.prompt, *(event.token for event in events)]
            rows_BT[row, : len(ids)] = ids
        logits_BTV = np.asarray(logits(params, rows_BT))
        for row, (request, events) in enumerate(done[begin : begin + size]):
            prompt = len(request.prompt)
            assert events[-1].finish in ("stop", "length")
            assert [event.finish for event in events[:-1]] == [None] * (len(events) - 1)
            tokens = [event.token for event in events]
            assert len(events) == request.max_tokens or tokens[-1] in request.stop_ids
            assert not any(token in request.stop_ids for token in tokens[:-1])
            at_TV = logits_BTV[row, prompt - 1 : prompt - 1 + len(events)]
            _assert_tokens(request, tokens, at_TV, tolerance)
            logp_TV = np.asarray(jax.nn.log_softmax(at_TV))
            for event, logp_V in zip(events, logp_TV, strict=True):
                assert abs(event.logp - logp_V[event.token]) < 10 * tolerance
                best = np.sort(logp_V)[::-1][: request.top]
                np.testing.assert_allclose([logp for _, logp in event.top], best, atol=10 * tolerance)
                assert all(abs(logp_V[id] - logp) < 10 * tolerance for id, logp in event.top)


@jax.jit
def _perturbed(logits_TV, in_prompt_TV, count_TV, seed, positions_T, settings, bias_V):
    adjusted = penalties(logits_TV, in_prompt_TV, count_TV, **settings["penalties"]) + bias_V[None]
    kept_TV = filter_logits(adjusted, **settings["filters"])
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
        )
    )
    for place, token in enumerate(tokens):
        gap = want_TV[place].max() - want_TV[place, token]
        assert gap <= tolerance, f"token {place} of {request}: {gap:.2e} below the best"
