import json

import pytest

from llmlab.core.errors import UserError
from llmlab.eval.tasks import contexts, continuation, read_task


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def questions(count, prefix="q"):
    return [{"prompt": f"{prefix}{i}?", "answer": f"answer-{prefix}{i}."} for i in range(count)]


def test_choices_take_their_answer_by_index_or_by_text(tmp_path):
    rows = [{"prompt": "a", "choices": ["x", "y"], "answer": 1}, {"prompt": "b", "choices": ["x", "y"], "answer": "x"}]
    task = read_task(write(tmp_path / "colours.jsonl", rows))
    assert (task.name, task.kind) == ("colours", "choices")
    assert [row.answers for row in task.rows] == [("y",), ("x",)]


def test_generation_takes_one_answer_or_several(tmp_path):
    task = read_task(
        write(tmp_path / "t.jsonl", [{"prompt": "a", "answer": "x"}, {"prompt": "b", "answer": ["x", "y"]}])
    )
    assert task.kind == "generation"
    assert [row.answers for row in task.rows] == [("x",), ("x", "y")]


def test_a_question_is_put_as_one_and_a_prompt_stands_as_it_is(tmp_path):
    rows = [{"question": "Who?", "answer": "I"}, {"prompt": "Who?", "answer": "I"}]
    task = read_task(write(tmp_path / "t.jsonl", rows))
    assert contexts(task, 0) == ["Question: Who?\nAnswer:", "Who?"]


def test_empty_lines_other_keys_bom_and_crlf_are_no_matter(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a", "answer": "x", "id": 7}\r\n\r\n{"prompt": "b", "answer": "y"}')
    assert [row.line for row in read_task(path).rows] == [1, 3]


GOOD = '{"prompt": "a", "choices": ["x", "y"], "answer": 0}'
BAD = [
    ("not JSON", '{"prompt": "a",'),
    ("not a JSON object", '["a"]'),
    ("no prompt: its keys are 'promt', 'answer'", '{"promt": "a", "answer": "x"}'),
    ("both prompt and question", '{"prompt": "a", "question": "b", "answer": "x"}'),
    ("no answer", '{"prompt": "a", "choices": ["x", "y"]}'),
    ("prompt=3 should be text", '{"prompt": 3, "choices": ["x", "y"], "answer": 0}'),
    ("should be a list of at least two", '{"prompt": "a", "choices": ["x"], "answer": 0}'),
    ("should be a list of at least", '{"prompt": "a", "choices": "xy", "answer": 0}'),
    ("choices[1]=' ' should be text, and not blank", '{"prompt": "a", "choices": ["x", " "], "answer": 0}'),
    ("choices[0]=1 should be text", '{"prompt": "a", "choices": [1, "y"], "answer": 0}'),
    ("answer=2 should be from 0 to 1", '{"prompt": "a", "choices": ["x", "y"], "answer": 2}'),
    ("answer=-1 should be from 0 to 1", '{"prompt": "a", "choices": ["x", "y"], "answer": -1}'),
    (
        "neither an index nor a choice: did you mean 'yes'?",
        '{"prompt": "a", "choices": ["no", "yes"], "answer": "Yes"}',
    ),
    ("answer=True is neither", '{"prompt": "a", "choices": ["x", "y"], "answer": true}'),
    ("has no choices, but line 1 has them", '{"prompt": "a", "answer": "x"}'),
    ("lone surrogate", '{"prompt": "\\ud800", "choices": ["x", "y"], "answer": 0}'),
]


@pytest.mark.parametrize("message, line", BAD)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, message, line):
    path = tmp_path / "t.jsonl"
    path.write_text(f"{GOOD}\n\n{line}\n")
    with pytest.raises(UserError) as error:
        read_task(path)
    assert str(error.value).startswith(f"{path}:3")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("answer", ["", [], 42, ["x", 1], None])
def test_an_accepted_answer_is_text(tmp_path, answer):
    with pytest.raises(UserError, match=r"t\.jsonl:1: answer"):
        read_task(write(tmp_path / "t.jsonl", [{"prompt": "a", "answer": answer}]))


def test_a_file_that_is_missing_empty_or_not_utf8(tmp_path):
    with pytest.raises(UserError, match="no task file"):
        read_task(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match="holds no rows"):
        read_task(tmp_path / "empty.jsonl")
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "é", "answer": "x"}'.encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.jsonl:1 is not UTF-8: byte 0xe9 at 12"):
        read_task(tmp_path / "latin.jsonl")


@pytest.mark.parametrize("shots", [1, 3, 9])
def test_examples_are_solved_others_and_never_the_row_itself(tmp_path, shots):
    task = read_task(write(tmp_path / "t.jsonl", questions(10)))
    used = []
    for row, context in zip(task.rows, contexts(task, shots), strict=True):
        assert row.answers[0] not in context
        *examples, prompt = context.split("\n\n")
        assert prompt == row.prompt
        solved = {f"{other.prompt} {other.answers[0]}" for other in task.rows if other != row}
        assert len(set(examples)) == shots
        assert set(examples) <= solved
        used += examples
    assert {used.count(example) for example in used} == {shots}
    assert contexts(task, shots) == contexts(task, shots)


def test_another_row_with_the_same_prompt_is_no_example(tmp_path):
    rows = [{"prompt": "same", "answer": "first"}, {"prompt": "same", "answer": "second"}, *questions(2)]
    task = read_task(write(tmp_path / "t.jsonl", rows))
    for context in contexts(task, 2)[:2]:
        assert "first" not in context
        assert "second" not in context


def test_examples_from_a_file_are_the_same_for_all_rows_but_one_that_they_solve(tmp_path):
    task = read_task(write(tmp_path / "t.jsonl", [*questions(3), *questions(1, "x")]))
    source = read_task(write(tmp_path / "shots.jsonl", questions(4, "x")))
    shown = contexts(task, 3, source)
    first, second, third, leaked = (context.rsplit("\n\n", 1)[0] for context in shown)
    assert first == second == third
    assert "answer-x0" not in leaked
    assert "answer-q" not in "".join(shown)


def test_too_few_examples_are_an_error(tmp_path):
    task = read_task(write(tmp_path / "t.jsonl", questions(3)))
    with pytest.raises(UserError, match=r"t\.jsonl:1 cannot have 3 examples: .* has 2 rows"):
        contexts(task, 3)


def test_one_space_stands_between_prompt_and_answer_unless_they_bring_their_own():
    assert continuation("Answer:", "x") == " x"
    assert continuation("Answer:", " x") == " x"
    assert continuation("Answer: ", "x") == "x"
    assert continuation("def f():\n", "x") == "x"
    assert continuation("", "x") == "x"
