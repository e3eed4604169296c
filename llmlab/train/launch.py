"""From a resolved experiment to a finished run: data, model, state, checks, then the loop.

Whatever can be refused is refused in the order of what it costs: the config, the workdir, the data, the kernels.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental.multihost_utils import broadcast_one_to_all

from llmlab.core.arrays import named_key
from llmlab.core.config import to_json
from llmlab.core.errors import Tripwire, UserError
from llmlab.core.mesh import Partition, make_partition
from llmlab.core.paths import cache_root
from llmlab.data.pipeline import TextSource, TokenBatch, evaluation_batches
from llmlab.data.prepare import data_fingerprint, prepare_parts, tokenizer_for
from llmlab.data.tokenizer import Tokenizer
from llmlab.kernels.check import checked_once
from llmlab.model.cost import abstract_params, flops_per_token, parameter_count
from llmlab.model.transformer import make_model
from llmlab.model.types import Model, Params
from llmlab.objective.next_token import Loss
from llmlab.train.check import kernel_checks, kernel_rows
from llmlab.train.config import Experiment, check_mesh
from llmlab.train.loop import Hooks, run_loop
from llmlab.train.optimizer import make_optimizer, make_schedule
from llmlab.train.progress import Progress, peak_flops, thousands
from llmlab.train.state import TrainState, init_state, start, state_shardings
from llmlab.train.step import make_step
from llmlab.workdir.checkpoints import Checkpoints
from llmlab.workdir.files import Workdir
from llmlab.workdir.metrics import MetricsLog, TensorBoardLog
from llmlab.workdir.open import weights_for

log = logging.getLogger(__name__)


class Run(NamedTuple):
    """What a run is made of, for the hooks that look at it. `held_out()` gives its evaluation batches anew."""

    experiment: Experiment
    workdir: Workdir
    partition: Partition
    tokenizer: Tokenizer
    model: Model
    loss: Loss
    held_out: Callable[[], Iterator[TokenBatch]]


def launch(
    experiment: Experiment, workdir: Workdir, make_hooks: Callable[[Run], Hooks], *, arguments: list[str] | None = None
) -> Run:
    """Runs `experiment` in `workdir` to its end, from the start or from the last good checkpoint there.

    Raises:
      UserError: something does not fit; StoppedAndSaved, Tripwire, DiskFull: as `run_loop`.
    """
    partition = make_partition(experiment.mesh)
    check_mesh(experiment, partition)
    experiment = _with_known_vocabulary(experiment, workdir)
    _on_first_host(lambda: workdir.claim(to_json(experiment)))
    try:
        return _launch_claimed(experiment, workdir, partition, make_hooks, arguments or [])
    finally:
        workdir.release()


def _launch_claimed(
    experiment: Experiment,
    workdir: Workdir,
    partition: Partition,
    make_hooks: Callable[[Run], Hooks],
    arguments: list[str],
) -> Run:
    first = jax.process_index() == 0
    progress = Progress(experiment.run.steps, quiet=not first)
    run, source = _assemble(experiment, workdir, partition, progress)
    experiment, settings = run.experiment, run.experiment.run
    check_kernels(experiment)
    if first:
        facts = {
            "data": data_fingerprint(experiment.data),
            "parameters": parameter_count(abstract_params(run.model)),
            "arguments": arguments,
        }
        _check_same_data(workdir, facts["data"])
        workdir.write_config(to_json(experiment), facts)
        run.tokenizer.save(workdir.tokenizer)
    checkpoints = Checkpoints(
        workdir.checkpoints, keep=settings.keep, keep_every=settings.keep_every, best=settings.best
    )
    logs = _Logs(workdir, settings.tensorboard) if first else _NoLog()
    try:
        state, step_fn = _prepare_state(run, checkpoints, progress)
        tokens = experiment.data.batch_size * experiment.data.sequence_length
        run_loop(
            experiment,
            state,
            step_fn,
            source,
            make_hooks(run),
            log=logs,
            saver=checkpoints,
            progress=progress,
            evaluated_before=bool(broadcast_one_to_all(np.int32(logs.goes_on_from(int(state.step))))),
            flops_per_step=tokens * flops_per_token(experiment.model, experiment.data.sequence_length),
            peak_flops=peak_flops(jax.devices()[0].device_kind),
        )
    finally:
        progress.close()
        source.close()
        checkpoints.close()
        logs.close()
    return run


def check_kernels(experiment: Experiment) -> None:
    """Compares the kernels this run would use with their references, once per device kind and version.

    Raises:
      Tripwire: one of them is wrong on this machine.
    """
    keys = [f"{check.func.__name__} {check.args} {check.keywords}" for check in kernel_checks(experiment)]
    rows = checked_once(keys, functools.partial(kernel_rows, experiment), cache_root() / "checks")
    wrong = [row for row in rows if not row.ok]
    if wrong:
        row = wrong[0]
        raise Tripwire(
            f"{row.name} differs from its reference on this machine by {row.error:.1e} (allowed {row.tolerance:.1e}): "
            f"set model.attention=reference and objective.logprobs=plain, and see `llmlab check`"
        )


def _assemble(
    experiment: Experiment, workdir: Workdir, partition: Partition, progress: Progress
) -> tuple[Run, TextSource]:
    data = experiment.data
    tokenizer = tokenizer_for(data)
    size = experiment.model.vocab_size or tokenizer.vocab_size
    if size < tokenizer.vocab_size:
        raise UserError(
            f"model.vocab_size={size} is less than the tokenizer's {tokenizer.vocab_size}: raise it, or 0 to follow"
        )
    experiment = dataclasses.replace(experiment, model=dataclasses.replace(experiment.model, vocab_size=size))
    check_mesh(experiment, partition)
    batch_sharding = partition.sharding("batch", "time")
    train = prepare_parts(data, tokenizer, "train")
    held_out = prepare_parts(data, tokenizer, "held_out")
    source = TextSource(data, train, seed=experiment.run.seed, sharding=batch_sharding)
    model = make_model(experiment.model, partition)
    loss = experiment.objective.make(model, token_bytes(tokenizer, size))
    batches = functools.partial(evaluation_batches, data, held_out, sharding=batch_sharding)
    progress.say(
        f"{sum(len(store.tokens) for store, _ in train):,} training tokens in {source.rows:,} rows, "
        f"vocabulary {size:,}; {partition.mesh.size} {jax.devices()[0].device_kind} device(s)"
    )
    return Run(experiment, workdir, partition, tokenizer, model, loss, batches), source


def token_bytes(tokenizer: Tokenizer, vocab_size: int) -> np.ndarray:
    """int32 [V]: bytes of text behind each id, 0 for ids that the model has and the tokenizer has not."""
    table_V = np.zeros(vocab_size, np.int32)
    table_V[: tokenizer.vocab_size] = tokenizer.token_bytes()
    return table_V


def _prepare_state(run: Run, checkpoints: Checkpoints, progress: Progress) -> tuple[TrainState, Any]:
    """(state, jitted step): restored if there is a checkpoint, else from other weights, else initialised; sharded."""
    experiment, model = run.experiment, run.model
    config, settings = experiment.optimizer, experiment.run
    optimizer = make_optimizer(config, settings.steps, model.axes)
    schedule = make_schedule(config, settings.steps)
    common = dict(window=config.skip_window, ema=bool(config.ema))

    def fresh(key: jax.Array) -> TrainState:
        return init_state(model, optimizer, key, **common)  # type: ignore[arg-type]

    key = named_key(settings.seed, "init")
    abstract = jax.eval_shape(fresh, key)
    shardings = state_shardings(model, abstract)
    latest = checkpoints.latest()
    if latest is not None:
        wanted = jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), abstract, shardings
        )
        state = TrainState(**checkpoints.restore(latest, wanted._asdict()))
        progress.say(f"going on from step {latest} in {run.workdir.path}")
    elif settings.init_from:
        weights: Params = weights_for(settings.init_from, model)
        begin = functools.partial(start, optimizer=optimizer, **common)  # type: ignore[arg-type]
        state = jax.jit(begin, out_shardings=shardings)(weights)
        progress.say(f"starting from the weights of {settings.init_from}")
    else:
        state = jax.jit(fresh, out_shardings=shardings)(key)
    progress.say(f"{thousands(parameter_count(state.trainable))} parameters; compiling the step …")
    step = make_step(run.loss, optimizer, schedule, config, seed=settings.seed, partition=run.partition)
    return state, jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))


def _on_first_host(action: Callable[[], None]) -> None:
    """Runs `action` on process 0; if it fails there, every other process stops too, instead of waiting for it."""
    error: UserError | None = None
    if jax.process_index() == 0:
        try:
            action()
        except UserError as raised:
            error = raised
    if broadcast_one_to_all(np.int32(error is not None)):
        raise error or UserError("process 0 refused to start: see its message")


def _with_known_vocabulary(experiment: Experiment, workdir: Workdir) -> Experiment:
    """A vocabulary that follows the tokenizer is the one this workdir's run resolved, where it has one."""
    if experiment.model.vocab_size or not workdir.config.exists():
        return experiment
    size = workdir.read_config()["config"].get("model", {}).get("vocab_size", 0)
    return dataclasses.replace(experiment, model=dataclasses.replace(experiment.model, vocab_size=size))


