"""`llmlab convert`: a folder in the Hugging Face layout becomes a workdir, or a workdir such a folder; adapters too."""

import dataclasses
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

from llmlab.core.config import from_config_dict, to_json
from llmlab.core.errors import UserError
from llmlab.core.mesh import MeshConfig
from llmlab.core.paths import check_free, new_folder
from llmlab.data import text
from llmlab.data.tokenizer import Tokenizer, TokenizerConfig
from llmlab.data.tokenizer_imported import import_tokenizer
from llmlab.model import hf, peft, weights
from llmlab.model.adapters import AdapterConfig, adapter_of
from llmlab.model.config import ModelConfig
from llmlab.model.cost import parameter_count
from llmlab.model.families import Family
from llmlab.model.transformer import make_model
from llmlab.objective import RewardConfig, next_token
from llmlab.train.config import Experiment, run, sections_of
from llmlab.train.optimizer import adamw
from llmlab.workdir.checkpoints import Checkpoints
from llmlab.workdir.files import Workdir
from llmlab.workdir.open import newest_base, open_workdir

log = logging.getLogger(__name__)

SOURCE = "source"  # what a converted workdir keeps of where it came from
_KEPT = (
    *("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*", "README.md", "generation_config.json"),
    *("tokenizer_config.json", "special_tokens_map.json", "chat_template.*"),
)


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    dtype: hf.DType | None = None,
    *,
    base: str = "",
    adapter_only: bool = False,
) -> str:
    """Converts `source` into `target`, whichever way; what there is to say about it, in a few lines.

    Args:
      dtype: where `source` is a model's folder, that of its weights; None: as they come.
      base: where `source` is an adapter of PEFT, the workdir whose weights it is for.
      adapter_only: where `source` is the workdir of an adapter, write it in PEFT's format, not merged.

    Raises:
      UserError: `source` is neither, something in it is not supported, or `target` is there already.
    """
    source, target = Path(source).expanduser(), Path(target).expanduser().absolute()
    if not source.is_dir():
        raise UserError(f"there is no folder {source}: give a model's folder, or a workdir")
    check_free(target)
    is_adapter = (source / peft.CONFIG).exists()
    is_workdir = not is_adapter and "config" in hf.read_json(source / "config.json")
    if base and not is_adapter:
        raise UserError(f"--base is for an adapter, and {source} has no {peft.CONFIG}: leave it out")
    if dtype and (is_adapter or is_workdir):
        raise UserError(f"--dtype={dtype} is for open weights that come in, and {source} is none: leave it out")
    if adapter_only and not is_workdir:
        raise UserError(f"--adapter_only is for the workdir of an adapter, and {source} is none: leave it out")
    if is_adapter:
        if not base:
            raise UserError(f"{source} is an adapter: name the workdir of the weights it is for, --base=runs/model")
        return adapter_to_workdir(source, Path(base).expanduser(), target)
    if is_workdir:
        return adapter_to_folder(source, target) if adapter_only else to_folder(source, target)
    return to_workdir(source, target, dtype)


def adapter_to_workdir(folder: Path, base: Path, target: Path) -> str:
    """A workdir of an adapter in PEFT's format, over the newest checkpoint of the workdir `base`."""
    under = newest_base(base)
    config = sections_of(Workdir(base).read_config()["config"])
    if config.adapter.kind != "none":
        raise UserError(f"{base} is an adapter itself: name the workdir of whole weights")
    if peft.is_scorer(folder) and config.model.head != "score":
        config = _judging(dataclasses.replace(config, model=dataclasses.replace(config.model, head="score")))
    adapter, settings = peft.load_peft(make_model(config.model), folder)
    experiment = dataclasses.replace(config, adapter=settings, run=dataclasses.replace(config.run, init_from=str(base)))
    with new_folder(target) as partial:
        workdir = Workdir(partial)
        shutil.copyfile(Workdir(base).tokenizer, workdir.tokenizer)
        workdir.write_config(to_json(experiment), {"base": under._asdict()})
        _save(workdir, adapter)
    return f"{parameter_count(adapter):,} parameters of an adapter over {base}, step {under.step}\nwritten   {target}"


def adapter_to_folder(source: Path, target: Path) -> str:
    """A folder that PEFT reads, from the workdir of an adapter."""
    opened = open_workdir(source)
    config = from_config_dict(AdapterConfig, opened.config["adapter"], "adapter")
    if config.kind == "none":
        raise UserError(f"{source} has whole weights and no adapter: leave out --adapter_only")
    adapter = adapter_of(opened.params)
    with new_folder(target) as partial:
        peft.save_peft(opened.model, adapter, config, partial)
    return f"{parameter_count(adapter):,} parameters of an adapter, without the weights under it\nwritten   {target}"


