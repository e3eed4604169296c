"""`llmlab convert`: a folder in the Hugging Face layout becomes a workdir, or a workdir such a folder."""

import logging
import os
import re
import shutil
from pathlib import Path

from llmlab.core.config import to_json
from llmlab.core.errors import UserError
from llmlab.core.mesh import MeshConfig
from llmlab.core.paths import check_free, new_folder
from llmlab.data import text
from llmlab.data.tokenizer import Tokenizer, TokenizerConfig
from llmlab.data.tokenizer_imported import import_tokenizer
from llmlab.model import hf, weights
from llmlab.model.cost import parameter_count
from llmlab.objective import next_token
from llmlab.train.config import Experiment, run
from llmlab.train.optimizer import adamw
from llmlab.workdir.checkpoints import Checkpoints
from llmlab.workdir.files import Workdir
from llmlab.workdir.open import open_workdir

log = logging.getLogger(__name__)

SOURCE = "source"  # what a converted workdir keeps of where it came from
_KEPT = (
    *("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*", "README.md", "generation_config.json"),
    *("tokenizer_config.json", "special_tokens_map.json", "chat_template.*"),
)


def convert(source: str | os.PathLike[str], target: str | os.PathLike[str], dtype: hf.DType | None = None) -> str:
    """Converts `source` into `target`, whichever way; what there is to say about it, in a few lines.

    Raises:
      UserError: `source` is neither, something in it is not supported, or `target` is there already.
    """
    source, target = Path(source).expanduser(), Path(target).expanduser().absolute()
    if not source.is_dir():
        raise UserError(f"there is no folder {source}: give a model's folder, or a workdir")
    check_free(target)
    keys = hf.read_json(source / "config.json")
    return to_folder(source, target) if "config" in keys else to_workdir(source, target, dtype)


def to_workdir(folder: Path, target: Path, dtype: hf.DType | None = None) -> str:
    """A workdir from open weights: `sample`, `eval` and `train --init_from` take it."""
    config, family = hf.read_config(folder)
    tokenizer = import_tokenizer(folder)
    if tokenizer.vocab_size > config.vocab_size:
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
    licence = licence_of(folder)
    with new_folder(target) as partial:
        workdir = Workdir(partial)
        tokenizer.save(workdir.tokenizer)
        facts = {"family": family.model_type, "licence": licence}
        workdir.write_config(to_json(experiment), {"source": facts, "parameters": parameter_count(params)})
        _keep(folder, partial / SOURCE)
        checkpoints = Checkpoints(workdir.checkpoints)
        checkpoints.save(0, {"trainable": params}, wait=True)
        checkpoints.close()
    return _summary(parameter_count(params), family.model_type, licence, tokenizer, target)


def to_folder(source: Path, target: Path) -> str:
    """A folder that `transformers` reads, from a workdir's last good checkpoint, an adapter merged into its weights."""
    opened = open_workdir(source)
    params = weights.whole(opened.params)
    family = hf.save(opened.model, params, target, tokenizer=opened.tokenizer)
    if (source / SOURCE).is_dir():
        _keep(source / SOURCE, target)
    licence = licence_of(target)
    return _summary(parameter_count(params), family.model_type, licence, opened.tokenizer, target)


def licence_of(folder: Path) -> str:
    """What the folder says of its licence, in README.md's header or by a file; "" where it says nothing."""
    readme = folder / "README.md"
    header = re.match(r"---\n(.*?)\n---", readme.read_text(errors="replace"), re.DOTALL) if readme.exists() else None
    fields = dict(re.findall(r"^(licen[sc]e(?:_name|_link)?):\s*(\S+)", header[1], re.MULTILINE)) if header else {}
    named = fields.get("license_name") or fields.get("license") or fields.get("licence") or ""
    files = sorted(path.name for pattern in ("LICENSE*", "LICENCE*") for path in folder.glob(pattern))
    return ", ".join(filter(None, (named, *files)))


def _keep(folder: Path, target: Path) -> None:
    """Copies the licence and what else belongs to the weights."""
    target.mkdir(exist_ok=True)
    for path in sorted({path for pattern in _KEPT for path in folder.glob(pattern) if path.is_file()}):
        if not (target / path.name).exists():
            shutil.copyfile(path, target / path.name)


def _summary(parameters: int, family: str, licence: str, tokenizer: Tokenizer, target: Path) -> str:
    return (
        f"{parameters:,} parameters of a {family} model, {tokenizer.vocab_size:,} tokens "
        f"({'lossless' if tokenizer.lossless else 'not lossless'} tokenizer)\n"
        f"licence   {licence or 'none named: find out before you use or pass on these weights'}\n"
        f"written   {target}"
    )
