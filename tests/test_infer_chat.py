"""Replies to conversations: what streams, what tools add, what is left out, one by one and many at once."""

import jax
import pytest

from llmlab.core.errors import UserError
from llmlab.data.chat import MarkerTemplate, Message
from llmlab.data.tokenizer import CHAT_MARKERS
from llmlab.data.tokenizer_character import CharacterTokenizer
from llmlab.infer import chat
from llmlab.infer.chat import fitted, replies, reply, results, split
from llmlab.infer.generate import stream
from llmlab.model.config import llama
from llmlab.model.transformer import make_model
from tests.scripted import MODEL, REACH, TEMPLATE, assistant, ids_of, says, tool, user

TOOLS = {"add": lambda text: str(sum(map(int, text.split("+"))))}


def heard(monkeypatch, said, *conversation, **settings):
    """(reply, pieces) where the model says `said`, a text or ids, or a function from the prompt's text to either."""
    says(monkeypatch, (lambda prompt, seed: said(prompt)) if callable(said) else lambda prompt, seed: said)
    pieces = []
    settings = {"max_tokens": 99, "on_text": lambda kind, text: pieces.append((kind, text)), **settings}
    return reply(MODEL, {}, TEMPLATE, conversation or [user("hi")], **settings), pieces


def joined(pieces):
    """Neighbours of a kind in one."""
    out = []
    for kind, text in pieces:
        if out and out[-1][0] == kind == "text":
            out[-1] = (kind, out[-1][1] + text)
        else:
            out.append((kind, text))
    return out


def test_a_turn_streams_as_it_is_written(monkeypatch):
    said, pieces = heard(monkeypatch, "naïve 日🙂")
    assert pieces == [("text", character) for character in "naïve 日🙂"]
    assert said.messages == (assistant("naïve 日🙂"),)
    assert (said.ended, said.left_out) == (True, 0)
    assert said.tokens == len("naïve 日🙂".encode()) + 1


@pytest.mark.parametrize("data", [b"a\xf0\x9f", b"a\xffb", b"\xe6\x97", b"\xf0\x9fab"])
def test_broken_characters_come_as_decoding_all_gives_them(monkeypatch, data):
    said, pieces = heard(monkeypatch, data)
    assert "".join(text for _, text in pieces) == data.decode(errors="replace") == said.messages[0].content


def test_what_stands_between_markers_is_no_text(monkeypatch):
    script = "<|think|>hm…<|/think|>so <|call|>add 1+2<|/call|><|end|>"
    said, pieces = heard(monkeypatch, script)
    assert [text for kind, text in pieces if kind == "thinking"] == list("hm…")
    assert joined(pieces)[3:] == [("text", "so "), ("call", "add 1+2")]
    assert said.messages == (assistant("so ", ("add", "1+2"), thinking="hm…"),)


@pytest.mark.parametrize(
    "script, want",
    [
        ("<|think|><|/think|>now", [("text", "now")]),
        ("<|call|>add 1", [("text", "add 1")]),
        ("a<|call|><|/call|>b", [("text", "ab")]),
        ("a<|user|>b<|result|>c", [("text", "abc")]),
        ("<|think|>a<|call|>f x<|/call|>b", [("thinking", "a"), ("call", "f x"), ("text", "b")]),
        (
            "<|think|>🙂<|/think|>x<|call|>a 1<|/call|>",
            [("thinking", "🙂"), ("text", "x"), ("call", "a 1")],
        ),
    ],
)
def test_what_is_not_well_formed_comes_as_the_template_reads_it(monkeypatch, script, want):
    said, pieces = heard(monkeypatch, script)
    assert joined(pieces) == want
    assert "".join(text for kind, text in want if kind == "text") == said.messages[0].content


def test_thinking_that_ends_in_half_a_character_does_not_open_a_call_to_the_eye(monkeypatch):
    _, pieces = heard(monkeypatch, [*ids_of("<|think|>"), 0xF0, *ids_of("<|/think|>x<|call|>add 1<|/call|>")])
    assert joined(pieces) == [("thinking", "\ufffd"), ("text", "x"), ("call", "add 1")]


def test_calls_run_and_the_model_goes_on(monkeypatch):
    def script(prompt):
        return "It is 3." if "<|result|>3" in prompt else "<|call|>add 1+2<|/call|>"

    said, pieces = heard(monkeypatch, script, user("1+2?"), tools=TOOLS)
    assert said.messages == (assistant("", ("add", "1+2")), tool("add", "3"), assistant("It is 3."))
    assert joined(pieces) == [("call", "add 1+2"), ("result", "3"), ("text", "It is 3.")]
    assert said.tokens == len("add 1+2") + 3 + len("It is 3.") + 1


