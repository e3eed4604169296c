"""Every endpoint, by the client that most people use."""

import base64
import itertools
import json
import re

import httpx
import numpy as np
import openai
import pytest

from llmlab.data.chat import Message, ToolCall
from llmlab.data.rows import examples
from llmlab.infer.retrieval import asked_with
from tests.serve_for_tests import REACH, Scripted, indexed, opened_model, running

MESSAGES = [{"role": "user", "content": "Hello 🙂"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "an expression",
        "parameters": {"type": "object", "properties": {"expression": {"type": "string"}}},
    },
}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    models = {"tiny": opened_model(), "a/base": opened_model(chat=False, seed=8)}
    with running(tmp_path_factory.mktemp("serve"), models) as made:
        yield made


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made


def test_models(client):
    assert [model.id for model in client.models.list()] == ["tiny", "a/base"]
    assert client.models.retrieve("a/base").id == "a/base"
    with pytest.raises(openai.NotFoundError, match="no model 'tinny'"):
        client.completions.create(model="tinny", prompt="a")


def test_a_completion_and_its_stream_are_the_same(client):
    asked = {"model": "tiny", "prompt": "the fox", "max_tokens": 24, "seed": 3, "temperature": 1.5, "logprobs": 2}
    whole = client.completions.create(**asked)
    chunks = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == whole.choices[0].text
    assert chunks[-1].usage == whole.usage
    assert whole.usage.completion_tokens <= 24
    assert whole.usage.prompt_tokens == len(tokens_of(client, "the fox"))
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]][-1] == whole.choices[0].finish_reason
    parts = [chunk.choices[0].logprobs for chunk in chunks[:-1]]
    assert [token for part in parts for token in part.tokens] == whole.choices[0].logprobs.tokens
    assert [place for part in parts for place in part.text_offset] == whole.choices[0].logprobs.text_offset
    assert client.completions.create(**asked).choices[0].text == whole.choices[0].text
    assert client.completions.create(**asked | {"seed": 4}).choices[0].text != whole.choices[0].text


def tokens_of(client, text, **more):
    answer = httpx.post(str(client.base_url).replace("/v1/", "/tokenize"), json={"prompt": text, **more})
    return answer.json()["tokens"]


def test_scoring_a_prompt_is_what_the_model_says(server, client):
    opened = server.models["tiny"].opened
    ids = tokens_of(client, "def f(x):")
    (scored,) = client.completions.create(model="tiny", prompt=ids, max_tokens=0, echo=True, logprobs=3).choices
    logits_TV = np.asarray(opened.model.logits(opened.params, np.array([ids], np.int32)))[0].astype(np.float64)
    logp_TV = logits_TV - np.log(np.exp(logits_TV).sum(-1, keepdims=True))
    want = [logp_TV[place, id] for place, id in enumerate(ids[1:])]
    assert scored.logprobs.token_logprobs[0] is None
    np.testing.assert_allclose(scored.logprobs.token_logprobs[1:], want, atol=1e-4)
    assert scored.text == "def f(x):"
    text = scored.text + " "
    for token, offset in zip(scored.logprobs.tokens[1:], scored.logprobs.text_offset[1:], strict=True):
        assert text[offset:].startswith(token)
    for top, row in zip(scored.logprobs.top_logprobs[1:], logp_TV, strict=False):
        assert max(top.values()) == pytest.approx(row.max(), abs=1e-4)


def test_echo_with_what_follows(client):
    asked = {"model": "tiny", "prompt": "naïve 🙂", "max_tokens": 4, "seed": 1, "logprobs": 0}
    plain = client.completions.create(**asked).choices[0]
    echoed = client.completions.create(**asked, echo=True, n=2).choices
    assert echoed[0].text == "naïve 🙂" + plain.text
    assert echoed[1].text.startswith("naïve 🙂")
    assert echoed[0].logprobs.tokens[-len(plain.logprobs.tokens) :] == plain.logprobs.tokens
    assert echoed[0].logprobs.text_offset[-1] == plain.logprobs.text_offset[-1] + len("naïve 🙂")


