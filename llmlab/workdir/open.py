"""From a workdir back to a model, its weights and its tokenizer."""

import os
from typing import Any, NamedTuple

import jax

from llmlab.core.config import from_config_dict
from llmlab.core.errors import UserError
from llmlab.core.mesh import Partition
from llmlab.data.tokenizer import Tokenizer, load_tokenizer
from llmlab.model import weights
from llmlab.model.adapters import AdapterConfig, adapted, adapter_axes, add_adapter, frozen_base
from llmlab.model.config import ModelConfig
from llmlab.model.cost import abstract_params
from llmlab.model.matrices import leaf_at, with_leaves
from llmlab.model.score import SCORE, fresh_score
from llmlab.model.transformer import make_model
from llmlab.model.types import Model, Params
from llmlab.workdir import manifest
from llmlab.workdir.checkpoints import latest_step, restore_subtree, saved_arrays
from llmlab.workdir.files import Workdir

_NO_CHECKPOINT = "{} holds no whole checkpoint: train it, with run.checkpoint_every set, until one is"


class Opened(NamedTuple):
    """A trained model: `config` is the resolved config of its run, `step` that of its last good checkpoint.

    Where that run trained an adapter, `params` are the weights under it with the adapter over them.
    """

    model: Model
    params: Params
    tokenizer: Tokenizer
    step: int
    config: dict[str, Any]


class Base(NamedTuple):
    """The checkpoint whose weights are frozen under an adapter, as config.json of the adapter's run refers to it."""

    workdir: str
    step: int
    digest: str


def open_workdir(path: str | os.PathLike[str], partition: Partition | None = None) -> Opened:
    """Opens the last good checkpoint of a workdir, on one device or over `partition`.

    Raises:
      UserError: there is no such workdir, or something in it is missing or torn.
    """
    workdir = Workdir(path)
    config, model = workdir.read_config()["config"], make_model(model_config(path), partition)
    if not workdir.tokenizer.exists():
        raise UserError(f"{workdir.tokenizer} is missing: copy it from where the run was trained")
    tokenizer = load_tokenizer(workdir.tokenizer)
    step = _good_step(workdir)
    return Opened(model, _weights(workdir, step, model), tokenizer, step, config)


def model_config(path: str | os.PathLike[str]) -> ModelConfig:
    """The settings of a workdir's model.

    Raises:
      UserError: there is no such workdir, or its config.json is torn.
    """
    workdir = Workdir(path)
    config = workdir.read_config()["config"]
    if "model" not in config:
        raise UserError(f"{workdir.config} has no section model: restore that file, or train into a new workdir")
    return from_config_dict(ModelConfig, config["model"], "model")


def weights_for(path: str | os.PathLike[str], model: Model, key: jax.Array | None = None) -> Params:
    """The weights of a workdir for another run's model, in its dtypes and shardings; an adapter is merged into them.

    A reward model also starts from weights that predict tokens: with `key`, from which its score is drawn then, as
    `model.init` draws it.

    Raises:
      UserError: no workdir, no whole checkpoint, or a weight that is missing there or has another shape.
    """
    workdir = Workdir(path)
    workdir.read_config()
    params = weights.whole(_weights(workdir, _good_step(workdir), model))
    if model.config.head == "tokens" or leaf_at(params, SCORE) is not None:
        return params
    if key is None:
        raise UserError(f"{workdir.path} predicts tokens (model.head=tokens): name the workdir of a reward model")
    return with_leaves(params, {SCORE: fresh_score(model, key)})


def newest_base(path: str | os.PathLike[str]) -> Base:
    """The last good checkpoint of a workdir, for an adapter over it.

    Raises:
      UserError: no workdir, or no whole checkpoint.
    """
    workdir = Workdir(path)
    workdir.read_config()
    step = _good_step(workdir)
    return Base(str(workdir.path), step, manifest.digest(manifest.read(workdir.checkpoints / str(step))))


