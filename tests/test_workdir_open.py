import dataclasses
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llmlab
from llmlab.core.config import to_json
from llmlab.core.errors import UserError
from llmlab.core.mesh import MeshConfig, make_partition
from llmlab.data.tokenizer_character import CharacterTokenizer
from llmlab.model.adapters import AdapterConfig, LowRank, adapter_of, add_adapter, merge_adapter
from llmlab.model.config import llama
from llmlab.model.matrices import with_leaves
from llmlab.model.score import SCORE, fresh_score
from llmlab.model.transformer import make_model
from llmlab.workdir.checkpoints import Checkpoints
from llmlab.workdir.files import Workdir
from llmlab.workdir.open import check_has_weights, frozen_weights, newest_base, open_workdir, weights_for

TOKENIZER = CharacterTokenizer("abcdefghijkl")
CONFIG = llama(width=16, layers=2, heads=2, vocab_size=TOKENIZER.vocab_size)


def numbered_params(start):
    """Parameters of CONFIG's shapes that are all different, for telling one tree from another."""
    abstract = jax.eval_shape(make_model(CONFIG).init, jax.random.key(0))
    leaves, structure = jax.tree.flatten(abstract)
    arrays = [jnp.asarray(start + i + np.arange(leaf.size).reshape(leaf.shape) * 1e-3, leaf.dtype)
              for i, leaf in enumerate(leaves)]  # fmt: skip
    return jax.tree.unflatten(structure, arrays)