def test_many_prompts_and_samples(client):
    asked = {"model": "tiny", "max_tokens": 5, "seed": 7}
    alone = [client.completions.create(prompt=text, n=2, **asked).choices for text in ("a", "b c")]
    together = client.completions.create(prompt=["a", "b c"], n=2, **asked).choices
    assert [choice.index for choice in together] == [0, 1, 2, 3]
    assert [choice.text for choice in together] == [choice.text for group in alone for choice in group]
    best = client.completions.create(prompt="a", n=1, best_of=4, logprobs=0, **asked)
    every = client.completions.create(prompt="a", n=4, logprobs=0, **asked).choices
    means = [np.mean(choice.logprobs.token_logprobs) for choice in every]
    assert best.choices[0].text == every[int(np.argmax(means))].text


def test_a_stop_string_ends_the_text_before_it(client):
    asked = {"model": "tiny", "prompt": "the", "max_tokens": 60, "seed": 3, "ignore_eos": True}
    extra = {"ignore_eos": asked.pop("ignore_eos")}
    text = client.completions.create(**asked, extra_body=extra).choices[0].text
    stop = text[len(text) // 2 :][:3]
    want = text[: text.index(stop)]
    cut = client.completions.create(**asked, stop=[stop, "never"], logprobs=0, extra_body=extra).choices[0]
    assert (cut.text, cut.finish_reason) == (want, "stop")
    assert all(offset < len(want) for offset in cut.logprobs.text_offset)
    pieces = client.completions.create(**asked, stop=stop, stream=True, extra_body=extra)
    assert "".join(chunk.choices[0].text for chunk in pieces) == want


def test_chat_and_its_stream_are_the_same(client):
    asked = {"model": "tiny", "messages": MESSAGES, "max_tokens": 30, "seed": 5, "n": 2, "logprobs": True}
    whole = client.chat.completions.create(**asked, top_logprobs=2)
    texts, finishes = ["", ""], [None, None]
    tokens: list[list[str]] = [[], []]
    chunks = list(
        client.chat.completions.create(**asked, top_logprobs=2, stream=True, stream_options={"include_usage": True})
    )
    for chunk in chunks[:-1]:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            finishes[choice.index] = choice.finish_reason or finishes[choice.index]
            tokens[choice.index] += [entry.token for entry in (choice.logprobs.content if choice.logprobs else [])]
    assert texts == [choice.message.content or "" for choice in whole.choices]
    assert finishes == [choice.finish_reason for choice in whole.choices]
    assert tokens == [[entry.token for entry in choice.logprobs.content] for choice in whole.choices]
    assert chunks[-1].usage == whole.usage
    assert all(len(entry.top_logprobs) == 2 for choice in whole.choices for entry in choice.logprobs.content)


def test_embeddings(server, client):
    texts = ["the quick fox", "the quick fox ", "def f(x):"]
    vectors = np.array([entry.embedding for entry in client.embeddings.create(model="tiny", input=texts).data])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=-1), 1, atol=1e-6)
    raw = client.embeddings.create(model="tiny", input=texts[0], encoding_format="base64").data[0].embedding
    np.testing.assert_array_equal(np.frombuffer(base64.b64decode(raw), "<f4"), vectors[0].astype("<f4"))
    opened = server.models["tiny"].opened
    ids = np.array([tokens_of(client, texts[2])], np.int32)
    from llmlab.model.types import inputs

    mean_D = np.asarray(opened.model.apply(opened.params, inputs(ids)).hidden_BTD)[0].mean(0)
    np.testing.assert_allclose(vectors[2], mean_D / np.linalg.norm(mean_D), atol=1e-5)


