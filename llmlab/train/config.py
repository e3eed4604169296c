"""The one door between what a user writes and what the code reads: a ConfigDict in, frozen dataclasses out.

Whatever cannot work is refused here, before anything is compiled, in one line that names the key.
"""

import dataclasses
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from llmlab.core.config import from_config_dict, to_config_dict
from llmlab.core.errors import UserError, nearest
from llmlab.core.mesh import MeshConfig, Partition
from llmlab.data.config import DataConfig
from llmlab.data.tokenizer import TokenizerConfig
from llmlab.model.adapters import AdapterConfig
from llmlab.model.config import ModelConfig, llama
from llmlab.model.transformer import check_divides
from llmlab.objective import OBJECTIVES, Objective
from llmlab.train.optimizer import OptimizerConfig
from llmlab.workdir.open import model_config

# No space at the end: SentencePiece joins it to the word that follows, and alone it is a token hardly ever seen.
SAMPLE_PROMPTS = ("def", "The")
BEST = ("eval/loss", "eval/bits_per_byte", "eval/perplexity")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """How long, how often, from where.

    steps: in all. seed: of initialisation and of the order of data. log_every, eval_every, sample_every,
    checkpoint_every: in steps; 0 is never (a run that ends is always evaluated; one that ends or is stopped is always
    saved). eval_batches: of the held-out split at each evaluation; 0 is all of it, and the last evaluation always sees
    all of it. keep: the last checkpoints; keep_every: also every one at a multiple of so many steps; best: also the one
    with the lowest such metric (`eval/loss`), of those evaluated on the same text. init_from: a workdir whose weights
    to start from. sample_prompts, sample_tokens: what the model is asked to continue while it trains. tensorboard:
    write its event files too.
    """

    steps: int = 1000
    seed: int = 0
    log_every: int = 10
    eval_every: int = 250
    eval_batches: int = 20
    sample_every: int = 500
    checkpoint_every: int = 250
    keep: int = 2
    keep_every: int = 0
    best: str = ""
    init_from: str = ""
    sample_prompts: tuple[str, ...] = SAMPLE_PROMPTS
    sample_tokens: int = 64
    tensorboard: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "log_every", "keep", "sample_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"run.{name}={getattr(self, name)} should be at least 1")
        for name in ("eval_every", "eval_batches", "sample_every", "checkpoint_every", "keep_every"):
            if getattr(self, name) < 0:
                raise UserError(f"run.{name}={getattr(self, name)} should be 0 (never) or more")


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A model, data and an objective, and how they are run: the resolved config."""

    model: ModelConfig
    data: DataConfig
    objective: Objective
    optimizer: OptimizerConfig
    mesh: MeshConfig
    run: RunConfig
    adapter: AdapterConfig = dataclasses.field(default_factory=AdapterConfig)


def one_of(arg: str, *choices: str) -> str:
    """The ARG of --config=FILE.py:ARG, or a UserError that names the nearest that the experiment knows."""
    if arg not in choices:
        raise UserError(f"--config: no variant {arg!r} of this experiment: {nearest(arg, filter(None, choices))}")
    return arg


def begun_from(arg: str) -> tuple[ModelConfig, TokenizerConfig]:
    """The model and the tokenizer of the workdir that the ARG of --config=FILE.py:ARG names; very small ones of `tiny`.

    Raises:
      UserError: there is no ARG, or no such workdir.
    """
    if not arg:
        raise UserError("name the workdir to begin from, such as --config=experiments/assistant/sft.py:runs/q")
    if arg == "tiny":
        return llama(width=32, layers=2, heads=4, max_positions=512), TokenizerConfig(vocab_size=512)
    return model_config(arg), TokenizerConfig(file=str(Path(arg) / "tokenizer.model"))


def run(**overrides: Any) -> RunConfig:
    """The config section, for experiment files."""
    return RunConfig(**overrides)


def experiment(
    *,
    model: ModelConfig,
    data: DataConfig,
    objective: Objective,
    optimizer: OptimizerConfig,
    run: RunConfig,
    mesh: MeshConfig | None = None,
    adapter: AdapterConfig | None = None,
) -> ConfigDict:
    """What an experiment file returns: a ConfigDict with every key, so that flags can override each."""
    mesh, adapter = mesh or MeshConfig(), adapter or AdapterConfig()
    return to_config_dict(Experiment(model, data, objective, optimizer, mesh, run, adapter))


def resolve(config: ConfigDict) -> Experiment:
    """The experiment that `config` describes.

    Raises:
      UserError: an unknown key, an ill-typed value, or sections that do not fit together.
    """
    sections = [field.name for field in dataclasses.fields(Experiment)]
    for key in config:
        if key not in sections:
            raise UserError(f"unknown config section {key}: {nearest(key, sections)}")
    for section in sections:
        if section not in config:
            raise UserError(f"the config has no section {section}: build it with llmlab.train.config.experiment(…)")
    name = config["objective"]["name"]
    if name not in OBJECTIVES:
        raise UserError(f"objective.name={name!r} is not a choice: {nearest(name, OBJECTIVES)}")
    _check_together(resolved := sections_of(config))
    return resolved


def sections_of(config: Any) -> Experiment:
    """The experiment that `config` describes, whether or not its sections fit together."""
    kinds = {field.name: field.type for field in dataclasses.fields(Experiment)}
    kinds["objective"] = OBJECTIVES[config["objective"]["name"]]
    given = {section: config[section] for section in kinds if section in config}
    return Experiment(**{s: from_config_dict(kinds[s], given[s], s) for s in given})  # type: ignore[arg-type]


def check_mesh(experiment: Experiment, partition: Partition) -> None:
    """Raises UserError where this mesh does not divide the batch, the sequence or the model."""
    data, optimizer = experiment.data, experiment.optimizer
    rows, devices = data.batch_size // optimizer.accumulate, partition.size("batch")
    if rows % devices:
        each = devices * optimizer.accumulate
        raise UserError(
            f"data.batch_size={data.batch_size} in {optimizer.accumulate} microbatches is not divided by the {devices} "
            f"devices that share the batch: try data.batch_size={-(-data.batch_size // each) * each}"
        )
    pieces = partition.size("time")
    if data.sequence_length % pieces:
        raise UserError(
            f"data.sequence_length={data.sequence_length} is not divided by the {pieces} devices that share time: "
            f"try data.sequence_length={-(-data.sequence_length // pieces) * pieces}"
        )
    check_divides(experiment.model, partition)


def _check_together(experiment: Experiment) -> None:
    model, data, optimizer, run = experiment.model, experiment.data, experiment.optimizer, experiment.run
    adapter = experiment.adapter
    if adapter.kind != "none" and not run.init_from:
        raise UserError(f"adapter.kind={adapter.kind} needs weights to adapt: name their workdir, --init_from=WORKDIR")
    if model.head == "score" and run.sample_every:
        raise UserError(
            f"run.sample_every={run.sample_every} asks a reward model (model.head=score) to write: set it to 0"
        )
    if adapter.kind == "none" and adapter.base_bits:
        raise UserError(
            f"adapter.base_bits={adapter.base_bits} is of the weights under an adapter: set adapter.kind too"
        )
    objective = experiment.objective
    if data.rows not in objective.rows:
        fitting = " or ".join(name for name, kind in OBJECTIVES.items() if data.rows in kind.rows)
        raise UserError(
            f"objective.name={objective.name} is learned from data.rows={' or '.join(objective.rows)}, and not from "
            f"data.rows={data.rows}: change it, or set objective.name={fitting}"
        )
    if model.head != objective.head:
        raise UserError(
            f"objective.name={objective.name} needs model.head={objective.head}, and it is {model.head}: set it"
        )
    if objective.needs_reference and objective.reference == "adapter" and adapter.kind == "none":
        raise UserError(
            "objective.reference=adapter is the weights under an adapter, and there is none: set adapter.kind, or "
            "objective.reference=auto"
        )
    if objective.stores_reference(adapter=adapter.kind != "none") and not run.init_from:
        raise UserError(
            f"objective.name={objective.name} compares with the model it begins from: name its workdir, "
            f"--init_from=WORKDIR"
        )
    if data.sequence_length > model.max_positions:
        raise UserError(
            f"data.sequence_length={data.sequence_length} is longer than model.max_positions={model.max_positions}: "
            f"shorten the one or raise the other"
        )
    if data.batch_size % optimizer.accumulate:
        raise UserError(
            f"optimizer.accumulate={optimizer.accumulate} does not divide data.batch_size={data.batch_size}: "
            f"try data.batch_size={-(-data.batch_size // optimizer.accumulate) * optimizer.accumulate}"
        )
    if run.best and run.best not in BEST:
        raise UserError(f"run.best={run.best!r} is not evaluated: {nearest(run.best, BEST)}")
    if run.best and (not run.eval_every or not run.checkpoint_every or run.checkpoint_every % run.eval_every):
        raise UserError(
            f"run.best={run.best!r} needs an evaluation at every checkpoint: run.eval_every={run.eval_every} should "
            f"divide run.checkpoint_every={run.checkpoint_every}"
        )
    if run.sample_every and run.sample_tokens >= model.max_positions:
        raise UserError(
            f"run.sample_tokens={run.sample_tokens} should be less than model.max_positions={model.max_positions}"
        )
