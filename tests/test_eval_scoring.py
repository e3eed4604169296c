"""A model that is a table of bigrams stands in for a trained one: what it finds likely is known by heart."""

import itertools
import json
import math
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from llmlab.core.errors import UserError
from llmlab.data.tokenizer_character import CharacterTokenizer
from llmlab.eval import scoring
from llmlab.eval.likelihood import make_log_likelihoods
from llmlab.eval.scoring import Generation, last_number, normalised, score_choices, score_generation
from llmlab.eval.tasks import contexts, read_task
from llmlab.model.types import Out

TOKENIZER = CharacterTokenizer("\n 0123456789abc?")
REACH = 24


def bigram_model(logits_VV):
    """P(next | token) = softmax of the token's row."""
    config = SimpleNamespace(max_positions=REACH, logit_softcap=None)

    def apply(params, inputs, *, cache=None, key=None):
        return Out(params["logits_VV"][inputs.tokens_BT], cache, {})

    model = SimpleNamespace(
        config=config, partition=None, apply=apply, head=lambda params: jnp.eye(TOKENIZER.vocab_size)
    )
    return model, {"logits_VV": jnp.asarray(logits_VV, jnp.float32)}


def likes(pairs, strength=4.0):
    """Logits that favour the second character of each pair after the first."""
    logits_VV = np.zeros((TOKENIZER.vocab_size, TOKENIZER.vocab_size))
    for first, second in pairs:
        logits_VV[TOKENIZER.encode(first)[0], TOKENIZER.encode(second)[0]] = strength
    return logits_VV


def task_of(tmp_path, rows):
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_task(path)


def choose(task, logits_VV, shots=0):
    model, params = bigram_model(logits_VV)
    score = make_log_likelihoods(model, 4)
    return score_choices(task, contexts(task, shots), model, params, TOKENIZER, score, lambda done: None)


@pytest.mark.parametrize("likes_b, accuracy", [(True, 1.0), (False, 0.0)])
def test_accuracy_is_one_or_nil_as_the_model_is_rigged(tmp_path, likes_b, accuracy):
    task = task_of(tmp_path, [{"prompt": f"{i}?", "choices": ["a", "b", "c"], "answer": "b"} for i in range(5)])
    result = scoring.summary(task, choose(task, likes([(" ", "b" if likes_b else "c")])), 0)
    assert (result["acc"], result["acc_norm"]) == (accuracy, accuracy)
    assert result["acc_stderr"] == 0
    assert result["chance"] == pytest.approx(1 / 3)
    assert (result["rows"], result["truncated"]) == (5, 0)


def test_choices_are_scored_by_their_own_tokens_only(tmp_path):
    task = task_of(tmp_path, [{"prompt": "ab", "choices": [" c", " ca"], "answer": 0}])
    logits_VV = likes([("a", "b"), (" ", "c")])
    (outcome,) = choose(task, logits_VV)
    logp_VV = logits_VV - np.log(np.exp(logits_VV).sum(-1, keepdims=True))

    def nats(text):
        ids = TOKENIZER.encode(text)
        return sum(logp_VV[first, second] for first, second in itertools.pairwise(ids))

    # From the prompt's last character on: nothing of "ab" itself counts.
    np.testing.assert_allclose(outcome["log_likelihoods"], [nats("b c"), nats("b ca")], rtol=1e-5)


def test_acc_goes_by_the_sum_and_acc_norm_by_the_mean_per_byte(tmp_path):
    # "a" alone costs less in all; a byte of "bbbb" costs less than a byte of "a".
    task = task_of(tmp_path, [{"prompt": "?", "choices": [" a", " bbbb"], "answer": " bbbb"}])
    (outcome,) = choose(task, likes([("b", "b")]))
    assert outcome["log_likelihoods"][0] > outcome["log_likelihoods"][1]
    assert (outcome["chosen"], outcome["correct"]) == (" a", False)
    assert (outcome["chosen_norm"], outcome["correct_norm"]) == (" bbbb", True)


def test_a_long_context_loses_its_beginning_and_is_counted(tmp_path):
    rows = [{"prompt": f"a{'0' * 40}{i}?", "choices": ["b", "c"], "answer": "b"} for i in range(2)]
    task = task_of(tmp_path, [*rows, {"prompt": "?", "choices": ["b", "c"], "answer": "b"}])
    result = scoring.summary(task, choose(task, likes([(" ", "b")])), 0)
    assert (result["truncated"], result["acc"]) == (2, 1.0)
    assert "2 contexts were cut" in scoring.table([result])


def test_a_choice_that_the_positions_do_not_reach_is_an_error(tmp_path):
    task = task_of(tmp_path, [{"prompt": "?", "choices": ["a", "b" * REACH], "answer": 0}])
    with pytest.raises(
        UserError, match=r"t\.jsonl:1: the choice 'b+'… has 25 tokens, more than model.max_positions=24"
    ):
        choose(task, likes([]))


def test_a_model_that_diverged_is_no_wrong_answer(tmp_path):
    task = task_of(tmp_path, [{"prompt": "?", "choices": ["a", "b"], "answer": 0}])
    with pytest.raises(UserError, match="not finite"):
        choose(task, likes([(" ", "a")], strength=np.nan))