def to_workdir(folder: Path, target: Path, dtype: hf.DType | None = None) -> str:
    """A workdir from open weights: `sample`, `eval` and `train --init_from` take it."""
    config, family = hf.read_config(folder)
    tokenizer = import_tokenizer(folder)
    if any(tokenizer.token_bytes()[config.vocab_size :]):  # special tokens of other models of a family may be beyond
        raise UserError(f"{folder}: the tokenizer has {tokenizer.vocab_size} ids, the model {config.vocab_size}")
    model, params = hf.load(folder, dtype=dtype)
    experiment = Experiment(
        model=model.config,
        data=text(
            sequence_length=min(model.config.max_positions, 1024),
            tokenizer=TokenizerConfig(file=str(target / "tokenizer.model")),
        ),
        objective=next_token(),
        optimizer=adamw(),
        mesh=MeshConfig(),
        run=run(sample_tokens=min(64, model.config.max_positions - 1)),
    )
    if model.config.head == "score":
        experiment = _judging(experiment)
    licence = licence_of(folder)
    with new_folder(target) as partial:
        workdir = Workdir(partial)
        tokenizer.save(workdir.tokenizer)
        facts = {"family": family.model_type, "licence": licence}
        workdir.write_config(to_json(experiment), {"source": facts, "parameters": parameter_count(params)})
        (partial / SOURCE).mkdir()
        for path in _kept(folder):
            shutil.copyfile(path, partial / SOURCE / path.name)
        _save(workdir, params)
    return _summary(parameter_count(params), _kind(family, config), licence, tokenizer, target)


def to_folder(source: Path, target: Path) -> str:
    """A folder that `transformers` reads, from a workdir's last good checkpoint, an adapter merged into its weights."""
    opened = open_workdir(source)
    params = weights.whole(opened.params)
    family = hf.save(opened.model, params, target, tokenizer=opened.tokenizer, beside=_kept(source / SOURCE))
    licence = licence_of(target)
    return _summary(parameter_count(params), _kind(family, opened.model.config), licence, opened.tokenizer, target)


def licence_of(folder: Path) -> str:
    """What the folder says of its licence, in README.md's header or by a file; "" where it says nothing."""
    readme = folder / "README.md"
    header = re.match(r"---\n(.*?)\n---", readme.read_text(errors="replace"), re.DOTALL) if readme.exists() else None
    # A list of licences stands in lines below, each after a hyphen: the first is taken.
    named_so = r"^(licen[sc]e(?:_name|_link)?):(?:[ \t]*|\s*-[ \t]+)([^\s-]\S*)"
    fields = dict(re.findall(named_so, header[1], re.MULTILINE)) if header else {}
    named = fields.get("license_name") or fields.get("license") or fields.get("licence") or ""
    files = sorted(path.name for pattern in ("LICENSE*", "LICENCE*") for path in folder.glob(pattern))
    return ", ".join(filter(None, (named, *files)))


def _judging(experiment: Experiment) -> Experiment:
    """The same for a model that scores: it reads preferences, whose files are still to be named."""
    data = dataclasses.replace(
        experiment.data, source="jsonl", rows="preference", files=(), held_out_files=(), mixture=(), packing="best_fit"
    )
    return dataclasses.replace(experiment, data=data, objective=RewardConfig())


def _save(workdir: Workdir, trainable: Any) -> None:
    """As the checkpoint of step 0."""
    checkpoints = Checkpoints(workdir.checkpoints)
    checkpoints.save(0, {"trainable": trainable}, wait=True)
    checkpoints.close()


def _kept(folder: Path) -> list[Path]:
    """The licence and what else belongs to the weights."""
    return sorted({path for pattern in _KEPT for path in folder.glob(pattern) if path.is_file()})


def _kind(family: Family, config: ModelConfig) -> str:
    return f"{family.model_type} {'reward model' if config.head == 'score' else 'model'}"


def _summary(parameters: int, kind: str, licence: str, tokenizer: Tokenizer, target: Path) -> str:
    return (
        f"{parameters:,} parameters of a {kind}, {tokenizer.vocab_size:,} tokens "
        f"({'lossless' if tokenizer.lossless else 'not lossless'} tokenizer)\n"
        f"licence   {licence or 'none named: find out before you use or pass on these weights'}\n"
        f"written   {target}"
    )
