"""A server that far more is asked of than it can do.

Times are what a client sees, and hold where nobody else uses the machine; where others do, the median is to hold
without the time in which a process could have run, and had no core. What was measured is printed: `pytest -s`.
"""

import json
import subprocess
import sys

import httpx
import numpy as np
import pytest

from tests.runs import ROOT, Place
from tests.serve_for_tests import serving

SLOTS, QUEUE = 4, 8


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """With a run that completes and chats."""
    made = Place(tmp_path_factory.mktemp("load"))
    tokenizer = {"kind": "sentencepiece", "chat_markers": True, "vocab_size": 400}
    given = [f"--config.data.tokenizer.{name}={value}" for name, value in tokenizer.items()]
    made.train(made.folder / "run", "--config.run.steps=1", "--config.model.max_positions=2048", *given)
    return made


def crowd(server, rate, seconds):
    """What comes of so many requests a second."""
    command = [sys.executable, "-m", "tests.load", server.url, server.process.pid, rate, seconds]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_ten_times_what_it_can_do_for_a_minute(place):
    with serving(place, place.folder / "run", f"--slots={SLOTS}", f"--queue={QUEUE}") as server:
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