def test_tokens_there_and_back(server):
    for text in ("naïve 日本語 🙂", "<|user|>x</s>"):
        said = httpx.post(f"{server.url}/tokenize", json={"prompt": text, "add_special_tokens": False}).json()
        assert said["count"] == len(said["tokens"]) == len(said["token_strs"])
        assert bytes(itertools.chain(*said["bytes"])).decode() == text
        back = httpx.post(f"{server.url}/detokenize", json={"tokens": said["tokens"]}).json()
        assert back == {"prompt": text}
    told = httpx.get(f"{server.url}/tokenizer_info").json()
    assert told == {"bos_token": "", "eos_token": None, "model_max_length": REACH}
    bos = {"prompt": told["bos_token"], "add_special_tokens": False}
    tokenizer = server.models["tiny"].opened.tokenizer
    assert httpx.post(f"{server.url}/tokenize", json=bos).json()["tokens"] == [tokenizer.bos_id]
    chat = httpx.post(f"{server.url}/tokenize", json={"messages": MESSAGES}).json()
    assert chat["token_strs"][:2] == ["<s>", "<|user|>"]
    assert chat["token_strs"][-2:] == ["<|end|>", "<|assistant|>"]


@pytest.mark.parametrize(
    "kind, change",
    [
        (openai.BadRequestError, {"max_tokens": REACH}),
        (openai.BadRequestError, {"temperature": -1}),
        (openai.BadRequestError, {"n": 10**9}),
        (openai.BadRequestError, {"messages": []}),
        (openai.BadRequestError, {"model": "a/base"}),
        (openai.BadRequestError, {"response_format": {"type": "xml"}}),
        (openai.NotFoundError, {"model": "../../etc/passwd"}),
    ],
)
def test_errors_are_the_clients_own(client, kind, change):
    asked = {"model": "tiny", "messages": MESSAGES, "max_tokens": 4, **change}
    with pytest.raises(kind) as refused:
        client.chat.completions.create(**asked)
    assert set(refused.value.body) == {"message", "type", "param", "code"}
    assert len(refused.value.body["message"].split()) > 3


def test_a_long_conversation_is_refused_or_loses_its_middle(server, client):
    turns = [{"role": "system", "content": "short"}]
    for number in range(12):
        turns += [{"role": "user", "content": f"question {number}"}, {"role": "assistant", "content": "yes, " * 6}]
    turns.append({"role": "user", "content": "the last one"})
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="tiny", messages=turns, max_tokens=8)
    assert refused.value.code == "context_length_exceeded"
    fits = client.chat.completions.create(
        model="tiny", messages=turns, max_tokens=8, extra_body={"truncation": "middle"}
    )
    assert REACH // 2 < fits.usage.prompt_tokens <= REACH - 8


def test_metrics_and_health(server, client):
    before = server.service.metrics.tokens
    written = client.completions.create(model="tiny", prompt="x", max_tokens=3).usage.completion_tokens
    text = httpx.get(f"{server.url}/metrics").text
    assert f'llmlab_tokens_total{{model="tiny"}} {before + written}\n' in text
    assert 'llmlab_first_token_seconds_bucket{model="tiny",le="+Inf"}' in text
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}


def test_a_vote_is_a_row_that_reward_models_train_on(server):
    vote = {"model": "tiny", "prompt": MESSAGES, "chosen": "yes", "rejected": [{"role": "assistant", "content": "no"}]}
    answer = httpx.post(f"{server.url}/v1/preferences", json=vote)
    assert answer.status_code == 200, answer.text
    (row,) = map(json.loads, (server.folder / "votes.jsonl").read_text().splitlines())
    (example,) = examples(row, "preference")
    assert [response.conversation[-1].content for response in example.responses] == ["yes", "no"]
    assert httpx.post(f"{server.url}/v1/preferences", json=vote | {"rejected": "yes"}).status_code == 400


