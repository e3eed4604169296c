"""`llmlab rank`: orders, pairs and drafts that a person makes, a row at a time."""

import io
import json
from collections import Counter

import pytest

from llmlab.core.errors import UserError
from llmlab.data.chat import Message
from llmlab.data.rows import examples
from llmlab.infer.rank import RankConfig, order_of, rank_command, ranking_rows, read_prompts
from llmlab.infer.terminal import Terminal
from tests.scripted import assistant, opened, says, tool, user

WORDS = ("alpha", "beta", "gamma", "delta")


@pytest.fixture
def files(tmp_path):
    (tmp_path / "prompts.txt").write_text("first\n\nsecond\nfirst\nthird\n")
    return {"prompts": str(tmp_path / "prompts.txt"), "out": str(tmp_path / "out.jsonl")}


def ranked(files, typed, tools=None, **settings):
    """What was shown while this was typed, and the rows that are kept after it."""
    out = io.StringIO()
    config = RankConfig(**files, **settings)
    rank_command(opened(), Terminal(io.StringIO(typed), out), config, tools=tools or {}, max_tokens=64, temperature=1.0)
    with open(files["out"], encoding="utf-8") as file:
        return out.getvalue(), [json.loads(line) for line in file]


def by_seed(prompt, seed):
    return f"{WORDS[seed % 4]} to {prompt.rpartition('<|user|>')[2].partition('<|end|>')[0]}"


def shown_answers(text):
    """The answers of the first prompt in the order in which they are numbered."""
    lines = text.split("--- 2")[0].splitlines()
    return [lines[i + 1] for i, line in enumerate(lines) if line.startswith("[")]


def test_an_order_becomes_a_row_at_once(monkeypatch, files):
    asked = says(monkeypatch, by_seed)
    text, rows = ranked(files, "3 1 4 2\nq\n")
    answers = shown_answers(text)
    assert sorted(answers) == sorted(f"{word} to first" for word in WORDS)
    best_first = [answers[place] for place in (2, 0, 3, 1)]
    assert rows == [
        {
            "prompt": [{"role": "user", "content": "first"}],
            "responses": [[{"role": "assistant", "content": answer}] for answer in best_first],
        }
    ]
    assert Counter(asked[:4]) == {"<|user|>first<|end|><|assistant|>": 4}


def test_it_goes_on_after_the_prompts_that_are_done(monkeypatch, files):
    says(monkeypatch, by_seed)
    ranked(files, "1 2 3 4\n")
    with open(files["out"], "a") as file:
        file.write('{"prompt": "half of a ro')
    text, rows = ranked(files, "s\n1 2 3 4\n")
    assert [row["prompt"][0]["content"] for row in rows] == ["first", "third"]
    assert "--- 1 of 2 ---\nuser: second" in text
    text, rows = ranked(files, "2 1 3 4\n")
    assert [row["prompt"][0]["content"] for row in rows] == ["first", "third", "second"]
    text, _ = ranked(files, "")
    assert text == ""


def test_what_is_no_order_is_asked_again(monkeypatch, files):
    says(monkeypatch, by_seed)
    text, rows = ranked(files, "1 2 3\n1 1 2 3\n0 1 2 3\nbest\n\n4321\n")
    assert text.count("each number from 1 to 4 once") == 5
    answers = shown_answers(text)
    assert [response[0]["content"] for response in rows[0]["responses"]] == answers[::-1]


@pytest.mark.parametrize(
    "line, want",
    [
        ("2 1 3", [1, 0, 2]),
        ("2,1,3", [1, 0, 2]),
        ("2 > 1 > 3", [1, 0, 2]),
        ("213", [1, 0, 2]),
        ("1 2", None),
        ("1 2 2", None),
        ("1=2 3", None),
        ("", None),
        ("1 2 3 4", None),
        ("²13", None),
    ],
)
def test_orders(line, want):
    assert order_of(line, 3) == want


def test_pairs():
    prompt = (Message("system", "s"), user("q"))
    a, b, c = ([{"role": "assistant", "content": text}] for text in "abc")
    answers = [(assistant(text),) for text in "abc"]
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    best = ranking_rows(prompt, answers, "best")
    assert best == [{"prompt": turns, "chosen": a, "rejected": b}, {"prompt": turns, "chosen": a, "rejected": c}]
    adjacent = ranking_rows(prompt, answers, "adjacent")
    assert adjacent == [{"prompt": turns, "chosen": a, "rejected": b}, {"prompt": turns, "chosen": b, "rejected": c}]


def test_pairs_of_a_prompt_are_kept_together(monkeypatch, files):
    says(monkeypatch, by_seed)
    text, rows = ranked(files, "1 2 3 4\n", pairs="adjacent")
    assert len(rows) == 3
    assert "3 rows" not in text
    text, rows = ranked(files, "1 2 3 4\nq\n", pairs="adjacent")
    assert [row["prompt"][0]["content"] for row in rows] == ["first"] * 3 + ["second"] * 3


def test_an_edited_answer_is_ordered_with_the_others(monkeypatch, files):
    says(monkeypatch, by_seed)
    text, rows = ranked(files, "e 2\nmine\n.\ne 9\ne 1\nmine\n.\n5 1 2 3 4\n", answers=4)
    assert "[5]\nmine\n" in text
    assert "there already" in text
    assert [response[0]["content"] for response in rows[0]["responses"]] == ["mine", *shown_answers(text)[:4]]


