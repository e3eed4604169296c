"""Conversations in the page of a run: before and after side by side, and the shares of what was right."""

import json
import re

import pytest

from llmlab.report.conversations import answers
from llmlab.report.run_page import write_report
from tests.test_report_run_page import Page, evaluation_row, training_row, workdir

SCORES = {
    "answers": 1200,
    "ended": 0.995,
    "exact": 0.5,
    "called": 0.9,
    "answered": 0.875,
    "tokens": 21.25,
    "too_long": 0,
    "kinds": {
        "plain": {"answers": 1000, "ended": 1.0, "exact": 0.4, "tokens": 20.0, "too_long": 0},
        "sum": {"answers": 200, "ended": 0.97, "exact": 1.0, "called": 0.9, "answered": 0.875, "tokens": 27.5},
    },
}


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


def conversation(question, answer, reference="right"):
    return {
        "prompt": [turn("user", question)],
        "answer": [turn("assistant", answer)],
        "reference": [turn("assistant", reference)],
        "ended": True,
    }


@pytest.fixture
def run(tmp_path):
    """A run that sampled these conversations: {step: rows}."""

    def make(sampled, **files):
        folder = workdir(tmp_path / "run", [training_row(1), evaluation_row(1, 2.0)], files=files)
        for step, rows in sampled.items():
            lines = rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows)
            (folder / "samples" / f"{step}.jsonl").write_text(lines)
        return folder

    return make


def cells(path):
    """The text of every cell of the conversations, row by row."""
    section = path.read_text().partition('<section id="conversations">')[2].partition("</section>")[0]
    rows = re.findall(r"<tr>(.*?)</tr>", section, re.DOTALL)
    return [
        [re.sub("<[^>]*>", "", cell) for cell in re.findall(r"<t[hd]>(.*?)</t[hd]>", row, re.DOTALL)] for row in rows
    ]


def test_the_first_and_the_last_answer_stand_side_by_side(run):
    before = [conversation("a?", "un<b>able</b>"), conversation("b?", "no")]
    after = [conversation("b?", "yes"), conversation("a?", "able"), conversation("c?", "new")]
    path = write_report(run({0: before, 50: [conversation("a?", "between")], 100: after}))
    assert cells(path) == [
        ["asked", "step 0", "step 100", "in the data"],
        ["user b?", "assistant no", "assistant yes", "assistant right"],
        ["user a?", "assistant un&lt;b&gt;able&lt;/b&gt;", "assistant able", "assistant right"],
        ["user c?", "", "assistant new", "assistant right"],
    ]
    assert "between" not in Page(path).sections["conversations"]


def test_one_sample_is_shown_alone(run):
    path = write_report(run({10: [conversation("a?", "able")]}))
    assert cells(path)[0] == ["asked", "step 10", "in the data"]


def test_turns_of_every_kind_are_shown(run):
    row = conversation("1+2?", "3")
    calls = [{"name": "add", "arguments": "1<2"}]
    row["answer"] = [
        turn("assistant", "so", thinking="hm & hm", tool_calls=calls),
        turn("tool", "3", name="add"),
        turn("assistant", ""),
    ]
    said = Page(write_report(run({10: [row]}))).sections["conversations"]
    for expected in ("assistant hm & hm so add 1<2", "tool add 3"):
        assert expected in said


@pytest.mark.parametrize(
    "content", ["", '{"prompt": [', "[]\n", '{"prompt": []}\n', '{"prompt": 1, "answer": 2, "reference": 3}\n']
)
def test_a_torn_file_is_passed_over(run, content):
    path = write_report(run({0: content, 100: [conversation("a?", "able")]}))
    assert cells(path)[0] == ["asked", "step 100", "in the data"]


def test_a_run_without_conversations_has_no_such_part(run):
    page = Page(write_report(run({})))
    assert "conversations" not in page.sections
    assert "answers" not in page.sections


def test_shares_are_a_table_by_kind(run):
    page = Page(write_report(run({}, **{"eval.json": {"step": 1, "conversations": SCORES}})))
    said = page.sections["answers"]
    for expected in ("1,200", "99.5 %", "87.5 %", "21.2", "sum", "97.0 %"):
        assert expected in said
    assert "conversations" not in page.sections["evaluation"]
    rows = re.findall("<tr>.*?</tr>", answers(SCORES))
    assert [row.count("<td>") for row in rows] == [0, 7, 7, 7]
    assert "<td>plain</td><td>1,000</td><td>100.0 %</td><td>40.0 %</td><td></td><td></td><td>20.0</td>" in rows[2]
