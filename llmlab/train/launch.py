"""From a resolved experiment to a finished run: data, model, state, checks, then the loop.

Whatever can be refused is refused in the order of what it costs: the config, the workdir, the data, the kernels.
"""

import contextlib
import dataclasses
import functools
import json
import logging
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental.multihost_utils import broadcast_one_to_all, process_allgather

from llmlab.core.arrays import named_key
from llmlab.core.config import to_json
from llmlab.core.distributed import together
from llmlab.core.errors import DiskFull, Tripwire, UserError
from llmlab.core.mesh import Partition, make_partition
from llmlab.core.paths import cache_root, write_atomic
from llmlab.data.pipeline import TextSource, evaluation_batches, statistics
from llmlab.data.prepare import data_fingerprint, prepare_parts, tokenizer_for
from llmlab.data.sources import source_paths
from llmlab.data.store import TokenStore
from llmlab.data.tokenizer import Tokenizer, load_tokenizer
from llmlab.kernels.check import checked_once
from llmlab.model.adapters import adapter_axes, add_adapter
from llmlab.model.cost import abstract_params, flops_per_token, parameter_count
from llmlab.model.transformer import make_model
from llmlab.model.types import Model
from llmlab.objective.base import Loss
from llmlab.train.check import kernel_checks, kernel_rows
from llmlab.train.config import Experiment, check_mesh
from llmlab.train.loop import Hooks, Meter, run_loop
from llmlab.train.optimizer import make_optimizer, make_schedule
from llmlab.train.progress import Progress, peak_flops, thousands
from llmlab.train.reference import reference_logps
from llmlab.train.state import TrainState, init_state, start, state_shardings
from llmlab.train.step import by_gradients_alone, make_step
from llmlab.workdir.checkpoints import Checkpoints
from llmlab.workdir.files import Workdir
from llmlab.workdir.metrics import MetricsLog, TensorBoardLog, check_tensorboard
from llmlab.workdir.open import (
    Base,
    check_base,
    check_has_weights,
    frozen_weights,
    newest_base,
    weights_for,
    weights_of,
)

log = logging.getLogger(__name__)


class Run(NamedTuple):
    """What a run is made of, for the hooks that look at it. `held_out()` gives its evaluation batches anew."""

    experiment: Experiment
    workdir: Workdir
    partition: Partition
    tokenizer: Tokenizer
    model: Model
    loss: Loss
    held_out: Callable[..., Iterator[Any]]


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
    together(functools.partial(_claim, experiment, workdir))
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
    first, begin = jax.process_index() == 0, time.monotonic()
    progress = Progress(experiment.run.steps, quiet=not first)
    base = together(functools.partial(_base, experiment, workdir))
    reference = together(functools.partial(_reference, experiment, workdir))
    begin_here = functools.partial(_begin, experiment, workdir, partition, progress, arguments, base, reference)
    run, data = together(begin_here)
    _check_same_on_every_host(run, base or reference)
    experiment, settings, source = run.experiment, run.experiment.run, data.source
    if reference is not None:
        splits = {"train": data.train, "held_out": data.held_out}
        logps = reference_logps(
            workdir, experiment.data, splits, run.model, reference, experiment.objective.logprobs, progress.say
        )
        source.references = logps["train"]
        held_out: Any = functools.partial(run.held_out, references=logps["held_out"])
        run = run._replace(held_out=held_out)
    tokens = experiment.data.batch_size * experiment.data.sequence_length
    flops = tokens * flops_per_token(experiment.model, experiment.data.sequence_length, frozen=base is not None)
    peak = peak_flops(jax.devices()[0].device_kind)
    meter = Meter(tokens, flops, peak, preparing=time.monotonic() - begin)
    checkpoints = Checkpoints(
        workdir.checkpoints, keep=settings.keep, keep_every=settings.keep_every, best=settings.best
    )
    logs = _Logs(workdir, settings.tensorboard) if first else _NoLog()
    try:
        state, step_fn = _prepare_state(run, base, reference, checkpoints, progress)
        run_loop(
            experiment,
            state,
            step_fn,
            source,
            make_hooks(run),
            log=logs,
            saver=checkpoints,
            progress=progress,
            meter=meter,
            evaluated_before=bool(broadcast_one_to_all(np.int32(logs.goes_on_from(int(state.step))))),
        )
    finally:
        progress.close()
        source.close()
        checkpoints.close()
        logs.close()
        if first:
            _add_seconds(workdir, meter.seconds())
    return run


