"""A sweep of real runs, of which one fails when it is under way."""

import argparse
import csv
from pathlib import Path

import pytest

from llmlab import cli
from llmlab.core.errors import EXIT_USER_ERROR

QUICKSTART = Path(__file__).parent.parent / "experiments" / "quickstart.py"
# A model may have more ids than its tokenizer, which it meets only once the tokenizer is trained; never fewer.
SWEEP = "model.vocab_size=384,448;data.tokenizer.vocab_size=384,448"


@pytest.mark.slow
def test_a_sweep_goes_on_past_a_failure_and_skips_what_is_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    corpus, workdir = tmp_path / "corpus.txt", tmp_path / "sweep"
    corpus.write_text(Path(argparse.__file__).read_text()[:60_000])
    command = [
        "llmlab",
        "sweep",
        f"--config={QUICKSTART}:tiny",
        f"--workdir={workdir}",
        f"--sweep={SWEEP}",
        "--parallel=2",
        "--config.data.source=text",
        f"--config.data.files={corpus}",
        "--config.data.batch_size=8",
        "--config.data.workers=1",
    ]
    assert cli.run(command) == EXIT_USER_ERROR
    shown = capsys.readouterr()
    assert "1 of 4 runs failed" in shown.err

    table = read(workdir)
    sizes = [(int(row["model.vocab_size"]), int(row["data.tokenizer.vocab_size"])) for row in table]
    assert sizes == [(384, 384), (384, 448), (448, 384), (448, 448)]
    assert [row["status"] for row in table] == ["done", "failed", "done", "done"]
    assert "model.vocab_size=384 is less than the tokenizer's 448" in table[1]["error"]
    for row in table[:1] + table[2:]:
        assert (row["step"], row["exit_code"]) == ("4", "0")
        assert 4 < float(row["loss"]) < 8
        assert float(row["bits_per_byte"]) > 0
        assert (workdir / row["run"] / "report.html").exists()
    page = (workdir / "report.html").read_text()
    assert "3 of 4 runs finished" in page
    assert table[1]["run"] in page
    assert "less than the tokenizer" in page

    finished = [row for row in table if row["status"] == "done"]
    written = [(workdir / row["run"] / "metrics.jsonl").stat().st_mtime_ns for row in finished]
    assert cli.run(command) == EXIT_USER_ERROR
    assert capsys.readouterr().err.count("was done before") == 3
    assert [(workdir / row["run"] / "metrics.jsonl").stat().st_mtime_ns for row in finished] == written
    # What the runs took the first time is still in the table.
    assert [row for row in read(workdir) if row["status"] == "done"] == finished


def read(workdir: Path) -> list[dict[str, str]]:
    with open(workdir / "results.csv", newline="") as file:
        return list(csv.DictReader(file))
