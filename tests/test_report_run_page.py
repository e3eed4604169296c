import json
import math
import re
from html.parser import HTMLParser

import pytest

from llmlab.core.errors import UserError
from llmlab.report.read import read_run, training_seconds, without_paths
from llmlab.report.run_page import write_report

VOID = {"meta"}
CONFIG = {
    "model": {"width": 128, "vocab_size": 4096, "pattern": ["global"]},
    "data": {"source": "text", "files": ["/home/someone/private/book.txt"], "batch_size": 16, "sequence_length": 256},
    "optimizer": {"learning_rate": 0.004},
    "run": {"steps": 40, "seed": 0, "init_from": "~/runs/earlier"},
}


class Page(HTMLParser):
    """The text of each section, all tags and attributes, and whether the tags balance."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.attributes, self.sections, self.open = [], [], {}, []
        self.section, self.text = "", ""
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag == "section":
            self.section = dict(attributes)["id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        self.section = "" if tag == "section" else self.section

    def handle_data(self, data):
        self.text += data
        self.sections[self.section] = self.sections.get(self.section, "") + data


def training_row(step, **values):
    loss = 2 + 6 / step
    row = {"step": step, "tokens": step * 4096, "targets": 4096.0, "loss": loss, "bits_per_byte": loss / 2}
    row |= {"learning_rate": 0.004, "grad_norm": 0.5, "skipped": 0.0, "tokens_per_second": 8192.0}
    return row | values


def evaluation_row(step, loss):
    return {"step": step, "eval/loss": loss, "eval/bits_per_byte": loss / 2, "eval/perplexity": math.exp(loss)}


def workdir(folder, rows, *, samples=None, tail="", files=None):
    (folder / "samples").mkdir(parents=True)
    described = {"config": CONFIG, "versions": {"jax": "0.10.2"}, "platform": "Linux-6.1", "devices": "1 x cpu"}
    described |= {
        "git": "1a2b3c4-dirty",
        "arguments": ["--workdir=/home/someone/my-run"],
        "data": {"hash": "feedbeef"},
        "parameters": 2_688_000,
    }
    (folder / "config.json").write_text(json.dumps(described))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    for step, text in (samples or {}).items():
        (folder / "samples" / f"{step}.txt").write_text(text)
    for name, content in (files or {}).items():
        (folder / name).write_text(json.dumps(content))
    return folder


@pytest.fixture
def finished(tmp_path):
    rows = [training_row(1), training_row(10), training_row(20), evaluation_row(20, 2.5), training_row(30)]
    rows += [training_row(40), evaluation_row(40, 2.25)]
    return workdir(
        tmp_path / "my-run",
        rows,
        samples={20: "half way", 40: "</script><b>bold</b> & done\x00"},
        files={"eval.json": {"xz_bits_per_byte": 1.92}, "time.json": {"tokenising": 30.0, "steps": 90.0}},
    )


def polylines(path):
    return len(re.findall("<polyline", path.read_text()))


def test_every_section_is_there_with_the_numbers_of_the_metrics(finished):
    page = Page(write_report(finished))
    assert set(page.sections) == {"", "numbers", "curves", "samples", "evaluation", "time", "config", "machine"}
    for expected in ("1.125", "xz -9: 1.920", "2.250", f"perplexity {math.exp(2.25):.1f}", "2.150", "2,688,000"):
        assert expected in page.sections["numbers"]
    for expected in (f"{40 * 4096:,}", "8.2k", "2:00"):
        assert expected in page.sections["numbers"]
    assert "0:30 (25 %)" in page.sections["time"]
    assert "1:30 (75 %)" in page.sections["time"]
    assert "40 steps" in page.text
    assert '"learning_rate": 0.004' in page.sections["config"]
    for expected in ("0.10.2", "Linux-6.1", "1a2b3c4-dirty", "feedbeef"):
        assert expected in page.sections["machine"]


def test_training_and_held_out_curves_share_a_chart(finished):
    path = write_report(finished)
    page = Page(path)
    for title in ("Loss", "Bits per byte", "Learning rate", "Gradient norm", "Tokens per second"):
        assert title in page.sections["curves"]
    assert polylines(path) == 7  # two of loss, two of bits, one each of the other three
    assert page.tags.count("circle") == 4  # two evaluations in each of two charts
    assert "held out: 2.5 at 20" in page.sections["curves"]
    assert "held out 2.25" in page.sections["curves"]


def test_nothing_is_fetched_or_run(finished):
    page = Page(write_report(finished))
    assert not {"script", "link", "img", "iframe", "object", "embed", "base"} & set(page.tags)
    assert not {"src", "href", "xlink:href", "action", "srcset", "data"} & {name for name, _ in page.attributes}
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    text = (finished / "report.html").read_text()
    assert "url(" not in text
    assert "@import" not in text
    assert "://" not in text


def test_samples_are_text_the_latest_first(finished):
    page = Page(write_report(finished))
    samples = page.sections["samples"]
    assert samples.index("step 40") < samples.index("step 20")
    assert "</script><b>bold</b> & done\u2400" in samples
    assert "b" not in page.tags
    details = re.findall("<details[^>]*>", (finished / "report.html").read_text())
    assert details[:2] == ["<details open>", "<details>"]


def test_no_folder_of_the_machine_is_told(finished):
    text = write_report(finished).read_text()
    assert "my-run" in text
    for secret in ("someone", "private", str(finished.parent), "~/runs"):
        assert secret not in text
    assert "…/book.txt" in text


@pytest.mark.parametrize(
    "value, shown",
    [
        ("/a/b/c.txt", "…/c.txt"),
        ("/a/b/", "…/b"),
        ("~/x", "…/x"),
        ("C:\\Users\\me\\x.txt", "…/x.txt"),
        ("gs://bucket/run", "…/run"),
        ("books/*.txt", "books/*.txt"),
        ("a / b and 1/2", "a / b and 1/2"),
        ("file:///home/me/x", "…/x"),
        ("/data/books/*.txt", "…/*.txt"),
        ("// a comment", "// a comment"),
        ("x = 1  // of a/b", "x = 1  // of a/b"),
        ("/* x", "/* x"),
        ("/* a/b */ and /** c/d */", "/* a/b */ and /** c/d */"),
        ("either/or, /or not/", "either/or, /or not/"),
        ("~5 or ~6/7", "~5 or ~6/7"),
        ("in /a/b\nof 1/2", "in …/b\nof 1/2"),
        ("/tmp", "/tmp"),
        ("--workdir=/home/me/my runs/x", "--workdir=…/x"),
        ("--config=experiments/x.py:/a/b.txt", "--config=experiments/x.py:…/b.txt"),
        ("--config.data.files=('/a/b','/c/d.txt')", "--config.data.files=('…/b','…/d.txt')"),
        (["/a/b", 3], ["…/b", 3]),
        ({"/c/k": "/a/b"}, {"…/k": "…/b"}),
        (1.5, 1.5),
        (None, None),
    ],
)
def test_paths_are_cut_to_their_last_part(value, shown):
    assert without_paths(value) == shown


@pytest.mark.parametrize(
    "rows, lines",
    [
        ([], 0),
        ([training_row(1)], 0),
        ([training_row(1), training_row(10)], 5),
        ([training_row(1), training_row(10, loss=None), training_row(20, loss=None)], 4),
        ([evaluation_row(20, 2.5), evaluation_row(40, 2.0)], 2),
    ],
    ids=["nothing", "one row", "no evaluation", "null losses", "only evaluations"],
)
def test_an_unfinished_run_has_a_page_too(tmp_path, rows, lines):
    path = write_report(workdir(tmp_path / "run", rows))
    page = Page(path)
    assert polylines(path) == lines
    assert "nan" not in path.read_text().lower()
    if not rows or rows[-1]["step"] < 40:
        assert "unfinished" in page.text
    if not any("eval/loss" in row for row in rows):
        assert "held-out" not in page.sections.get("numbers", "")


def test_a_loss_that_is_not_finite_is_said_and_leaves_a_gap(tmp_path):
    rows = [training_row(s) for s in (1, 10)] + [training_row(20, loss=float("nan"))]
    rows += [training_row(s) for s in (30, 40)] + [
        training_row(41, loss=float("inf")),
        evaluation_row(41, float("nan")),
    ]
    path = write_report(workdir(tmp_path / "run", rows))
    page = Page(path)
    assert "not finite" in page.sections["numbers"]
    assert "held-out" not in page.sections["numbers"]
    assert polylines(path) == 2 + 4


def test_a_torn_last_line_is_no_row(tmp_path):
    run = read_run(workdir(tmp_path / "run", [training_row(1)], tail='{"step": 10, "loss": 1.'))
    assert [row["step"] for row in run.training] == [1]


def test_time_in_steps_is_tokens_over_rate(tmp_path):
    rows = [training_row(1), training_row(10, tokens_per_second=4096.0), training_row(40, tokens_per_second=8192.0)]
    run = read_run(workdir(tmp_path / "run", rows))
    assert training_seconds(run) == pytest.approx(9 / 1 + 30 / 2)
    assert training_seconds(read_run(workdir(tmp_path / "one", rows[:1]))) is None


def test_torn_extras_are_left_out(finished):
    (finished / "eval.json").write_text('{"xz_bits')
    (finished / "samples" / "notes.txt").write_text("not a step")
    (finished / "samples" / "30.txt").write_bytes(b"\xff\xfe cut")
    page = Page(write_report(finished))
    assert "xz" not in page.text
    assert "not a step" not in page.text
    assert "\ufffd\ufffd cut" in page.sections["samples"]


def test_a_folder_that_is_no_workdir_is_an_error_of_one_line(tmp_path):
    with pytest.raises(UserError, match=r"config\.json"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_else_is_evaluated_has_curves(tmp_path):
    further = {"accuracy": 0.5, "margin": 0.1, "chosen_reward": 1.0, "rejected_reward": 0.5, "accuracy/made_up": 0.25}
    rows = []
    for step, gain in ((1, 0.0), (20, 0.1), (40, 0.25)):
        rows.append(training_row(step, margin=gain))
        rows.append(evaluation_row(step, 2.5) | {f"eval/{name}": value + gain for name, value in further.items()})
    path = write_report(workdir(tmp_path / "run", rows))
    said = Page(path).sections["curves"]
    for expected in ("Margin", "Accuracy", "Reward", "chosen 1.25", "rejected 0.75", "all 0.75", "made up 0.5"):
        assert expected in said
    assert "held out 0.35" in said  # of the margin, beside what it is in training
    assert "training 0.25" in said
    assert "erplexity" not in said
    assert polylines(path) == 7 + 2 + 2 + 2


def test_calibration_is_that_of_the_last_evaluation(tmp_path):
    sure, right = (0.55, 0.75, 0.95), (0.5, 0.8, 1.0)
    rows = [training_row(1), evaluation_row(1, 2.0) | {"eval/calibration/confidence_50": 0.9}, training_row(40)]
    last = evaluation_row(40, 1.0)
    for low, confidence, accuracy in zip((50, 70, 90), sure, right, strict=True):
        last |= {f"eval/calibration/confidence_{low}": confidence, f"eval/calibration/accuracy_{low}": accuracy}
    last |= {"eval/calibration/confidence_60": None, "eval/calibration/accuracy_60": None}
    path = write_report(workdir(tmp_path / "run", [*rows, last]))
    said = Page(path).sections["curves"]
    assert "Calibration" in said
    for confidence, accuracy in zip(sure, right, strict=True):
        assert f"held out: {accuracy:g} at {confidence:g}" in said
    assert "Calibration" not in Page(write_report(workdir(tmp_path / "other", rows))).sections["curves"]
