import json
import re

import pytest

from llmlab.report.runs_page import write_runs_report


def workdir(folder, width, rate, losses, *, steps=20, batch_size=4):
    folder.mkdir(parents=True)
    config = {
        "model": {"width": width, "layers": 2},
        "data": {"batch_size": batch_size, "sequence_length": 8, "files": ["/home/someone/a.txt"]},
        "optimizer": {"learning_rate": rate},
        "run": {"steps": steps},
    }
    rows = []
    for step, loss in losses.items():
        rows.append({"step": step, "tokens": step * batch_size * 8, "loss": loss + 0.1, "tokens_per_second": 32.0})
        rows.append({"step": step, "eval/loss": loss, "eval/bits_per_byte": loss / 2})
    (folder / "config.json").write_text(json.dumps({"config": config, "parameters": width * 1000}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def folders(tmp_path):
    return [
        workdir(tmp_path / "a", 128, 0.001, {10: 3.5, 20: 3.25}),
        workdir(tmp_path / "b", 128, 0.003, {10: 3.0, 20: 2.75}),
        workdir(tmp_path / "c", 256, 0.001, {10: 3.25, 20: 3.0}),
        workdir(tmp_path / "d", 256, 0.003, {10: 4.5}),
    ]


def section(text, name):
    return re.search(rf'<section id="{name}">(.*?)</section>', text, re.S).group(1)


def figures(text, name):
    found = re.findall(r"<figure><figcaption>(.*?)</figcaption>(.*?)</figure>", section(text, name), re.S)
    return dict(found)


def table(text):
    rows = re.findall(r"<tr>(.*?)</tr>", section(text, "results"), re.S)
    return [re.findall(r"<t[hd]>(.*?)</t[hd]>", row, re.S) for row in rows]


def test_the_table_has_what_differs_and_the_best_first(folders, tmp_path):
    text = write_runs_report(folders, tmp_path / "page.html", "my sweep").read_text()
    header, *rows = table(text)
    assert header[1:5] == ["width", "learning_rate", "held-out loss", "bits per byte"]
    assert [row[1:5] for row in rows] == [
        ["128", "0.003", "2.7500", "1.3750"],
        ["256", "0.001", "3.0000", "1.5000"],
        ["128", "0.001", "3.2500", "1.6250"],
        ["256", "0.003", "4.5000", "2.2500"],
    ]
    assert [row[-1] for row in rows] == ["20 steps"] * 3 + ["unfinished: step 10 of 20"]
    assert [row[6] for row in rows] == ["128.0k", "256.0k", "128.0k", "256.0k"]
    assert rows[0][7] == "0:10"  # ten steps of 32 tokens, at 32 a second
    assert "3 of 4 runs finished" in text
    assert "someone" not in text


def test_every_run_has_its_curve_named_by_what_differs(folders, tmp_path):
    text = write_runs_report(folders, tmp_path / "page.html", "my sweep").read_text()
    charts = figures(text, "curves")
    assert list(charts) == ["Held-out loss", "Training loss after the first tenth"]
    held_out, training = charts.values()
    assert held_out.count("<polyline") == 3  # the fourth has one point
    assert held_out.count("<circle") == 7
    legend = re.findall(r"</svg>([^<]*)</li>", held_out)
    assert legend[0] == "width 128, learning_rate 0.003"
    assert len(set(legend)) == 4
    assert "legend" not in training


def test_tokens_are_the_other_axis_where_steps_are_not_alike(tmp_path):
    small = workdir(tmp_path / "small", 128, 0.001, {10: 3.5, 20: 3.25})
    large = workdir(tmp_path / "large", 128, 0.001, {10: 3.5, 20: 3.0}, batch_size=8)
    text = write_runs_report([small, large], tmp_path / "page.html", "t").read_text()
    by_tokens = figures(text, "curves")["Held-out loss by tokens"]
    assert "3.25 at 640<" in by_tokens
    assert "3 at 1280<" in by_tokens


def test_the_effect_of_each_setting_is_drawn_for_finished_runs(folders, tmp_path):
    text = write_runs_report(folders, tmp_path / "page.html", "t").read_text()
    charts = figures(text, "settings")
    assert list(charts) == ["Held-out loss against model.width", "Held-out loss against optimizer.learning_rate"]
    by_width, by_rate = charts.values()
    assert "learning_rate 0.001: 3.25 at 128<" in by_width
    assert "learning_rate 0.001: 3 at 256<" in by_width
    assert "width 128: 2.75 at 0.003<" in by_rate
    assert by_width.count("<circle") == by_rate.count("<circle") == 3


def test_runs_without_a_result_are_listed_with_their_reason(folders, tmp_path):
    everything = [*folders, tmp_path / "e<", tmp_path / "f"]
    notes = {"e<": "out of memory <5 GB>", "d": "no room left to write /home/someone/d: free some"}
    text = write_runs_report(everything, tmp_path / "page.html", "t", notes).read_text()
    assert "out of memory &lt;5 GB&gt;" in section(text, "missing")
    assert "no result yet" in section(text, "missing")
    assert table(text)[4][-1] == "no room left to write …/d: free some"
    assert "3 of 6 runs finished" in text


def test_one_run_and_none_have_a_page_too(folders, tmp_path):
    one = write_runs_report(folders[:1], tmp_path / "one.html", "t").read_text()
    assert [row[1] for row in table(one)] == ["run", "a"]
    none = write_runs_report([], tmp_path / "none.html", "t").read_text()
    assert "0 of 0 runs" in none
    assert "<section" not in none
