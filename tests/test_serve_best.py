"""Thinking longer, over HTTP: the best of several answers by votes and by reward, and budgets of thinking."""

import asyncio
import json
import threading
from types import SimpleNamespace

import httpx
import numpy as np
import openai
import pytest

from llmlab.core.errors import UserError
from llmlab.data.chat import Message, ToolCall
from llmlab.infer.choose import Judge, final_answer, majority
from llmlab.model.transformer import make_model
from llmlab.serve.best import Answer, Choosing, choosing, ranked
from llmlab.serve.command import ServeConfig, serve_command
from llmlab.serve.errors import ApiError
from llmlab.serve.fields import Fields
from llmlab.serve.limits import Limits
from llmlab.serve.sampling import Asked
from llmlab.workdir.open import Opened
from tests import chat_families
from tests.helpers import random_params, tiny_llama
from tests.serve_for_tests import REACH, opened_model, running
from tests.test_serve_api import SCHEMA, Script

MESSAGES = [{"role": "user", "content": "Hello 🙂"}]
TURNS = (Message("user", "Hello 🙂"),)


def imported_model():
    """Of a tokenizer whose models chat, and do not think."""
    tokenizer, _ = chat_families.of("chatml")
    model = make_model(tiny_llama(vocab_size=tokenizer.vocab_size, max_positions=REACH))
    return Opened(model, random_params(model), tokenizer, 5, {})


@pytest.fixture(scope="module")
def judge():
    tokenizer = opened_model().tokenizer
    model = make_model(tiny_llama(vocab_size=tokenizer.vocab_size, max_positions=REACH, layers=1, head="score"))
    return Judge(Opened(model, random_params(model, seed=1), tokenizer, 3, {}))


@pytest.fixture(scope="module")
def server(tmp_path_factory, judge):
    models = {"tiny": opened_model(), "plain": imported_model()}
    with running(tmp_path_factory.mktemp("serve"), models, judge=judge) as made:
        yield made


@pytest.fixture(scope="module")
def ask(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120) as client:

        def asked(**fields):
            known = {"model", "n", "stream", "max_tokens", "seed", "temperature", "logprobs", "response_format"}
            plain = {name: fields[name] for name in known & fields.keys()}
            more = {name: value for name, value in fields.items() if name not in known}
            return client.chat.completions.create(
                **{"model": "tiny", "messages": MESSAGES, "max_tokens": 60, **plain}, extra_body=more
            )

        yield asked


class Scripts(Script):
    """One turn after another, each for a sample."""

    def __init__(self, turns):
        super().__init__(turns[0])
        self.turns = list(turns[1:])

    def fresh(self):
        return Script(self.turns.pop(0))


def says(monkeypatch, server, *turns):
    """The samples of a request with a `response_format` say these turns; gives their tokens, ends included."""
    model = server.models["tiny"]
    before = len(model.template.render(TURNS, generate=True).ids)
    written = [model.template.render((*TURNS, turn)).ids[before:] for turn in turns]

    async def limit_for(form, structures):
        return Scripts(written) if form else None

    monkeypatch.setattr("llmlab.serve.chat.limit_for", limit_for)
    return written


def told(*texts):
    return [Message("assistant", text) for text in texts]


FORM = {"response_format": {"type": "json_object"}}


def test_the_answers_that_most_come_to_are_given_first(monkeypatch, server, ask):
    written = says(monkeypatch, server, *told("it is 3", "5", "2 + 3 is 5.", "7"))
    done = ask(best_of=4, choose="majority", logprobs=True, **FORM)
    (choice,) = done.choices
    assert (choice.index, choice.message.content, choice.votes) == (0, "5", 2)
    assert bytes(byte for entry in choice.logprobs.content for byte in entry.bytes) == b"5"
    assert done.usage.completion_tokens == sum(map(len, written))
    says(monkeypatch, server, *told("it is 3", "5", "2 + 3 is 5.", "7"))
    choices = ask(best_of=4, n=3, choose="majority", **FORM).choices
    assert [choice.message.content for choice in choices] == ["5", "2 + 3 is 5.", "it is 3"]
    assert [choice.index for choice in choices] == [0, 1, 2]
    assert [choice.votes for choice in choices] == [2, 2, 1]


