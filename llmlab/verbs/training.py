"""Verbs that train: train, check, sweep."""

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags as f
from absl.flags import FlagValues

from llmlab.core.errors import UserError
from llmlab.core.flags import define_config, define_workdir, overrides, parse, required
from llmlab.core.long_work import leaving_on_sigterm, outliving_readers
from llmlab.verbs.common import Verb, experiment_of, start_jax, tools

if TYPE_CHECKING:
    from llmlab.data.chat import Example
    from llmlab.data.config import DataConfig
    from llmlab.scaling import Result
    from llmlab.train.launch import Run
    from llmlab.train.loop import Hooks


LOOKED_AT, SAMPLED = 64, 6  # conversations


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
    experiment = experiment_of(flags, rest, init_from=flags.init_from)
    start_jax(flags)
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
    from llmlab.data.chat import template_for
    from llmlab.eval.conversations import write_conversations
    from llmlab.eval.held_out import make_evaluator
    from llmlab.eval.samples import write_samples
    from llmlab.model.transformer import make_model
    from llmlab.train.loop import Hooks
    from llmlab.train.state import TrainState

    settings = run.experiment.run
    asked = _asked(run.experiment.data) if settings.sample_every else []
    evaluator = make_evaluator(run.loss, run.partition)
    # A few prompts do not divide over a mesh: every device works on all of them.
    sampler = make_model(run.experiment.model, run.partition.with_whole_batch())

    def evaluate(state: TrainState, full: bool) -> dict[str, float]:
        batches = run.held_out()
        limit = None if full or not settings.eval_batches else settings.eval_batches
        return evaluator(state.evaluated, itertools.islice(batches, limit))

    def sample(state: TrainState) -> None:
        path = run.workdir.samples / f"{int(state.step)}.txt"
        if run.experiment.data.rows != "text":
            write_conversations(
                sampler,
                state.evaluated,
                template_for(run.tokenizer),
                asked,
                tools=tools(),
                max_tokens=settings.sample_tokens,
                seed=settings.seed,
                path=path,
            )
            return
        write_samples(
            sampler,
            state.evaluated,
            run.tokenizer,
            settings.sample_prompts,
            max_tokens=settings.sample_tokens,
            temperature=0.8,
            seed=settings.seed,
            path=path,
        )

    return Hooks(evaluate, sample)


def _asked(data: "DataConfig") -> "list[Example]":
    """The conversations whose last question a model is asked again while it trains: one of each kind, or the first."""
    from llmlab.data.chat import Example
    from llmlab.data.sources import Report, documents

    if data.rows == "text":
        return []
    first = [Example.loads(each.text) for each in itertools.islice(documents(data, "held_out", Report()), LOOKED_AT)]
    of_kinds = list({example.kind: example for example in reversed(first)}.values())
    return (of_kinds if len(of_kinds) > 1 else first)[:SAMPLED]


def _summarise(run: "Run") -> None:
    """The end of a run: its held-out figure beside that of xz, and where to look."""
    from llmlab.eval.command import BASELINE, keep_results, xz_of
    from llmlab.report.run_page import write_report
    from llmlab.workdir.metrics import MetricsLog

    rows = [row for row in MetricsLog(run.workdir.metrics).rows() if "eval/bits_per_byte" in row]
    if rows and run.experiment.data.rows == "text":
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
    experiment = experiment_of(flags, rest)
    start_jax(flags)
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
    experiment_of(flags, rest)
    check_keys(grid, flags.config)
    given: Any = flags["config"]
    file, workdir = given.config_filename, Path(required(flags, "workdir"))
    shared = overrides(flags)

    def check(settings: dict[str, str]) -> Any:
        changed = [f"--config.{key}={value}" for key, value in settings.items()]
        parsed, _ = parse(define_config, [f"--config={file}", *shared, *changed])
        return to_json(experiment_of(parsed, []))

    def draw(results: "list[Result]") -> None:
        notes = {result.name: result.error for result in results if result.error}
        write_runs_report([result.folder for result in results], workdir / "report.html", workdir.resolve().name, notes)

    results = run_sweep(file, shared, grid, workdir, check=check, parallel=flags.parallel, on_update=draw)
    print(f"results  {workdir / 'results.csv'}\npage     {workdir / 'report.html'}")
    if failed := [result.name for result in results if result.status == "failed"]:
        raise UserError(
            f"{len(failed)} of {len(results)} runs failed, {failed[0]} first: see its .log, then run this again"
        )


VERBS = {
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
    "check": Verb(
        "is this machine computing it right? kernels, gradients on the mesh, restore",
        "--config=experiments/X.py[:ARG] [--config.mesh.tensor=2 …] [--workdir=DIR]",
        "Exits with 76 when something is wrong.",
        _define_check,
        _check,
    ),
    "sweep": Verb(
        "many runs from one experiment, as a table and a page of curves",
        "--config=FILE --sweep='model.width=128,256;optimizer.learning_rate=1e-3,3e-3' --workdir=DIR",
        "Skips what is done, and goes on past a run that fails.",
        _define_sweep,
        _sweep,
    ),
}
