"""A server that far more is asked of than it can do, and one that is asked what nobody should ask, beside others.

Times are what a client sees, and hold where nobody else uses the machine; where others do, the median is to hold
without the time in which a process could have run, and had no core. What was measured is printed: `pytest -s`.
"""

import json
import random
import subprocess
import sys
import time

import httpx
import numpy as np
import pytest

from tests.runs import ROOT, Place
from tests.serve_for_tests import serving
from tests.test_serve_hostile import BAD, CHAT, COMPLETE, HARMLESS, HELLO, generated

SLOTS, QUEUE = 4, 8


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """With two runs that complete and chat: the model of one is so small that a token is Python's work, that of the
    other has five million parameters.
    """
    made = Place(tmp_path_factory.mktemp("load"))
    tokenizer = {"kind": "sentencepiece", "chat_markers": True, "vocab_size": 400}
    given = [f"--config.data.tokenizer.{name}={value}" for name, value in tokenizer.items()]
    given += ["--config.run.steps=1", "--config.model.max_positions=2048"]
    made.train(made.folder / "run", *given)
    larger = {"width": 256, "layers": 6, "heads": 4}
    made.train(made.folder / "larger", *given, *(f"--config.model.{name}={value}" for name, value in larger.items()))
    return made


def serving_well(place, name, *flags):
    """Compiled as a user's would be: what tests do without otherwise."""
    return serving(place, place.folder / name, *flags, xla_flags="")


def crowd(server, rate, seconds):
    """What comes of so many requests a second."""
    command = [sys.executable, "-m", "tests.load", "crowd", server.url, server.process.pid, rate, seconds]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_ten_times_what_it_can_do_for_a_minute(place):
    with serving_well(place, "run", f"--slots={SLOTS}", f"--queue={QUEUE}") as server:
        seconds = 15
        capacity = crowd(server, 20, seconds)["ends"]["length"] / seconds
        before = server.megabytes()
        seen = crowd(server, 10 * capacity, 60)
        after, metrics = server.megabytes(), httpx.get(f"{server.url}/metrics").text
    refused, no_core = np.asarray(seen["refused"]).T * 1e3
    measured, fair = (np.percentile(times, (50, 95, 99, 100)).round(1) for times in (refused, refused - no_core))
    print(
        f"\n{capacity:.1f} requests/s; at ten times {seen['ends']}, at most {max(seen['taken'])} taken in; memory "
        f"{before:.0f} MB, {after / before - 1:+.1%} after; refused in (median, p95, p99, max) {measured} ms, of which "
        f"with a core {fair}"
    )
    assert set(seen["ends"]) == {"length", "gone", "429"}
    assert seen["ends"]["429"] > 2 * seen["ends"]["length"] > capacity * 30
    assert len(seen["refused"]) == seen["ends"]["429"]  # each of them told when to come again
    assert SLOTS < max(seen["taken"]) <= SLOTS + QUEUE
    assert after < 1.05 * before
    assert fair[0] < 50
    if np.median(no_core) < 1:  # nobody else uses the machine
        assert measured[2] < 50
    for idle in ("running", "waiting", "pages_used"):
        assert f'llmlab_{idle}{{model="tiny"}} 0' in metrics


def expression(regex):
    return {"response_format": {"type": "regex", "regex": regex}}


TURN = {"role": "user", "content": "a"}
COSTLY = {
    "a large body of nothing": (COMPLETE, b'{"prompts": [' + b"[]," * 340_000 + b"[]]}"),
    "a body that is too large": (COMPLETE, b" " * 2**22),
    "a long list of ids": (COMPLETE, {"prompt": [1] * 300_000}),
    "a long text": (COMPLETE, {"prompt": "a" * 10**6}),
    "many turns": (CHAT, {"messages": [TURN] * 30_000}),
    "many turns to cut": (CHAT, {"messages": [TURN] * 2_000, "truncation": "middle", "max_tokens": 4}),
    "a long text to read": ("/tokenize", {"prompt": "the quick " * 6_000}),
    "many ids to spell": ("/detokenize", {"tokens": [5] * 65_000}),
    "texts to embed": ("/v1/embeddings", {"input": ["the quick brown fox " * 20] * 64}),
    "an expression": (CHAT, {"messages": HELLO, "max_tokens": 16} | expression("((a|b){1,500}c?){1,500}")),
    "an expression of expressions": (COMPLETE, {"prompt": "a"} | expression("(((a?){99}){99}){99}")),
}


def hostile_requests(count):
    """Paths and bodies, in random order."""
    rng = random.Random(0)
    asked = [
        *BAD.values(),
        *((CHAT, body | {"max_tokens": 3}) for body in HARMLESS.values()),
        *(4 * [*COSTLY.values()]),
    ]
    asked += [generated(random.Random(seed)) for seed in range(count - len(asked))]
    rng.shuffle(asked)
    return [(path, body if isinstance(body, bytes) else json.dumps(body).encode()) for path, body in asked]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("name", "most"), [("run", 4), ("larger", 2)])
def test_the_others_beside_five_hundred_hostile_requests(place, name, most):
    statuses, spans, asked = [], [], hostile_requests(500)
    command, pipes = (
        [sys.executable, "-m", "tests.load", "steady"],
        {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE},
    )
    with (
        serving_well(place, name) as server,
        httpx.Client(base_url=server.url, timeout=120) as web,
        subprocess.Popen([*command, server.url], cwd=ROOT, text=True, **pipes) as steady,
    ):
        time.sleep(5)
        # By turns: what else the machine does falls on both.
        for begin in range(0, len(asked), 50):
            started = time.monotonic()
            statuses += [web.post(path, content=body).status_code for path, body in asked[begin : begin + 50]]
            spans.append((started, time.monotonic()))
            time.sleep(max(2, time.monotonic() - started))
        seen = json.loads(steady.communicate("")[0])
        assert web.get("/health").status_code == 200
    assert [status for status in statuses if status != 200 and not 400 <= status < 500] == []
    beside = np.array([any(first < times[0] < last for first, last in spans) for times in seen])
    assert min(sum(beside), sum(~beside)) > 20
    firsts, wholes = (np.array([times[place] - times[0] for times in seen]) * 1e3 for place in (1, -1))
    for what, times in ("first token", firsts), ("whole answer", wholes):
        alone, among = np.median(times[~beside]), np.median(times[beside])
        print(f"\n{what}: {alone:.1f} ms alone, {among:.1f} ms beside them: {among / alone:.2f} times", end="")
        assert among < most * alone
