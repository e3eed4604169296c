"""From a workdir back to a model, its weights and its tokenizer."""

import os
from typing import Any, NamedTuple

import jax

from llmlab.core.config import from_config_dict
from llmlab.core.errors import UserError
from llmlab.core.mesh import Partition
from llmlab.data.tokenizer import Tokenizer, load_tokenizer
from llmlab.model.config import ModelConfig
from llmlab.model.transformer import make_model
from llmlab.model.types import Model, Params
from llmlab.workdir import manifest
from llmlab.workdir.checkpoints import latest_step, restore_subtree, saved_arrays
from llmlab.workdir.files import Workdir

_NO_CHECKPOINT = "{} holds no whole checkpoint: train it, with run.checkpoint_every set, until one is"


class Opened(NamedTuple):
    """A trained model: `config` is the resolved config of its run, `step` that of its last good checkpoint."""

    model: Model
    params: Params
    tokenizer: Tokenizer
    step: int
    config: dict[str, Any]


def open_workdir(path: str | os.PathLike[str], partition: Partition | None = None) -> Opened:
    """Opens the last good checkpoint of a workdir, on one device or over `partition`.

    Raises:
      UserError: there is no such workdir, or something in it is missing or torn.
    """
    workdir = Workdir(path)
    config = workdir.read_config()["config"]
    if "model" not in config:
        raise UserError(f"{workdir.config} has no section model: restore that file, or train into a new workdir")
    model = make_model(from_config_dict(ModelConfig, config["model"], "model"), partition)
    if not workdir.tokenizer.exists():
        raise UserError(f"{workdir.tokenizer} is missing: copy it from where the run was trained")
    tokenizer = load_tokenizer(workdir.tokenizer)
    step = _good_step(workdir)
    return Opened(model, _weights(workdir, step, model), tokenizer, step, config)


def weights_for(path: str | os.PathLike[str], model: Model) -> Params:
    """The weights of a workdir for another run's model, in its dtypes and shardings.

    Raises:
      UserError: no workdir, no whole checkpoint, or a weight that is missing there or has another shape.
    """
    workdir = Workdir(path)
    workdir.read_config()
    return _weights(workdir, _good_step(workdir), model)


def check_has_weights(path: str | os.PathLike[str]) -> None:
    """Raises UserError where `path` is no workdir or no checkpoint was ever committed there; reads none."""
    workdir = Workdir(path)
    workdir.read_config()
    if not any(workdir.checkpoints.glob(f"*/{manifest.NAME}")):
        raise UserError(_NO_CHECKPOINT.format(workdir.path))


def _good_step(workdir: Workdir) -> int:
    step = latest_step(workdir.checkpoints)
    if step is None:
        raise UserError(_NO_CHECKPOINT.format(workdir.path))
    return step


def _weights(workdir: Workdir, step: int, model: Model) -> Params:
    """The weights that evaluation and samples use: the EMA where the run kept one, else the trained ones."""
    abstract = jax.eval_shape(model.init, jax.random.key(0))
    if model.partition is not None:
        shardings = model.partition.shardings(model.axes)
        abstract = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), abstract, shardings
        )
    saved = saved_arrays(workdir.checkpoints, step)
    leaves, wanted = jax.tree_util.tree_leaves_with_path(abstract), {}
    for path, leaf in leaves:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        places = [f"{tree}.{name}" for tree in ("ema", "trainable", "frozen")]
        wanted[next((place for place in places if place in saved), places[1])] = leaf
    restored = restore_subtree(workdir.checkpoints, step, wanted)
    return jax.tree.unflatten(jax.tree.structure(abstract), [restored[name] for name in wanted])
