"""Is this machine computing it right? A small twin of a config, on the devices and mesh at hand.

Compilers get this wrong: on some meshes a gather over a sharded vocabulary gives the right loss and wrong gradients. So
kernels are compared with their references, gradients on the mesh with one device's leaf by leaf, and a save with its
restore.
"""

import dataclasses
import functools
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from llmlab.core.distributed import together
from llmlab.core.errors import UserError
from llmlab.core.mesh import Partition, fetch, single_device
from llmlab.data.pipeline import Batch, GroupBatch, TokenBatch
from llmlab.data.store import STEP
from llmlab.kernels import attention, logprobs
from llmlab.kernels.check import LENGTH, Comparison, check_attention, check_ssm, check_token_logprobs, compared
from llmlab.model.transformer import make_model
from llmlab.train.config import Experiment
from llmlab.train.optimizer import make_optimizer
from llmlab.train.state import start, state_shardings
from llmlab.train.step import accumulated_gradients
from llmlab.workdir.checkpoints import Checkpoints

GRADIENT_TOLERANCE = 1e-5
LONGEST = 128
LONGEST_ATTENTION = 1024
# Three chunks of the 48 tokens that are checked, the last of them not full.
CHUNK = 20


def check_experiment(
    experiment: Experiment, partition: Partition, folder: str | os.PathLike[str] | None = None
) -> Iterator[Comparison]:
    """All comparisons, as they finish: kernels, gradients by leaf, save and restore.

    Args:
      folder: where to save, in a folder made for it and removed again; the system's temporary one when None.

    Raises:
      UserError: several processes and no folder, or one that they do not share.
    """
    if folder is None and jax.process_count() > 1:
        raise UserError("on several processes check saves where all see it: give --workdir on a shared file system")
    yield from kernel_rows(experiment)
    small = twin(experiment, partition)
    yield from gradient_rows(small, partition)
    yield from restore_rows(small, partition, folder)


def kernel_rows(experiment: Experiment) -> list[Comparison]:
    """What mixes tokens in each kind of layer, and token log-probabilities: chosen version against reference."""
    return [row for check in kernel_checks(experiment) for row in check()]


def kernel_checks(experiment: Experiment) -> list[functools.partial]:
    """The comparisons that `kernel_rows` makes, as calls: their arguments say which kernels the run would use how."""
    model, data = experiment.model, experiment.data
    attention_name, logprobs_name = versions(experiment)
    checks: list[functools.partial] = []
    s, packed = model.ssm, data.packing == "best_fit" or data.rows not in ("text", "chat")
    if "mamba" in model.pattern:
        options: Any = dict(groups=s.groups, packed=packed, implementation=s.implementation, chunk=s.chunk)
        checks.append(functools.partial(check_ssm, s.head_dim, s.state, model.dtype, **options))
    for kind in dict.fromkeys(kind for kind in model.pattern if kind != "mamba"):
        check = functools.partial(
            check_attention,
            model.H,
            model.heads,
            model.K,
            model.dtype,
            length=min(max(data.sequence_length, LENGTH), LONGEST_ATTENTION),
            window=model.window if kind == "local" else None,
            softcap=model.attention_softcap,
            value_dim=model.value_dim,
            sinks=model.attention_sinks,
            packed=packed,
            implementation=attention_name,
        )
        checks.append(check)
    if model.head == "score":
        return checks
    check = functools.partial(
        check_token_logprobs,
        min(model.width, 1024),
        min(_vocab_size(experiment), 32768),
        model.dtype,
        softcap=model.logit_softcap,
        implementation=logprobs_name,
        chunk=CHUNK,
    )
    return [*checks, check]


