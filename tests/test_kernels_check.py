"""The start-up check: passes what is right, catches what is planted, and runs once per device and version."""

import dataclasses
import errno
import functools
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.quickstart import get_config
from llmlab.core.arrays import Mean
from llmlab.core.errors import UserError
from llmlab.core.mesh import single_device
from llmlab.data.pipeline import TokenBatch
from llmlab.kernels import attention as attention_contract
from llmlab.kernels import attention_blockwise, check, logprobs
from llmlab.kernels.attention_blockwise import BLOCK
from llmlab.kernels.check import Comparison, check_attention, check_ssm, check_token_logprobs, checked_once, compare
from llmlab.model.config import LatentConfig, deepseek
from llmlab.model.ssm import SsmConfig
from llmlab.model.transformer import make_model
from llmlab.train import check as run_check
from llmlab.train.config import resolve
from tests.helpers import random_params, tiny_llama


def failed(rows):
    return [row.name for row in rows if not row.ok]


@pytest.mark.parametrize(
    "kind",
    [
        {"implementation": "blockwise", "packed": True, "window": 50},
        {"implementation": "short", "packed": True, "softcap": 5.0},
        pytest.param({"implementation": "blockwise"}, marks=pytest.mark.slow),
        pytest.param({"causal": False}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_attention_passes(kind):
    rows = check_attention(16, 4, 2, jnp.float32, **kind)
    assert {row.name for row in rows} == {"attention", "gradient of q", "gradient of k", "gradient of v"}
    assert failed(rows) == []


@pytest.mark.parametrize("implementation", ["short", pytest.param("blockwise", marks=pytest.mark.slow)])
def test_attention_with_sinks_and_narrow_values_passes(implementation):
    rows = check_attention(12, 4, 2, jnp.float32, value_dim=8, sinks=True, packed=True, implementation=implementation)
    assert {row.name for row in rows} >= {"attention", "gradient of v", "gradient of sinks_N"}
    assert failed(rows) == []


def test_sinks_that_a_version_forgets_are_caught(monkeypatch):
    attention = check.attention

    def forgetful(*args, implementation, sinks_N=None, **kwargs):
        kept = {"sinks_N": sinks_N} if implementation == "reference" else {}
        return attention(*args, implementation=implementation, **kept, **kwargs)

    monkeypatch.setattr(check, "attention", forgetful)
    rows = check_attention(8, 2, 1, jnp.float32, sinks=True, implementation="blockwise", length=64)
    assert "gradient of sinks_N" in failed(rows)


def test_attention_in_bfloat16_passes_its_own_tolerance():
    rows = check_attention(16, 2, 2, jnp.bfloat16, implementation="blockwise", packed=True)
    assert failed(rows) == []
    assert all(row.error > 1e-4 for row in rows)  # it was bfloat16 that was compared, with something more precise


def test_the_check_is_two_blocks_long():
    seen = []

    def spy(*args, **kwargs):
        seen.append(args[0].shape[1])
        return attention(*args, **kwargs)

    attention = check.attention
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(check, "attention", spy)
        check_attention(8, 1, 1, jnp.float32)
    assert min(seen) >= 2 * BLOCK


def test_ignored_segment_ids_are_caught(monkeypatch):
    attention = check.attention

    def forgetful(*args, implementation, **kwargs):
        if implementation != "reference":
            kwargs |= {"q_segment_ids_BT": None, "k_segment_ids_BS": None}
        return attention(*args, implementation=implementation, **kwargs)

    monkeypatch.setattr(check, "attention", forgetful)
    kind = {"implementation": "blockwise", "length": 64}
    assert failed(check_attention(8, 2, 1, jnp.float32, packed=False, **kind)) == []
    assert "attention" in failed(check_attention(8, 2, 1, jnp.float32, packed=True, **kind))


@pytest.mark.parametrize("packed", [pytest.param(False, marks=pytest.mark.slow), True])
def test_the_state_space_passes(packed):
    rows = check_ssm(8, 4, jnp.float32, chunk=16, groups=2, packed=packed, implementation="chunked")
    gradients = {f"gradient of {name}" for name in ("x", "dt", "rate", "b", "c")}
    assert {row.name for row in rows} == {"y", "state"} | gradients
    assert failed(rows) == []


@pytest.mark.slow
def test_a_state_that_passes_between_documents_is_caught(monkeypatch):
    ssm = check.ssm

    def forgetful(*args, segment_ids_BT, implementation, **kwargs):
        if implementation != "reference":
            segment_ids_BT = jnp.minimum(segment_ids_BT, 1)
        return ssm(*args, segment_ids_BT=segment_ids_BT, implementation=implementation, **kwargs)

    monkeypatch.setattr(check, "ssm", forgetful)
    assert failed(check_ssm(8, 4, jnp.float32, chunk=16, packed=False)) == []
    assert "y" in failed(check_ssm(8, 4, jnp.float32, chunk=16, packed=True))


@pytest.mark.parametrize("implementation", ["plain", "chunked"])
def test_token_logprobs_pass(implementation):
    rows = check_token_logprobs(32, 100, jnp.float32, temperature=0.7, implementation=implementation, chunk=20)
    assert {row.name for row in rows} == {"logp_BT", "logz_BT", "entropy_BT", "gradient of hidden", "gradient of w"}
    assert failed(rows) == []


def test_a_wrong_gradient_with_the_right_value_is_caught():
    @jax.custom_vjp
    def square(x):
        return {"y": x**2}

    square.defvjp(lambda x: (square(x), x), lambda x, g: (1.9 * x * g["y"],))
    rows = compare(square, lambda x: {"y": x**2}, {"x": jnp.arange(1.0, 5.0)}, tolerance=1e-3)
    assert failed(rows) == ["gradient of x"]
    assert rows[1].error == pytest.approx(0.05, rel=1e-3)


def test_a_result_that_is_not_a_number_is_not_ok():
    rows = compare(lambda x: {"y": x * jnp.nan}, lambda x: {"y": x}, {"x": jnp.ones(2)}, tolerance=1e9)
    assert failed(rows) == ["y", "gradient of x"]


class Counter:
    """A check that counts how often it ran."""

    def __init__(self, ok=True):
        self.runs, self.rows = 0, [Comparison("x", 1e-7, 1e-4, ok)]

    def __call__(self):
        self.runs += 1
        return self.rows


def test_it_runs_once_per_key(tmp_path):
    run = Counter()
    for key in (["attention", 64], ["attention", 64], ["attention", 128]):
        assert checked_once(key, run, tmp_path / "cache") == run.rows
    assert run.runs == 2


@pytest.mark.parametrize("version", ["check.__version__", "check.jax.__version__", "check.metadata.version"])
def test_another_version_runs_again(tmp_path, monkeypatch, version):
    run = Counter()
    checked_once([], run, tmp_path)
    monkeypatch.setattr(
        f"llmlab.kernels.{version}", (lambda _: "another") if version.endswith(".version") else "another"
    )
    checked_once([], run, tmp_path)
    assert run.runs == 2


def test_another_driver_runs_again(tmp_path, monkeypatch):
    run = Counter()
    for driver in ("cuda 12", "cuda 13", "cuda 12"):
        client = types.SimpleNamespace(platform_version=driver)
        device = types.SimpleNamespace(platform="gpu", device_kind="a", client=client)
        monkeypatch.setattr(jax, "devices", lambda device=device: [device])
        checked_once([], run, tmp_path)
    assert run.runs == 2


def test_a_full_disk_does_no_harm(tmp_path, monkeypatch):
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    run = Counter()
    assert checked_once([], run, tmp_path) == run.rows
    assert list(tmp_path.iterdir()) == []


def test_a_failure_is_not_remembered(tmp_path):
    run = Counter(ok=False)
    assert [checked_once([], run, tmp_path) for _ in range(2)] == [run.rows] * 2
    assert run.runs == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("torn", ["", '{"rows": [["x", 1e-7', "[]", '{"rows": [["x"]]}', '{"rows": []}'])
def test_a_torn_marker_only_means_another_check(tmp_path, torn):
    run = Counter()
    checked_once([], run, tmp_path)
    (marker,) = tmp_path.iterdir()
    marker.write_text(torn)
    assert checked_once([], run, tmp_path) == run.rows
    assert run.runs == 2
    checked_once([], run, tmp_path)
    assert run.runs == 2
    assert list(tmp_path.iterdir()) == [marker]


def test_a_cache_that_cannot_be_written_does_no_harm(tmp_path):
    (tmp_path / "file").write_text("")
    run = Counter()
    assert checked_once([], run, tmp_path / "file" / "cache") == run.rows


# --- the check of a run ----------------------------------------------------------------------------------------------


@functools.cache
def quickstart():
    """Rows of 256 tokens, 16 of them, over a vocabulary of 4096."""
    return resolve(get_config())


def changed(experiment, **sections):
    """The experiment with keys of its sections replaced."""
    new = {name: dataclasses.replace(getattr(experiment, name), **keys) for name, keys in sections.items()}
    return dataclasses.replace(experiment, **new)


@pytest.fixture
def used(monkeypatch):
    """The names of the versions that were called since."""
    names = []
    attention = [(attention_contract, "short"), (attention_contract, "blockwise")]
    for module, attribute in [*attention, (logprobs, "_plain"), (logprobs, "_chunked")]:
        version = getattr(module, attribute)

        def noted(*args, name=attribute.strip("_"), version=version, **kwargs):
            names.append(name)
            return version(*args, **kwargs)

        monkeypatch.setattr(module, attribute, noted)
    return names


@pytest.mark.parametrize(
    "sections, expected",
    [
        ({}, {"short", "chunked"}),
        ({"optimizer": {"accumulate": 2}}, {"short", "plain"}),
        (
            {"data": {"batch_size": 2, "sequence_length": 2048}, "model": {"max_positions": 2048}},
            {"blockwise", "chunked"},
        ),
        ({"data": {"batch_size": 512}}, {"blockwise", "chunked"}),
        ({"model": {"attention": "blockwise"}, "objective": {"logprobs": "plain"}}, {"blockwise", "plain"}),
    ],
    ids=lambda value: str(sorted(value)) if isinstance(value, set) else str(value),  # workers hash strings apart
)
def test_a_run_and_its_check_use_the_same_versions(sections, expected, used):
    experiment = changed(quickstart(), **sections)
    config = dataclasses.replace(experiment.model, vocab_size=experiment.data.tokenizer.vocab_size)
    model = make_model(config)
    loss = experiment.objective.make(model, np.ones(config.vocab_size, np.int32))
    shape = (experiment.data.batch_size // experiment.optimizer.accumulate, experiment.data.sequence_length)
    ids, mask = jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0))
    used.clear()
    jax.eval_shape(lambda params, batch: loss(params, batch, None), params, TokenBatch(ids, ids, mask, ids, ids))
    assert set(used) == expected
    assert {each.keywords["implementation"] for each in run_check.kernel_checks(experiment)} == expected


@pytest.fixture
def drawn(monkeypatch):
    """Weights of twins by numpy: how they begin is not what is checked, and takes long to compile."""
    monkeypatch.setattr(
        run_check, "make_model", lambda *given: (m := make_model(*given))._replace(init=lambda key: random_params(m))
    )


def small_run(**sections):
    """As the quickstart, over a narrow model."""
    narrow = tiny_llama(dtype="float32", vocab_size=64, max_positions=512)
    return changed(dataclasses.replace(quickstart(), model=narrow), **sections)


def test_the_check_knows_the_sinks_and_the_widths_of_the_run():
    (with_sinks, _) = run_check.kernel_checks(small_run(model={"attention_sinks": True}))
    assert with_sinks.keywords["sinks"]
    latent = LatentConfig(kv_rank=8, nope_dim=12, rope_dim=4, value_dim=10)
    (narrow, _) = run_check.kernel_checks(small_run(model={"kv_heads": 0, "latent": latent}))
    assert narrow.args[:3] == (16, 4, 4)
    assert (narrow.keywords["value_dim"], narrow.keywords["sinks"]) == (10, False)


def test_the_twin_keeps_experts_and_latents_and_one_leading_dense_layer():
    wide = deepseek("small", width=512, layers=9, vocab_size=64)
    wide = dataclasses.replace(wide, experts=dataclasses.replace(wide.experts, first_dense=3))
    twin = run_check.twin(dataclasses.replace(quickstart(), model=wide), single_device()).model
    assert (twin.width, twin.stacks(), twin.expert_width) == (64, ((0,), (1, 2)), 128)
    assert (twin.experts.count, twin.experts.score, twin.latent) == (16, "sigmoid", wide.latent)


def test_the_versions_are_checked_in_several_pieces(used, monkeypatch):
    experiment = small_run(data={"batch_size": 4096, "sequence_length": 64})
    pieces = {}
    split, to_blocks = logprobs._split, attention_blockwise._to_blocks

    def noted_split(arrays, chunk):
        out = split(arrays, chunk)
        pieces["chunks"] = len(out[0])
        return out

    def noted_blocks(q_BTNH, block, K):
        out = to_blocks(q_BTNH, block, K)
        pieces["blocks"] = len(out)
        return out

    monkeypatch.setattr(logprobs, "_split", noted_split)
    monkeypatch.setattr(attention_blockwise, "_to_blocks", noted_blocks)
    monkeypatch.setattr(attention_contract, "SHORT_SCORES_IN_ALL", 2**20)
    assert failed(run_check.kernel_rows(experiment)) == []
    assert set(used) == {"blockwise", "chunked"}
    assert pieces == {"chunks": 3, "blocks": 3}


def test_the_check_gives_segment_ids_as_the_model_does(monkeypatch):
    given = []
    right = check.attention

    def noted(*args, **kwargs):
        given.append(kwargs["q_segment_ids_BT"] is not None and kwargs["k_segment_ids_BS"] is not None)
        return right(*args, **kwargs)

    monkeypatch.setattr(check, "attention", noted)
    run_check.kernel_checks(small_run(data={"packing": "chunk"}))[0]()
    assert given
    assert all(given)


def test_a_run_checks_what_its_kinds_of_layers_use():
    ssm = SsmConfig(state=6, head_dim=8, groups=2, chunk=32)
    for pattern, expected in (("mamba",), {"check_ssm"}), (("mamba", "global"), {"check_ssm", "check_attention"}):
        checks = run_check.kernel_checks(small_run(model={"pattern": pattern, "ssm": ssm}))
        assert {each.func.__name__ for each in checks} == expected | {"check_token_logprobs"}
    assert checks[0].args == (8, 6, "float32")
    assert checks[0].keywords == dict(groups=2, packed=True, implementation="auto", chunk=32)


def test_a_run_that_asks_for_cudnn_is_refused_at_its_check(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(UserError, match="'cudnn' cannot do this: it takes no segment ids.*use 'auto'"):
        run_check.kernel_rows(small_run(model={"attention": "cudnn", "dtype": "bfloat16"}, data={"packing": "chunk"}))


def test_gradients_are_compared_in_full_precision(drawn, monkeypatch):
    seen = []

    def noted(loss, params, *args):
        seen.append(jax.config.jax_default_matmul_precision)
        return Mean(jnp.ones(()), jnp.ones(())), {}, params

    monkeypatch.setattr(run_check, "accumulated_gradients", noted)
    before = jax.config.jax_default_matmul_precision
    small = run_check.twin(small_run(data={"sequence_length": 16}), single_device())
    for row in run_check.gradient_rows(small, single_device()):
        assert row.ok
        assert jax.config.jax_default_matmul_precision == before
    assert seen == ["highest", "highest"]


def test_a_state_is_saved_in_the_folder_given_and_nothing_left(drawn, tmp_path, monkeypatch):
    saved = []
    right = run_check.Checkpoints
    monkeypatch.setattr(run_check, "Checkpoints", lambda folder: (saved.append(folder), right(folder))[1])
    folder = tmp_path / "not yet" / "there"
    (row,) = run_check.restore_rows(small_run(), single_device(), folder)
    assert row.ok
    assert [place.is_relative_to(folder) for place in saved] == [True]
    assert list(folder.iterdir()) == []


def test_several_processes_need_a_folder(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match="give --workdir on a shared file system"):
        next(run_check.check_experiment(small_run(), single_device()))


def test_a_folder_that_is_not_shared_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(run_check, "_same_everywhere", lambda own: str(Path(own) / "of process 0"))
    with pytest.raises(UserError, match="not the same folder on all hosts"):
        next(run_check.restore_rows(small_run(), single_device(), tmp_path))