def test_without_tools_a_call_ends_the_reply(monkeypatch):
    said, _ = heard(monkeypatch, "<|call|>add 1+2<|/call|>")
    assert said.messages == (assistant("", ("add", "1+2")),)


def test_a_turn_that_was_cut_runs_nothing(monkeypatch):
    said, _ = heard(monkeypatch, "<|call|>add 1+2<|/call|> and so on", tools=TOOLS, max_tokens=12)
    assert (len(said.messages), said.ended) == (1, False)


def test_no_more_calls_than_allowed(monkeypatch):
    said, _ = heard(monkeypatch, "<|call|>add 1+2<|/call|>", tools=TOOLS, max_calls=2)
    assert [message.role for message in said.messages] == ["assistant", "tool", "assistant", "tool", "assistant"]
    two = "<|call|>add 1+2<|/call|><|call|>add 3+4<|/call|>"
    said, _ = heard(monkeypatch, two, tools=TOOLS, max_calls=3)
    assert [message.content for message in said.messages] == ["", "3", "7", ""]


def test_a_tool_that_fails_or_is_not_there_answers_so():
    calls = assistant("", ("add", "x"), ("ad", "1"), ("add", "2+2")).calls
    wrong, missing, right = results(calls, TOOLS)
    assert wrong.content.startswith("error: invalid literal")
    assert missing.content == "error: there is no tool 'ad': did you mean 'add'?"
    assert right == tool("add", "4")


def test_a_call_that_is_refused_is_an_answer_to_the_model(monkeypatch):
    ran, asked = [], []
    tools = {"keep": lambda text: ran.append(text) or "kept", "add": TOOLS["add"]}

    def approve(call):
        asked.append(call)
        return call.name == "add"

    script = "<|call|>keep x<|/call|><|call|>add 1+2<|/call|><|call|>ad 1<|/call|>"
    prompts = says(monkeypatch, lambda prompt, seed: "Well." if "<|result|>" in prompt else script)
    settings = {"tools": tools, "approve": approve, "max_tokens": 99}
    said = reply(MODEL, {}, TEMPLATE, [user("hi")], **settings)
    no = "error: the user does not allow this call"
    missing = "error: there is no tool 'ad': did you mean 'add'?"
    assert said.messages[1:] == (tool("keep", no), tool("add", "3"), tool("ad", missing), assistant("Well."))
    assert ran == []
    assert [call.name for call in asked] == ["keep", "add"]
    assert f"<|tool|>keep<|result|>{no}<|end|><|tool|>add<|result|>3<|end|>" in prompts[1]
    (many,) = replies(MODEL, {}, TEMPLATE, [[user("hi")]], **settings)
    assert (many.messages, ran) == (said.messages, [])


@pytest.mark.parametrize("calls_a_turn, max_calls, turns", [(1, 0, 1), (1, 3, 4), (3, 7, 3), (9, 4, 1)])
def test_a_model_that_never_stops_calling_is_stopped(monkeypatch, calls_a_turn, max_calls, turns):
    ran = []
    script = "<|call|>f<|/call|>" * calls_a_turn
    tools = {"f": lambda text: ran.append(text) or "."}
    said, pieces = heard(monkeypatch, script, tools=tools, max_calls=max_calls)
    assert sum(message.role == "assistant" for message in said.messages) == turns
    assert len(ran) == (turns - 1) * calls_a_turn <= max_calls
    assert pieces[-1] == ("note", f"no more than {max_calls} calls are run for one answer")


def test_an_answer_can_be_stopped(monkeypatch):
    pieces = []
    settings = {"on_text": lambda kind, text: pieces.append(text), "stop": lambda: len(pieces) == 3}
    said, _ = heard(monkeypatch, "abcdef<|call|>add 1<|/call|>", tools=TOOLS, **settings)
    assert (said.messages, said.ended) == ((assistant("abc"),), False)


def test_the_earliest_turns_are_left_out_but_never_the_system(monkeypatch):
    turns = [Message("system", "be kind")]
    for i in range(6):
        turns += [user(f"q{i}" + "." * 50), assistant(f"a{i}" + "." * 50)]
    asked = says(monkeypatch, lambda prompt, seed: "fine")
    notes = []
    settings = {"max_tokens": 100, "on_text": lambda kind, text: notes.append((kind, text))}
    said = reply(MODEL, {}, TEMPLATE, [*turns, user("last")], **settings)
    (prompt,) = asked
    assert prompt.startswith("<|system|>be kind<|end|><|user|>q3.")
    assert prompt.endswith("<|user|>last<|end|><|assistant|>")
    assert said.left_out == 6
    (note,) = [text for kind, text in notes if kind == "note"]
    assert "first 6 turns" in note
    assert f"{REACH}" in note
    # One turn more to keep would not have fitted.
    ids, left_out = fitted(TEMPLATE, [*turns, user("last")], REACH - 100)
    assert left_out == 6
    assert len(ids) <= REACH - 100 < len(TEMPLATE.render([turns[0], *turns[5:], user("last")], generate=True).ids)


