"""The one loop. Whatever the stage, its order is fixed: evaluate, save, next batch, step, log the previous step."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple, Protocol

import jax

from llmlab.core.arrays import Metrics
from llmlab.core.errors import StoppedAndSaved, Tripwire
from llmlab.core.host_memory import give_back
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
    meter: "Meter",
    evaluated_before: bool = False,
) -> TrainState:
    """Trains from `state` to `run.steps`; `evaluated_before` says that the log has this state's evaluation already.

    Raises:
      StoppedAndSaved: SIGTERM or Ctrl-C; the state is committed.
      Tripwire: too many steps in a row were skipped; the last good state is committed.
      DiskFull: a save or a row of metrics found no room.
    """
    run = experiment.run
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
        try:
            while True:
                saver.check()
                last, stopping, evaluated = step == run.steps, stop.at(step), {}
                beside = not stopping or last  # who stops us may not wait for more than a save
                known = evaluated_before and step == start
                if hooks.evaluate and (_due(step, run.eval_every) or last) and not known and beside:
                    flush()
                    with meter.phase("evaluating"):
                        evaluated = {f"eval/{k}": v for k, v in hooks.evaluate(state, last).items()}
                    log.append({"step": step, **evaluated})
                    shown = {k: v for k, v in evaluated.items() if k.count("/") == 1}  # in parts only in the log
                    progress.say(f"step {step}  " + "  ".join(f"{k} {v:.4f}" for k, v in shown.items()))
                if (
                    hooks.sample
                    and run.sample_every
                    and (_due(step, run.sample_every) or last)
                    and beside
                    and (step > start or (step == 0 and run.init_from))  # what it began from, to compare with
                ):
                    flush()
                    with meter.phase("sampling"):
                        hooks.sample(state)
                if step > start and (_due(step, run.checkpoint_every) or last or stopping):
                    flush()
                    comparable = {} if last and run.eval_batches else evaluated  # the last one sees more text
                    with meter.phase("saving"):
                        saver.save(step, state.saved, comparable, wait=last or stopping)
                if last:
                    return state
                if stopping:
                    raise StoppedAndSaved(f"stopped at step {step} of {run.steps}; the same command goes on from there")
                with meter.phase("waiting for data"):
                    batch = source.next(step, state)
                with jax.transfer_guard("disallow"), meter.phase("compiling") if step == start else nullcontext():
                    state, metrics = step_fn(state, batch)
                step += 1
                flush()
                pending = (step, metrics)
        except Tripwire:
            # The steps that tripped it changed no weight.
            saver.save(step, state.saved, wait=True)
            raise


class Meter:
    """Where the time goes, by phase; tokens per second and model FLOP utilisation while training."""

    def __init__(self, tokens_per_step: int, flops_per_step: float, peak: float | None, preparing: float = 0.0) -> None:
        self.tokens_per_step = tokens_per_step
        self._seconds = {"preparing": preparing}
        self._begin = time.monotonic() - preparing
        self._flops, self._peak = flops_per_step, peak
        self._since: tuple[float, int] | None = None
        self._pause = 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A context whose time counts as this phase; all but waiting for data is no part of the rates."""
        begin = time.monotonic()
        try:
            yield
        finally:
            passed = time.monotonic() - begin
            self._seconds[name] = self._seconds.get(name, 0.0) + passed
            if name != "waiting for data":
                self._pause += passed

    def seconds(self) -> dict[str, float]:
        """Wall seconds so far by phase; what no phase claims is the steps themselves."""
        rest = time.monotonic() - self._begin - sum(self._seconds.values())
        return {**self._seconds, "training": rest}

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
    if not values["tokens"]:
        raise Tripwire(
            f"the batch of step {step} has no token to learn: look at the data with `llmlab tokenize --chat`, and see "
            f"data.train_on"
        )
    if step % run.log_every and step != run.steps and step != 1:
        return
    values.pop("skipped_in_a_row")
    targets = values.pop("tokens")
    first = {name: values.pop(name) for name in ("loss", "bits_per_byte") if name in values}
    counts = {"step": step, "tokens": step * meter.tokens_per_step, "targets": targets}
    row = {**counts, **first, **values, **meter.read(step)}
    log.append(row)
    progress.show(row)
    give_back()


def _due(step: int, every: int) -> bool:
    return bool(every) and step % every == 0
