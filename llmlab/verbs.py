"""What each `llmlab VERB` is: its flags, its help, and what it runs. A verb imports what it needs, when it runs."""

import atexit
import dataclasses
import itertools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from absl import flags as f
from absl.flags import FlagValues

from llmlab.core.errors import UserError
from llmlab.core.flags import define_config, define_workdir, none_left, overrides, parse, required
from llmlab.core.long_work import leaving_on_sigterm, outliving_readers

if TYPE_CHECKING:
    from llmlab.scaling import Result
    from llmlab.train.config import Experiment
    from llmlab.train.launch import Run
    from llmlab.train.loop import Hooks


class Verb(NamedTuple):
    """`define` declares the flags, with their help; `run` gets them parsed, and what was no flag."""

    summary: str
    usage: str
    details: str
    define: Callable[[Any, list[str]], None]
    run: Callable[[Any, list[str]], None]


# --- train, check, sweep -------------------------------------------------------------------------------------------


def _define_hosts(flags: FlagValues) -> None:
    f.DEFINE_string("coordinator", "", "host:port of process 0, on several hosts.", flag_values=flags)
    f.DEFINE_integer("processes", 0, "How many processes there are, on several hosts.", flag_values=flags)
    f.DEFINE_integer("process_id", -1, "Which of them this one is.", flag_values=flags)


def _define_train(flags: FlagValues, argv: list[str]) -> None:
    define_config(flags, argv)
    define_workdir(flags, "Where the run keeps its files; the same command again goes on from there.")
    f.DEFINE_string("init_from", "", "Start from the weights of this workdir.", flag_values=flags)
    f.DEFINE_bool("print_config", False, "Print what would run and what it costs, and stop.", flag_values=flags)
    _define_hosts(flags)


@outliving_readers()
@leaving_on_sigterm()
def _train(flags: FlagValues, rest: list[str]) -> None:
    experiment = _experiment(flags, rest, init_from=flags.init_from)
    _start_jax(flags)
    import jax

    if flags.print_config:
        from llmlab.core.mesh import make_partition
        from llmlab.train.config import check_mesh
        from llmlab.train.describe import describe

        if experiment.model.vocab_size:
            check_mesh(experiment, make_partition(experiment.mesh))
        print(describe(experiment, jax.device_count()))
        return
    from llmlab.train.launch import launch
    from llmlab.workdir.files import Workdir

    given: Any = flags["config"]
    arguments = [f"--config={given.config_filename}", *overrides(flags)]
    finished = launch(experiment, Workdir(required(flags, "workdir")), _hooks, arguments=arguments)
    if jax.process_index() == 0:
        _summarise(finished)


def _hooks(run: "Run") -> "Hooks":
    """Evaluation and samples, for the loop that may not import them."""
    from llmlab.eval.held_out import make_evaluator
    from llmlab.eval.samples import write_samples
    from llmlab.model.transformer import make_model
    from llmlab.train.loop import Hooks
    from llmlab.train.state import TrainState

    settings = run.experiment.run
    evaluator = make_evaluator(run.loss, run.partition)
    # A few prompts do not divide over a mesh: every device works on all of them.
    sampler = make_model(run.experiment.model, run.partition.with_whole_batch())

    def evaluate(state: TrainState, full: bool) -> dict[str, float]:
        batches = run.held_out()
        limit = None if full or not settings.eval_batches else settings.eval_batches
        return evaluator(state.evaluated, itertools.islice(batches, limit))

    def sample(state: TrainState) -> None:
        write_samples(
            sampler,
            state.evaluated,
            run.tokenizer,
            settings.sample_prompts,
            max_tokens=settings.sample_tokens,
            temperature=0.8,
            seed=settings.seed,
            path=run.workdir.samples / f"{int(state.step)}.txt",
        )

    return Hooks(evaluate, sample)


def _summarise(run: "Run") -> None:
    """The end of a run: its held-out figure beside that of xz, and where to look."""
    from llmlab.eval.command import BASELINE, keep_results, xz_of
    from llmlab.report.run_page import write_report
    from llmlab.workdir.metrics import MetricsLog

    rows = [row for row in MetricsLog(run.workdir.metrics).rows() if "eval/bits_per_byte" in row]
    if rows:
        xz = xz_of(run.experiment.data, "held_out", quiet=True)[BASELINE]
        keep_results(run.workdir.path, {BASELINE: xz})
        print(f"held-out bits per byte  {rows[-1]['eval/bits_per_byte']:.4f}  (xz -9, file by file: {xz:.4f})")
    report = write_report(run.workdir.path)
    print(f"report   {report}\nsamples  {run.workdir.samples}")