def test_a_conversation_is_split_after_its_last_question():
    turns = (user("a"), assistant("b"), user("c"), assistant("", ("add", "1")), tool("add", "1"), assistant("d"))
    assert split(turns) == (turns[:3], turns[3:])
    assert split(turns[:3]) == (turns[:3], ())
    assert split((Message("system", "s"), assistant("hello"))) == ((Message("system", "s"),), (assistant("hello"),))
    assert split(()) == ((), ())


def test_a_question_too_long_is_an_error_of_one_line(monkeypatch):
    with pytest.raises(UserError, match=r"600 .*max_tokens=99 .*512 positions"):
        heard(monkeypatch, "x", user("?" * 596))


def test_no_room_after_a_tool_ends_the_reply(monkeypatch):
    tools = {"long": lambda text: "." * REACH}
    said, pieces = heard(monkeypatch, "<|call|>long<|/call|>", tools=tools)
    assert [message.role for message in said.messages] == ["assistant", "tool"]
    assert not said.ended
    assert pieces[-1] == ("note", "no room is left for another turn")


def test_many_at_once_are_as_one_by_one(monkeypatch):
    def script(prompt, seed):
        question = prompt.rpartition("<|user|>")[2].partition("<|end|>")[0]
        if "<|result|>" in prompt:
            return f"{question} is {prompt.rpartition('<|result|>')[2].partition('<|end|>')[0]}, says {seed}"
        return f"<|call|>add {question}<|/call|>" if "+" in question else f"{question}!"

    says(monkeypatch, script)
    asked = [
        [user("1+2")],
        [user("hello")],
        [user("." * 600)],
        [user("hi"), assistant("ho"), user("30+40")],
        [user("7+x")],
    ]
    done = []
    settings = {"tools": TOOLS, "max_tokens": 80}
    many = replies(MODEL, {}, TEMPLATE, asked, seeds=range(10, 15), batch_size=2, progress=done.append, **settings)
    for i in (0, 1, 3, 4):
        assert many[i]._replace(seconds=0.0) == reply(MODEL, {}, TEMPLATE, asked[i], seed=10 + i, **settings)._replace(
            seconds=0.0
        )
    assert many[3].messages[-1].content == "30+40 is 70, says 13"
    assert (many[2].messages, many[2].ended) == ((), False)
    assert done == sorted(done)
    assert done[-1] == 5


def test_batches_are_full_and_few_in_shape(monkeypatch):
    shapes = []
    says(monkeypatch, lambda prompt, seed: "ok")
    scripted = chat.complete

    def complete(*args, rows, width, **settings):
        shapes.append((rows, width, len(args[2])))
        return scripted(*args, rows=rows, width=width, **settings)

    monkeypatch.setattr(chat, "complete", complete)
    replies(MODEL, {}, TEMPLATE, [[user("?" * n)] for n in (3, 40, 45, 5, 300)], max_tokens=8, batch_size=2)
    assert shapes == [(2, 512, 2), (2, 64, 2), (2, 32, 1)]


def test_no_conversations_are_no_replies():
    assert replies(MODEL, {}, TEMPLATE, [], max_tokens=8) == []


@pytest.mark.slow
def test_a_real_model_says_the_same_alone_and_among_others():
    tokenizer = CharacterTokenizer("\n abcdef", CHAT_MARKERS)
    template = MarkerTemplate(tokenizer)
    config = llama(width=16, layers=1, heads=2, vocab_size=tokenizer.vocab_size, max_positions=64, init_std=0.7)
    model = make_model(config)
    params = jax.jit(model.init)(jax.random.key(1))
    asked = [[user("abc")], [user("fed cab")], [user("a"), assistant("b"), user("c")]]
    settings = {"max_tokens": 12, "temperature": 1.0}
    many = replies(model, params, template, asked, seeds=[5, 6, 8], **settings)
    for seed, conversation, said in zip([5, 6, 8], asked, many, strict=True):
        alone = reply(model, params, template, conversation, seed=seed, **settings)
        assert alone.messages == said.messages
        prompt = template.render(conversation, generate=True).ids
        ids = list(stream(model, params, prompt, seed=seed, stop_ids=template.stop_ids, **settings))
        assert said.messages == (template.parse(ids),)
        assert said.ended == (ids[-1] in template.stop_ids)
        assert (said.tokens, alone.tokens) == (len(ids), len(ids))
