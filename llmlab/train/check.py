"""Is this machine computing it right? A small twin of a config, on the devices and mesh at hand.

Compilers get this wrong: on some meshes a gather over a sharded vocabulary gives the right loss and wrong gradients. So
kernels are compared with their references, gradients on the mesh with one device's leaf by leaf, and a save with its
restore.
"""

import dataclasses
import functools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from llmlab.core.mesh import Partition, fetch, single_device
from llmlab.data.pipeline import TokenBatch
from llmlab.kernels.check import Comparison, check_attention, check_token_logprobs
from llmlab.model.transformer import make_model
from llmlab.train.config import Experiment
from llmlab.train.optimizer import make_optimizer
from llmlab.train.state import start, state_shardings
from llmlab.train.step import accumulated_gradients
from llmlab.workdir.checkpoints import Checkpoints

GRADIENT_TOLERANCE = 1e-5
LONGEST = 128


def check_experiment(experiment: Experiment, partition: Partition) -> Iterator[Comparison]:
    """All comparisons, as they finish: kernels, gradients by leaf, save and restore."""
    yield from kernel_rows(experiment)
    small = twin(experiment, partition)
    yield from gradient_rows(small, partition)
    yield from restore_rows(small, partition)


def kernel_rows(experiment: Experiment) -> list[Comparison]:
    """Attention for each kind of layer, and token log-probabilities: chosen version against reference."""
    return [row for check in kernel_checks(experiment) for row in check()]


def kernel_checks(experiment: Experiment) -> list[functools.partial]:
    """The comparisons that `kernel_rows` makes, as calls: their arguments say which kernels the run would use how."""
    model, data = experiment.model, experiment.data
    checks = []
    for kind in dict.fromkeys(model.pattern):
        attention = functools.partial(
            check_attention,
            model.H,
            model.heads,
            model.K,
            model.dtype,
            length=data.sequence_length,
            window=model.window if kind == "local" else None,
            softcap=model.attention_softcap,
            packed=data.packing == "best_fit",
            implementation=model.attention,
        )
        checks.append(attention)
    vocab_size = model.vocab_size or data.tokenizer.vocab_size
    logprobs = functools.partial(
        check_token_logprobs,
        min(model.width, 1024),
        min(vocab_size, 32768),
        model.dtype,
        softcap=model.logit_softcap,
        implementation=experiment.objective.logprobs,
    )
    return [*checks, logprobs]


def twin(experiment: Experiment, partition: Partition) -> Experiment:
    """The same kinds of layers, heads and mesh, in float32, small enough for one device in seconds."""
    model, tensor = experiment.model, partition.size("heads")
    if model.width > 256:
        groups = model.heads // model.K
        heads: Any = dict(heads=groups * tensor, kv_heads=tensor, head_dim=model.H)
        model = dataclasses.replace(model, width=64 * partition.size("embed"), mlp_width=128 * tensor, **heads)
    layers = min(model.layers, max(2, len(model.pattern)))
    vocab_size = 512 * partition.size("vocab") if model.vocab_size == 0 or model.vocab_size > 4096 else model.vocab_size
    model = dataclasses.replace(model, layers=layers, vocab_size=vocab_size, dtype="float32", param_dtype="float32")
    data, optimizer = experiment.data, experiment.optimizer
    pieces = partition.size("time")
    length = -(-min(data.sequence_length, LONGEST) // pieces) * pieces
    rows = 2 * partition.size("batch") * optimizer.accumulate
    data = dataclasses.replace(data, batch_size=rows, sequence_length=length)
    return dataclasses.replace(experiment, model=model, data=data)


def gradient_rows(experiment: Experiment, partition: Partition) -> Iterator[Comparison]:
    """The gradient of every leaf on the mesh, against one device's, in relative norm."""
    config, accumulate = experiment.model, experiment.optimizer.accumulate
    batch = _random_batch(experiment)
    params = jax.tree.map(np.asarray, make_model(config).init(jax.random.key(0)))
    token_bytes_V = np.ones(config.vocab_size, np.int32)
    key = jax.random.key(1)

    def gradients(partition: Partition) -> Any:
        model = make_model(config, partition)
        loss = experiment.objective.make(model, token_bytes_V)
        placed = _place(params, partition.shardings(model.axes))
        rows = _place(batch, jax.tree.map(lambda _: partition.sharding("batch", "time"), batch))
        run = jax.jit(lambda p, b: accumulated_gradients(loss, p, {}, b, key, accumulate, partition)[::2])
        return fetch(run(placed, rows)) if partition.mesh.size > 1 else jax.device_get(run(placed, rows))

    (total, one_gradients), (mesh_total, mesh_gradients) = gradients(single_device()), gradients(partition)
    yield compared("loss on the mesh", mesh_total.sum, total.sum, GRADIENT_TOLERANCE)
    for (path, mine), theirs in zip(
        jax.tree_util.tree_leaves_with_path(mesh_gradients), jax.tree.leaves(one_gradients), strict=True
    ):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        yield compared(f"gradient of {name}", mine, theirs, GRADIENT_TOLERANCE)


def restore_rows(experiment: Experiment, partition: Partition) -> Iterator[Comparison]:
    """A state saved and restored, bit for bit. On several hosts the temporary folder must be shared by all."""
    config = experiment.optimizer
    model = make_model(experiment.model, partition)
    optimizer = make_optimizer(config, experiment.run.steps, model.axes)
    params = jax.tree.map(np.asarray, make_model(experiment.model).init(jax.random.key(0)))
    placed = _place(params, partition.shardings(model.axes))
    state = start(placed, optimizer, window=config.skip_window, ema=bool(config.ema))
    state = jax.jit(lambda s: s, out_shardings=state_shardings(model, jax.eval_shape(lambda: state)))(state)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    with tempfile.TemporaryDirectory() as own:
        folder = _same_everywhere(own)
        checkpoints = Checkpoints(Path(folder) / "checkpoints")
        checkpoints.save(1, state._asdict(), wait=True)
        restored = checkpoints.restore(1, abstract._asdict())
        checkpoints.close()
        pairs = zip(jax.tree.leaves(fetch(state._asdict())), jax.tree.leaves(fetch(restored)), strict=True)
        different = sum(not np.array_equal(saved, back) for saved, back in pairs)
    yield Comparison("save and restore, leaves that differ", float(different), 0.0, not different)


def compared(name: str, mine: Any, reference: Any, tolerance: float) -> Comparison:
    """The relative difference of two arrays in Euclidean norm."""
    a, b = np.asarray(mine, np.float64), np.asarray(reference, np.float64)
    error = float(np.linalg.norm(a - b)) / max(float(np.linalg.norm(b)), 1e-30)
    return Comparison(name, error, tolerance, error <= tolerance)


def _random_batch(experiment: Experiment) -> TokenBatch:
    """Random tokens; half-way along each row a second document begins."""
    shape = (experiment.data.batch_size, experiment.data.sequence_length)
    tokens_BT = np.random.default_rng(0).integers(experiment.model.vocab_size, size=shape, dtype=np.int32)
    index_T = np.arange(shape[1], dtype=np.int32)
    second_T = index_T >= shape[1] // 2
    positions_BT = np.broadcast_to(np.where(second_T, index_T - shape[1] // 2, index_T), shape)
    segment_ids_BT = np.broadcast_to(1 + second_T.astype(np.int32), shape)
    mask_BT = np.ones(shape, np.float32)
    return TokenBatch(tokens_BT, np.roll(tokens_BT, -1, axis=1), mask_BT, positions_BT, segment_ids_BT)  # type: ignore[arg-type]


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