def _define_check(flags: FlagValues, argv: list[str]) -> None:
    define_config(flags, argv)
    define_workdir(flags, "A folder that all hosts share; needed on several hosts.")
    _define_hosts(flags)


def _check(flags: FlagValues, rest: list[str]) -> None:
    experiment = _experiment(flags, rest)
    _start_jax(flags)
    import jax

    from llmlab.core.errors import Tripwire
    from llmlab.core.mesh import make_partition
    from llmlab.train.check import check_experiment

    partition = make_partition(experiment.mesh)
    wrong = 0
    for row in check_experiment(experiment, partition, flags.workdir or None):
        wrong += not row.ok
        if jax.process_index() == 0:
            verdict = "ok   " if row.ok else "WRONG"
            print(f"{verdict}  {row.name:64s} {row.error:9.2e}  allowed {row.tolerance:.0e}", flush=True)
    if wrong:
        raise Tripwire(f"{wrong} comparisons are wrong on this machine and mesh: do not trust a run on it")


def _define_sweep(flags: FlagValues, argv: list[str]) -> None:
    define_config(flags, argv)
    define_workdir(flags, "A folder for all runs, a folder each.")
    f.DEFINE_string("sweep", None, "Keys and their values: 'model.width=128,256;run.seed=0,1,2'.", flag_values=flags)
    f.DEFINE_integer("parallel", 1, "Runs at once.", flag_values=flags)


@outliving_readers()
def _sweep(flags: FlagValues, rest: list[str]) -> None:
    from llmlab.core.config import to_json
    from llmlab.report.runs_page import write_runs_report
    from llmlab.scaling import check_keys, parse_sweep, run_sweep

    grid = parse_sweep(required(flags, "sweep"))
    _experiment(flags, rest)
    check_keys(grid, flags.config)
    given: Any = flags["config"]
    file, workdir = given.config_filename, Path(required(flags, "workdir"))
    shared = overrides(flags)

    def check(settings: dict[str, str]) -> Any:
        changed = [f"--config.{key}={value}" for key, value in settings.items()]
        parsed, _ = parse(define_config, [f"--config={file}", *shared, *changed])
        return to_json(_experiment(parsed, []))

    def draw(results: "list[Result]") -> None:
        notes = {result.name: result.error for result in results if result.error}
        write_runs_report([result.folder for result in results], workdir / "report.html", workdir.resolve().name, notes)

    results = run_sweep(file, shared, grid, workdir, check=check, parallel=flags.parallel, on_update=draw)
    print(f"results  {workdir / 'results.csv'}\npage     {workdir / 'report.html'}")
    if failed := [result.name for result in results if result.status == "failed"]:
        raise UserError(
            f"{len(failed)} of {len(results)} runs failed, {failed[0]} first: see its .log, then run this again"
        )


# --- sample, eval, quantise, report, tokenize ------------------------------------------------------------------------


def _define_sample(flags: FlagValues, argv: list[str]) -> None:
    define_workdir(flags, "The run to sample from.")
    f.DEFINE_string("prompt", "", "The text to go on from.", flag_values=flags)
    f.DEFINE_integer("max_tokens", 128, "The most tokens to write.", flag_values=flags)
    f.DEFINE_float("temperature", 0.8, "0 always takes the likeliest token.", flag_values=flags)
    f.DEFINE_integer("top_k", 0, "Only the k likeliest tokens; 0 is all.", flag_values=flags)
    f.DEFINE_float("top_p", 1.0, "Only the likeliest tokens that hold this probability.", flag_values=flags)
    f.DEFINE_float("min_p", 0.0, "Only tokens this likely, relative to the likeliest.", flag_values=flags)
    f.DEFINE_float("repetition_penalty", 1.0, "More than 1 makes what was said less likely.", flag_values=flags)
    f.DEFINE_integer("seed", 0, "The same seed gives the same text.", flag_values=flags)


