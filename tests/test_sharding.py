"""Meshes change nothing: gradients leaf by leaf, thirty steps of AdamW, and a checkpoint from each on every other."""

import functools
import importlib
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmlab.core.mesh import MeshConfig, make_partition, single_device
from llmlab.data.config import DataConfig
from llmlab.kernels import logprobs as kernel_logprobs
from llmlab.kernels.logprobs import TokenLogprobs
from llmlab.model.transformer import make_model
from llmlab.objective import NextTokenConfig
from llmlab.train.check import check_experiment, gradient_rows, twin
from llmlab.train.config import experiment, resolve, run
from llmlab.train.optimizer import OptimizerConfig, adamw, make_optimizer, make_schedule
from llmlab.train.state import start, state_shardings
from llmlab.train.step import accumulated_gradients, make_step
from llmlab.workdir.checkpoints import Checkpoints
from tests.helpers import VOCAB, assert_close, host, packed_batch, random_params, tiny_llama

MESHES = {
    "8x1": MeshConfig(data=8, fsdp=1),
    "fsdp": MeshConfig(),
    "4x2": MeshConfig(data=1, fsdp=4, tensor=2),
    "2x2x2": MeshConfig(data=2, fsdp=2, tensor=2),
    "sequence": MeshConfig(data=1, fsdp=2, tensor=2, sequence=2),
}
FAST = [
    ("2x2x2", False, "plain", "float32"),
    ("sequence", False, "chunked", "float32"),
]
ALL = list(itertools.product(MESHES, (False, True), ("plain", "chunked"), ("float32", "float64")))


def partition_of(mesh):
    return single_device() if mesh is None else make_partition(MESHES[mesh])


@functools.cache
def gradients(mesh, scan, logprobs, dtype):
    with jax.enable_x64(dtype == "float64"):
        partition = partition_of(mesh)
        model = make_model(
            tiny_llama(scan=scan, dtype=dtype, param_dtype=dtype, window=6, pattern=("local", "global")), partition
        )
        params = jax.device_put(random_params(model), partition.shardings(model.axes))
        loss = NextTokenConfig(logprobs=logprobs, z_loss=1e-3).make(model, np.ones(VOCAB, np.int32))
        batch = jax.device_put(packed_batch(), partition.sharding("batch", "time"))
        run = jax.jit(lambda p, b: accumulated_gradients(loss, p, {}, b, jax.random.key(0), 1, partition)[::2])
        return host(run(params, batch))


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch):
    """Chunks of 4 of the 16 tokens of each of 8 rows."""
    monkeypatch.setitem(kernel_logprobs.CHUNK_TOKENS, "cpu", 32)
    split = kernel_logprobs._split

    def in_chunks_of_4(arrays, chunk):
        assert chunk == 4
        return split(arrays, chunk)

    monkeypatch.setattr(kernel_logprobs, "_split", in_chunks_of_4)


@pytest.mark.parametrize(
    "mesh, scan, logprobs, dtype",
    [pytest.param(*case, marks=[] if case in FAST else pytest.mark.slow) for case in ALL],
)
def test_first_step_gradients_are_one_devices(mesh, scan, logprobs, dtype):
    tolerance = 1e-5 if dtype == "float32" else 1e-10
    assert_close(gradients(mesh, scan, logprobs, dtype), gradients(None, False, "plain", dtype), tolerance)


def trained(mesh, scan, steps=30):
    partition = partition_of(mesh)
    model = make_model(tiny_llama(scan=scan), partition)
    config = OptimizerConfig(learning_rate=1e-3, warmup=5, schedule="constant", ema=0.9)
    optimizer = make_optimizer(config, steps, model.axes)
    params = jax.device_put(random_params(model, scale=0.2), partition.shardings(model.axes))
    state = start(params, optimizer, window=config.skip_window, ema=True)
    shardings = state_shardings(model, jax.eval_shape(lambda: state))
    state = jax.device_put(state, shardings)
    loss = NextTokenConfig().make(model, np.ones(VOCAB, np.int32))
    step = make_step(loss, optimizer, make_schedule(config, steps), config, seed=0, partition=partition)
    step = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
    losses = []
    for index in range(steps):
        batch = jax.device_put(packed_batch(seed=index), partition.sharding("batch", "time"))
        state, metrics = step(state, batch)
        losses.append(metrics["loss"].value())
    return losses, state


