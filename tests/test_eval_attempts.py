"""What choosing among several answers gains."""

import io
import json

import numpy as np
import pytest

from llmlab.core.errors import UserError
from llmlab.data.config import DataConfig
from llmlab.data.rows import examples
from llmlab.data.sources import Document
from llmlab.eval import attempts, command
from llmlab.eval.command import EvalConfig, eval_command
from llmlab.report.run_page import _attempts
from tests.scripted import MODEL, TEMPLATE, assistant, says, user
from tests.test_eval_command_conversations import run_of
from tests.test_eval_conversations import example

ASKED = [example("sum", user(f"{a} + 1 = ?"), assistant(f"It is {a + 1}.")) for a in range(8)]


class Judge:
    """Knows the right answers by what they begin with, and is wrong about those without an end."""

    def scores(self, conversations):
        return np.array([float("it" in conversation[-1].content) for conversation in conversations])


def half_right(prompt, seed):
    """Right at odd seeds, and else wrong, each time otherwise."""
    right = int(prompt.rpartition("<|user|>")[2].split(" ")[0]) + 1
    return f"it is {right}" if seed % 2 else f"that is {right + seed + 1}"


def drawn(monkeypatch, answer=half_right, **settings):
    says(monkeypatch, answer)
    return attempts.attempts(MODEL, {}, TEMPLATE, ASKED, **{"count": 8, "max_tokens": 60} | settings)


def test_the_answer_of_most_and_the_best_are_right_more_often(monkeypatch):
    scores = attempts.curve(drawn(monkeypatch, judge=Judge()))
    assert scores["n"] == [1, 2, 4, 8]
    assert scores["questions"] == 8
    # Of a single one half are right; of two, one wrong and one right, the first, which is wrong; of four most agree.
    assert scores["majority"] == [0.5, 0, 1, 1]
    assert scores["best"] == [0.5, 1, 1, 1]
    assert scores["weighted"] == [0.5, 1, 1, 1]
    assert scores["any"] == [0.5, 1, 1, 1]
    lines = attempts.table(scores).splitlines()
    assert [line.split()[0] for line in lines] == ["attempts", "1", "2", "4", "8"]
    assert lines[2].split()[1:] == ["0.0000", "1.0000", "1.0000", "1.0000"]


def test_without_a_judge_there_is_no_best(monkeypatch):
    scores = attempts.curve(drawn(monkeypatch, count=3))
    assert scores["n"] == [1, 2, 3]
    assert "best" not in scores
    assert "reward" not in attempts.table(scores)


def test_what_has_not_ended_is_wrong_and_never_chosen(monkeypatch):
    def endless(prompt, seed):
        return half_right(prompt, seed) if seed % 2 else half_right(prompt, 1) + " " * 90

    found = drawn(monkeypatch, endless, judge=Judge(), count=2)
    assert [[each["right"] for each in attempt] for attempt in found] == [[False, True]] * 8
    assert found[0][0]["reward"] == -np.inf
    assert not attempts.pairs(ASKED[0].responses[0].conversation[:1], found[0])  # the wrong one has not ended
    assert attempts.curve(found)["best"] == [0.5, 1]


def evaluated(monkeypatch, folder, **settings):
    def documents(data, split, report):
        yield from (Document(f"sums:{i}", each.dumps()) for i, each in enumerate(ASKED))

    monkeypatch.setattr(command, "documents", documents)
    out = io.StringIO()
    config = EvalConfig(**{"held_out": False, "conversations": False} | settings)
    return eval_command(run_of("chat"), folder, config, out=out, quiet=True), out.getvalue()


def test_from_the_command_to_the_report(monkeypatch, tmp_path):
    says(monkeypatch, half_right)
    kept = tmp_path / "pairs.jsonl"
    result, printed = evaluated(monkeypatch, tmp_path, attempts=4, pairs=str(kept))
    assert json.loads((tmp_path / "eval.json").read_text())["attempts"] == result["attempts"]
    rows = [json.loads(line)["attempts"] for line in (tmp_path / "eval" / "attempts.jsonl").read_text().splitlines()]
    assert [[each["right"] for each in row] for row in rows] == [[False, True, False, True]] * 8
    assert "the answer of most" in printed
    pairs = [json.loads(line) for line in kept.read_text().splitlines()]
    assert len(pairs) == 16
    for pair in pairs:
        (read,) = examples(pair, "preference")
        assert [each.conversation[-1].content[:2] for each in read.responses] == ["it", "th"]
    chart = _attempts(result["attempts"])
    assert "the answer of most" in chart
    assert "8 questions" in chart
    assert _attempts(None) == ""


@pytest.mark.parametrize(
    ("settings", "mend"),
    [
        ({"reward": "runs/reward"}, "give --attempts"),
        ({"pairs": "pairs.jsonl"}, "give --attempts"),
        ({"attempts": 4, "turn_temperature": 0.0}, "choose one above 0"),
        ({"attempts": -1}, "at least 0"),
    ],
)
def test_settings_that_make_no_sense(settings, mend):
    with pytest.raises(UserError, match=mend):
        EvalConfig(**settings)


def test_a_model_of_text_has_no_attempts(tmp_path):
    run = run_of("text")
    assert run.config["data"]["rows"] == DataConfig().rows
    with pytest.raises(UserError, match="trained on conversations"):
        eval_command(run, tmp_path, EvalConfig(held_out=False, attempts=2), quiet=True)