def _sample(flags: FlagValues, rest: list[str]) -> None:
    none_left(rest)
    _start_jax()
    import llmlab
    from llmlab.infer.stream import sample_command

    sample_command(
        llmlab.open(required(flags, "workdir")),
        flags.prompt,
        max_tokens=flags.max_tokens,
        temperature=flags.temperature,
        top_k=flags.top_k,
        top_p=flags.top_p,
        min_p=flags.min_p,
        repetition_penalty=flags.repetition_penalty,
        seed=flags.seed,
        out=sys.stdout,
    )


def _define_eval(flags: FlagValues, argv: list[str]) -> None:
    define_workdir(flags, "The run to evaluate.")
    f.DEFINE_bool("held_out", True, "Measure loss and bits per byte of text.", flag_values=flags)
    f.DEFINE_string("source", "", "Other text than the run's held-out part: text, jsonl, python …", flag_values=flags)
    f.DEFINE_list("files", [], "Its files or patterns.", flag_values=flags)
    f.DEFINE_string("field", "", "The field of its rows that holds text.", flag_values=flags)
    f.DEFINE_string("split", "", "Which part of it: held_out, train, all.", flag_values=flags)
    f.DEFINE_list("tasks", [], "JSON lines files: choices, or answers to generate.", flag_values=flags)
    f.DEFINE_integer("few_shot", 0, "Solved examples before each question.", flag_values=flags)
    f.DEFINE_string("few_shot_file", "", "Where they come from; empty: the task's other rows.", flag_values=flags)
    f.DEFINE_integer("limit", 0, "The first so many rows of each task; 0 is all.", flag_values=flags)
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
    from llmlab.eval.command import EvalConfig, eval_command

    names = [field.name for field in dataclasses.fields(EvalConfig)]
    values: dict[str, Any] = {name: getattr(flags, name) for name in names}
    if wrong := [length for length in flags.needle_lengths if not (length.isascii() and length.isdigit())]:
        raise UserError(f"--needle_lengths={wrong[0]!r} should be numbers of tokens, such as 512,1024")
    lists = {"files": flags.files, "tasks": flags.tasks, "needle_lengths": map(int, flags.needle_lengths)}
    config = EvalConfig(**(values | {name: tuple(items) for name, items in lists.items()}))
    _start_jax()
    import llmlab

    workdir = required(flags, "workdir")
    eval_command(llmlab.open(workdir), workdir, config)
    if flags.needle:
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
    _start_jax()
    import llmlab
    from llmlab.eval.command import EvalConfig
    from llmlab.eval.quantisation import quantise_command
    from llmlab.model.matrices import OF_LAYERS
    from llmlab.model.quantise import QuantiseConfig

    config = QuantiseConfig(flags.bits, flags.group, flags.include or OF_LAYERS)
    on = EvalConfig(source=flags.source, files=tuple(flags.files), batch_size=flags.rows)
    quantise_command(llmlab.open(required(flags, "workdir")), config, on)


def _define_report(flags: FlagValues, argv: list[str]) -> None:
    define_workdir(flags, "The run to report on.")


def _report(flags: FlagValues, rest: list[str]) -> None:
    none_left(rest)
    from llmlab.report.run_page import write_report

    print(write_report(required(flags, "workdir")))


def _define_tokenize(flags: FlagValues, argv: list[str]) -> None:
    define_workdir(flags, "The run whose tokenizer to use.")
    f.DEFINE_string("model", "", "Or any SentencePiece model file.", flag_values=flags)


def _tokenize(flags: FlagValues, rest: list[str]) -> None:
    from llmlab.data.token_view import tokenize_command

    if bool(flags.model) == bool(flags.workdir):
        raise UserError("give one of --workdir=DIR and --model=FILE")
    tokenize_command(flags.model or flags.workdir, " ".join(rest) if rest else None, sys.stdout)


def _define_convert(flags: FlagValues, argv: list[str]) -> None:
    dtypes = ["float32", "bfloat16", "float64"]
    f.DEFINE_enum("dtype", None, dtypes, "Of weights that come in; else as they come.", flag_values=flags)
    f.DEFINE_string("base", "", "Where SRC is an adapter of PEFT: the workdir of its weights.", flag_values=flags)
    f.DEFINE_bool("adapter_only", False, "Write an adapter for PEFT, instead of merged.", flag_values=flags)