def check_base(base: Base) -> None:
    """Raises UserError where the checkpoint is not there, or not what it was when the adapter was trained."""
    folder = Workdir(base.workdir).checkpoints / str(base.step)
    if not folder.is_dir():
        raise UserError(
            f"the weights that this run stands on are gone: there is no {folder} (moved, or deleted as its run "
            f"went on): put it back, or run the same `llmlab train` command again with its --init_from=NEW_WORKDIR"
        )
    if (found := manifest.digest(manifest.verify(folder))) != base.digest:
        raise UserError(
            f"{folder} is not what this run was trained over (its hash was {base.digest[:12]}, now {found[:12]}): "
            f"put that checkpoint back, or train anew in another workdir"
        )


def frozen_weights(base: Base, config: AdapterConfig, model: Model) -> Params:
    """The weights under an adapter, in the model's dtypes and shardings, quantised where `config` says so.

    Of a reward model over weights that predict tokens the score is None: it is the adapter's.
    """
    params = weights.whole(_weights(Workdir(base.workdir), base.step, model))
    return frozen_base(model, params, config, release=True)


def weights_of(base: Base, model: Model) -> Params:
    """The weights of a checkpoint that is known by its hash, whole, in the model's dtypes and shardings.

    Raises:
      UserError: it is not there, or not what it was.
    """
    check_base(base)
    return weights.whole(_weights(Workdir(base.workdir), base.step, model))


def check_has_weights(path: str | os.PathLike[str], config: ModelConfig) -> None:
    """Raises UserError where no model of this config can start from `path`, by its config and files; reads none."""
    workdir = Workdir(path)
    _lacks_score(workdir, config)
    if not any(workdir.checkpoints.glob(f"*/{manifest.NAME}")):
        raise UserError(_NO_CHECKPOINT.format(workdir.path))


def _good_step(workdir: Workdir) -> int:
    step = latest_step(workdir.checkpoints)
    if step is None:
        raise UserError(_NO_CHECKPOINT.format(workdir.path))
    return step


def _weights(workdir: Workdir, step: int, model: Model) -> Params:
    """The weights as evaluation and samples use them; the score of a reward model is None where it was not trained."""
    content = workdir.read_config()
    if "base" not in content:
        return _restored(workdir, step, model, abstract_params(model), model.axes)
    config = from_config_dict(AdapterConfig, content["config"]["adapter"], "adapter")
    base = Base(**content["base"])
    check_base(base)
    frozen = frozen_weights(base, config, model)
    abstract = jax.eval_shape(lambda frozen: add_adapter(model, frozen, config, jax.random.key(0)), frozen)
    return adapted(frozen, _restored(workdir, step, model, abstract, adapter_axes(model, config)))


def _restored(workdir: Workdir, step: int, model: Model, abstract: Any, axes: Any) -> Any:
    """What was trained, as `abstract`: its EMA where the run kept one."""
    if model.partition is not None:
        abstract = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            abstract,
            model.partition.shardings(axes),
        )
    if _lacks_score(workdir, model.config):
        abstract = jax.tree_util.tree_map_with_path(lambda path, leaf: None if _name(path) == SCORE else leaf, abstract)
    saved, wanted = saved_arrays(workdir.checkpoints, step), {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract):
        name = _name(path)
        wanted[f"ema.{name}" if f"ema.{name}" in saved else f"trainable.{name}"] = leaf
    restored = restore_subtree(workdir.checkpoints, step, wanted)
    return jax.tree.unflatten(jax.tree.structure(abstract), [restored[name] for name in wanted])


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _lacks_score(workdir: Workdir, config: ModelConfig) -> bool:
    """Whether a model of this config has a score that the workdir's has not; UserError where it is the other way."""
    saved = model_config(workdir.path).head
    if saved == "score" and config.head == "tokens":
        raise UserError(
            f"{workdir.path} is a reward model (model.head=score), which has learned to predict no tokens: start from "
            f"the weights that it began with, or set model.head=score"
        )
    return saved != config.head
