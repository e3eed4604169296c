"""What `llmlab eval` does with a run of conversations, and with one of text."""

import io
import json
from types import SimpleNamespace

import pytest

from llmlab.core.config import to_json
from llmlab.core.errors import UserError
from llmlab.data.config import DataConfig
from llmlab.data.sources import Document
from llmlab.eval import command
from llmlab.eval.command import EvalConfig, eval_command, talks
from llmlab.verbs.common import CHAT_TEMPERATURE
from tests import scripted
from tests.scripted import says
from tests.test_eval_conversations import PLAIN, SUM, TOOLS


def run_of(rows, head="tokens"):
    data = DataConfig(rows=rows, source="jsonl", files=("chats.jsonl",))
    model = SimpleNamespace(config=SimpleNamespace(max_positions=scripted.REACH, head=head), partition=None)
    return scripted.opened()._replace(model=model, config={"data": to_json(data)})


def evaluated(folder, rows="chat", **settings):
    out = io.StringIO()
    config = EvalConfig(**{"held_out": False} | settings)
    result = eval_command(run_of(rows), folder, config, tools=TOOLS, out=out, quiet=True)
    return result, out.getvalue()


@pytest.fixture
def rows_read(monkeypatch):
    """Lets the held-out part of the data be these examples; which part was asked for."""
    asked = []

    def documents(data, split, report):
        asked.append((data.rows, split))
        yield from (Document(f"chats.jsonl:{i}", example.dumps()) for i, example in enumerate([SUM, PLAIN, PLAIN]))

    monkeypatch.setattr(command, "documents", documents)
    return asked


def test_answers_to_held_out_conversations_are_measured_and_kept(monkeypatch, tmp_path, rows_read):
    says(monkeypatch, lambda prompt, seed: "so on")
    result, printed = evaluated(tmp_path)
    assert rows_read == [("chat", "held_out")]
    scores = result["conversations"]
    assert (scores["answers"], scores["exact"], scores["answered"]) == (3, 2 / 3, 0.0)
    assert json.loads((tmp_path / "eval.json").read_text()) == result
    outcomes = [json.loads(line) for line in (tmp_path / "eval" / "conversations.jsonl").read_text().splitlines()]
    assert [outcome["exact"] for outcome in outcomes] == [False, True, True]
    assert [line.split()[0] for line in printed.splitlines()] == ["answers", "conversations", "plain", "sum"]


def test_settings_of_the_answers(monkeypatch, tmp_path, rows_read):
    says(monkeypatch, lambda prompt, seed: "so on")
    result, _ = evaluated(tmp_path, turn_tokens=3, limit=2)
    scores = result["conversations"]
    assert (scores["answers"], scores["ended"], scores["tokens"]) == (2, 0.0, 3.0)
    result, _ = evaluated(tmp_path, "preference")
    assert result["conversations"]["answers"] == 3


def test_answers_are_drawn_as_in_a_chat(monkeypatch, tmp_path, rows_read):
    says(monkeypatch, lambda prompt, seed: "so on")
    drawn, measure = [], command.conversations.measure
    monkeypatch.setattr(
        command.conversations, "measure", lambda *a, **k: drawn.append(k["temperature"]) or measure(*a, **k)
    )
    evaluated(tmp_path, temperature=0.3)
    evaluated(tmp_path, turn_temperature=0.0)
    assert drawn == [CHAT_TEMPERATURE, 0.0]


def test_what_does_not_talk_is_not_asked(tmp_path):
    assert talks(run_of("chat"))
    assert talks(run_of("preference", head="tokens"))
    assert not talks(run_of("preference", head="score"))
    assert not talks(run_of("text"))
    with pytest.raises(UserError, match="nothing to evaluate"):
        evaluated(tmp_path, "text")
