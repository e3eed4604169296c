"""Verbs that look at what there is, or turn it into something else: eval, quantise, report, tokenize, convert."""

import dataclasses
import sys
from pathlib import Path
from typing import Any, get_args

from absl import flags as f
from absl.flags import FlagValues

from llmlab.core.errors import UserError
from llmlab.core.flags import define_workdir, none_left, required
from llmlab.verbs.common import CHAT_TEMPERATURE, Verb, start_jax, tools


def _define_eval(flags: FlagValues, argv: list[str]) -> None:
    define_workdir(flags, "The run to evaluate.")
    f.DEFINE_bool("held_out", True, "Measure loss and bits per byte of text.", flag_values=flags)
    f.DEFINE_string("source", "", "Other text than the run's held-out part: text, jsonl, python …", flag_values=flags)
    f.DEFINE_list("files", [], "Its files or patterns.", flag_values=flags)
    f.DEFINE_string("field", "", "The field of its rows that holds text.", flag_values=flags)
    f.DEFINE_string("split", "", "Which part of it: held_out, train, all.", flag_values=flags)
    f.DEFINE_bool("conversations", True, "Measure the answers of a model of conversations.", flag_values=flags)
    f.DEFINE_integer("turn_tokens", 256, "The longest turn of these.", flag_values=flags)
    f.DEFINE_float(
        "turn_temperature",
        CHAT_TEMPERATURE,
        "How they are drawn: as `llmlab chat` does. 0 may repeat itself.",
        flag_values=flags,
    )
    f.DEFINE_integer("attempts", 0, "Answers to each of these: what does choosing among them gain?", flag_values=flags)
    f.DEFINE_string(
        "reward",
        "",
        "The workdir of a model that chooses too: a reward model, or one that writes, by what it finds likely.",
        flag_values=flags,
    )
    f.DEFINE_string("pairs", "", "Add right attempts beside wrong ones to this file, to learn from.", flag_values=flags)
    f.DEFINE_list("tasks", [], "JSON lines files: choices, or answers to generate.", flag_values=flags)
    f.DEFINE_integer("few_shot", 0, "Solved examples before each question.", flag_values=flags)
    f.DEFINE_string("few_shot_file", "", "Where they come from; empty: the task's other rows.", flag_values=flags)
    f.DEFINE_integer(
        "limit", 0, "The first so many rows of each task, or conversations; 0 is all, or 500.", flag_values=flags
    )
    f.DEFINE_integer("max_tokens", 64, "The longest generated answer.", flag_values=flags)
    f.DEFINE_float("temperature", 0.0, "Of generated answers.", flag_values=flags)
    f.DEFINE_integer("seed", 0, "Of generated answers.", flag_values=flags)
    f.DEFINE_string("extract", "line", "What of a generated text is the answer: line, number.", flag_values=flags)
    f.DEFINE_bool("needle", False, "Hide sentences in the text, and ask for them.", flag_values=flags)
    f.DEFINE_list(
        "needle_lengths", [], "Tokens of its prompts; empty: up to what the model reads or 8192.", flag_values=flags
    )
    f.DEFINE_integer("needle_depths", 5, "At how many depths.", flag_values=flags)
    f.DEFINE_integer("needle_samples", 8, "How many at each depth and length.", flag_values=flags)
    f.DEFINE_integer(
        "batch_size", 0, "Rows at once; 0 is as in training, 16 for tasks, 4 for needles.", flag_values=flags
    )


def _eval(flags: FlagValues, rest: list[str]) -> None:
    none_left(rest)
    from llmlab.eval.command import EvalConfig, eval_command, talks

    names = [field.name for field in dataclasses.fields(EvalConfig)]
    values: dict[str, Any] = {name: getattr(flags, name) for name in names}
    if wrong := [length for length in flags.needle_lengths if not (length.isascii() and length.isdigit())]:
        raise UserError(f"--needle_lengths={wrong[0]!r} should be numbers of tokens, such as 512,1024")
    lists = {"files": flags.files, "tasks": flags.tasks, "needle_lengths": map(int, flags.needle_lengths)}
    config = EvalConfig(**(values | {name: tuple(items) for name, items in lists.items()}))
    start_jax()
    import llmlab

    workdir = required(flags, "workdir")
    opened = llmlab.open(workdir)
    eval_command(opened, workdir, config, tools=tools() if talks(opened) else {})
    if flags.needle or flags.attempts:
        from llmlab.report.run_page import write_report

        print(f"report   {write_report(workdir)}")


def _define_quantise(flags: FlagValues, argv: list[str]) -> None:
    define_workdir(flags, "The run whose weights to quantise.")
    f.DEFINE_integer("bits", 4, "Of a quantised weight: 8 or 4.", flag_values=flags)
    f.DEFINE_integer("group", 0, "Inputs that share a scale; 0 is all with 8 bits, 32 with 4.", flag_values=flags)
    f.DEFINE_string("include", "", "Matrices whose path has this pattern; by default all of layers.", flag_values=flags)
    f.DEFINE_integer("rows", 16, "Rows of text to compare on.", flag_values=flags)
    f.DEFINE_string("source", "", "Other text than the run's held-out part: text, jsonl, python …", flag_values=flags)
    f.DEFINE_list("files", [], "Its files or patterns.", flag_values=flags)


def _quantise(flags: FlagValues, rest: list[str]) -> None:
    none_left(rest)
    start_jax()
    import llmlab
    from llmlab.eval.command import EvalConfig
    from llmlab.eval.quantisation import quantise_command
    from llmlab.model.matrices import OF_LAYERS
    from llmlab.model.quantise import QuantiseConfig

    config = QuantiseConfig(flags.bits, flags.group, flags.include or OF_LAYERS)
    on = EvalConfig(source=flags.source, files=tuple(flags.files), batch_size=flags.rows)
    quantise_command(llmlab.open(required(flags, "workdir")), config, on)