def _claim(experiment: Experiment, workdir: Workdir) -> None:
    """Refuses what is missing before anything is made, then holds the folder."""
    for part, _ in experiment.data.parts():
        source_paths(part)
    if experiment.run.init_from and not workdir.config.exists():
        check_has_weights(experiment.run.init_from, experiment.model)
    if experiment.run.tensorboard:
        check_tensorboard()
    if jax.process_index() == 0:
        # Weights under an adapter, or of a reference, are known by their hash: they may be elsewhere than at first.
        adapts = experiment.adapter.kind != "none"
        by_hash = adapts or experiment.objective.stores_reference(adapter=adapts)
        allowed = ("run.init_from",) if by_hash else ()
        workdir.claim(to_json(experiment), *allowed)


def _base(experiment: Experiment, workdir: Workdir) -> Base | None:
    """The checkpoint under this run's adapter."""
    if experiment.adapter.kind == "none":
        return None
    base = _begun_from(experiment, workdir, "base")
    check_base(base)
    return base


def _reference(experiment: Experiment, workdir: Workdir) -> Base | None:
    """The checkpoint whose log-probabilities this run's are compared with, where they are computed beforehand."""
    if not experiment.objective.stores_reference(adapter=experiment.adapter.kind != "none"):
        return None
    return _begun_from(experiment, workdir, "reference")


def _begun_from(experiment: Experiment, workdir: Workdir, name: str) -> Base:
    """The newest checkpoint of run.init_from at the first start, then always that, wherever its workdir is now."""
    known = workdir.read_config().get(name) if workdir.config.exists() else None
    if known is None:
        return newest_base(experiment.run.init_from)
    return Base(**known)._replace(workdir=str(Workdir(experiment.run.init_from).path))


class _Data(NamedTuple):
    """The stores of both splits, each with its weight, and the source of training batches."""

    train: list[tuple[TokenStore, float]]
    held_out: list[tuple[TokenStore, float]]
    source: TextSource


def _begin(
    experiment: Experiment,
    workdir: Workdir,
    partition: Partition,
    progress: Progress,
    arguments: list[str],
    base: Base | None,
    reference: Base | None,
) -> tuple[Run, _Data]:
    """Data, model and loss, and what the workdir says of them; no process waits for another in here."""
    run, read = _assemble(experiment, workdir, partition, progress)
    _check_same_tokenizer(run)
    check_kernels(run.experiment)
    if jax.process_index() == 0:
        facts: dict[str, Any] = {
            "data": data_fingerprint(run.experiment.data),
            "parameters": parameter_count(abstract_params(run.model)),
            "arguments": arguments,
        }
        if base is not None:
            facts["base"] = base._asdict()
        if reference is not None:
            facts["reference"] = reference._asdict()
        _check_same_data(workdir, facts["data"])
        workdir.write_config(to_json(run.experiment), facts)
        run.tokenizer.save(workdir.tokenizer)
    return run, read


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


def _assemble(experiment: Experiment, workdir: Workdir, partition: Partition, progress: Progress) -> tuple[Run, _Data]:
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
    if data.rows != "text":
        progress.say(statistics(data, train))
        statistics(data, held_out)  # refuses it where most is left out
    source = TextSource(data, train, seed=experiment.run.seed, sharding=batch_sharding)
    model = make_model(experiment.model, partition)
    loss = experiment.objective.make(model, token_bytes(tokenizer, size))
    batches = functools.partial(evaluation_batches, data, held_out, sharding=batch_sharding)
    progress.say(
        f"{sum(len(store.tokens) for store, _ in train):,} training tokens in {source.rows:,} rows, "
        f"vocabulary {size:,}; {partition.mesh.size} {jax.devices()[0].device_kind} device(s)"
    )
    return Run(experiment, workdir, partition, tokenizer, model, loss, batches), _Data(train, held_out, source)


def token_bytes(tokenizer: Tokenizer, vocab_size: int) -> np.ndarray:
    """int32 [V]: bytes of text behind each id, 0 for ids that the model has and the tokenizer has not."""
    table_V = np.zeros(vocab_size, np.int32)
    table_V[: tokenizer.vocab_size] = tokenizer.token_bytes()
    return table_V


