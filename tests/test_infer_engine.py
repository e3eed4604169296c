"""The engine: every token is what its request alone would get, and nothing is left behind."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmlab.core.errors import UserError
from llmlab.core.mesh import MeshConfig, make_partition
from llmlab.infer import engine_step as device
from llmlab.infer.decoder import Decoder, ready
from llmlab.infer.engine import Engine, EngineConfig
from llmlab.infer.request import Request, Sampling
from llmlab.model import cache
from llmlab.model.transformer import make_model
from tests.engine_for_tests import (
    KINDS,
    RandomLimit,
    assert_as_alone,
    logits_in_pages,
    model_of,
    run_cancels,
    run_schedule,
)
from tests.helpers import VOCAB, random_params, relative

CONFIG = EngineConfig(slots=4, page_size=4, pages=40, prefill=8)


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_the_request_alone(kind, steps):
    engine = Engine(*model_of(kind), dataclasses.replace(CONFIG, steps=steps))
    done = []
    for seed in range(4):
        done += run_schedule(engine, np.random.default_rng(seed), 12).values()
        assert engine.load["running"] == engine.load["waiting"] == engine.load["pages_used"] == 0
    assert_as_alone(kind, done)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_two_hundred_schedules(kind, steps):
    engine = Engine(*model_of(kind), dataclasses.replace(CONFIG, steps=steps))
    for seed in range(200):
        done = run_schedule(engine, np.random.default_rng(1000 + seed), 10)
        assert engine.load["pages_used"] == 0
        assert_as_alone(kind, list(done.values()))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dense", "window", "latent"])
def test_fifty_schedules_in_eight_bits(kind):
    engine = Engine(*model_of(kind), dataclasses.replace(CONFIG, int8=True))
    for seed in range(50):
        done = run_schedule(engine, np.random.default_rng(2000 + seed), 10)
        assert engine.load["pages_used"] == 0
        # A rounding difference may turn a value into the next of 255, which moves logits by some thousandths.
        assert_as_alone(kind, list(done.values()), 1e-2, int8=True)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float32", 1e-5), pytest.param("float64", 1e-12, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("kind", KINDS)
def test_logits_from_pages_are_those_without_a_cache(kind, dtype, tolerance):
    rows_BT = np.random.default_rng(0).integers(VOCAB, size=(4, 40)).astype(np.int32)
    with jax.enable_x64(dtype == "float64"):
        model = make_model(dataclasses.replace(KINDS[kind], dtype=dtype, param_dtype=dtype))
        params = jax.tree.map(lambda leaf: leaf.astype(dtype), model_of(kind)[1])
        expected_BTV = np.asarray(jax.jit(model.logits)(params, rows_BT))
        # Pieces that begin and end inside of pages and of windows, and two tokens alone.
        paged_BTV = logits_in_pages(model, params, rows_BT, (11, 12, 13, 24, 35))
    assert paged_BTV.dtype == dtype
    assert relative(paged_BTV, expected_BTV) < tolerance


def test_cancels_leave_nothing():
    engine = Engine(*model_of("dense"), CONFIG)
    assert_as_alone("dense", run_cancels(engine, np.random.default_rng(0), 150))


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, several", [*((kind, {}) for kind in KINDS), ("dense", {"guesses": 3}), ("dense", {"steps": 3})], ids=str
)
def test_ten_thousand_cancels_leave_nothing(kind, several):
    engine = Engine(*model_of(kind), dataclasses.replace(CONFIG, **several))
    assert_as_alone(kind, run_cancels(engine, np.random.default_rng(1), 10_000))


def alone(engine, request):
    """The events of one request, with nothing beside it."""
    engine.submit(request)
    events = []
    while not engine.idle:
        events += engine.step()
    return events


def test_rows_that_do_not_fit_begin_again_and_lose_nothing():
    engine = Engine(*model_of("dense"), EngineConfig(slots=4, page_size=4, pages=16, prefill=8, reuse=False))
    requests = [Request((7 + i, 2, 3), 40, Sampling(temperature=1.0, seed=i)) for i in range(4)]
    numbers = [engine.submit(request)[0] for request in requests]
    events = {number: [] for number in numbers}
    waited = False
    while not engine.idle:
        for event in engine.step():
            events[event.number].append(event)
        waited |= any(events.values()) and engine.load["waiting"] > 0
    assert waited  # 4 rows of 43 tokens need 44 pages
    assert_as_alone("dense", list(zip(requests, events.values(), strict=True)))


def test_prompts_that_begin_alike_are_read_once(monkeypatch):
    engine = Engine(*model_of("dense"), EngineConfig(slots=4, page_size=4, prefill=8))
    prompt = tuple(range(30))
    alone(engine, Request(prompt, 4))
    reads = []
    monkeypatch.setattr(device, "read", lambda *a, read=device.read: reads.append(int(a[5][0])) or read(*a))
    engine.submit(Request((*prompt[:25], 40, 41), 3))
    engine.step()
    # Of 27 tokens 24 fill pages that are known; the others are read, which draws a token, and it goes in at once.
    assert reads == [3]
    assert (engine._running[0].known, engine._running[0].cached) == (7, 28)


@pytest.mark.parametrize("loops", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_number_in_pages_and_slots_of_others_before_reaches_nobody(kind, loops, monkeypatch):
    monkeypatch.setattr(cache, "loops_over_pages", lambda rows, tokens: loops)  # compiled for each count of pages
    engine = Engine(*model_of(kind), EngineConfig(slots=3, page_size=4, pages=60 + loops, prefill=8))
    main = engine._device._main
    bad = jax.tree.map(lambda kept: jnp.full_like(kept, jnp.nan), main.state.layers)
    engine._device._main = main._replace(state=main.state._replace(layers=bad))
    assert_as_alone(kind, list(run_schedule(engine, np.random.default_rng(0), 8).values()))


def test_a_first_token_comes_with_the_last_piece_of_its_prompt_while_others_write():
    engine = Engine(*model_of("dense"), EngineConfig(slots=4, page_size=4, prefill=8))
    engine.submit(Request(tuple(range(10)), 20))
    while not engine.step():
        pass
    late = Request(tuple(range(20, 40)), 3, Sampling(seed=1, repetition=1.3))
    (number,) = engine.submit(late)
    came = [[event for event in engine.step() if event.number == number] for _ in range(5)]
    assert [len(events) for events in came] == [0, 0, 1, 1, 1]  # 20 tokens, 8 at once
    assert_as_alone("dense", [(late, [event for events in came for event in events])])


def test_what_follows_a_prompt_is_drawn_by_a_step_where_its_limit_has_to_be_asked():
    engine = Engine(*model_of("dense"), EngineConfig(slots=4, page_size=4, prefill=8))
    engine.submit(Request(tuple(range(5)), 2, limit=RandomLimit(0, 9)))
    engine.step()
    assert [(run.cached, len(run.tokens)) for run in engine._running] == [(5, 5)]
    assert engine._flight is not None


@pytest.mark.parametrize("kind", ["dense", "mamba", "window"])
def test_samples_of_one_prompt_share_its_reading(kind, monkeypatch):
    engine = Engine(*model_of(kind), EngineConfig(slots=4, page_size=4, prefill=8))
    reads = []
    monkeypatch.setattr(device, "read", lambda *a, read=device.read: reads.append(int(a[5][0])) or read(*a))
    request = Request(tuple(range(30)), 6, Sampling(seed=5))
    numbers = engine.submit(request, 4)
    events = {number: [] for number in numbers}
    while not engine.idle:
        for event in engine.step():
            events[event.number].append(event)
    assert sum(reads) == 29
    done = [
        (dataclasses.replace(request, sampling=Sampling(seed=5 + copy)), of) for copy, of in enumerate(events.values())
    ]
    assert_as_alone(kind, done)
    assert len({tuple(event.token for event in of) for of in events.values()}) > 1


@pytest.mark.parametrize("n", [2, 3, 5])
def test_samples_of_one_prompt_end_where_pages_are_few(n):
    engine = Engine(*model_of("dense"), EngineConfig(slots=4, page_size=4, pages=16, prefill=8))
    request = Request(tuple(range(45)), 4, Sampling(seed=5))
    events = {number: [] for number in engine.submit(request, n)}
    for _ in range(400):
        for event in engine.step():
            events[event.number].append(event)
    assert engine.idle
    seeds = (dataclasses.replace(request, sampling=Sampling(seed=5 + copy)) for copy in range(n))
    assert_as_alone("dense", list(zip(seeds, events.values(), strict=True)))


def test_a_long_prompt_does_not_wait_for_ever_for_short_ones():
    engine = Engine(*model_of("dense"), EngineConfig(slots=4, page_size=4, prefill=8))
    (long,) = engine.submit(Request(tuple(range(45)), 1))
    for step in range(40):  # six pieces, each after three of others
        engine.submit(Request((step % 40, 2, 3), 1))
        if any(event.number == long for event in engine.step()):
            break
    else:
        pytest.fail("the long prompt is still waiting")
    assert step >= 20


def test_a_short_prompt_does_not_wait_for_a_long_one():
    engine = Engine(*model_of("dense"), EngineConfig(slots=4, page_size=4, prefill=8))
    (long,), (short,) = engine.submit(Request(tuple(range(45)), 1)), engine.submit(Request((1, 2, 3), 1))
    ended = []
    while not engine.idle:
        ended += [event.number for event in engine.step() if event.finish]
    assert ended == [short, long]


def test_a_long_prompt_does_not_stall_the_others():
    engine = Engine(*model_of("dense"), EngineConfig(slots=4, page_size=4, prefill=8))
    (short,) = engine.submit(Request((1, 2), 20, Sampling(temperature=0)))
    engine.step()
    engine.submit(Request(tuple(range(40)), 1))
    for _ in range(5):
        assert [event.number for event in engine.step()].count(short) == 1


@pytest.mark.parametrize("kind", ["dense", "latent"])
def test_pages_that_are_gathered_give_the_same_logits(kind, monkeypatch):
    rows_BT = np.random.default_rng(0).integers(VOCAB, size=(3, 28)).astype(np.int32)
    looped = logits_in_pages(*model_of(kind), rows_BT, (9, 10), size=4)
    with monkeypatch.context() as patched:
        patched.setattr("llmlab.model.cache.loops_over_pages", lambda rows, tokens: False)
        jax.clear_caches()
        gathered = logits_in_pages(*model_of(kind), rows_BT, (9, 10), size=4)
    jax.clear_caches()
    assert 0 < relative(looped, gathered) < 1e-5


@pytest.mark.parametrize("kind", ["dense", "heads"])
def test_what_is_no_number_in_one_row_stays_there(kind):
    model = make_model(dataclasses.replace(model_of(kind)[0].config, tied_embedding=False))
    params = random_params(model)
    table_VD = params["embedding"]["tokens_VD"]
    params |= {"embedding": params["embedding"] | {"tokens_VD": table_VD.at[7].set(np.nan)}}

    def tokens(*prompts):
        engine, drawn = Engine(model, params, CONFIG), {}
        numbers = [engine.submit(Request(prompt, 6, Sampling(temperature=0)))[0] for prompt in prompts]
        while not engine.idle:
            for event in engine.step():
                drawn.setdefault(event.number, []).append(event.token)
        return drawn[numbers[0]]

    assert tokens((1, 2, 3), (7, 2, 5)) == tokens((1, 2, 3))


def pointers(params):
    return {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(params)}


def test_weights_that_are_ready_are_not_copied():
    model, params = model_of("dense")
    made = ready(Decoder.of(model), params)
    assert pointers(made) != pointers(params)
    assert pointers(ready(Decoder.of(model), made)) == pointers(made)


def test_what_is_put_side_by_side_is_deleted_where_nobody_needs_it():
    model, _ = model_of("dense")
    params = model.unstack(random_params(model))
    attention = params["layers"][0]["attention"]
    alone = {name: leaf for name, leaf in attention.items() if name not in ("query_DNH", "key_DKH", "value_DKH")}
    made = ready(Decoder.of(model), params, release=True)["layers"][0]["attention"]
    assert attention["query_DNH"].is_deleted()
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((alone, made)))


@pytest.mark.parametrize("kind", KINDS)
def test_weights_side_by_side_give_the_same_logits(kind):
    model, params = model_of(kind)
    params = model.unstack(params)
    made, tokens_BT = ready(Decoder.of(model), params), np.arange(24).reshape(2, 12) % model.config.vocab_size
    assert len(jax.tree.leaves(made)) < len(jax.tree.leaves(params))
    wanted = np.asarray(model.logits(params, tokens_BT))
    np.testing.assert_allclose(model.logits(made, tokens_BT), wanted, atol=1e-5 * np.abs(wanted).max())


def test_a_cancelled_request_leaves_at_once():
    engine = Engine(*model_of("dense"), CONFIG)
    running, waiting = engine.submit(Request((1, 2, 3), 40)), engine.submit(Request((1, 2), 40), 9)
    for _ in range(5):
        engine.step()
    for number in running + waiting:
        assert engine.cancel(number)
    assert engine.load == {"running": 0, "waiting": 0, "pages_used": 0, "pages": 40}
    assert {event.finish for event in engine.step()} == {"cancelled"}
    assert engine.idle
    assert not engine.cancel(running[0])


@pytest.mark.parametrize("kind", ["dense", "mamba"])
def test_a_prompt_is_scored_as_the_model_reads_it_at_once(kind):
    model, params = model_of(kind)
    engine = Engine(model, params, CONFIG)
    prompt = tuple(np.random.default_rng(0).integers(48, size=30).tolist())
    alone(engine, Request(prompt, 1))  # what is kept of it must not spare the scoring
    logp_TV = np.asarray(jax.nn.log_softmax(model.logits(params, np.asarray([prompt]))[0]))
    for max_tokens in (0, 2):
        events = alone(engine, Request(prompt, max_tokens, Sampling(temperature=0), top=2, scored=True))
        given = [event for event in events if event.in_prompt]
        assert [event.token for event in given] == list(prompt)
        assert given[0].logp is None
        np.testing.assert_allclose([e.logp for e in given[1:]], logp_TV[np.arange(29), prompt[1:]], atol=1e-4)
        for event, logp_V in zip(given[1:], logp_TV, strict=False):
            np.testing.assert_allclose([logp for _, logp in event.top], np.sort(logp_V)[::-1][:2], atol=1e-4)
        assert events[-1].finish == "length"
        assert len(events) == 30 + max(max_tokens, 1)
    (only, end) = alone(engine, Request((5,), 0, scored=True))
    assert (only.token, only.logp, end.finish) == (5, None, "length")


class Even:
    """Even tokens only, ten of them at most."""

    def __init__(self):
        self.seen = []

    def fresh(self):
        return Even()

    def ready(self, within):
        return True

    def allowed(self):
        return np.full(2, 0x55555555 if len(self.seen) < 10 else 0, np.uint32)

    def accept(self, token):
        self.seen.append(token)


def test_a_limit_holds_and_stalls_nobody():
    engine = Engine(*model_of("dense"), CONFIG)
    free = Request((1, 2, 3), 20, Sampling(seed=1))
    limited = [Request((1, 2, 3), 20, Sampling(seed=1), limit=Even()) for _ in range(2)]
    (first,) = engine.submit(free)
    others = [engine.submit(request)[0] for request in limited]
    events = {number: [] for number in (first, *others)}
    steps = 0
    while not engine.idle:
        for event in engine.step():
            events[event.number].append(event)
        steps += not any(event.finish for event in events[first])
    assert steps <= 22
    assert_as_alone("dense", [(free, events[first])])
    for request, number in zip(limited, others, strict=True):
        tokens = [event.token for event in events[number]]
        assert tokens[-1] is None
        assert events[number][-1].finish == "dead_end"
        assert tokens[:-1] == request.limit.seen
        assert all(token % 2 == 0 for token in tokens[:-1])
        assert len(tokens) == 11


def test_pages_of_two_weights_are_never_found():
    model, params = model_of("dense")
    other, prompt = random_params(model, seed=8), tuple(range(40))
    engine = Engine(model, params, CONFIG)
    engine.submit(Request(prompt, 2))
    engine.step()
    engine.publish(other)
    while not engine.idle:
        engine.step()
    engine.submit(Request(prompt[:5], 1))  # its page would lead to those of the one before
    while not engine.idle:
        engine.step()
    assert [event.token for event in alone(engine, Request(prompt, 8, Sampling(temperature=0)))] == [
        event.token for event in alone(Engine(model, other, CONFIG), Request(prompt, 8, Sampling(temperature=0)))
    ]


def test_new_weights_change_what_is_drawn_and_forget_what_was_kept():
    model, params = model_of("dense")
    engine = Engine(model, params, CONFIG)
    request = Request(tuple(range(20)), 8, Sampling(temperature=0))
    before = [event.token for event in alone(engine, request)]
    other = random_params(model, seed=8)
    engine.publish(other)
    after = [event.token for event in alone(engine, request)]
    assert before != after
    assert after == [event.token for event in alone(Engine(model, other, CONFIG), request)]


@pytest.mark.parametrize("kind", ["dense", "latent"])
def test_keys_and_values_in_eight_bits_are_nearly_the_same(kind):
    model, params = model_of(kind)
    prompt = tuple(np.random.default_rng(1).integers(48, size=30).tolist())
    logps = []
    for int8 in (False, True):
        engine = Engine(model, params, dataclasses.replace(CONFIG, int8=int8))
        logps.append([event.logp for event in alone(engine, Request(prompt, 0, scored=True))[1:-1]])
        kept = {leaf.dtype for leaf in jax.tree.leaves(engine._device._main.state.layers)}
        assert kept == ({np.dtype("int8"), np.dtype("float32")} if int8 else {np.dtype("float32")})
    difference = np.abs(np.subtract(*logps))
    assert 0 < difference.max() < 0.2


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        (lambda: Request((), 1), "the prompt is empty"),
        (lambda: Request((1,), 0), "max_tokens=0 should be at least 1"),
        (lambda: Request((48,), 1), "ids are integers from 0 to 47"),
        (lambda: Request((1,) * 60, 5), "ask for at most 4"),
        (lambda: Request((1,), 1, Sampling(presence=-200)), "presence=-200 should be"),
        (lambda: Request((1,), 1, top=21), "top=21 should be from 0 to 20"),
        (lambda: Request((1,), 1, Sampling(temperature=float("nan"))), "temperature=nan should be"),
        (lambda: Request((1,), 1, Sampling(bias={99: 1.0})), "a bias is for token 99"),
        (lambda: Request((1,), 1, Sampling(frequency=1e9)), "frequency=1000000000.0 should be"),
    ],
)
def test_what_cannot_be_run_is_refused(request_, says):
    engine = Engine(*model_of("dense"), CONFIG)
    with pytest.raises(UserError, match=re.escape(says)):
        engine.submit(request_())
    assert engine.idle


def test_a_prompt_is_scored_once():
    engine = Engine(*model_of("dense"), CONFIG)
    with pytest.raises(UserError, match="ask for n=1"):
        engine.submit(Request((1, 2), 0, scored=True), 2)
    assert engine.idle


def test_pages_must_hold_a_row():
    with pytest.raises(UserError, match="give at least 16"):
        Engine(*model_of("dense"), EngineConfig(slots=1, page_size=4, pages=15))


def test_several_tokens_come_of_one_call_where_nothing_else_has_to_be_done():
    engine = Engine(*model_of("dense"), EngineConfig(slots=4, page_size=4, prefill=8, steps=4))
    (first,) = engine.submit(Request((1, 2, 3), 30))
    bursts = [[event.number for event in engine.step()] for _ in range(4)]
    # The first token with its prompt; then each step gives out what the one before has drawn.
    assert [len(burst) for burst in bursts] == [1, 4, 4, 4]
    (second,) = engine.submit(Request(tuple(range(20)), 10))  # in three pieces
    bursts = [[event.number for event in engine.step()] for _ in range(7)]
    assert [burst.count(first) for burst in bursts] == [4, 1, 1, 4, 4, 3, 0]  # the first of these was under way
    assert [burst.count(second) for burst in bursts] == [0, 0, 1, 4, 4, 1, 0]
    assert engine.idle


def test_what_is_drawn_after_a_stop_is_dropped():
    engine = Engine(*model_of("dense"), EngineConfig(slots=2, page_size=4, prefill=8))
    written = [event.token for event in alone(engine, Request((1, 2, 3), 12))]
    stop = next(token for place, token in enumerate(written) if place > 3 and token not in written[:place])
    engine = Engine(*model_of("dense"), EngineConfig(slots=2, page_size=4, prefill=8, steps=5))
    events = alone(engine, Request((1, 2, 3), 12, stop_ids=(stop,)))
    assert [event.token for event in events] == written[: written.index(stop) + 1]
    assert events[-1].finish == "stop"
    assert engine.load["pages_used"] == 0


def calls_of(monkeypatch):
    """The steps asked for, and what was drawn, of every call from now on."""
    calls = []

    def step(*given, steps, step=device.step):
        state, drawn = step(*given, steps=steps)
        calls.append((steps, np.asarray(drawn.logp_RT)))
        return state, drawn

    monkeypatch.setattr(device, "step", step)
    return calls


def test_a_call_ends_with_the_last_token_that_anybody_wants(monkeypatch):
    engine = Engine(*model_of("dense"), EngineConfig(slots=2, page_size=4, prefill=8, steps=8))
    calls = calls_of(monkeypatch)
    alone(engine, Request((1, 2, 3), 4))
    ((steps, logp_RT),) = calls  # the first token comes with the prompt
    assert steps == 8
    assert np.all(logp_RT[0, :3] < 0)
    assert not logp_RT[:, 3:].any()


def test_who_has_a_limit_does_not_wait_for_several_tokens_of_others(monkeypatch):
    engine = Engine(*model_of("dense"), EngineConfig(slots=2, page_size=4, prefill=8, steps=8))
    calls = calls_of(monkeypatch)
    engine.submit(Request((4, 5), 50))
    (limited,) = engine.submit(Request((1, 2, 3), 6, limit=RandomLimit(0, 60)))
    goes_on = True
    while goes_on:
        goes_on = not any(event.number == limited and event.finish for event in engine.step())
    assert {steps for steps, _ in calls} == {1}
    while not engine.idle:
        engine.step()
    assert {steps for steps, _ in calls} == {1, 8}


def test_guesses_and_several_steps_exclude_each_other():
    with pytest.raises(UserError, match="set steps to 1"):
        EngineConfig(guesses=2, steps=2)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("place", [lambda params: params, lambda params: jax.device_put(params, jax.devices()[1])])
def test_all_shapes_are_compiled_before_the_first_request(place, steps):
    model, params = model_of("dense")
    engine = Engine(model, place(params), dataclasses.replace(CONFIG, steps=steps))
    seen = []
    shapes = engine.compile(lambda done, total: seen.append((done, total)))
    assert seen == [(n + 1, shapes) for n in range(shapes)]
    counts = device.step._cache_size(), device.read._cache_size()
    run_schedule(engine, np.random.default_rng(3), 12)
    assert (device.step._cache_size(), device.read._cache_size()) == counts


@pytest.mark.parametrize("kind, steps", [("dense", 1), ("heads", 3)])
def test_sharded_parameters_and_cache_give_the_same(kind, steps):
    model, params = model_of(kind)
    partition = make_partition(MeshConfig(data=1, fsdp=2, tensor=2), jax.devices()[:4])
    sharded = make_model(model.config, partition)
    placed = jax.device_put(params, partition.shardings(sharded.axes))
    engine = Engine(sharded, placed, dataclasses.replace(CONFIG, steps=steps))
    values = engine._device._main.state.layers[0]["k_BKSH"].values
    assert values.sharding.shard_shape(values.shape)[1] == model.config.K // 2
    assert_as_alone(kind, list(run_schedule(engine, np.random.default_rng(5), 8).values()))