def _define_report(flags: FlagValues, argv: list[str]) -> None:
    define_workdir(flags, "The run to report on, or a folder of several stages.")


def _report(flags: FlagValues, rest: list[str]) -> None:
    none_left(rest)
    from llmlab.report.run_page import write_report
    from llmlab.report.stages_page import write_stages_report

    workdir = Path(required(flags, "workdir")).expanduser()
    if (workdir / "config.json").exists() or not any(workdir.glob("*/config.json")):
        print(write_report(workdir))
        return
    path, table = write_stages_report(workdir)
    print(f"{table}\n{path}")


def _define_tokenize(flags: FlagValues, argv: list[str]) -> None:
    from llmlab.data.config import Rows

    define_workdir(flags, "The run whose tokenizer to use.")
    f.DEFINE_string("model", "", "Or any SentencePiece model file.", flag_values=flags)
    f.DEFINE_string("chat", "", "Show the conversations of this file, and what is learned of them.", flag_values=flags)
    kinds = list(get_args(Rows)[1:])
    f.DEFINE_enum("rows", None, kinds, "What its rows are; else their fields tell.", flag_values=flags)
    f.DEFINE_integer("limit", 3, "How many of its rows; 0 is all.", flag_values=flags)


def _tokenize(flags: FlagValues, rest: list[str]) -> None:
    from llmlab.data.token_view import chat_command, tokenize_command

    if bool(flags.model) == bool(flags.workdir):
        raise UserError("give one of --workdir=DIR and --model=FILE")
    tokenizer = flags.model or flags.workdir
    if flags.chat:
        none_left(rest)
        data = _data_of(flags.workdir) if flags.workdir else {}
        settings = {name: data[name] for name in ("system", "train_on") if name in data}
        chat_command(tokenizer, flags.chat, sys.stdout, rows=flags.rows, limit=flags.limit, **settings)
        return
    if given := [name for name in ("rows", "limit") if flags[name].present]:
        raise UserError(f"--{given[0]} is of conversations: name their file by --chat=FILE")
    tokenize_command(tokenizer, " ".join(rest) if rest else None, sys.stdout)


def _data_of(workdir: str) -> dict[str, Any]:
    """How the run in this folder read its rows."""
    from llmlab.workdir.files import Workdir

    found = Workdir(workdir)
    return found.read_config()["config"].get("data", {}) if found.config.exists() else {}


def _define_convert(flags: FlagValues, argv: list[str]) -> None:
    dtypes = ["float32", "bfloat16", "float64"]
    f.DEFINE_enum("dtype", None, dtypes, "Of weights that come in; else as they come.", flag_values=flags)
    f.DEFINE_string("base", "", "Where SRC is an adapter of PEFT: the workdir of its weights.", flag_values=flags)
    f.DEFINE_bool("adapter_only", False, "Write an adapter for PEFT, instead of merged.", flag_values=flags)


def _convert(flags: FlagValues, rest: list[str]) -> None:
    if len(rest) != 2:
        raise UserError(f"give two folders, SRC and DST, and not {len(rest)}: see `llmlab convert --help`")
    start_jax()
    from llmlab.train.convert import convert

    print(convert(rest[0], rest[1], flags.dtype, base=flags.base, adapter_only=flags.adapter_only))


VERBS = {
    "eval": Verb(
        "held-out loss, perplexity and bits per byte; answers to conversations; scores of local tasks",
        "--workdir=DIR [--source=text --files=a.txt,b.txt] [--tasks=a.jsonl,b.jsonl]",
        'A task is a file of rows {"question", "choices", "answer"} or {"question", "answer"}.',
        _define_eval,
        _eval,
    ),
    "quantise": Verb(
        "what weights of 8 or 4 bits would save, and what they would cost",
        "--workdir=DIR --bits=4",
        "Example:  llmlab quantise --workdir=runs/quickstart --bits=4 --group=32\n"
        "\n"
        "Only the matrices are quantised; nothing is written. An adapter trains over such weights with\n"
        "--config.adapter.kind=lora --config.adapter.base_bits=4.",
        _define_quantise,
        _quantise,
    ),
    "report": Verb(
        "write a run as one self-contained page, DIR/report.html",
        "--workdir=DIR",
        "Of a folder that holds the workdirs of several stages it prints what each is measured by, before and after.",
        _define_report,
        _report,
    ),
    "tokenize": Verb(
        "show the tokens of a text, their ids, and bytes per token; of conversations, what is learned",
        "--workdir=DIR|--model=FILE [TEXT|--chat=FILE]",
        "Without TEXT it reads standard input.\n"
        "\n"
        "Example:  llmlab tokenize --workdir=runs/quickstart --chat=chats.jsonl --limit=1",
        _define_tokenize,
        _tokenize,
    ),
    "convert": Verb(
        "a Hugging Face folder to a workdir, or a workdir to such a folder",
        "SRC DST [--dtype=bfloat16]",
        "Example:  llmlab convert ~/models/Qwen3-0.6B runs/qwen && llmlab sample --workdir=runs/qwen --prompt=Once\n"
        "\n"
        "Settings that are not supported are errors, never ignored. The licence of the source is shown and kept.\n"
        "Adapters in PEFT's format:  llmlab convert adapter_folder runs/adapter --base=runs/qwen\n"
        "                            llmlab convert runs/adapter adapter_folder --adapter_only",
        _define_convert,
        _convert,
    ),
}