def save(path, step, state):
    saver = Checkpoints(path / "checkpoints")
    saver.save(step, state | {"step": jnp.int32(step)}, wait=True)
    saver.close()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = Workdir(tmp_path_factory.mktemp("run"))
    workdir.write_config({"model": to_json(CONFIG)}, {})
    TOKENIZER.save(workdir.tokenizer)
    trained = {"trainable": numbered_params(0), "frozen": {}}
    save(workdir.path, 10, trained | {"ema": None})
    save(workdir.path, 20, trained | {"ema": numbered_params(100)})
    return workdir.path


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def assert_equal(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_it_opens_as_model_weights_and_tokenizer(run):
    opened = llmlab.open(run)
    assert opened.model.config == CONFIG
    assert opened.step == 20
    assert opened.config["model"]["width"] == 16
    assert opened.tokenizer.decode(opened.tokenizer.encode("face")) == "face"
    assert_equal(opened.params, numbered_params(100))
    logits_BTV = jax.eval_shape(opened.model.logits, opened.params, jnp.zeros((1, 3), jnp.int32))
    assert logits_BTV.shape == (1, 3, TOKENIZER.vocab_size)


def test_without_an_ema_the_trained_weights_are_given(run):
    shutil.rmtree(run / "checkpoints" / "20")
    opened = open_workdir(run)
    assert opened.step == 10
    assert_equal(opened.params, numbered_params(0))


def test_a_torn_checkpoint_gives_the_one_before(run):
    os.truncate(run / "checkpoints" / "20" / "_METADATA", 4)
    assert open_workdir(run).step == 10


def test_it_opens_onto_a_mesh(run):
    partition = make_partition(MeshConfig(fsdp=4, tensor=2))
    opened = open_workdir(run, partition)
    assert_equal(opened.params, numbered_params(100))
    expected = partition.shardings(opened.model.axes)
    for leaf, sharding in zip(jax.tree.leaves(opened.params), jax.tree.leaves(expected), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)


def test_another_run_starts_from_these_weights_in_its_own_dtype(run):
    model = make_model(dataclasses.replace(CONFIG, param_dtype="bfloat16"))
    found = weights_for(run, model)
    assert_equal(found, jax.tree.map(lambda x: x.astype(jnp.bfloat16), numbered_params(100)))


def test_a_model_of_another_shape_is_refused_with_the_weight_and_both_shapes(run):
    wider = make_model(dataclasses.replace(CONFIG, width=32, head_dim=8))
    with pytest.raises(UserError, match=r"ema\.embedding\.tokens_VD is \(16, 16\) in .* and \(16, 32\) here"):
        weights_for(run, wider)
    biased = make_model(dataclasses.replace(CONFIG, norm="layernorm", bias=True))
    with pytest.raises(UserError, match=r"holds no trainable\..*: it was saved by another config"):
        weights_for(run, biased)


REWARD = dataclasses.replace(CONFIG, head="score")
ADAPTER = AdapterConfig(kind="lora", rank=2, include="query_DNH")


def saved_run(path, config, trainable, adapter=None, **facts):
    """A workdir whose checkpoint, at step 10, holds what was trained."""
    workdir = Workdir(path)
    path.mkdir()
    workdir.write_config({"model": to_json(config), "adapter": to_json(adapter or AdapterConfig())}, facts)
    TOKENIZER.save(workdir.tokenizer)
    save(path, 10, {"trainable": trainable, "ema": None})
    return path


def trunk(params):
    return jax.tree.leaves(with_leaves(params, {SCORE: None}))


def reward_params(start, score):
    """`numbered_params` of the trunk, with this score."""
    params = numbered_params(start)
    return params | {"head": {"norm": params["head"]["norm"], "score_D": jnp.full(16, score)}}


@pytest.mark.parametrize("mesh", [None, MeshConfig(fsdp=4, tensor=2)])
def test_a_reward_model_starts_from_weights_that_predict_tokens(run, mesh):
    model = make_model(REWARD, mesh and make_partition(mesh))
    key = jax.random.key(3)
    found = weights_for(run, model, key)
    expected = jax.jit(make_model(REWARD).init)(key)["head"]["score_D"]
    np.testing.assert_array_equal(found["head"]["score_D"], expected)
    assert_equal(trunk(found), trunk(reward_params(100, 0.0)))
    if mesh:
        expected = model.partition.shardings(model.axes)
        for leaf, sharding in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    with pytest.raises(UserError, match=r"predicts tokens \(model\.head=tokens\): name the workdir of a reward model"):
        weights_for(run, model)


def test_a_reward_model_starts_from_another_with_its_score(tmp_path):
    reward = saved_run(tmp_path / "reward", REWARD, reward_params(100, 0.5))
    found = weights_for(reward, make_model(REWARD), jax.random.key(3))
    assert_equal(found, reward_params(100, 0.5))
    opened = open_workdir(reward)
    assert_equal(opened.params, found)


def test_a_model_that_predicts_tokens_does_not_start_from_a_reward_model(tmp_path):
    reward = saved_run(tmp_path / "reward", REWARD, reward_params(100, 0.5))
    for start in (lambda: weights_for(reward, make_model(CONFIG)), lambda: check_has_weights(reward, CONFIG)):
        with pytest.raises(
            UserError, match=r"reward is a reward model \(model\.head=score\), .* set model\.head=score$"
        ):
            start()
    check_has_weights(reward, REWARD)


@pytest.mark.parametrize("bits", [0, 8])
def test_an_adapter_over_weights_that_predict_tokens_brings_the_score(run, tmp_path, bits):
    """And another reward model starts from both, merged."""
    model, config = make_model(REWARD), dataclasses.replace(ADAPTER, base_bits=bits)
    base = newest_base(run)
    frozen = frozen_weights(base, config, model)
    assert frozen["head"]["score_D"] is None
    adapter = add_adapter(model, frozen, config, jax.random.key(3))
    np.testing.assert_array_equal(adapter[SCORE], fresh_score(model, jax.random.key(3)))
    adapter = jax.tree.map(lambda x: x + 0.5, adapter)
    path = saved_run(tmp_path / "lora", REWARD, adapter, config, base=base._asdict())
    opened = open_workdir(path)
    assert_equal(adapter_of(opened.params), adapter)
    found = weights_for(path, model, jax.random.key(4))
    assert_equal(found, merge_adapter(frozen_weights(base, config, model), adapter))


def test_a_reward_model_starts_from_an_adapter_that_predicts_tokens(run, tmp_path):
    tokens, reward, base = make_model(CONFIG), make_model(REWARD), newest_base(run)
    frozen = frozen_weights(base, ADAPTER, tokens)
    adapter = jax.tree.map(lambda x: x + 0.5, add_adapter(tokens, frozen, ADAPTER, jax.random.key(3)))
    assert all(isinstance(update, LowRank) for update in adapter.values())
    path = saved_run(tmp_path / "lora", CONFIG, adapter, ADAPTER, base=base._asdict())
    found = weights_for(path, reward, jax.random.key(4))
    np.testing.assert_array_equal(found["head"]["score_D"], fresh_score(reward, jax.random.key(4)))
    merged = merge_adapter(frozen, adapter)
    merged["head"].pop("unembedding_DV")
    assert_equal(trunk(found), jax.tree.leaves(merged))


@pytest.mark.parametrize(
    "spoil, says",
    [
        (lambda run: shutil.rmtree(run), "there is no workdir"),
        (lambda run: (run / "config.json").unlink(), "no config.json"),
        (lambda run: os.truncate(run / "config.json", 30), "config.json is torn"),
        (lambda run: (run / "config.json").write_text('{"config": {}}'), "has no section model"),
        (lambda run: (run / "tokenizer.model").unlink(), "tokenizer.model is missing"),
        (lambda run: os.truncate(run / "tokenizer.model", 0), "tokenizer.model"),
        (lambda run: shutil.rmtree(run / "checkpoints"), "holds no whole checkpoint"),
        (lambda run: [(p / "manifest.json").unlink() for p in (run / "checkpoints").iterdir()], "no whole checkpoint"),
    ],
)
def test_what_is_missing_is_said_in_one_line(run, spoil, says):
    spoil(run)
    with pytest.raises(UserError) as caught:
        open_workdir(run)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
