"""Choosing among answers: what they come to, what most say, and the reward of each."""

import numpy as np
import pytest
from scipy.special import log_softmax

from llmlab.core.mesh import MeshConfig, make_partition
from llmlab.data.chat import Message
from llmlab.infer.choose import Judge, final_answer, majority, shares
from llmlab.model.transformer import make_model
from llmlab.model.types import inputs
from llmlab.workdir.open import Opened
from tests.helpers import random_params, tiny_llama
from tests.scripted import TEMPLATE, TOKENIZER


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("It is 42.", "42"),
        ("12 + 30 = 42.0", "42"),
        ("so -1,200", "-1200"),
        ("100", "100"),
        ("1" * 29 + "2", "1" * 29 + "2"),
        ("-0.0", "0"),
        ("  Yes,  of course. ", "yes, of course"),
        ("…", "…"),
        (" . ", None),
    ],
)
def test_what_an_answer_comes_to(text, answer):
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("answers", "place"),
    [(["1", "2", "2"], 1), (["1", "2"], 0), ([None, None, None, "3"], 3), ([None, None], 0), (["2", "1", "1", "2"], 0)],
)
def test_what_most_answers_say(answers, place):
    assert majority(answers) == place


def judge(partition=None, head="score", kind=""):
    model = make_model(tiny_llama(vocab_size=TOKENIZER.vocab_size, head=head, max_positions=96), partition)
    return Opened(model, random_params(model, seed=3), TOKENIZER, 5, {"objective": {"kind": kind} if kind else {}})


CONVERSATIONS = [
    (Message("user", "a" * size), Message("assistant", f"that is {size}", thinking="hm")) for size in (1, 30, 60, 7, 2)
]


def test_the_share_of_reward_of_answers_that_come_to_the_same():
    many = shares(["7", "8", "8", None, "9"], [2.0, 1.5, 1.6, 9.0, -np.inf])
    strengths = np.exp([2.0, 1.5, 1.6])
    np.testing.assert_allclose(many, np.array([strengths[0], *[strengths[1:].sum()] * 2, 0, 0]) / strengths.sum())
    assert shares(["1", "2"], [1e4, 1e4 - 1]) == pytest.approx([1 / (1 + np.exp(-1)), 1 / (1 + np.e)])
    assert shares([None, "1"], [0, -np.inf]) == [0, 0]


def test_a_score_is_that_of_the_last_token():
    opened = judge()
    for conversation, score in zip(CONVERSATIONS, Judge(opened).scores(CONVERSATIONS), strict=True):
        ids = TEMPLATE.render(conversation).ids
        hidden_BTD = opened.model.apply(opened.params, inputs(np.asarray([ids], np.int32))).hidden_BTD
        np.testing.assert_allclose(score, opened.model.score(opened.params, hidden_BTD)[0, -1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["", "sigmoid", "simpo"])
def test_a_model_that_writes_rewards_what_it_finds_likely(kind):
    opened = judge(head="tokens", kind=kind)
    earlier = (Message("user", "b"), Message("assistant", "ccc"), *CONVERSATIONS[0])
    conversations = [*CONVERSATIONS, earlier]
    for conversation, score in zip(conversations, Judge(opened).scores(conversations), strict=True):
        ids, begin = TEMPLATE.render(conversation).ids, len(TEMPLATE.render(conversation[:-1], generate=True).ids)
        logits_TV = opened.model.logits(opened.params, np.asarray([ids], np.int32))[0]
        logp_T = log_softmax(np.asarray(logits_TV, np.float64), axis=-1)[np.arange(len(ids) - 1), ids[1:]]
        said_T = logp_T[begin - 1 :]
        np.testing.assert_allclose(score, said_T.mean() if kind == "simpo" else said_T.sum(), rtol=1e-4)


@pytest.mark.parametrize("head", ["score", "tokens"])
def test_scores_on_a_mesh_are_those_of_one_device(head):
    there = Judge(judge(make_partition(MeshConfig(data=4, tensor=2)), head)).scores(CONVERSATIONS)
    np.testing.assert_allclose(there, Judge(judge(head=head)).scores(CONVERSATIONS), rtol=1e-4, atol=1e-5)


def test_what_does_not_fit_comes_last():
    long = (Message("user", "a" * 100), Message("assistant", "b"))
    done = []
    scores = Judge(judge()).scores([long, CONVERSATIONS[0]], progress=done.append)
    assert scores[0] == -np.inf
    assert np.isfinite(scores[1])
    assert done == [1]
