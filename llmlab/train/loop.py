"""The one loop. Whatever the stage, its order is fixed: evaluate, save, next batch, step, log the previous step."""

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax

from llmlab.core.arrays import Metrics
from llmlab.core.errors import StoppedAndSaved, Tripwire
from llmlab.train.config import Experiment
from llmlab.train.progress import Progress
from llmlab.train.signals import StopRequest
from llmlab.train.state import TrainState
from llmlab.train.step import Step


class Source(Protocol):
    """Where batches come from: a corpus, or rollouts of the very policy that is trained."""

    def next(self, step: int, state: Any) -> Any:
        """The batch of this step, on the devices."""
        ...


class Log(Protocol):
    """Where rows of metrics go."""

    def append(self, row: Mapping[str, Any]) -> None:
        """Writes one row."""
        ...


class Saver(Protocol):
    """Where states go."""

    def save(self, step: int, state: dict, metrics: dict[str, float] | None = None, *, wait: bool = False) -> None:
        """Saves in the background, or waits until it is committed."""
        ...

    def check(self) -> None:
        """Raises what a background save raised."""
        ...


class Hooks(NamedTuple):
    """What happens beside the steps. `evaluate(state, full)` gives metrics by name; `sample(state)` writes text."""

    evaluate: Callable[[TrainState, bool], dict[str, float]] | None = None
    sample: Callable[[TrainState], None] | None = None


def run_loop(
    experiment: Experiment,
    state: TrainState,
    step_fn: Step,
    source: Source,
    hooks: Hooks,
    *,
    log: Log,
    saver: Saver,
    progress: Progress,
    evaluated_before: bool = False,
    flops_per_step: float = 0.0,
    peak_flops: float | None = None,
) -> TrainState:
    """Trains from `state` to `run.steps`; `evaluated_before` says that the log has this state's evaluation already.

    Raises:
      StoppedAndSaved: SIGTERM or Ctrl-C; the state is committed.
      Tripwire: too many steps in a row were skipped; the last good state is committed.
      DiskFull: a save or a row of metrics found no room.
    """
    run, data = experiment.run, experiment.data
    meter = Meter(data.batch_size * data.sequence_length, flops_per_step, peak_flops)
    pending: tuple[int, Metrics] | None = None
    step = int(state.step)
    start = step

    def flush() -> None:
        nonlocal pending
        if pending is not None:
            logged, metrics = pending
            pending = None
            _log(logged, metrics, experiment, meter, log, progress)

    with StopRequest() as stop:
        while True:
            saver.check()
            last, stopping, evaluated = step == run.steps, stop.at(step), {}
            known = evaluated_before and step == start
            if hooks.evaluate and (_due(step, run.eval_every) or last) and not known:
                flush()
                with meter:
                    evaluated = hooks.evaluate(state, last)
                log.append({"step": step, **{f"eval/{name}": value for name, value in evaluated.items()}})
                progress.say(f"step {step}  " + "  ".join(f"held-out {k} {v:.4f}" for k, v in evaluated.items()))
            if hooks.sample and (_due(step, run.sample_every) or last) and step > start:
                flush()
                with meter:
                    hooks.sample(state)
            if step > start and (_due(step, run.checkpoint_every) or last or stopping):
                flush()
                named = {f"eval/{name}": value for name, value in evaluated.items()}
                with meter:
                    saver.save(step, state._asdict(), named, wait=last or stopping)
            if last:
                return state
            if stopping:
                raise StoppedAndSaved(f"stopped at step {step} of {run.steps}; the same command goes on from there")
            batch = source.next(step, state)
            with jax.transfer_guard("disallow"):
                state, metrics = step_fn(state, batch)
            step += 1
            try:
                flush()
            except Tripwire:
                saver.save(step, state._asdict(), wait=True)
                raise
            pending = (step, metrics)


class Meter:
    """Tokens per second and model FLOP utilisation between logged rows, evaluation and saving left out.

    As a context, the time inside does not count.
    """

    def __init__(self, tokens_per_step: int, flops_per_step: float, peak: float | None) -> None:
        self.tokens_per_step = tokens_per_step
        self._flops, self._peak = flops_per_step, peak
        self._since: tuple[float, int] | None = None
        self._pause = 0.0

    def __enter__(self) -> None:
        self._paused_at = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self._pause += time.monotonic() - self._paused_at

    def read(self, step: int) -> dict[str, float]:
        """The rates since the last reading; the first steps after a start, which compile, give none."""
        now, since = time.monotonic(), self._since
        self._since, pause, self._pause = (now, step), self._pause, 0.0
        if since is None or step == since[1]:
            return {}
        seconds = (now - since[0] - pause) / (step - since[1])
        rates = {"tokens_per_second": self.tokens_per_step / seconds}
        if self._peak:
            rates["mfu"] = self._flops / seconds / (self._peak * jax.device_count())
        return rates


def _log(step: int, metrics: Metrics, experiment: Experiment, meter: Meter, log: Log, progress: Progress) -> None:
    """Fetches the metrics of a step that has long finished, and writes them where they are due."""
    run, optimizer = experiment.run, experiment.optimizer
    values = {name: mean.value() for name, mean in jax.device_get(metrics).items()}
    if values["skipped_in_a_row"] >= optimizer.max_skips:
        raise Tripwire(
            f"{optimizer.max_skips} steps in a row were skipped by step {step}: its loss or gradient is not "
            f"finite, or far outside the recent window; lower optimizer.learning_rate, and see grad_norm in the metrics"
        )
    if step % run.log_every and step != run.steps and step != 1:
        return
    values.pop("skipped_in_a_row")
    targets = values.pop("tokens")
    row = {"step": step, "tokens": step * meter.tokens_per_step, "targets": targets, **values, **meter.read(step)}
    log.append(row)
    progress.show(row)


def _due(step: int, every: int) -> bool:
    return bool(every) and step % every == 0