def versions(experiment: Experiment) -> tuple[str, str]:
    """The names of the attention and the log-probabilities that a step of this run uses, "auto" resolved."""
    model, data = experiment.model, experiment.data
    B, T, platform = data.batch_size // experiment.optimizer.accumulate, data.sequence_length, jax.default_backend()
    attention_name, logprobs_name = model.attention, experiment.objective.logprobs
    # cuDNN cannot: a batch always carries segment ids.
    auto_attention = attention.choose(B, T, T, model.heads, platform, cudnn_can=False)
    auto_logprobs = logprobs.choose(B, T, _vocab_size(experiment), model.dtype, platform)
    return (
        auto_attention if attention_name == "auto" else attention_name,
        auto_logprobs if logprobs_name == "auto" else logprobs_name,
    )


def _vocab_size(experiment: Experiment) -> int:
    return experiment.model.vocab_size or experiment.data.tokenizer.vocab_size


def twin(experiment: Experiment, partition: Partition) -> Experiment:
    """The same kinds of layers, heads, kernels and mesh, in float32, small enough for one device in seconds."""
    attention_name, logprobs_name = versions(experiment)
    model, tensor = experiment.model, partition.size("heads")
    if model.width > 256:
        groups = model.heads // model.K
        heads: Any = dict(heads=groups * tensor, kv_heads=tensor, head_dim=0 if model.latent.kv_rank else model.H)
        narrow, shared = dataclasses.replace(model.experts, width=0), min(model.ssm.groups, 2)
        heads |= dict(ssm=dataclasses.replace(model.ssm, groups=shared, heads=2 * shared * tensor))
        sizes: Any = dict(width=64 * partition.size("embed"), mlp_width=128 * tensor, experts=narrow)
        model = dataclasses.replace(model, **heads, **sizes)
    dense = len(model.segments()) - 1
    layers = dense + min(len(model.segments()[-1]), max(2, len(model.pattern)))
    vocab_size = 512 * partition.size("vocab") if model.vocab_size == 0 or model.vocab_size > 4096 else model.vocab_size
    experts = dataclasses.replace(model.experts, first_dense=dense)
    small: Any = dict(attention=attention_name, layers=layers, vocab_size=vocab_size, experts=experts)
    model = dataclasses.replace(model, dtype="float32", param_dtype="float32", **small)
    objective: Any = experiment.objective
    if model.head == "tokens":
        objective = dataclasses.replace(objective, logprobs=logprobs_name)
    data, optimizer = experiment.data, experiment.optimizer
    pieces = partition.size("time")
    length = -(-min(data.sequence_length, LONGEST) // pieces) * pieces
    rows = 2 * partition.size("batch") * optimizer.accumulate
    data = dataclasses.replace(data, batch_size=rows, sequence_length=length)
    return dataclasses.replace(experiment, model=model, data=data, objective=objective)


def gradient_rows(experiment: Experiment, partition: Partition) -> Iterator[Comparison]:
    """The gradient of every leaf on the mesh, against one device's, in relative norm."""
    config, accumulate = experiment.model, experiment.optimizer.accumulate
    batch = random_batch(experiment)
    params = jax.device_get(jax.jit(make_model(config).init)(jax.random.key(0)))
    token_bytes_V = np.ones(config.vocab_size, np.int32)
    key = jax.random.key(1)

    def gradients(partition: Partition) -> Any:
        model = make_model(config, partition)
        loss = experiment.objective.make(model, token_bytes_V)
        placed = _place(params, partition.shardings(model.axes))
        rows = _place(batch, jax.tree.map(lambda x: partition.sharding("batch", *("time",) * (x.ndim == 2)), batch))
        run = jax.jit(lambda p, b: accumulated_gradients(loss, p, {}, b, key, accumulate, partition)[::2])
        # Accelerators otherwise round the factors of float32 products to fewer bits than the tolerance allows.
        with jax.default_matmul_precision("highest"):
            return fetch(run(placed, rows)) if partition.mesh.size > 1 else jax.device_get(run(placed, rows))

    (total, one_gradients), (mesh_total, mesh_gradients) = gradients(single_device()), gradients(partition)
    yield compared("loss on the mesh", mesh_total.sum, total.sum, GRADIENT_TOLERANCE)
    for (path, mine), theirs in zip(
        jax.tree_util.tree_leaves_with_path(mesh_gradients), jax.tree.leaves(one_gradients), strict=True
    ):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        yield compared(f"gradient of {name}", mine, theirs, GRADIENT_TOLERANCE)


def restore_rows(
    experiment: Experiment, partition: Partition, folder: str | os.PathLike[str] | None = None
) -> Iterator[Comparison]:
    """A state saved under `folder` and restored, bit for bit."""
    config = experiment.optimizer
    model = make_model(experiment.model, partition)
    optimizer = make_optimizer(config, experiment.run.steps, model.axes)
    params = jax.device_get(jax.jit(make_model(experiment.model).init)(jax.random.key(0)))
    placed = _place(params, partition.shardings(model.axes))
    state = start(placed, optimizer, window=config.skip_window, ema=bool(config.ema))
    state = jax.jit(lambda s: s, out_shardings=state_shardings(model, jax.eval_shape(lambda: state)))(state)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    if folder is not None:
        folder = Path(folder).resolve()
        folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="check-", dir=folder) as own:
        shared = Path(_same_everywhere(own))
        together(functools.partial(_check_seen, shared))
        checkpoints = Checkpoints(shared / "checkpoints")
        checkpoints.save(1, state.saved, wait=True)
        restored = checkpoints.restore(1, abstract.saved)
        checkpoints.close()
        pairs = zip(jax.tree.leaves(fetch(state.saved)), jax.tree.leaves(fetch(restored)), strict=True)
        different = sum(not np.array_equal(saved, back) for saved, back in pairs)
    yield Comparison("save and restore, leaves that differ", float(different), 0.0, not different)


