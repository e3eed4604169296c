"""The thread around the engine: what callers get, who is refused, and that nobody waits for ever."""

import asyncio
import contextlib
import threading
import time

import numpy as np
import pytest

from llmlab.core.errors import UserError
from llmlab.infer.engine import Engine, EngineConfig
from llmlab.infer.request import Request, Sampling
from llmlab.infer.service import Closing, Failed, Overloaded, Service
from tests.engine_for_tests import assert_books, model_of, random_request

CONFIG = EngineConfig(slots=2, page_size=16, prefill=32)
LONG = Request((1, 2, 3), 50, Sampling(temperature=0.0))


@pytest.fixture
def service():
    made = Service(Engine(*model_of("dense"), CONFIG), queue=2)
    yield made
    asyncio.run(made.close())


async def written(service, *requests, n=1):
    """The tokens of each sample, and how it ended."""
    samples: dict[int, list] = {}
    with service.submit(*requests, n=n) as ticket:
        async for index, event in ticket:
            samples.setdefault(index, []).append(event)
    return {
        index: ([event.token for event in events if event.token is not None], events[-1].finish)
        for index, events in samples.items()
    }


async def until(condition):
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.005)


def test_samples_are_those_of_the_engine_alone(service):
    requests = [Request((5, 6, 7, 8, 9), 6, Sampling(seed=3)), Request((1,), 4, Sampling(seed=9))]
    engine = Engine(*model_of("dense"), CONFIG)
    want = []
    for request in requests:
        numbers = engine.submit(request, 2)
        tokens = {number: [] for number in numbers}
        while not engine.idle:
            for event in engine.step():
                tokens[event.number].append(event.token)
        want += tokens.values()
    got = asyncio.run(written(service, *requests, n=2))
    assert [got[index] for index in range(4)] == [(tokens, "length") for tokens in want]
    assert service.metrics.tokens == sum(map(len, want))
    assert service.metrics.prompt_tokens == 6
    assert service.metrics.finished == {"length": 4}
    assert sum(service.metrics.first_seconds.counts) == 4
    assert sum(service.metrics.between_seconds.counts) == sum(map(len, want)) - 4


def test_what_can_never_run_is_refused_before_it_waits(service):
    async def asked():
        with pytest.raises(UserError, match="64 positions"):
            service.submit(Request((1,), 1000))
        assert service.load["waiting"] == 0

    asyncio.run(asked())


def test_a_full_queue_refuses_and_an_abandoned_request_gives_its_place_back(service):
    async def asked():
        with contextlib.ExitStack() as stack:
            for _ in range(4):
                stack.enter_context(service.submit(LONG))
            with pytest.raises(Overloaded) as refused:
                service.submit(LONG)
            assert 1 <= refused.value.retry_after <= 60
            assert service.metrics.refused == 1
        await until(lambda: service.load["running"] == service.load["waiting"] == service.load["pages_used"] == 0)
        assert (await written(service, LONG))[0][1] == "length"

    asyncio.run(asked())


def test_a_place_is_held_before_it_is_known_for_what():
    async def asked():
        service = Service(Engine(*model_of("dense"), CONFIG), queue=2)
        with service.admit(3) as ticket, service.admit(1) as other:
            with pytest.raises(Overloaded):
                service.admit(1)
            with pytest.raises(UserError, match="64 positions"):
                other.begin(Request((1,), 1000))
            closing = asyncio.create_task(service.close())
            await asyncio.sleep(0.02)
            ticket.begin(LONG, n=3)
            assert [event.finish async for _, event in ticket if event.finish] == ["length"] * 3
            assert not closing.done()
        await closing

    asyncio.run(asked())


def test_a_consumer_that_is_cancelled_frees_its_slot(service):
    async def asked():
        task = asyncio.create_task(written(service, LONG, n=2))
        await until(lambda: service.load["running"] == 2)
        task.cancel()
        await until(lambda: service.load["running"] == service.load["pages_used"] == 0)
        await until(lambda: service.metrics.finished["cancelled"] == 2)

    asyncio.run(asked())


@pytest.mark.parametrize("callers", [100, pytest.param(10_000, marks=pytest.mark.slow)])
def test_callers_who_leave_take_everything_with_them(callers):
    service = Service(Engine(*model_of("dense"), EngineConfig(slots=2, page_size=4, pages=20, prefill=8)), queue=20)
    engine, rng, steps, patient = service._engine, np.random.default_rng(0), [], []
    step = engine.step
    engine.step = lambda: (step(), steps.append(engine.load))[0]

    async def ask(patience):
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience):
                patient.append(await written(service, random_request(rng), n=int(rng.choice([1, 1, 2]))))

    async def asked():
        for _ in range(callers // 10):
            async with asyncio.TaskGroup() as group:
                for patience in (None, *rng.exponential(0.02, 9)):
                    group.create_task(ask(patience))
            seen = len(steps)
            await until(lambda: engine.idle and not service._samples)
            assert service.load == {"running": 0, "waiting": 0, "pages_used": 0, "pages": 20}
            # The step that was under way when the last one left, and all after it.
            assert all(load["running"] == load["waiting"] == load["pages_used"] == 0 for load in steps[seen + 1 :])
        assert_books(engine)
        assert service._admitted == len(service._tickets) == 0
        await service.close()

    asyncio.run(asked())
    # Some limits leave nothing that may follow.
    assert {finish for samples in patient for _, finish in samples.values()} - {"dead_end"} == {"stop", "length"}
    assert len(patient) >= callers // 10
    assert service.metrics.finished["cancelled"] > callers / 4
    assert service.metrics.finished.total() >= callers


def test_closing_finishes_what_was_admitted():
    async def asked():
        service = Service(Engine(*model_of("dense"), CONFIG), queue=2)
        tasks = [asyncio.create_task(written(service, LONG)) for _ in range(4)]
        await asyncio.sleep(0)
        closing = asyncio.create_task(service.close())
        await asyncio.sleep(0)
        with pytest.raises(Closing):
            service.submit(LONG)
        done = await asyncio.gather(*tasks)
        await closing
        assert [(len(samples[0][0]), samples[0][1]) for samples in done] == [(50, "length")] * 4

    asyncio.run(asked())


def test_an_error_in_the_engine_reaches_everybody_who_waits(service, monkeypatch, caplog):
    def broken():
        raise ValueError("no more memory")

    async def asked():
        with service.submit(LONG) as running, service.submit(LONG) as other:
            await anext(running)
            monkeypatch.setattr(service._engine, "step", broken)
            for ticket in (running, other):
                with pytest.raises(Failed, match="no more memory"):
                    async for _ in ticket:
                        pass
        with pytest.raises(Failed, match="no more memory"):
            service.submit(LONG)
        assert isinstance(service.error, ValueError)

    asyncio.run(asyncio.wait_for(asked(), 20))
    assert "no more memory" in caplog.text


def test_an_idle_engine_is_not_stepped(service, monkeypatch):
    asyncio.run(written(service, Request((1, 2), 2)))
    steps = []
    monkeypatch.setattr(service._engine, "step", lambda: steps.append(threading.get_ident()) or [])
    time.sleep(0.05)
    assert not steps
