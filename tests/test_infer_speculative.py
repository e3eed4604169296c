"""Guesses change nothing of what is written, only the number of steps; and the distribution is the model's own."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from scipy import stats

from llmlab.core.errors import UserError
from llmlab.infer.engine import Engine, EngineConfig
from llmlab.infer.request import Request, Sampling
from llmlab.infer.sampling import filter_logits
from llmlab.infer.speculative import Ends
from llmlab.model.transformer import make_model
from tests.engine_for_tests import assert_as_alone, model_of, run_schedule
from tests.helpers import VOCAB, random_params, tiny_llama

CONFIG = EngineConfig(slots=4, page_size=4, pages=40, prefill=8, guesses=3)


def near(model, params, step):
    """A draft that is nearly the model: some of its guesses are wrong."""
    return model, jax.tree.map(lambda leaf, other: leaf + step * other, params, random_params(model, seed=9))


def other_model():
    """A smaller one that knows nothing of the first."""
    model = make_model(tiny_llama(layers=1, width=8, heads=2, kv_heads=1))
    return model, random_params(model, seed=11)


@pytest.mark.parametrize("kind", ["dense", "experts", "latent"])
@pytest.mark.parametrize("drafted", [False, True], ids=["looked up", "drafted"])
def test_guesses_change_nothing_but_the_number_of_steps(kind, drafted):
    model, params = model_of(kind)
    engine = Engine(model, params, CONFIG, draft=near(model, params, 0.05) if drafted else None)
    done = []
    for seed in range(3):
        done += run_schedule(engine, np.random.default_rng(seed), 12).values()
        assert engine.load["pages_used"] == 0
    assert_as_alone(kind, done)
    assert 0 < engine.right < engine.guessed


def written(engine, requests, most):
    """The tokens of each request; at most so many of them are in the engine at once."""
    tokens, left = {}, iter(requests)
    ended = submitted = 0
    while ended < len(requests):
        while submitted < min(ended + most, len(requests)):
            tokens[engine.submit(next(left))[0]] = []
            submitted += 1
        for event in engine.step():
            tokens[event.number].append(event.token)
            ended += event.finish is not None
    return list(tokens.values())


@functools.cache
def greedy_requests():
    """1,000 of them, every other one with a prompt that repeats itself."""
    rng, requests = np.random.default_rng(0), []
    for number in range(1000):
        length = int(rng.integers(1, 33))
        of = rng.integers(VOCAB, size=int(rng.integers(2, 7)) if number % 2 else length)
        stop_ids = tuple(rng.integers(VOCAB, size=2).tolist()) if rng.random() < 0.3 else ()
        prompt = tuple(np.resize(of, length).tolist())
        requests.append(Request(prompt, int(rng.integers(1, 32)), Sampling(temperature=0), stop_ids))
    return requests


@functools.cache
def greedy_without_guesses(kind):
    engine = Engine(*model_of(kind), EngineConfig(slots=16, page_size=4, prefill=32))
    return written(engine, greedy_requests(), 32)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "by", "kept"),
    [
        ("dense", "look-up", (0.1, 0.6)),
        ("dense", "a near draft", (0.3, 0.9)),
        ("dense", "another model", (0.001, 0.2)),
        ("experts", "a near draft", (0.3, 0.9)),
        ("latent", "a near draft", (0.3, 0.9)),
    ],
)
def test_greedy_output_is_the_same_in_1000_of_1000(kind, by, kept):
    model, params = model_of(kind)
    drafts = {"look-up": lambda: None, "a near draft": lambda: near(model, params, 0.05), "another model": other_model}
    # Too few pages for all slots, so that some lose theirs while guesses are under way.
    config = EngineConfig(slots=16, page_size=4, pages=120, prefill=32, guesses=3)
    engine = Engine(model, params, config, draft=drafts[by]())
    guessed = written(engine, greedy_requests(), 32)
    same = [a == b for a, b in zip(guessed, greedy_without_guesses(kind), strict=True)]
    assert sum(same) == len(same) == 1000
    assert kept[0] < engine.right / engine.guessed < kept[1]
    assert engine.guessed > 3000


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("by", ["nothing", "look-up", "a draft"])
def test_a_million_draws_have_the_distribution_of_the_model(by):
    config = tiny_llama(layers=1, vocab_size=12, max_positions=16)
    model = make_model(config)
    params = random_params(model)
    # It ends as it began, with what is likely, and not certain, to follow again.
    request = Request((5, 2, 0, 2, 5, 3, 1, 5, 2), 3, Sampling(temperature=0.8, min_p=0.05))
    p_VVV = odds_of_three(config, params, request)
    number = {"nothing": 0, "look-up": 1, "a draft": 2}[by]
    engine = Engine(
        model,
        params,
        EngineConfig(slots=256, page_size=4, prefill=8, guesses=2 * (number > 0)),
        draft=near(model, params, 0.1) if by == "a draft" else None,
    )
    draws = 333_334
    first = number * draws
    requests = [
        dataclasses.replace(request, sampling=dataclasses.replace(request.sampling, seed=seed))
        for seed in range(first, first + draws)
    ]
    tokens_BT = np.asarray(written(engine, requests, 512))
    assert tokens_BT.size > 1e6
    counts_VVV = np.zeros_like(p_VVV)
    np.add.at(counts_VVV, tuple(tokens_BT.T), 1)
    assert not counts_VVV[p_VVV == 0].any()
    rare = (p_VVV > 0) & (draws * p_VVV < 5)  # too rare for the test to hold of each: together they are one bin
    often = (p_VVV > 0) & ~rare
    counts, expected = counts_VVV[often], draws * p_VVV[often]
    if rare.any():
        counts, expected = np.append(counts, counts_VVV[rare].sum()), np.append(expected, draws * p_VVV[rare].sum())
    assert stats.chisquare(counts, expected).pvalue > 0.01
    if number:
        assert 0.2 < engine.right / engine.guessed < 0.9


def odds_of_three(config, params, request):
    """How likely every three tokens are to come next, in float64: all pairs are read after the prompt, at once."""
    V, length = config.vocab_size, len(request.prompt)
    s = request.sampling
    with jax.enable_x64(True):
        model = make_model(dataclasses.replace(config, dtype="float64", param_dtype="float64"))
        params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
        pairs_X2 = np.stack(np.meshgrid(np.arange(V), np.arange(V), indexing="ij"), axis=-1).reshape(V * V, 2)
        rows_XT = np.concatenate([np.tile(request.prompt, (V * V, 1)), pairs_X2], axis=1)
        logits_XV = model.logits(params, rows_XT)[:, length - 1 :].reshape(V * V * 3, V)
        p_XV = jax.nn.softmax(filter_logits(logits_XV, temperature=s.temperature, min_p=s.min_p))
        p_VV3V = np.asarray(p_XV).reshape(V, V, 3, V)
    assert p_VV3V.dtype == np.float64
    return p_VV3V[0, 0, 0][:, None, None] * p_VV3V[:, 0, 1][:, :, None] * p_VV3V[:, :, 2]


def test_right_guesses_save_steps():
    model, params = model_of("dense")
    request = Request((1, 2, 3), 40, Sampling(temperature=1.0, seed=4))
    steps = []
    for draft in (None, (model, params)):
        engine = Engine(model, params, CONFIG, draft=draft)
        engine.submit(request)
        count = 0
        while not engine.idle:
            engine.step()
            count += 1
        steps.append(count)
    # Whole guesses of three, each checked in a step that gives a token of its own; a last step sees that all is done.
    assert steps[1] <= 12 < steps[0]


def test_what_cannot_be_taken_back_is_not_guessed():
    with pytest.raises(UserError, match="engine.guesses needs a model whose layers all look back"):
        Engine(*model_of("mamba"), CONFIG)
    with pytest.raises(UserError, match="a draft model needs layers"):
        Engine(*model_of("dense"), CONFIG, draft=model_of("mamba"))


def test_what_followed_before_is_looked_up():
    assert Ends().after([1, 2, 3, 4, 5, 9, 2, 3, 4], 2) == [5, 9]
    assert Ends().after([1, 2, 3, 7, 1, 2, 8, 1, 2], 3) == [8, 1, 2]  # the last time counts
    assert Ends().after([1, 2, 9, 5, 1, 2, 3, 5, 1, 2], 1) == [3]
    assert Ends().after([7, 1, 2, 9, 5, 1, 2, 3, 7, 1, 2], 1) == [9]  # more alike counts more
    assert Ends().after([1, 2, 3], 3) == []
    assert Ends().after([5, 5, 5, 5], 2) == [5]
    growing, text = Ends(), np.random.default_rng(0).integers(3, size=200).tolist()
    for length in range(1, 200, 3):
        assert growing.after(text[:length], 4) == Ends().after(text[:length], 4)