@pytest.mark.slow
@pytest.mark.parametrize("scan", [False, True])
def test_thirty_steps_of_adamw_agree_on_every_mesh(scan):
    expected, _ = trained(None, False)
    for mesh in MESHES:
        np.testing.assert_allclose(trained(mesh, scan)[0], expected, rtol=1e-5, err_msg=mesh)


@pytest.mark.slow
def test_a_checkpoint_restores_on_every_other_mesh(tmp_path):
    for source in ("2x2x2", "8x1"):
        _, state = trained(source, False, steps=2)
        checkpoints = Checkpoints(tmp_path / source)
        checkpoints.save(2, state._asdict(), wait=True)
        for target in (None, *MESHES):
            partition = partition_of(target)
            model = make_model(tiny_llama(), partition)
            abstract = jax.eval_shape(lambda s=state: s)
            shardings = state_shardings(model, abstract)
            wanted = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings)
            restored = checkpoints.restore(2, wanted._asdict())
            jax.tree.map(np.testing.assert_array_equal, host(restored), host(state._asdict()))
            assert restored["trainable"]["embedding"]["tokens_VD"].sharding.mesh.size == partition.mesh.size
        checkpoints.close()


def small_experiment(mesh):
    config = experiment(
        model=tiny_llama(),
        data=DataConfig(sequence_length=16, batch_size=8),
        objective=NextTokenConfig(logprobs="plain"),
        optimizer=adamw(),
        run=run(steps=10, sample_every=0),
        mesh=MESHES[mesh],
    )
    return resolve(config)


@jax.custom_vjp
def gathered(logits_BTV, target_BT):
    """The target's logit by a gather, whose gradient every shard of the vocabulary scatters as if the row were its own.

    That is what the compiler made of a plain gather on some meshes; planted, because it does not on all.
    """
    return jnp.take_along_axis(logits_BTV, target_BT[..., None], axis=-1)[..., 0]


def gathered_forward(logits_BTV, target_BT):
    return gathered(logits_BTV, target_BT), (target_BT, logits_BTV.shape[-1])


def gathered_backward(saved, cotangent_BT):
    target_BT, size = saved
    local_BTV = jnp.arange(size)[None, None] % (size // 2) == target_BT[..., None] % (size // 2)
    return jnp.where(local_BTV, cotangent_BT[..., None], 0.0), None


gathered.defvjp(gathered_forward, gathered_backward)


def gathered_logprobs(hidden_BTD, w_DV, target_BT, *, temperature=1.0, softcap=None, implementation="auto", **_):
    """Token log-probabilities as they must not be computed."""
    logits_BTV = jnp.einsum("BTD,DV->BTV", hidden_BTD, w_DV)
    logz_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    return TokenLogprobs(gathered(logits_BTV, target_BT) - logz_BT, logz_BT, logz_BT)


def test_check_catches_a_gather_over_a_sharded_vocabulary(monkeypatch):
    partition = make_partition(MESHES["2x2x2"])
    small = twin(small_experiment("2x2x2"), partition)
    module = importlib.import_module("llmlab.objective.base")
    right = module.token_logprobs

    def planted(hidden_BTD, w_DV, target_BT, **options):
        # Only where the mesh is: the one device that it is compared with gathers from a whole vocabulary.
        version = gathered_logprobs if on_mesh else right
        return version(hidden_BTD, w_DV, target_BT, **options)

    on_mesh = False

    def noted(config, partition=None):
        nonlocal on_mesh
        on_mesh = partition is not None and partition.mesh.size > 1
        model = make_model(config, partition)
        return model._replace(init=lambda key: random_params(model))

    monkeypatch.setattr(module, "token_logprobs", planted)
    monkeypatch.setattr("llmlab.train.check.make_model", noted)
    rows = list(gradient_rows(small, partition))
    assert rows[0].ok, "the loss itself is right: that is what makes it treacherous"
    assert not all(row.ok for row in rows)


@pytest.mark.slow
def test_check_passes_on_a_mesh():
    rows = list(check_experiment(small_experiment("2x2x2"), make_partition(MESHES["2x2x2"])))
    assert len(rows) > 10
    assert [row.name for row in rows if not row.ok] == []