def _check_same_data(workdir: Workdir, fingerprint: object) -> None:
    if workdir.config.exists() and (known := workdir.read_config().get("data")) != fingerprint:
        raise UserError(
            f"the data of {workdir.path} is not what its run began with (its hash was {known}, now {fingerprint}): "
            f"restore the files, or train into a new workdir"
        )


class _Logs:
    """metrics.jsonl, and TensorBoard beside it where it was asked for."""

    def __init__(self, workdir: Workdir, tensorboard: bool):
        self._metrics = MetricsLog(workdir.metrics)
        self._board_folder = workdir.path / "tensorboard" if tensorboard else None
        self._board: TensorBoardLog | None = None

    def goes_on_from(self, step: int) -> bool:
        """Drops what was logged past `step`; whether what is left has this step's evaluation."""
        self._metrics.truncate_after(step)
        if self._board_folder is not None:
            self._board = TensorBoardLog(self._board_folder, purge_step=step + 1)
        return self._metrics.has(step, "eval/")

    def append(self, row: Mapping[str, Any]) -> None:
        self._metrics.append(row)
        if self._board is not None:
            self._board.append(row)

    def close(self) -> None:
        self._metrics.close()
        if self._board is not None:
            self._board.close()


class _NoLog:
    """What every host but the first logs."""

    def goes_on_from(self, step: int) -> bool:
        return False

    def append(self, row: Mapping[str, Any]) -> None:
        pass

    def close(self) -> None:
        pass