def random_batch(experiment: Experiment) -> Batch:
    """Random tokens; half-way along each row a second document begins, or each row holds two pairs of answers."""
    B, T = shape = (experiment.data.batch_size, experiment.data.sequence_length)
    rng = np.random.default_rng(0)
    tokens_BT = rng.integers(experiment.model.vocab_size, size=shape, dtype=np.int32)
    judged = experiment.data.rows not in ("text", "chat")
    pieces = 4 if judged else 2
    begin_T = np.minimum(np.arange(T) // -(-T // pieces), pieces - 1) * -(-T // pieces)
    positions_BT = np.broadcast_to((np.arange(T) - begin_T).astype(np.int32), shape)
    segment_ids_BT = np.broadcast_to(np.unique(begin_T, return_inverse=True)[1].astype(np.int32) + 1, shape)
    rows = (tokens_BT, np.roll(tokens_BT, -1, axis=1), np.ones(shape, np.float32), positions_BT, segment_ids_BT)
    if not judged:
        return TokenBatch(*rows)  # type: ignore[arg-type]
    marks_BT = np.where(rng.random(shape) < 0.2, rng.integers(STEP, 256, shape), 1).astype(np.int32)
    present_BPR = np.ones((B, 2, 2), np.float32)
    value_BPR, reference_BPR = rng.random((2, B, 2, 2), np.float32)
    return GroupBatch(*rows, marks_BT, present_BPR, value_BPR, -T * reference_BPR)  # type: ignore[arg-type]


def _place(tree: Any, shardings: Any) -> Any:
    """Arrays that every host has whole, laid out over the mesh."""
    return jax.tree.map(
        lambda x, s: jax.make_array_from_callback(x.shape, s, lambda index: np.asarray(x)[index]), tree, shardings
    )


def _same_everywhere(folder: str) -> str:
    """Process 0's folder, on every host."""
    name = np.zeros(4096, np.uint8)
    encoded = np.frombuffer(folder.encode(), np.uint8)
    name[: len(encoded)] = encoded
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(name))).rstrip(b"\0").decode()


def _check_seen(folder: Path) -> None:
    if not folder.is_dir():
        raise UserError(f"{folder.parent} is not the same folder on all hosts: give --workdir on a shared file system")
