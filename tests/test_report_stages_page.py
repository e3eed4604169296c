"""The table of stages: their order, what each is measured by, and what `llmlab eval` adds."""

import json

import pytest

from llmlab.core.errors import UserError
from llmlab.report.stages_page import write_stages_report


def make_stage(folder, name, rows, evaluations, begins="", **evaluated):
    workdir = folder / name
    workdir.mkdir()
    config = {"run": {"steps": 9, "init_from": begins and str(folder / begins)}, "data": {"rows": rows}}
    (workdir / "config.json").write_text(json.dumps({"config": config}))
    metrics = [{"step": step, **{f"eval/{key}": value for key, value in each.items()}} for step, each in evaluations]
    lines = [*metrics, {"step": 9, "loss": 1.0}]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (workdir / "eval.json").write_text(json.dumps({"step": 9, **evaluated}))


def test_each_stage_comes_after_the_one_it_began_from_with_its_own_measures(tmp_path):
    pairs = [(0, {"loss": 0.7, "accuracy": 0.5}), (9, {"loss": 0.2, "accuracy": 0.9345})]
    make_stage(tmp_path, "a_reward", "preference", pairs, "sft", pairs={"by_kind": {"rude": 1.0}})
    answers = {"ended": 0.995, "kinds": {"sum": {"answered": 0.98, "ended": 1.0}, "function": {"ended": 1.0}}}
    chat = [(0, {"loss": 5.0, "bits_per_byte": 3.0}), (9, {"loss": 2.5, "bits_per_byte": 1.5})]
    make_stage(tmp_path, "sft", "chat", chat, "z_first", conversations=answers)
    make_stage(tmp_path, "z_first", "text", [(9, {"loss": 4.0, "bits_per_byte": 1.9})])
    path, table = write_stages_report(tmp_path)
    assert [line.split("  ")[0] for line in table.splitlines()] == [
        "stage",
        *["z_first"] * 2,
        *["sft"] * 3,
        *["a_reward"] * 3,
    ]
    cells = {tuple(part.strip() for part in line.split("  ") if part.strip()) for line in table.splitlines()}
    assert ("z_first", "held-out bits per byte", "1.9000") in cells
    assert ("sft", "held-out loss of answers", "5.0000", "2.5000") in cells
    assert ("sft", "answers that end by themselves", "99.5%") in cells
    assert ("sft", "answered through a call: sum", "98.0%") in cells
    assert ("a_reward", "held-out pairs told apart", "50.0%", "93.5%") in cells
    assert ("a_reward", "pairs told apart: rude", "100.0%") in cells
    page = path.read_text()
    assert '<a href="sft/report.html">sft/report.html</a>' in page
    assert "93.5%" in page


def test_a_folder_without_workdirs_is_refused(tmp_path):
    with pytest.raises(UserError, match="is no workdir and holds none"):
        write_stages_report(tmp_path)