def test_passages_stand_before_the_last_question(server, tmp_path):
    find, question = indexed(tmp_path), "Does a lazy fox or a cat jump?"
    found = find(question)
    history = [*MESSAGES, {"role": "assistant", "content": "Hi."}, {"role": "user", "content": question}]
    heard = (Message("user", "Hello 🙂"), Message("assistant", "Hi."))
    with running(tmp_path, {"tiny": opened_model(reach=1024)}, find=find) as made:
        assert httpx.get(f"{made.url}/v1/models").json()["data"][0]["index"]
        script, template = Scripted(made.models["tiny"]), made.models["tiny"].template

        def ask(**more):
            body = {"messages": history, "passages": True} | more
            return httpx.post(f"{made.url}/v1/chat/completions", json=body, timeout=60)

        script.says(*[Message("assistant", "It does [1].")] * 4)
        given = [{"source": each.passage.source, "text": each.passage.text} for each in found]
        assert [each["source"] for each in given] == ["fox.md:1-1", "cat.md:1-1"]
        assert ask().json()["passages"] == given
        whole = template.render((*heard, asked_with(found, question)), generate=True).ids
        assert script.asked[-1].prompt == tuple(whole)
        # The answer's room comes first, then the passages, then what was said before.
        alone = len(template.render((asked_with(found, question),), generate=True).ids)
        assert ask(max_tokens=1024 - alone, truncation="middle").json()["passages"] == given
        assert len(script.asked[-1].prompt) == alone
        assert ask(max_tokens=1025 - alone, truncation="middle").json()["passages"] == given[:1]
        chunks = [json.loads(line[6:]) for line in ask(stream=True).text.split("\n\n") if line[6:7] == "{"]
        assert [chunk.get("passages") for chunk in chunks] == [given] + [None] * (len(chunks) - 1)
        assert ask(messages=[{"role": "system", "content": "x"}]).status_code == 400
    refused = httpx.post(f"{server.url}/v1/chat/completions", json={"messages": MESSAGES, "passages": True})
    assert refused.status_code == 400
    assert "llmlab serve --index=DIR" in refused.json()["error"]["message"]


def test_own_tools_run(server):
    assert [tool["function"]["name"] for tool in httpx.get(f"{server.url}/tools").json()["data"]] == [
        "calculator",
        "lookup",
    ]
    said = httpx.post(f"{server.url}/tools/calculator", json={"arguments": '{"input": "12 + 30"}'})
    assert said.json() == {"content": "42"}
    assert httpx.post(f"{server.url}/tools/rm", json={"arguments": "x"}).status_code == 404


