"""The loop's order, its endings, and its rates, with a step that only counts."""

import io
import os
import signal

import jax
import jax.numpy as jnp
import pytest

from llmlab.core.arrays import Mean
from llmlab.core.errors import StoppedAndSaved, Tripwire
from llmlab.data.config import DataConfig
from llmlab.objective import next_token
from llmlab.train.config import experiment, resolve, run
from llmlab.train.loop import Hooks, Meter, run_loop
from llmlab.train.optimizer import adamw
from llmlab.train.progress import Progress, clock, line, peak_flops, thousands
from llmlab.train.state import Guard, TrainState
from tests.helpers import tiny_llama


class Recorder:
    """A log, a saver, a source and hooks that write down when they were called."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.events: list[tuple] = []
        self.rows: list[dict] = []
        self._stop_at = stop_at

    def append(self, row):
        self.events.append(("log" if "loss" in row else "log eval", row["step"]))
        self.rows.append(row)

    def save(self, step, state, metrics=None, *, wait=False):
        assert int(state["step"]) == step
        self.events.append(("save", step, dict(metrics or {}), wait))

    def check(self):
        pass

    def next(self, step, state):
        self.events.append(("batch", step))
        if step == self._stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return jnp.zeros(())

    def evaluate(self, state, full):
        self.events.append(("evaluate", int(state.step), full))
        return {"loss": 1.0}

    def sample(self, state):
        self.events.append(("sample", int(state.step)))


def one_step(skipped_from: int = 1000):
    def step(state, batch):
        bad = jnp.maximum(state.step + 1 - skipped_from, 0)
        one = jnp.ones(())
        values = {"loss": 2.0, "bits_per_byte": 1.0, "skipped": bad, "skipped_in_a_row": bad, "tokens": 7.0}
        metrics = {name: Mean(jnp.asarray(value, jnp.float32), one) for name, value in values.items()}
        return state._replace(step=state.step + 1), metrics

    return jax.jit(step)


def looped(recorder, *, step_fn=None, begin=0, known=False, **settings):
    config = experiment(
        model=tiny_llama(),
        data=DataConfig(sequence_length=8, batch_size=2),
        objective=next_token(),
        optimizer=adamw(max_skips=3),
        run=run(**{**dict(steps=6, log_every=2, eval_every=3, sample_every=0, checkpoint_every=3), **settings}),
    )
    zero = jnp.zeros((), jnp.int32)
    state = TrainState(jnp.asarray(begin, jnp.int32), {}, {}, (), None, Guard(jnp.zeros((1, 2)), zero, zero, zero))
    return run_loop(
        resolve(config),
        state,
        step_fn or one_step(),
        recorder,
        Hooks(recorder.evaluate, recorder.sample),
        log=recorder,
        saver=recorder,
        progress=Progress(6, out=io.StringIO()),
        meter=Meter(16, 0.0, None),
        evaluated_before=known,
    )


def test_the_order_is_evaluate_save_batch_step_log():
    recorder = Recorder()
    assert int(looped(recorder).step) == 6
    assert recorder.events == [
        ("evaluate", 0, False), ("log eval", 0), ("batch", 0), ("batch", 1), ("log", 1), ("batch", 2), ("log", 2),
        ("evaluate", 3, False), ("log eval", 3), ("save", 3, {"eval/loss": 1.0}, False),
        ("batch", 3), ("batch", 4), ("log", 4), ("batch", 5),
        ("log", 6), ("evaluate", 6, True), ("log eval", 6), ("save", 6, {}, True),
    ]  # fmt: skip
    assert [row["tokens"] for row in recorder.rows if "loss" in row] == [16, 32, 64, 96]


def test_an_evaluation_that_is_known_is_not_made_again():
    recorder = Recorder()
    looped(recorder, begin=3, known=True)
    assert ("evaluate", 3, False) not in recorder.events
    assert ("save", 3, {}, False) not in recorder.events
    assert recorder.events[0] == ("batch", 3)


def test_a_signal_saves_and_leaves_without_evaluating():
    recorder = Recorder(stop_at=2)
    with pytest.raises(StoppedAndSaved, match="stopped at step 3 of 6"):
        looped(recorder)
    assert recorder.events[-3:] == [("batch", 2), ("log", 2), ("save", 3, {}, True)]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize("settings", [dict(eval_every=3), dict(eval_every=0, checkpoint_every=0)])
def test_too_many_skips_stop_the_run_with_its_last_state_saved(settings):
    recorder = Recorder()
    with pytest.raises(Tripwire, match="3 steps in a row"):
        looped(recorder, step_fn=one_step(skipped_from=0), **settings)
    assert recorder.events[-1][0] == "save"
    assert recorder.events[-1][3]


def test_the_line_says_what_matters():
    row = {
        "step": 5,
        "loss": 3.21,
        "bits_per_byte": 2.1,
        "learning_rate": 3e-3,
        "tokens_per_second": 8100.0,
        "mfu": 0.41,
    }
    shown = line(row, 10, 80.0)
    assert shown == "step 5/10  loss 3.210  bits/byte 2.100  lr 3.0e-03  8.1k tokens/s  mfu 41 %  1:20 left"
    assert (thousands(1.2e9), clock(3723)) == ("1.2B", "1:02:03")


def test_plain_lines_where_there_is_no_terminal():
    out = io.StringIO()
    progress = Progress(3, out=out)
    for step in (1, 2, 3):
        progress.show({"step": step, "loss": 1.0})
    assert out.getvalue().splitlines()[0].startswith("step 1/3")
    assert len(out.getvalue().splitlines()) == 2  # the first, and the last
    assert "\r" not in out.getvalue()


@pytest.mark.parametrize(
    "kind, peak", [("NVIDIA H200", 989e12), ("TPU v5 lite", 197e12), ("TPU v5p", 459e12), ("cpu", None)]
)
def test_peaks_are_known_by_the_longest_name(kind, peak):
    assert peak_flops(kind) == peak