def _convert(flags: FlagValues, rest: list[str]) -> None:
    if len(rest) != 2:
        raise UserError(f"give two folders, SRC and DST, and not {len(rest)}: see `llmlab convert --help`")
    _start_jax()
    from llmlab.train.convert import convert

    print(convert(rest[0], rest[1], flags.dtype, base=flags.base, adapter_only=flags.adapter_only))


# --- what the verbs share --------------------------------------------------------------------------------------------


def _experiment(flags: FlagValues, rest: list[str], init_from: str = "") -> "Experiment":
    """The resolved experiment that --config and its overrides describe."""
    none_left(rest)
    given: Any = flags["config"]
    file = given.config_filename if given.present else ""
    if not file:
        raise UserError("--config=FILE.py is missing: name an experiment, such as --config=experiments/quickstart.py")
    if not os.path.isfile(path := file.partition(":")[0]):
        raise UserError(f"--config: there is no file {path}: see the ones in experiments/")
    from llmlab.train.config import resolve

    config = flags.config
    if not hasattr(config, "to_dict"):
        raise UserError(f"--config: get_config in {path} should return a ConfigDict: see experiments/quickstart.py")
    if init_from:
        config.run.init_from = init_from
    return resolve(config)


def _start_jax(flags: Any = None) -> None:
    """Joins the other hosts, if any, and keeps what is compiled for the next start."""
    from llmlab.core.host_memory import keep_freed_memory

    keep_freed_memory()
    import jax

    from llmlab.core.compile_cache import look_over
    from llmlab.core.distributed import connect
    from llmlab.core.paths import cache_root

    compiled = cache_root() / "compiled"
    look_over(compiled)
    atexit.register(look_over, compiled)
    jax.config.update("jax_compilation_cache_dir", str(compiled))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    if flags is not None:
        connect(flags.coordinator, flags.processes, flags.process_id)


VERBS: dict[str, Verb] = {
    "train": Verb(
        "train the model that an experiment file describes, or go on with it",
        "--config=experiments/X.py[:ARG] --workdir=DIR [--config.section.key=value …]",
        "Example:  llmlab train --config=experiments/quickstart.py --workdir=runs/quickstart --config.model.layers=6\n"
        "\n"
        "SIGTERM and Ctrl-C save and leave with code 75; a second Ctrl-C leaves at once. Under srun, mpirun or a\n"
        "Kubernetes JobSet the same command runs on all hosts; --coordinator, --processes and --process_id set it\n"
        "by hand.",
        _define_train,
        _train,
    ),
    "sample": Verb(
        "let a trained model go on from a prompt",
        "--workdir=DIR --prompt=TEXT",
        "Example:  llmlab sample --workdir=runs/quickstart --prompt='def' --temperature=0.8",
        _define_sample,
        _sample,
    ),
    "eval": Verb(
        "held-out loss, perplexity and bits per byte; scores of local tasks",
        "--workdir=DIR [--source=text --files=a.txt,b.txt] [--tasks=a.jsonl,b.jsonl]",
        'A task is a file of rows {"question", "choices", "answer"} or {"question", "answer"}.',
        _define_eval,
        _eval,
    ),
    "check": Verb(
        "is this machine computing it right? kernels, gradients on the mesh, restore",
        "--config=experiments/X.py[:ARG] [--config.mesh.tensor=2 …] [--workdir=DIR]",
        "Exits with 76 when something is wrong.",
        _define_check,
        _check,
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
        "write a run as one self-contained page, DIR/report.html", "--workdir=DIR", "", _define_report, _report
    ),
    "tokenize": Verb(
        "show the tokens of a text, their ids, and bytes per token",
        "--workdir=DIR|--model=FILE [TEXT]",
        "Without TEXT it reads standard input.",
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
    "sweep": Verb(
        "many runs from one experiment, as a table and a page of curves",
        "--config=FILE --sweep='model.width=128,256;optimizer.learning_rate=1e-3,3e-3' --workdir=DIR",
        "Skips what is done, and goes on past a run that fails.",
        _define_sweep,
        _sweep,
    ),
}