def test_the_answers_of_the_highest_reward_are_given_first(ask, judge):
    settings = {"seed": 11, "temperature": 1.5, "max_tokens": 30}
    every = ask(n=6, **settings).choices
    answers = [Message("assistant", choice.message.content) for choice in every]
    rewards = judge.scores([(*TURNS, answer) for answer in answers])
    cut = [choice.finish_reason == "length" for choice in every]
    order = sorted(range(6), key=lambda place: (cut[place], -rewards[place]))
    done = ask(n=3, best_of=6, **settings)
    assert [choice.message.content for choice in done.choices] == [answers[place].content for place in order[:3]]
    np.testing.assert_allclose([choice.reward for choice in done.choices], rewards[order[:3]], rtol=1e-5)
    assert len({round(choice.reward, 4) for choice in done.choices}) == 3
    assert not hasattr(every[0], "reward")


def test_thinking_is_judged_too(monkeypatch, server, ask, judge):
    thought = Message("assistant", "well 🙂", thinking="so so", calls=(ToolCall("lookup", "x"),))
    says(monkeypatch, server, thought)
    (choice,) = ask(choose="reward", **FORM).choices
    assert choice.message.reasoning_content == "so so"
    assert choice.reward == pytest.approx(judge.scores([(*TURNS, thought)])[0], rel=1e-5)


def order_of(answers, judge=None):
    return asyncio.run(ranked(answers, TURNS, "majority" if judge is None else "reward", judge))


class Fixed:
    """A judge whose rewards are known."""

    def __init__(self, *rewards):
        self.rewards = np.array(rewards)

    def scores(self, conversations):
        return self.rewards


def test_votes_that_weigh_as_much_as_their_rewards():
    answers = [
        Answer(message, is_cut) for message, is_cut in zip(told("3", "5", "5", "9"), [False] * 3 + [True], strict=True)
    ]
    order = asyncio.run(ranked(answers, TURNS, "weighted", Fixed(1.0, 0.5, 0.9, 7.0)))
    assert [place for place, _ in order] == [2, 1, 0, 3]
    strengths = np.exp([1.0, 0.5, 0.9])
    wanted = [*[sum(strengths[1:]) / sum(strengths)] * 2, strengths[0] / sum(strengths), 0]
    np.testing.assert_allclose([said["share"] for _, said in order], wanted)
    assert [said["reward"] for _, said in order] == [0.9, 0.5, 1.0, 7.0]


def test_votes_are_those_of_answers_with_an_end():
    whole, cut = ([Answer(message, is_cut) for message in told("3", "", "5", "9", "5")] for is_cut in (False, True))
    ends = [final_answer(answer.message.content) for answer in whole]
    assert order_of(whole)[0] == (majority(ends), {"votes": 2})
    assert [place for place, _ in order_of(whole)] == [2, 4, 0, 3, 1]
    assert [place for place, _ in order_of(cut)] == [2, 4, 0, 3, 1]
    mixed = [whole[0], whole[1], cut[2], whole[3], cut[4]]
    assert order_of(mixed) == [(0, {"votes": 1}), (3, {"votes": 1}), (1, {"votes": 0})] + [
        (place, {"votes": 0}) for place in (2, 4)
    ]
    assert order_of([whole[1], whole[1]]) == [(0, {"votes": 0}), (1, {"votes": 0})]


def test_calls_agree_by_what_they_call():
    calls = [(ToolCall("f", "1"),), (ToolCall("f", "2"),), (ToolCall("f", "2"),)]
    answers = [Answer(Message("assistant", text, calls=call), False) for text, call in zip("abc", calls, strict=True)]
    assert [place for place, _ in order_of(answers)] == [1, 2, 0]


def test_an_answer_without_a_reward_comes_after_those_that_have_one():
    answers = [Answer(message, place == 3) for place, message in enumerate(told("a", "b", "c", "d"))]
    scores = np.array([-np.inf, -2.0, np.nan, 5.0])
    judge = SimpleNamespace(scores=lambda conversations: scores)
    rewards = {place: why["reward"] for place, why in order_of(answers, judge)}
    assert rewards == {1: -2.0, 0: None, 2: None, 3: 5.0}
    assert list(rewards) == [1, 0, 2, 3]


ASKED = Asked(n=2, stop=(), sampling=None, stream=False, usage=False, ignore_eos=False)


def chosen_by(judge, stream=False, **given):
    return choosing(Fields(given, ("best_of", "choose")), ASKED._replace(stream=stream), 16, judge)