def _prepare_state(
    run: Run, base: Base | None, reference: Base | None, checkpoints: Checkpoints, progress: Progress
) -> tuple[TrainState, Any]:
    """(state, jitted step): restored if there is a checkpoint, else from other weights, else initialised; sharded."""
    experiment, model = run.experiment, run.model
    config, settings, adapter = experiment.optimizer, experiment.run, experiment.adapter
    frozen = {} if base is None else frozen_weights(base, adapter, model)
    axes = model.axes if base is None else adapter_axes(model, adapter)
    optimizer = make_optimizer(config, settings.steps, axes)
    schedule = make_schedule(config, settings.steps)
    common: Any = dict(window=config.skip_window, ema=bool(config.ema))

    def fresh(key: jax.Array, frozen: Any) -> TrainState:
        if base is None:
            return init_state(model, optimizer, key, **common)
        return start(add_adapter(model, frozen, adapter, key), optimizer, **common)

    key = named_key(settings.seed, "init")
    abstract = jax.eval_shape(fresh, key, frozen)
    shardings = state_shardings(model, abstract, axes)
    latest = checkpoints.latest()
    if latest is not None:
        wanted = jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), abstract, shardings
        )
        state = TrainState(frozen={}, **checkpoints.restore(latest, wanted.saved))
        progress.say(f"going on from step {latest} in {run.workdir.path}")
    elif settings.init_from and base is None:
        begin = functools.partial(start, optimizer=optimizer, **common)
        # Exactly the reference, where there is one, whatever else its workdir holds by now.
        weights = weights_for(settings.init_from, model, key) if reference is None else weights_of(reference, model)
        state = jax.jit(begin, out_shardings=shardings)(weights)
        progress.say(f"starting from the weights of {settings.init_from}")
    else:
        state = jax.jit(fresh, out_shardings=shardings)(key, frozen)
    if base is not None:
        progress.say(f"an adapter over the weights of {base.workdir} at step {base.step}, which stay as they are")
    state = state._replace(frozen=frozen)
    shardings = shardings._replace(frozen=jax.tree.map(lambda x: x.sharding, frozen))
    progress.say(f"{thousands(parameter_count(state.trainable))} parameters; compiling the step …")
    step = make_step(
        run.loss,
        optimizer,
        schedule,
        config,
        seed=settings.seed,
        partition=run.partition,
        post_step=model.post_step if base is None else by_gradients_alone,
        before=experiment.objective.before(model),
    )
    return state, jax.jit(step, donate_argnums=0, out_shardings=(shardings, run.partition.sharding()))


def _with_known_vocabulary(experiment: Experiment, workdir: Workdir) -> Experiment:
    """A vocabulary that follows the tokenizer is the one this workdir's run resolved, where it has one."""
    if experiment.model.vocab_size or not workdir.config.exists():
        return experiment
    size = workdir.read_config()["config"].get("model", {}).get("vocab_size", 0)
    return dataclasses.replace(experiment, model=dataclasses.replace(experiment.model, vocab_size=size))


def _check_same_tokenizer(run: Run) -> None:
    """Weights read ids: another tokenizer of the same size would fit their shapes, and mean nothing."""
    weights = run.workdir if run.workdir.tokenizer.exists() else None
    if weights is None and run.experiment.run.init_from:
        weights = Workdir(run.experiment.run.init_from)
    if weights is not None and load_tokenizer(weights.tokenizer).fingerprint != run.tokenizer.fingerprint:
        raise UserError(
            f"the weights of {weights.path} were trained with another tokenizer than this data makes: "
            f"set --config.data.tokenizer.file={weights.tokenizer}"
        )


def _check_same_on_every_host(run: Run, base: Base | None) -> None:
    """Hosts whose files, Python or caches differ would assemble one batch of several corpora, without a word."""
    if jax.process_count() == 1:
        return
    mine = f"{data_fingerprint(run.experiment.data)} {run.tokenizer.fingerprint} {base.digest if base else ''}"
    hashes_P = np.asarray(process_allgather(np.uint32(zlib.crc32(mine.encode()))))
    if len(set(hashes_P.tolist())) > 1:
        raise UserError(
            f"the hosts read different data, tokenizers or frozen weights (hashes {hashes_P.tolist()}): "
            "give all of them the same"
        )


def _add_seconds(workdir: Workdir, seconds: dict[str, float]) -> None:
    """Adds this start's wall time by phase to that of the starts before, for the report."""
    path = workdir.path / "time.json"
    try:
        before = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        before = {}
    total = {name: before.get(name, 0.0) + seconds.get(name, 0.0) for name in {**before, **seconds}}
    with contextlib.suppress(DiskFull):  # a full disk has been reported by what stopped the run
        write_atomic(path, json.dumps(total).encode())


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