class Script:
    """Leaves one token at a time to choose from."""

    def __init__(self, ids):
        self.ids, self.place = ids, 0

    def allowed(self):
        words = np.zeros(11, np.uint32)
        id = self.ids[min(self.place, len(self.ids) - 1)]
        words[id // 32] = np.uint32(1 << id % 32)
        return words

    def accept(self, token):
        self.place += 1

    def fresh(self):
        return Script(self.ids)

    def ready(self, within):
        return True


def says(monkeypatch, server, turn):
    """From now on the model says what this turn is spelt with, where `response_format` is given."""
    model = server.models["tiny"]
    start = (Message("user", "x"),)
    before = model.template.render(start, generate=True).ids
    whole = model.template.render((*start, turn)).ids
    ids = [*whole[len(before) :], model.opened.tokenizer.eos_id]

    async def limit_for(form, structures):
        return Script(ids) if form else None

    monkeypatch.setattr("llmlab.serve.chat.limit_for", limit_for)
    return {"response_format": {"type": "json_object"}}


@pytest.mark.parametrize("arguments", ["12 + 30", '{"expression": "12 + 30"}'])
def test_a_tool_is_called_and_its_result_comes_back_as_the_model_knows_it(monkeypatch, server, client, arguments):
    turn = Message("assistant", "Well 🙂", thinking="a sum", calls=(ToolCall("calculator", arguments),))
    asked = {"model": "tiny", "messages": MESSAGES, "tools": [TOOL], "temperature": 0, "max_tokens": 120}
    asked |= says(monkeypatch, server, turn)
    (choice,) = client.chat.completions.create(**asked).choices
    (call,) = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Well 🙂"
    assert choice.message.reasoning_content == "a sum"
    assert call.function.name == "calculator"
    assert json.loads(call.function.arguments) == {"expression": "12 + 30"}

    deltas = [chunk.choices[0].delta for chunk in client.chat.completions.create(**asked, stream=True)]
    assert "".join(delta.content or "" for delta in deltas) == "Well 🙂"
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == "a sum"
    (streamed,) = [call for delta in deltas for call in delta.tool_calls or []]
    assert streamed.function.arguments == call.function.arguments

    result = {"role": "tool", "tool_call_id": call.id, "content": "<|end|>42"}
    history = [*MESSAGES, choice.message.model_dump(exclude_none=True), result]
    said = httpx.post(f"{server.url}/tokenize", json={"messages": history}).json()
    model = server.models["tiny"]
    conversation = (Message("user", "Hello 🙂"), turn, Message("tool", "<|end|>42", name="calculator"))
    assert said["tokens"] == model.template.render(conversation, generate=True).ids


def test_a_stop_string_in_a_turn(monkeypatch, server, client):
    asked = {"model": "tiny", "messages": MESSAGES, "temperature": 0, "max_tokens": 120, "logprobs": True}
    asked |= says(monkeypatch, server, Message("assistant", "one two 🙂🙂 three", thinking="one two"))
    whole = client.chat.completions.create(**asked).choices[0]
    assert (whole.message.content, whole.finish_reason) == ("one two 🙂🙂 three", "stop")
    scored = bytes(byte for entry in whole.logprobs.content for byte in entry.bytes)
    assert scored.decode() == "one two 🙂🙂 three"
    cut = client.chat.completions.create(**asked, stop=["o 🙂🙂", "zzz"]).choices[0]
    assert (cut.message.content, cut.message.reasoning_content, cut.finish_reason) == ("one tw", "one two", "stop")
    assert bytes(byte for entry in cut.logprobs.content for byte in entry.bytes).startswith(b"one tw")


def test_several_samples_of_one_form_keep_to_it_each(monkeypatch, server, client):
    asked = {"model": "tiny", "messages": MESSAGES, "max_tokens": 120, "n": 3}
    asked |= says(monkeypatch, server, Message("assistant", "one two"))
    choices = client.chat.completions.create(**asked).choices
    assert [choice.message.content for choice in choices] == ["one two"] * 3


SCHEMA = {
    "type": "object",
    "properties": {"size": {"type": "integer", "minimum": 0, "maximum": 9}, "good": {"type": "boolean"}},
    "required": ["size", "good"],
    "additionalProperties": False,
}
FORMS = {
    "schema": (
        {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}},
        r'\{\s*"size"\s*:\s*\d\s*,\s*"good"\s*:\s*(true|false)\s*\}',
    ),
    "regex": ({"type": "regex", "regex": "(yes|no)!"}, "(yes|no)!"),
    "grammar": ({"type": "grammar", "grammar": 'start: "a" "b"+ "."'}, r"ab+\."),
}


@pytest.mark.parametrize("form", FORMS)
def test_answers_have_the_form_that_is_asked_for(client, form):
    asked, pattern = FORMS[form]
    more = {"response_format": asked} if form == "schema" else {"extra_body": {"response_format": asked}}
    settings = {"model": "tiny", "max_tokens": 120, "temperature": 1.0, "seed": 3, "n": 3} | more
    finished = 0
    for choice in client.chat.completions.create(messages=MESSAGES, **settings).choices:
        if choice.finish_reason == "stop":
            finished += 1
            assert re.fullmatch(pattern, choice.message.content), choice.message.content
            assert form != "schema" or set(json.loads(choice.message.content)) == {"size", "good"}
        else:
            assert choice.finish_reason == "length"
    assert finished
    streamed = client.chat.completions.create(messages=MESSAGES, stream=True, **settings | {"n": 1})
    text = "".join(chunk.choices[0].delta.content or "" for chunk in streamed)
    assert re.fullmatch(pattern, text)


@pytest.mark.parametrize(
    ("form", "says"),
    [
        ({"type": "json_schema"}, "json_schema.schema is missing"),
        ({"type": "regex", "regex": "("}, "the regex cannot be"),
        ({"type": "regex", "regex": "(?=a)"}, "the regex cannot be"),
        ({"type": "json_schema", "json_schema": {"schema": {"not": {}}}}, "cannot be enforced"),
        ({"type": "xml"}, "'xml' is not a choice"),
    ],
)
def test_forms_that_cannot_be_held_are_refused(client, form, says):
    with pytest.raises(openai.BadRequestError, match=re.escape(says)):
        client.chat.completions.create(
            model="tiny", messages=MESSAGES, max_tokens=5, extra_body={"response_format": form}
        )