def test_what_chooses():
    judge = object()
    assert chosen_by(judge) == chosen_by(None, best_of=2) == Choosing(2, None)
    assert chosen_by(judge, best_of=4) == chosen_by(judge, best_of=4, choose="reward") == Choosing(4, "reward")
    assert chosen_by(None, best_of=4) == chosen_by(judge, best_of=4, choose="majority") == Choosing(4, "majority")
    assert chosen_by(None, stream=True, best_of=2) == Choosing(2, None)


@pytest.mark.parametrize(
    "given, says",
    [
        ({"choose": "reward"}, "start the server with --reward=WORKDIR"),
        ({"choose": "weighted"}, "start the server with --reward=WORKDIR"),
        ({"choose": "vote"}, "is not a choice"),
        ({"best_of": 1}, "from 2 to 16"),
        ({"best_of": 17}, "from 2 to 16"),
        ({"best_of": 4, "stream": True}, "best_of: the best can be known at the end only"),
        ({"choose": "majority", "stream": True}, "choose: the best can be known at the end only"),
    ],
)
def test_what_cannot_be_chosen(given, says):
    with pytest.raises(ApiError, match=says) as refused:
        chosen_by(None, **given)
    assert (refused.value.status, refused.value.param) == (400, refused.value.message.partition(":")[0])


def test_a_stream_of_the_best_is_refused(ask):
    with pytest.raises(openai.BadRequestError, match="leave stream out"):
        ask(best_of=2, stream=True)


def test_scoring_is_within_the_time_of_a_request(monkeypatch, ask, judge, server):
    settings = {"best_of": 2, "max_tokens": 1}
    ask(**settings)
    asked, done = threading.Event(), threading.Event()

    def scores(conversations):
        asked.set()
        done.wait(60)
        return np.zeros(len(conversations))

    monkeypatch.setattr(judge, "scores", scores)
    monkeypatch.setattr("llmlab.serve.chat.limits_of", lambda request: Limits(seconds=3))
    with pytest.raises(openai.BadRequestError, match="took longer than 3 s"):
        ask(**settings)
    assert asked.is_set()
    assert httpx.get(f"{server.url}/health").status_code == 200
    done.set()


def test_thinking_has_its_budget_and_the_answer_its_form(ask):
    form = {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}}
    both = {"min_thinking_tokens": 4, "max_thinking_tokens": 9}
    ended = 0
    for choice in ask(n=3, max_tokens=120, seed=2, **both, **form).choices:
        assert choice.message.reasoning_content
        if choice.finish_reason == "stop":
            ended += 1
            assert set(json.loads(choice.message.content)) == {"size", "good"}
    assert ended
    asked = {"max_tokens": 40, "seed": 2, "temperature": 1.0}
    whole = ask(**asked, **both).choices[0].message
    chunks = [chunk.choices[0].delta for chunk in ask(**asked, **both, stream=True)]
    thought = "".join(getattr(delta, "reasoning_content", None) or "" for delta in chunks)
    assert (thought, "".join(delta.content or "" for delta in chunks)) == (whole.reasoning_content, whole.content)
    assert not hasattr(ask(**asked, max_thinking_tokens=0).choices[0].message, "reasoning_content")


@pytest.mark.parametrize(
    "given, says",
    [
        ({"min_thinking_tokens": 5, "max_thinking_tokens": 4}, "max_thinking_tokens: 4 should be at least"),
        ({"min_thinking_tokens": 60}, "min_thinking_tokens: 60 leave nothing of 60 tokens"),
        ({"min_thinking_tokens": -1}, "min_thinking_tokens: -1 should be from 0"),
        ({"max_thinking_tokens": "few"}, "max_thinking_tokens: it should be a whole number"),
        ({"model": "plain", "max_thinking_tokens": 9}, "max_thinking_tokens: this tokenizer has no ids for"),
    ],
)
def test_budgets_that_cannot_be_kept(ask, given, says):
    with pytest.raises(openai.BadRequestError, match=says):
        ask(**given)


def test_a_reward_model_without_a_chat_template_is_refused_before_a_model_is_read():
    def read(folder):
        return opened_model(chat=False) if folder == "runs/reward" else pytest.fail("read")

    with pytest.raises(UserError, match="no chat markers"):
        serve_command(ServeConfig(("a",), port=0, reward="runs/reward"), read)
