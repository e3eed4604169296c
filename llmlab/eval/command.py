"""What `llmlab eval` does: held-out loss and bits per byte of a workdir, `xz -9` beside them, and scores of tasks.

Of a model of conversations also what it answers to held-out ones.
"""

import dataclasses
import itertools
import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TextIO

from llmlab.core.config import from_config_dict
from llmlab.core.errors import UserError, nearest
from llmlab.core.paths import clear_when_full, write_atomic
from llmlab.data.chat import Conversation, Example, template_for
from llmlab.data.config import BUILT_IN, DataConfig
from llmlab.data.pipeline import TokenBatch, evaluation_batches, evaluation_rows
from llmlab.data.prepare import prepare_parts
from llmlab.data.progress import shown
from llmlab.data.sources import Report, documents
from llmlab.data.split import Split
from llmlab.eval import attempts, conversations
from llmlab.eval.baselines import xz_bits_per_byte
from llmlab.eval.held_out import Evaluate, exponential, make_evaluator
from llmlab.eval.likelihood import make_log_likelihoods
from llmlab.eval.needle import NeedleConfig, needle, text_table
from llmlab.eval.preferences import pairs_table, references_of, told_apart
from llmlab.eval.scoring import Generation, Outcome, score_choices, score_generation, summary, table
from llmlab.eval.tasks import Task, contexts, read_task
from llmlab.infer.chat import NO_TOOLS, Tools, split
from llmlab.infer.choose import Judge
from llmlab.infer.kept import append_rows, as_turns
from llmlab.model.score import check_predicts_tokens
from llmlab.objective import OBJECTIVES
from llmlab.workdir.metrics import strict
from llmlab.workdir.open import Opened, open_workdir

XZ_BYTES = 16 * 2**20
LONGEST_UNASKED = 8192
CONVERSATIONS_UNASKED = 500
BASELINE = "xz_bits_per_byte"
NOTHING = "there is nothing to evaluate: give --tasks or --needle, or leave --held_out on"
SPLITS: tuple[Split, ...] = ("held_out", "train", "all")


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """What to evaluate on.

    held_out: measure loss and bits per byte, on the held-out text of the run unless told otherwise:
    source, files, field: other text instead, as in the `data` section; files alone are of the run's source, or text.
    split: which part of the text; empty for held_out, or, where `source` and `files` name other text, for all of it.
    conversations: where the run is of conversations, measure what the model answers to those that it has not seen, in
    turns of at most turn_tokens, drawn at turn_temperature.
    attempts: so many answers to each of these conversations, to see what choosing among them gains; reward: the workdir
    of a model that chooses too, see `llmlab.infer.choose.Judge`; pairs: a file that right ones beside wrong ones are
    added to, as rows that a reward model learns from. See `llmlab.eval.attempts`.
    tasks: JSON lines files (see `llmlab.eval.tasks`). few_shot: solved examples in each prompt, from few_shot_file or
    else from the task's other rows. limit: the first so many rows of each task, or conversations; 0 is all, or 500.
    max_tokens, temperature, seed, extract: of tasks with written answers; see `llmlab.eval.scoring.Generation`.
    needle: whether to hide sentences in the text and ask for them, see `llmlab.eval.needle`. needle_lengths: tokens of
    the prompts; empty: four lengths, up to what the positions reach or 8,192. needle_depths, needle_samples: so many.
    batch_size: rows at once; 0 is as many as in training, 16 for tasks, 4 for needles.
    """

    held_out: bool = True
    source: str = ""
    files: tuple[str, ...] = ()
    field: str = ""
    split: str = ""
    conversations: bool = True
    turn_tokens: int = 256
    turn_temperature: float = 0.7
    attempts: int = 0
    reward: str = ""
    pairs: str = ""
    tasks: tuple[str, ...] = ()
    few_shot: int = 0
    few_shot_file: str = ""
    limit: int = 0
    max_tokens: int = 64
    temperature: float = 0.0
    seed: int = 0
    extract: Literal["line", "number"] = "line"
    needle: bool = False
    needle_lengths: tuple[int, ...] = ()
    needle_depths: int = 5
    needle_samples: int = 8
    batch_size: int = 0

    def __post_init__(self) -> None:
        zero_or_more = ("few_shot", "limit", "batch_size", "temperature", "turn_temperature", "attempts")
        for name, least in {"turn_tokens": 1, "max_tokens": 1, **dict.fromkeys(zero_or_more, 0)}.items():
            if getattr(self, name) < least:
                raise UserError(f"--{name}={getattr(self, name)} should be at least {least}")
        if self.split and self.split not in SPLITS:
            raise UserError(f"--split={self.split!r} is not a choice: {nearest(self.split, SPLITS)}")
        if self.extract not in ("line", "number"):
            raise UserError(f"--extract={self.extract!r} is not a choice: {nearest(self.extract, ('line', 'number'))}")
        for name in ("reward", "pairs"):
            if getattr(self, name) and not self.attempts:
                raise UserError(f"--{name} is for attempts: give --attempts too, such as --attempts=16")
        if self.attempts and not self.turn_temperature:
            raise UserError("--turn_temperature=0 makes every attempt the same: choose one above 0, such as 1")
        if not (self.held_out or self.conversations or self.tasks or self.needle or self.attempts):
            raise UserError(NOTHING)