def test_answers_that_are_the_same_or_empty_are_not_shown(monkeypatch, files):
    says(monkeypatch, lambda prompt, seed: "" if seed == 0 else "same" if seed < 9 else "other")
    text, rows = ranked(files, "1 2\n")
    assert sorted(shown_answers(text)) == ["other", "same"]
    says(monkeypatch, lambda prompt, seed: "always")
    text, rows = ranked(files, "")
    assert text.count("skipped: the model always answers the same") == 2
    assert len(rows) == 1


def test_the_place_of_an_answer_does_not_tell_its_seed(monkeypatch, files):
    says(monkeypatch, by_seed)
    config, firsts = RankConfig(**files), set()
    for seed in range(0, 40, 4):
        out = io.StringIO()
        settings = {"max_tokens": 64, "temperature": 1.0, "seed": seed}
        rank_command(opened(), Terminal(io.StringIO(""), out), config, **settings)
        firsts.add(shown_answers(out.getvalue())[0])
    assert len(firsts) > 1


def test_drafts_are_kept_edited_or_skipped(monkeypatch, files):
    says(monkeypatch, by_seed)
    text, rows = ranked(files, "r\nx\nk\ne\nbetter\n.\ns\n", drafts=True)
    first = next(line for line in text.splitlines() if line.endswith("to first"))
    kept = [row["messages"][-1]["content"] for row in rows]
    assert kept[0] != first
    assert kept[0].endswith(" to first")
    assert kept[1:] == ["better"]
    assert rows[1]["messages"] == [{"role": "user", "content": "second"}, {"role": "assistant", "content": "better"}]
    text, rows = ranked(files, "k\n", drafts=True)
    assert "--- 1 of 1 ---\nuser: third" in text
    assert len(rows) == 3


def test_drafts_may_call_tools_and_an_empty_one_is_not_kept(monkeypatch, files):
    says(monkeypatch, lambda prompt, seed: "It is 3." if "<|result|>3" in prompt else "<|call|>add 1+2<|/call|>")
    _, rows = ranked(files, "e\n.\nk\nq\n", tools={"add": lambda text: "3"}, drafts=True)
    (row,) = rows
    turns = [user("first"), assistant("", ("add", "1+2")), tool("add", "3"), assistant("It is 3.")]
    assert [turn["content"] for turn in row["messages"]] == [turn.content for turn in turns]


def test_prompts_of_rows(tmp_path):
    path = tmp_path / "p.jsonl"
    turns = [
        {"role": "user", "content": "a\u2028"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    sharegpt = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
    rows = [{"prompt": "q"}, {"prompt": turns}, {"messages": [*turns, {"role": "assistant", "content": "d"}]}]
    rows += [{"messages": turns}, sharegpt, {"instruction": "do", "input": "it"}, {"question": "q", "system": "s"}]
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    whole = (user("a\u2028"), assistant("b"), user("c"))
    others = [(user("q"),), (user("do\n\nit"),), (Message("system", "s"), user("q"))]
    assert read_prompts(str(path)) == [(user("q"),), whole, whole, whole, *others]


@pytest.mark.parametrize(
    "content", ["{}", '{"prompt": []}', '{"prompt": [{"role": "usr", "content": "x"}]}', '{"messages": 3}']
)
def test_a_row_without_a_prompt_is_named(tmp_path, content):
    path = tmp_path / "p.jsonl"
    path.write_text(f'{{"prompt": "good"}}\n{content}\n')
    with pytest.raises(UserError, match=r"p\.jsonl, line 2 holds no prompt"):
        read_prompts(str(path))


@pytest.mark.parametrize("content", ["nonsense", "[]"])
def test_a_line_that_is_no_row_is_named(tmp_path, content):
    path = tmp_path / "p.jsonl"
    path.write_text(f"{content}\n")
    with pytest.raises(UserError, match=r"p\.jsonl, line 1 is not a JSON object"):
        read_prompts(str(path))


@pytest.mark.parametrize("pairs, rows", [("none", "ranking"), ("best", "preference"), ("adjacent", "preference")])
def test_what_is_kept_is_what_training_reads(pairs, rows):
    prompt = (Message("system", "s"), user("q"), assistant("a")._replace(train=False), user("q2"))
    answers = [(assistant("one", thinking="hm"),), (assistant("two"),), (assistant("", ("add", "1")),)]
    order = {"none": [[0, 1, 2]], "best": [[0, 1], [0, 2]], "adjacent": [[0, 1], [1, 2]]}[pairs]
    kept = json.loads(json.dumps(ranking_rows(prompt, answers, pairs)))
    for row, places in zip(kept, order, strict=True):
        (example,) = examples(row, rows)
        want = [(*prompt, *answers[place]) for place in places]
        assert [response.conversation for response in example.responses] == want


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"answers": 1}, "--answers=1"),
        ({"answers": 10}, "--answers=10"),
        ({"drafts": True, "pairs": "best"}, "--pairs=best"),
        ({"prompts": "/no/such/file"}, "--prompts=/no/such/file cannot be read"),
        ({"out": "/no/such/folder/x"}, "cannot be written"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_generated(monkeypatch, files, settings, message):
    asked = says(monkeypatch, by_seed)
    with pytest.raises(UserError, match=message):
        ranked(files | settings, "")
    assert asked == []


def test_orders_need_answers_that_are_drawn(files):
    with pytest.raises(UserError, match="--temperature=0"):
        rank_command(
            opened(), Terminal(io.StringIO(), io.StringIO()), RankConfig(**files), max_tokens=9, temperature=0.0
        )
