"""Tools over HTTP: offered as each model's template does it, and called when the client wants them to be."""

import json

import httpx
import openai
import pytest

pytest.importorskip("tokenizers", reason="the extra hf installs it")
pytest.importorskip("jinja2", reason="the extra hf installs it")

from llmlab.data.chat import MarkerTemplate, Message, prompt_of
from llmlab.model.transformer import make_model
from llmlab.serve.tools import Declared, Offer
from llmlab.workdir.open import Opened
from tests.chat_families import of
from tests.helpers import random_params, tiny_llama
from tests.scripted import TOKENIZER
from tests.serve_for_tests import opened_model, running

REACH = 1024
MESSAGES = [{"role": "user", "content": "hello"}]


def tool(name: str, **properties: dict) -> dict:
    schema = {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}
    return {"type": "function", "function": {"name": name, "description": "é", "parameters": schema}}


TOOLS = [tool("paint", color={"enum": ["red", "blue"]}), tool("stop")]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    models = {"own": opened_model(reach=REACH)}
    for name in ("thinking", "chatml"):
        tokenizer, _ = of(name)
        model = make_model(tiny_llama(vocab_size=tokenizer.vocab_size, max_positions=REACH))
        models[name] = Opened(model, random_params(model, seed=7), tokenizer, 5, {})
    with running(tmp_path_factory.mktemp("serve"), models) as made:
        yield made


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=300) as made:
        yield made


@pytest.mark.parametrize("name", ["own", "thinking"])
def test_a_model_calls_what_it_has_to(client, name):
    asked = {"model": name, "messages": MESSAGES, "tools": TOOLS, "max_tokens": 200, "seed": 1, "temperature": 2.0}
    named = {"type": "function", "function": {"name": "paint"}}
    choices = client.chat.completions.create(**asked, tool_choice=named, n=3).choices
    for choice in choices:
        (call,) = choice.message.tool_calls
        assert (call.function.name, choice.finish_reason) == ("paint", "tool_calls")
        assert json.loads(call.function.arguments)["color"] in ("red", "blue")
    required = client.chat.completions.create(**asked, tool_choice="required", n=2).choices
    calls = [call for choice in required for call in choice.message.tool_calls]
    assert len(calls) == 2
    assert {call.function.name for call in calls} <= {"paint", "stop"}
    chunks = client.chat.completions.create(**asked, tool_choice=named, stream=True)
    (streamed,) = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    assert streamed.function.arguments == choices[0].message.tool_calls[0].function.arguments


def test_our_own_assistants_give_our_own_tools_text():
    calculator, paint = (Declared(name, "", {"type": "object"}) for name in ("calculator", "paint"))
    own, imported = MarkerTemplate(TOKENIZER), of("thinking")[1]
    assert Offer((calculator,), ("calculator",)).forms(own) == {"calculator": None}
    assert Offer((calculator,), ("calculator",)).forms(imported) == {"calculator": calculator.parameters}
    assert Offer((calculator, paint), ("calculator",)).forms(own) == {"calculator": calculator.parameters}
    assert Offer((calculator,)).forms(own) == {}


@pytest.mark.parametrize("name", ["own", "thinking"])
def test_the_prompt_tells_of_tools_unless_none_may_be_called(server, client, name):
    template = server.models[name].template
    turns = (Message("user", "hello"),)
    told, plain = prompt_of(template.with_tools(TOOLS), turns), prompt_of(template, turns)
    asked = {"model": name, "messages": MESSAGES, "max_tokens": 3}
    for choice, prompt in (("auto", told), ("none", plain)):
        used = client.chat.completions.create(**asked, tools=TOOLS, tool_choice=choice).usage
        assert used.prompt_tokens == len(prompt)
    shown = httpx.post(f"{server.url}/tokenize", json={"model": name, "messages": MESSAGES, "tools": TOOLS}).json()
    assert shown["tokens"] == told


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model": "chatml"}, "does not tell it of tools: offer it none"),
        ({"tool_choice": "required", "tools": []}, "tool_choice: there are no tools to call"),
        (
            {"tool_choice": {"type": "function", "function": {"name": "walk"}}},
            "tool_choice: there is no 'walk' in tools",
        ),
        ({"tool_choice": "must"}, "tool_choice: 'must' is not a choice"),
        ({"tool_choice": "required", "response_format": {"type": "json_object"}}, "leave out response_format"),
        ({"tool_choice": "required", "tools": [tool("f", x={"not": {}})]}, "tool_choice: .* cannot be enforced"),
        ({"tools": [tool("f", x={"description": "long " * 30_000})]}, "positions hold: shorten them"),
    ],
)
def test_what_cannot_be_offered_or_forced_is_refused(client, change, says):
    asked = {"model": "thinking", "messages": MESSAGES, "tools": TOOLS, "max_tokens": 5} | change
    with pytest.raises(openai.BadRequestError, match=says):
        client.chat.completions.create(**asked)