def eval_command(
    opened: Opened,
    workdir: str | os.PathLike[str],
    config: EvalConfig,
    *,
    tools: Tools = NO_TOOLS,
    out: TextIO | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Evaluates `opened`, prints the figures to `out`, and returns what it adds to `eval.json` in the workdir.

    Rows of tasks with what the model made of them go to `eval/TASK.jsonl`, conversations to `eval/conversations.jsonl`,
    attempts at them to `eval/attempts.jsonl`.
    `tools` run where the model calls them.

    Raises:
      UserError: text or a task that cannot be read, or one for a reward model. All tasks are read before anything is
        computed.
      DiskFull: no room for the results.
    """
    if config.tasks or config.needle:
        check_predicts_tokens(opened.model.config)
    out, folder = out or sys.stdout, Path(workdir).expanduser()
    tasks = [(task, contexts_) for task, contexts_ in _tasks(config)]
    result: dict[str, Any] = {"step": opened.step}
    if config.attempts and not talks(opened):
        raise UserError("--attempts needs a model that was trained on conversations: name the workdir of one")
    judge = Judge(open_workdir(config.reward)) if config.reward else None
    if config.pairs:
        append_rows(config.pairs, [])  # what cannot be written to is refused before anything is computed
    if not (config.held_out or tasks or config.needle or talks(opened)):
        raise UserError(NOTHING)
    if config.held_out and rows_of(opened) == "preference":
        result["pairs"] = told_apart(opened, folder, *_rows_to_evaluate(opened, config), quiet=quiet)
        print(pairs_table(result["pairs"]), file=out, flush=True)
    elif config.held_out:
        result["held_out"] = held_out(opened, folder, config, quiet=quiet)
        if BASELINE in result["held_out"] and text_of(opened.config, config) == text_of(
            opened.config, EvalConfig(batch_size=config.batch_size)
        ):
            result[BASELINE] = result["held_out"][BASELINE]
        print(_held_out_lines(result["held_out"]), file=out, flush=True)
    if config.conversations and talks(opened):
        outcomes = answers(opened, config, tools, quiet=quiet)
        result["conversations"] = conversations.summary(outcomes)
        _write_outcomes(folder / "eval" / "conversations.jsonl", outcomes)
        print(conversations.table(result["conversations"]), file=out, flush=True)
    if config.attempts:
        questions, found = several(opened, config, tools, judge, quiet=quiet)
        result["attempts"] = {"split": text_of(opened.config, config)[1], **attempts.curve(found)}
        rows = [
            {"prompt": as_turns(question), "attempts": each} for question, each in zip(questions, found, strict=True)
        ]
        _write_outcomes(folder / "eval" / "attempts.jsonl", strict(rows))
        print(attempts.table(result["attempts"]), file=out, flush=True)
        if config.pairs:
            rows = [row for pair in zip(questions, found, strict=True) for row in attempts.pairs(*pair)]
            append_rows(config.pairs, rows)
            print(f"{len(rows):,} pairs added to {config.pairs}", file=out, flush=True)
    if tasks:
        result["tasks"] = []
        score = _scorer(opened, config, quiet)
        for task, prompts in tasks:
            outcomes = score(task, prompts)
            result["tasks"].append(summary(task, outcomes, config.few_shot))
            _write_outcomes(folder / "eval" / f"{task.name}.jsonl", outcomes)
        print(table(result["tasks"]), file=out, flush=True)
    if config.needle:
        result["needle"] = find_needles(opened, config, quiet=quiet)
        print(text_table(result["needle"]), file=out, flush=True)
    keep_results(folder, result)
    return result


def keep_results(workdir: str | os.PathLike[str], results: dict[str, Any]) -> None:
    """Adds `results` to `eval.json`, in place of what it has by the same names.

    `step` says which checkpoint was scored: scores of another go. `xz_bits_per_byte`, of the text that the run held
    out, is of no step, and stays.
    """
    path = Path(workdir) / "eval.json"
    try:
        known = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        known = {}
    if not isinstance(known, dict):
        known = {}
    if "step" in results and known.get("step") != results["step"]:
        known = {name: known[name] for name in known if name == BASELINE}
    write_atomic(path, json.dumps(strict(known | results), indent=2, allow_nan=False).encode() + b"\n")


def held_out(
    opened: Opened, workdir: str | os.PathLike[str], config: EvalConfig, *, quiet: bool = False
) -> dict[str, Any]:
    """The loss, and what else the run's objective measures, of the rows that `config` names, and what these are.

    Of text: perplexity, bits per byte and perplexity per byte, both without the ends of documents, and what `xz -9`
    makes of it.
    """
    partition = opened.model.partition
    data, split = _rows_to_evaluate(opened, config)
    parts = prepare_parts(data, opened.tokenizer, split, progress=not quiet)
    stores = [store for store, _ in parts]
    evaluate = evaluator_of(opened)
    sharding = None if partition is None else partition.sharding("batch", "time")
    rows = evaluation_rows(data, parts)
    with shown("evaluating rows", rows, not quiet, in_bytes=False) as advance:

        def passed(batches: Iterator[TokenBatch]) -> Iterator[TokenBatch]:
            for number, batch in enumerate(batches):
                yield batch
                advance(min(rows, (number + 1) * data.batch_size))

        references = references_of(opened, workdir, data, split, parts)
        batches = evaluation_batches(data, parts, sharding=sharding, references=references)
        scores = evaluate(opened.params, passed(batches))
    of_text = {}
    if data.rows == "text":
        byte_perplexity = exponential(scores["bits_per_byte"] * math.log(2))
        of_text = {"byte_perplexity": byte_perplexity, **xz_of(data, split, quiet)}
    return {
        "source": data.source,
        "files": list(data.files),
        "split": split,
        "documents": sum(len(store) for store in stores),
        "bytes": sum(int(store.text_bytes.sum()) for store in stores),
        **scores,
        **of_text,
    }


def _rows_to_evaluate(opened: Opened, config: EvalConfig) -> tuple[DataConfig, Split]:
    """`text_of`, in batches that the devices share evenly."""
    data, split = text_of(opened.config, config)
    devices = opened.model.partition.size("batch") if opened.model.partition is not None else 1
    return dataclasses.replace(data, batch_size=-(-data.batch_size // devices) * devices), split


def rows_of(opened: Opened) -> str:
    """What the rows were that the run was trained on."""
    return opened.config["data"].get("rows", "text")


def talks(opened: Opened) -> bool:
    """Whether the run was on conversations, and its model writes."""
    return rows_of(opened) != "text" and opened.model.config.head == "tokens"


def answers(opened: Opened, config: EvalConfig, tools: Tools, *, quiet: bool = False) -> list[conversations.Outcome]:
    """What `measure` says of the answers to the conversations that `config` names."""
    examples = _conversations(opened, config)
    with shown("answering", len(examples), not quiet, in_bytes=False) as advance:
        settings = {"tools": tools, "progress": advance, **_turn_settings(opened, config)}
        return conversations.measure(opened.model, opened.params, template_for(opened.tokenizer), examples, **settings)


def several(
    opened: Opened, config: EvalConfig, tools: Tools, judge: Judge | None, *, quiet: bool = False
) -> tuple[list[Conversation], list[attempts.Attempts]]:
    """The questions of the conversations that `config` names, and `config.attempts` at each, with what `judge` says."""
    examples, count = _conversations(opened, config), config.attempts
    if not examples:
        raise UserError("there is no conversation to attempt: name other --files, or a larger --limit")
    with shown("answering", len(examples) * count, not quiet, in_bytes=False) as advance:
        settings = {
            "tools": tools,
            "count": count,
            "judge": judge,
            "progress": advance,
            **_turn_settings(opened, config),
        }
        found = attempts.attempts(opened.model, opened.params, template_for(opened.tokenizer), examples, **settings)
    return [split(example.responses[0].conversation)[0] for example in examples], found


def _conversations(opened: Opened, config: EvalConfig) -> list[Example]:
    data, split = text_of(opened.config, config)
    found = itertools.islice(documents(data, split, Report()), config.limit or CONVERSATIONS_UNASKED)
    examples = [Example.loads(document.text) for document in found]
    # Of single answers, one that is bad is none to be compared with.
    return [example for example in examples if data.rows != "binary" or example.responses[0].value > 0]


def _turn_settings(opened: Opened, config: EvalConfig) -> dict[str, Any]:
    return {
        "max_tokens": min(config.turn_tokens, max(1, opened.model.config.max_positions // 2)),
        "batch_size": config.batch_size or Generation().batch_size,
        "seed": config.seed,
        "temperature": config.turn_temperature,
    }


def evaluator_of(opened: Opened) -> Evaluate:
    """What measures the loss that the run was trained on."""
    name = opened.config["objective"]["name"]
    objective = from_config_dict(OBJECTIVES[name], opened.config["objective"], "objective")
    return make_evaluator(objective.make(opened.model, opened.tokenizer.token_bytes()), opened.model.partition)


def find_needles(opened: Opened, config: EvalConfig, *, quiet: bool = False) -> dict[str, Any]:
    """The tables of `llmlab.eval.needle`, in the text that `config` names."""
    longest = min(opened.model.config.max_positions, LONGEST_UNASKED)
    lengths = config.needle_lengths or tuple(sorted({length for i in range(4) if (length := longest >> i) >= 128}))
    lengths = lengths or (longest,)
    settings = NeedleConfig(
        lengths, config.needle_depths, config.needle_samples, config.seed, config.batch_size or NeedleConfig.batch_size
    )
    haystack: list[int] = []
    data, split = text_of(opened.config, config)
    for document in documents(data, split, Report()):
        haystack += opened.tokenizer.encode(document.text if data.rows == "text" else _spoken(document.text))
        if len(haystack) > 8 * max(lengths):
            break
    rows = len(lengths) * settings.depths * settings.samples
    with shown("hiding needles", rows, not quiet, in_bytes=False) as advance:
        return needle(opened.model, opened.params, opened.tokenizer, haystack, settings, advance)


def _spoken(item: str) -> str:
    """The turns of a conversation as text."""
    return "\n".join(message.content for message in Example.loads(item).responses[0].conversation)


def text_of(trained: dict[str, Any], config: EvalConfig) -> tuple[DataConfig, Split]:
    """The text to evaluate on: what the run of config `trained` held out, or what `config` names instead."""
    data = from_config_dict(DataConfig, trained["data"], "data")
    split: Split = "held_out"
    if config.files or (config.source and config.source != data.source):
        reads_files = data.source not in (*BUILT_IN, "mixture")
        section = {
            **{field.name: getattr(data, field.name) for field in dataclasses.fields(data)},
            "source": config.source or (data.source if reads_files else "text" if data.rows == "text" else "jsonl"),
            "files": config.files,
            "held_out_files": (),
            "mixture": (),
        }
        data = DataConfig(**section)
        split = "all"
    if config.field:
        data = dataclasses.replace(data, field=config.field)
    if config.batch_size:
        data = dataclasses.replace(data, batch_size=config.batch_size)
    if config.split:
        (split,) = [known for known in SPLITS if known == config.split]
    return data, split


def xz_of(data: DataConfig, split: Split, quiet: bool) -> dict[str, Any]:
    """Bits per byte of `xz -9`, of the first documents only where compressing all would take minutes."""
    texts, size = [], 0
    for document in documents(data, split, Report()):
        texts.append(document.text.encode())
        size += len(texts[-1])
        if size >= XZ_BYTES:
            break
    with shown("compressing with xz -9", size, not quiet) as advance:
        return {BASELINE: xz_bits_per_byte(texts, progress=advance), "xz_bytes": size}


def _held_out_lines(scores: dict[str, Any]) -> str:
    files = f" {', '.join(scores['files'])}" if scores["files"] else ""
    if BASELINE not in scores:
        known = ("source", "files", "split", "documents", "bytes")
        measured = [f"  {name:24s} {value:.4f}" for name, value in scores.items() if name not in known]
        head = f"{scores['split']} rows of {scores['source']}{files}: {scores['documents']:,} conversations"
        return "\n".join([head, *measured])
    part = "" if scores["xz_bytes"] == scores["bytes"] else f" (on the first {scores['xz_bytes']:,} bytes)"
    return "\n".join(
        [
            f"{scores['split']} text of {scores['source']}{files}: "
            f"{scores['documents']:,} documents, {scores['bytes']:,} bytes",
            f"  loss           {scores['loss']:.4f} nats per token",
            f"  perplexity     {scores['perplexity']:.3f} per token, {scores['byte_perplexity']:.4f} per byte",
            f"  bits per byte  {scores['bits_per_byte']:.4f}",
            f"  xz -9          {scores[BASELINE]:.4f} bits per byte, file by file{part}",
        ]
    )


def _tasks(config: EvalConfig) -> Iterator[tuple[Task, list[str]]]:
    """Each task, cut to the limit, with the context of each row."""
    source = read_task(config.few_shot_file) if config.few_shot_file else None
    names: dict[str, str] = {}
    for path in config.tasks:
        task = read_task(path)
        if task.name in names:
            raise UserError(f"--tasks has two files named {task.name}: {names[task.name]} and {path}; rename one")
        names[task.name] = path
        kept = config.limit or len(task.rows)
        prompts = contexts(task, config.few_shot, source)
        yield dataclasses.replace(task, rows=task.rows[:kept]), prompts[:kept]


def _scorer(opened: Opened, config: EvalConfig, quiet: bool) -> Any:
    """score(task, contexts) -> outcomes, by whichever way the task's kind is scored."""
    model, params, tokenizer = opened.model, opened.params, opened.tokenizer
    batch_size = config.batch_size or Generation().batch_size
    log_likelihoods = make_log_likelihoods(model, batch_size)
    settings = Generation(config.max_tokens, config.temperature, config.seed, batch_size, config.extract)

    def score(task: Task, prompts: Sequence[str]) -> list[Outcome]:
        total = sum(len(row.choices) or 1 for row in task.rows)
        with shown(f"task {task.name}", total, not quiet, in_bytes=False) as advance:
            if task.kind == "choices":
                return score_choices(task, prompts, model, params, tokenizer, log_likelihoods, advance)
            return score_generation(task, prompts, model, params, tokenizer, settings, advance)

    return score


def _write_outcomes(path: Path, outcomes: Sequence[Outcome]) -> None:
    with clear_when_full(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, b"".join(json.dumps(outcome, ensure_ascii=False).encode() + b"\n" for outcome in outcomes))