@pytest.fixture
def says(monkeypatch):
    """What the model writes after a prompt, given as text -> text; keeps what it was asked."""
    asked = []

    def fake(answers):
        def complete(model, params, prompts, **settings):
            asked.append((prompts, settings))
            return [TOKENIZER.encode(answers(TOKENIZER.decode(prompt))) for prompt in prompts]

        monkeypatch.setattr(scoring, "complete", complete)
        return asked

    return fake


def generate(task, **settings):
    model, params = bigram_model(likes([]))
    settings = Generation(**{"max_tokens": 8, **settings})
    return score_generation(task, contexts(task, 0), model, params, TOKENIZER, settings, lambda done: None)


def test_what_is_written_is_matched_but_for_case_and_white_space(tmp_path, says):
    says(lambda prompt: f" {prompt[0]}  a \nabc")
    rows = [
        {"prompt": "1?", "answer": ["b", "1 A"]},
        {"prompt": "22?", "answer": "2 a"},
        {"prompt": "3?", "answer": "3a"},
    ]
    task = task_of(tmp_path, rows)
    outcomes = generate(task)
    assert [outcome["line"] for outcome in outcomes] == [1, 2, 3]
    assert [outcome["read"] for outcome in outcomes] == ["1 a", "2 a", "3 a"]
    assert [outcome["correct"] for outcome in outcomes] == [True, True, False]
    result = scoring.summary(task, outcomes, 0)
    assert result["exact_match"] == pytest.approx(2 / 3)
    assert result["exact_match_stderr"] == pytest.approx(math.sqrt(2 / 9 / 2))


def test_numbers_are_read_from_the_end_of_what_is_written(tmp_path, says):
    says(lambda prompt: "2 ab 07\n\n9" if prompt[0] == "1" else "a")
    task = task_of(tmp_path, [{"prompt": "1?", "answer": "7"}, {"prompt": "2?", "answer": "a 7"}])
    assert [outcome["correct"] for outcome in generate(task, extract="number")] == [True, False]
    with pytest.raises(UserError, match=r"t\.jsonl:1: the answer 'a' holds no number"):
        generate(task_of(tmp_path, [{"prompt": "1?", "answer": "a"}]), extract="number")


def test_writing_stops_at_the_end_of_the_line_only_where_lines_are_read(tmp_path, says):
    asked = says(lambda prompt: "1")
    task = task_of(tmp_path, [{"prompt": "1?", "answer": "1"}])
    generate(task)
    generate(task, extract="number")
    newline = TOKENIZER.encode("\n")
    assert [settings["stop_ids"] for _, settings in asked] == [[TOKENIZER.eos_id, *newline], [TOKENIZER.eos_id]]


def test_an_answer_that_could_never_match_is_an_error(tmp_path, says):
    with pytest.raises(UserError, match=r"t\.jsonl:1: .* has several lines"):
        generate(task_of(tmp_path, [{"prompt": "1?", "answer": "a\nb"}]))


def test_prompts_begin_with_bos_and_leave_room_for_the_answer(tmp_path, says):
    asked = says(lambda prompt: "1")
    rows = [{"prompt": f"{i}{'0' * 40}?", "answer": "1"} for i in range(3)] + [{"prompt": "1?", "answer": "1"}]
    outcomes = generate(task_of(tmp_path, rows), batch_size=2)
    for prompts, settings in asked:
        for prompt in prompts:
            assert prompt[0] == TOKENIZER.bos_id
            assert prompt[-1] == TOKENIZER.encode("?")[0]
            assert prompt.count(TOKENIZER.bos_id) == 1
            assert len(prompt) + settings["max_tokens"] <= REACH
    # A row keeps its seed in whatever batch it comes, so that batch_size changes no answer.
    assert [settings["seeds"] for _, settings in asked] == [[0, 1], [2, 3]]
    assert [outcome["truncated"] for outcome in outcomes] == [True, True, True, False]
    with pytest.raises(UserError, match=r"max_tokens=24 should be less than model\.max_positions=24"):
        generate(task_of(tmp_path, rows), max_tokens=REACH)


def test_the_standard_error_is_that_of_a_share_of_rows():
    assert scoring.standard_error(0.25, 101) == pytest.approx(math.sqrt(0.25 * 0.75 / 100))
    assert scoring.standard_error(1.0, 10) == 0
    assert scoring.standard_error(1.0, 1) is None
    drawn = np.random.default_rng(0).random((2000, 50)) < 0.3
    errors = [scoring.standard_error(float(row.mean()), 50) for row in drawn]
    np.testing.assert_allclose(np.mean(np.square(errors)), drawn.mean(1).var(), rtol=0.1)


def test_answers_are_normalised_and_numbers_found():
    assert normalised("  The   ANSWER \t is\nno") == "the answer is"
    assert normalised("") == ""
    cases = {"1,234.50": "1234.5", "3+4=7.": "7", "10-5": "5", "is -5": "-5", "2 then 1,2": "2", "007": "7"}
    assert {text: last_number(text) == scoring.Decimal(number) for text, number in cases.items()} == dict.fromkeys(
        cases, True
    )
    assert last_number("none\n\n12") is None


def test_the_table_has_a_line_for_each_score(tmp_path):
    task = task_of(tmp_path, [{"prompt": f"{i}?", "choices": ["a", "b"], "answer": "b"} for i in range(4)])
    lines = scoring.table([scoring.summary(task, choose(task, likes([(" ", "b")])), 2)]).splitlines()
    assert [line.split()[:5] for line in lines[1:]] == [["t", "4", "2", s, "1.0000"] for s in ("acc", "acc_norm")]
