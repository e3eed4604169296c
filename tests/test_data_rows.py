"""Rows of published data sets as examples: every shape, literal by literal, and what is refused."""

import random

import pytest

from llmlab.data.chat import Example, Message, Response, Step, ToolCall
from llmlab.data.rows import BadRowError, examples, guess_rows

USER, ANSWER = Message("user", "Hi"), Message("assistant", "Hello")
CONTEXT = Message("assistant", "Hello", train=False)
GOOD, BAD = Message("assistant", "good"), Message("assistant", "bad")


def turns(*pairs):
    return [{"role": role, "content": content} for role, content in pairs]


def conversation(row, **options):
    ((response,), kind) = only(examples(row, "chat", **options))
    assert response.value == 0
    assert kind == row.get("kind", "")
    return response.conversation


def only(found: list[Example]) -> Example:
    assert len(found) == 1
    return found[0]


ASKED = turns(("user", "Hi"))
SHAPES = {
    "messages": {"messages": turns(("user", "Hi"), ("assistant", "Hello"))},
    "parts": {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "H"}, "i"]},
            {"role": "assistant", "content": [{"type": "text", "text": "Hello"}]},
        ]
    },
    "absent fields that a table fills with null": {
        "messages": [
            {"role": "system", "content": "", "tool_calls": None},
            {"role": "user", "content": "Hi", "tool_calls": None, "name": None},
            {"role": "assistant", "content": "Hello", "tool_calls": None, "thinking": None, "weight": None},
        ],
        "prompt": None,
        "kind": None,
    },
    "sharegpt": {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
    "alpaca": {"instruction": "Hi", "input": "", "output": "Hello"},
    "alpaca without input": {"instruction": "Hi", "output": "Hello"},
    "texts": {"prompt": "Hi", "completion": "Hello"},
    "lists": {"prompt": ASKED, "completion": turns(("assistant", "Hello"))},
    "a list after a text": {"prompt": "Hi", "completion": turns(("assistant", "Hello"))},
    "question": {"question": "Hi", "answer": "Hello"},
    "transcript": {"prompt": "\n\nHuman: Hi\n\nAssistant:", "completion": "Hello"},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_of_a_conversation_is_the_same_conversation(shape):
    row = {name: value for name, value in SHAPES[shape].items() if name != "kind"}
    assert conversation(row) == (USER, ANSWER)
    assert guess_rows(SHAPES[shape]) == "chat"


def test_alpacas_input_follows_its_instruction():
    row = {"instruction": "Translate.", "input": "Katze", "output": "cat", "kind": "words"}
    assert conversation(row) == (Message("user", "Translate.\n\nKatze"), Message("assistant", "cat"))


def test_thinking_calls_results_and_weights():
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "é"}}}
    other = {"id": "c2", "type": "function", "function": {"name": "now", "arguments": '{"x":  1}'}}
    row = {
        "messages": [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": "1+2?"},
            {"role": "assistant", "content": None, "reasoning_content": "Add.", "tool_calls": [call, other]},
            {"role": "tool", "tool_call_id": "c2", "content": "noon"},
            {"role": "tool", "tool_call_id": "c1", "content": "3"},
            {"role": "assistant", "content": "3", "weight": 0},
            {"role": "user", "content": "Sure?"},
            {"role": "assistant", "content": "Yes", "thinking": "Hm.", "weight": 1, "train": True},
            {"role": "user", "content": "And now?"},
            {"role": "assistant", "content": "", "function_call": {"name": "now", "arguments": None}},
            {"role": "function", "name": "clock", "content": "noon"},
            {"role": "assistant", "content": "Noon", "train": False},
        ]
    }
    assert conversation(row) == (
        Message("system", "Be brief."),
        Message("user", "1+2?"),
        Message(
            "assistant",
            thinking="Add.",
            calls=(ToolCall("add", '{"a": 1, "b": "é"}'), ToolCall("now", '{"x":  1}')),
        ),
        Message("tool", "noon", name="now"),
        Message("tool", "3", name="add"),
        Message("assistant", "3", train=False),
        Message("user", "Sure?"),
        Message("assistant", "Yes", thinking="Hm."),
        Message("user", "And now?"),
        Message("assistant", calls=(ToolCall("now", ""),)),
        Message("tool", "noon", name="clock"),
        Message("assistant", "Noon", train=False),
    )


def test_thinking_within_an_answer_is_thinking_where_it_begins_it():
    def said(content, **more):
        asked = {"role": "user", "content": "<think>a</think>b"}
        return conversation({"messages": [asked, {"role": "assistant", "content": content, **more}]})[1:]

    assert said("<think>\nHm.\n\nSo.\n</think>\n\nYes") == (Message("assistant", "Yes", thinking="Hm.\n\nSo."),)
    for plain in ("Write <think>a</think>.", "<think> and no end"):
        assert said(plain) == (Message("assistant", plain),)
    kept = "<think>a</think>b"
    assert said(kept, thinking="Hm.") == (Message("assistant", kept, thinking="Hm."),)
    assert conversation({"prompt": "1?", "completion": "<think>a</think>b"})[1] == Message(
        "assistant", "b", thinking="a"
    )


def test_calls_without_ids_stay_apart_and_arguments_from_parquet_lose_what_is_not_theirs():
    def calls(*names):
        return {"role": "assistant", "tool_calls": [{"name": name, "arguments": {"x": 1, "y": None}} for name in names]}

    def result(said, **more):
        return {"role": "tool", "content": said, **more}

    said = [
        calls("a", "b"),
        result("1", tool_call_id="call 0"),
        calls("c"),
        result("2"),
        result("3"),
        turns(("assistant", "Hello"))[0],
    ]
    row = {"messages": [{"role": "user", "content": "Go"}, *said]}
    results = [turn for turn in conversation(row) if turn.role == "tool"]
    assert results == [Message("tool", said, name=name) for said, name in (("1", "a"), ("2", "b"), ("3", "c"))]
    assert conversation(row)[1].calls[0] == ToolCall("a", '{"x": 1}')


def test_sharegpts_calls_are_json_and_their_results_come_in_their_order():
    calls = '[{"name": "a", "arguments": {"x": 1}}, {"name": "b", "arguments": {}}]'
    row = {
        "system": "Use tools.",
        "conversations": [
            {"from": "human", "value": "Go"},
            {"from": "function_call", "value": calls},
            {"from": "observation", "value": "1"},
            {"from": "tool", "value": "2"},
            {"from": "gpt", "value": "Done"},
        ],
    }
    assert conversation(row) == (
        Message("system", "Use tools."),
        Message("user", "Go"),
        Message("assistant", calls=(ToolCall("a", '{"x": 1}'), ToolCall("b", "{}"))),
        Message("tool", "1", name="a"),
        Message("tool", "2", name="b"),
        Message("assistant", "Done"),
    )


def test_only_the_last_turn_is_learned_where_that_is_asked():
    row = {"messages": turns(("user", "Hi"), ("assistant", "Hello"), ("user", "Well?"), ("assistant", "Well."))}
    assert [turn.train for turn in conversation(row)] == [True] * 4
    assert [turn.train for turn in conversation(row, train_on="last")] == [True, False, True, True]


def test_the_configs_system_turn_comes_where_the_row_has_none():
    row = {"messages": turns(("user", "Hi"), ("assistant", "Hello"))}
    assert conversation(row, system="Ours.") == (Message("system", "Ours."), USER, ANSWER)
    assert conversation(row | {"system": "Its."}, system="Ours.")[0] == Message("system", "Its.")
    own = {"messages": turns(("system", "Own."), ("user", "Hi"), ("assistant", "Hello"))}
    assert conversation(own, system="Ours.") == (Message("system", "Own."), USER, ANSWER)
    preference = {"prompt": "Hi", "chosen": "good", "rejected": "bad"}
    chosen, rejected = only(examples(preference, "preference", system="S")).responses
    assert chosen.conversation[0] == rejected.conversation[0] == Message("system", "S")


PREFERENCES = {
    "texts": {"prompt": "Hi", "chosen": "good", "rejected": "bad"},
    "lists": {
        "prompt": ASKED,
        "chosen": turns(("assistant", "good")),
        "rejected": turns(("assistant", "bad")),
    },
    "lists that hold the prompt": {
        "chosen": turns(("user", "Hi"), ("assistant", "good")),
        "rejected": turns(("user", "Hi"), ("assistant", "bad")),
    },
    "lists that repeat the prompt": {
        "prompt": "Hi",
        "chosen": turns(("user", "Hi"), ("assistant", "good")),
        "rejected": turns(("user", "Hi"), ("assistant", "bad")),
    },
    "alpaca": {"instruction": "Hi", "input": "", "output": "other", "chosen": "good", "rejected": "bad"},
    "question": {"question": "Hi", "chosen": "good", "rejected": "bad"},
    "transcripts": {"chosen": "\n\nHuman: Hi\n\nAssistant: good", "rejected": "\n\nHuman: Hi\n\nAssistant: bad"},
    "transcript and answers": {"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": "good", "rejected": "bad"},
}


@pytest.mark.parametrize("shape", PREFERENCES)
def test_every_shape_of_a_preference_is_the_same_preference(shape):
    row = PREFERENCES[shape]
    assert guess_rows(row) == "preference"
    assert examples(row, "preference") == [Example((Response((USER, GOOD)), Response((USER, BAD))))]
    good, bad = examples(row | {"kind": "k"}, "binary")
    assert good == Example((Response((USER, GOOD), 1.0),), "k")
    assert bad == Example((Response((USER, BAD), 0.0),), "k")


def test_a_transcript_of_hh_rlhf_in_several_turns():
    start = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: How do I say:\n\nHuman rights?\n\nAssistant:"
    ((chosen, rejected), _) = only(examples({"chosen": f"{start} good\n", "rejected": f"{start} bad"}, "preference"))
    context = (USER, CONTEXT, Message("user", "How do I say:\n\nHuman rights?"))
    assert (chosen.conversation, rejected.conversation) == ((*context, GOOD), (*context, BAD))


def test_an_answer_is_judged_whatever_its_weight():
    chosen, rejected = ([*ASKED, {"role": "assistant", "content": text, "weight": 0}] for text in ("good", "bad"))
    assert examples({"chosen": chosen, "rejected": rejected}, "preference") == examples(
        PREFERENCES["texts"], "preference"
    )


def test_margins():
    row = {"prompt": "Hi", "chosen": "good", "rejected": "bad"}
    for more, margin in (
        ({"margin": 0.5}, 0.5),
        ({"score_chosen": 8, "score_rejected": 5.5}, 2.5),
        ({"margin": None, "score_chosen": 8}, 0.0),
    ):
        chosen, rejected = only(examples(row | more, "preference")).responses
        assert (chosen.value, rejected.value) == (margin, 0.0)


@pytest.mark.parametrize("order", [{}, {"ranks": [1, 2, 3]}, {"scores": [9.5, 3, -1]}])
def test_rankings_come_best_first(order):
    row = {"prompt": "Hi", "responses": ["a", turns(("assistant", "b")), "c"], **order}
    assert guess_rows(row) == "ranking"
    found = only(examples(row, "ranking")).responses
    assert [r.conversation for r in found] == [(USER, Message("assistant", text)) for text in "abc"]
    if order:
        ((name, values),) = order.items()
        backward = {"prompt": "Hi", "responses": row["responses"][::-1], name: values[::-1]}
        assert only(examples(backward, "ranking")).responses == found


@pytest.mark.parametrize("label", [True, False, 1, 0])
def test_a_label_is_a_value(label):
    row = {"prompt": "Hi", "completion": "good", "label": label}
    assert guess_rows(row) == "binary"
    assert examples(row, "binary") == [Example((Response((USER, GOOD), float(label)),))]
    several = {"messages": turns(("user", "Hi"), ("assistant", "Hello"), ("user", "Hi"), ("assistant", "good"))}
    found = only(examples(several | {"label": label}, "binary")).responses
    assert found == (Response((USER, CONTEXT, USER, GOOD), float(label)),)


def test_steps_make_up_the_answer():
    row = {"prompt": "Hi", "completions": ["One.", "Two. ", "Three", " four."], "labels": [True, False, 0.5, 1]}
    assert guess_rows(row) == "steps"
    answer = only(examples(row, "steps")).responses[0].conversation[-1]
    assert answer.steps == (Step("One.\n", 1), Step("Two. ", 0), Step("Three", 0.5), Step(" four.", 1))
    assert answer.content == "One.\nTwo. Three four." == "".join(step.text for step in answer.steps)


CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "a b", "arguments": ""}}]}
PAIR = PREFERENCES["texts"]
REFUSED = {
    "other shape": ("chat", {"text": "Hi"}, r"no row of data\.rows=chat \(it has 'text'\); give messages"),
    "nothing": ("chat", {}, "it has no field at all"),
    "another kind": ("chat", PAIR, r"it has 'prompt', 'chosen', 'rejected'.*or set data\.rows=preference"),
    "half a preference": ("preference", {"prompt": "Hi", "chosen": "good"}, "no row of data.rows=preference"),
    "no list": ("chat", {"messages": "Hi"}, "field is not a list .'messages' is str"),
    "no turns": ("chat", {"messages": []}, "no turns"),
    "no object": ("chat", {"messages": ["Hi"]}, "a turn is no object"),
    "no role": ("chat", {"messages": [{"content": "Hi"}]}, "unknown role .None in 'messages'"),
    "unknown role": ("chat", {"messages": turns(("bot", "Hi"))}, "unknown role .'bot' in 'messages'"),
    "a picture": ("chat", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "content is not text"),
    "a number": ("chat", {"messages": turns(("user", 3))}, "field is not text .'messages' is int"),
    "surrogate": ("chat", {"question": "Hi", "answer": "\ud800"}, "lone surrogate .in 'answer'"),
    "surrogate in an argument": (
        "chat",
        {"messages": [{"role": "assistant", "tool_calls": [{"name": "a", "arguments": {"x": "\udc00"}}]}]},
        "lone surrogate .in 'arguments'",
    ),
    "surrogate in a kind": ("chat", {"question": "Hi", "answer": "a", "kind": "\ud800"}, "lone surrogate .in 'kind'"),
    "user at the end": ("chat", {"messages": ASKED}, "no answer at the end .the last turn is of role 'user'"),
    "empty answer": ("chat", {"prompt": "Hi", "completion": " \n"}, "empty answer"),
    "empty turn between": (
        "chat",
        {"messages": turns(("user", "Hi"), ("assistant", ""), ("user", "Hi"), ("assistant", "Hello"))},
        "empty answer",
    ),
    "nothing learned": (
        "chat",
        {"messages": [*ASKED, {"role": "assistant", "content": "Hello", "weight": 0}]},
        "nothing to learn",
    ),
    "half a weight": (
        "chat",
        {"messages": [{"role": "assistant", "content": "x", "weight": 0.5}]},
        "not a truth value",
    ),
    "tools": ("chat", {"question": "Hi", "answer": "a", "tools": [{"name": "f"}]}, "tools are not read"),
    "bad call": ("chat", {"messages": [*ASKED, CALL]}, "unreadable tool call"),
    "written call": ("chat", {"conversations": [{"from": "function_call", "value": "{"}]}, "unreadable tool call"),
    "the same": ("preference", PAIR | {"chosen": "bad"}, "answers that are the same"),
    "empty rejected": ("preference", PAIR | {"rejected": ""}, "empty answer"),
    "negative margin": ("preference", PAIR | {"margin": -1}, "margin below 0 .it is -1.; exchange"),
    "infinite margin": ("preference", PAIR | {"margin": float("inf")}, "not a number .'margin' is inf"),
    "worded margin": ("preference", PAIR | {"margin": "much"}, "not a number .'margin' is 'much'"),
    "no prompt": ("preference", {"chosen": "good", "rejected": "bad"}, "no prompt .'chosen' is an answer alone"),
    "other prompts": (
        "preference",
        {
            "chosen": turns(("user", "Hi"), ("assistant", "good")),
            "rejected": turns(("user", "Ho"), ("assistant", "bad")),
        },
        "answers to different conversations",
    ),
    "a prompt that is not its own": (
        "preference",
        PREFERENCES["lists that repeat the prompt"] | {"prompt": "Ho"},
        "another prompt than its own",
    ),
    "transcript that ends with the human": (
        "preference",
        {"chosen": "\n\nHuman: Hi\n\nAssistant: a\n\nHuman: b", "rejected": "\n\nHuman: Hi\n\nAssistant: c"},
        "no answer at the end",
    ),
    "one response": ("ranking", {"prompt": "Hi", "responses": ["a"]}, "fewer than two responses"),
    "two the same": ("ranking", {"prompt": "Hi", "responses": ["a", "b", "a"]}, "answers that are the same"),
    "tie": ("ranking", {"prompt": "Hi", "responses": ["a", "b"], "scores": [1, 1]}, "equally good"),
    "ranks short": ("ranking", {"prompt": "Hi", "responses": ["a", "b"], "ranks": [1]}, "different lengths"),
    "worded label": ("binary", {"prompt": "Hi", "completion": "a", "label": "yes"}, "not a truth value"),
    "no label": ("binary", {"prompt": "Hi", "completion": "a"}, "no row of data.rows=binary.*data.rows=chat"),
    "labels short": ("steps", {"prompt": "Hi", "completions": ["a", "b"], "labels": [1]}, "different lengths"),
    "label of two": ("steps", {"prompt": "Hi", "completions": ["a"], "labels": [2]}, "label out of range .2 in"),
    "empty step": ("steps", {"prompt": "Hi", "completions": ["a", " "], "labels": [1, 0]}, "empty step"),
    "no steps": ("steps", {"prompt": "Hi", "completions": [], "labels": []}, "empty answer"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_sound_is_refused_in_one_line(case):
    rows, row, message = REFUSED[case]
    with pytest.raises(BadRowError, match=message) as caught:
        examples(row, rows)
    bad = caught.value.at("a.jsonl line 3")
    assert str(bad).startswith("a.jsonl line 3 (")
    assert "\n" not in str(bad)
    str(bad).encode()


TOOL_TURNS = [
    {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
    {"from": "observation", "value": "1"},
    {"role": "assistant", "content": None, "tool_calls": [{"id": "a", "function": {"name": "g", "arguments": {}}}]},
    {"role": "tool", "tool_call_id": "a", "content": "2"},
    {"role": "assistant", "content": "Hello", "weight": 1, "thinking": "Hm."},
]
GOOD_ROWS = [
    *(("chat", row) for row in SHAPES.values()),
    *(("preference", row | {"margin": 1, "system": "S"}) for row in PREFERENCES.values()),
    ("chat", {"messages": [*ASKED, *TOOL_TURNS], "kind": "k"}),
    ("binary", {"messages": [*ASKED, *TOOL_TURNS], "label": True}),
    ("ranking", {"prompt": "Hi", "responses": ["a", turns(("assistant", "b"))], "ranks": [2, 1]}),
    ("steps", {"prompt": "Hi", "completions": ["a", "b"], "labels": [1, 0]}),
]
JUNK = (
    None,
    True,
    -1,
    10**400,
    float("nan"),
    "",
    "\ud800",
    "\n\nHuman:",
    "tool",
    "[{}]",
    [],
    [[]],
    [None],
    {},
    {"x": []},
)


def spoilt(value, rng):
    """The same with one thing in it replaced, wherever it lies."""
    places = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    if not places or rng.random() < 0.2:
        return rng.choice(JUNK)
    place = rng.choice(places)
    copy = value.copy()
    copy[place] = spoilt(value[place], rng)
    return copy


@pytest.mark.parametrize("number", range(len(GOOD_ROWS)))
def test_a_row_with_anything_in_it_replaced_is_an_example_or_a_bad_row(number):
    rows, good = GOOD_ROWS[number]
    rng = random.Random(number)
    kept = 0
    for example in examples(good, rows):
        assert Example.loads(example.dumps()) == example
    for _ in range(200):
        row = spoilt(good, rng)
        if not isinstance(row, dict):
            continue
        try:
            found = examples(row, rows, system="S")
        except BadRowError as error:
            str(error.at("here")).encode()
            continue
        kept += len(found)
        for example in found:
            assert Example.loads(example.dumps()) == example
            for response in example.responses:
                first, *_, last = response.conversation
                assert first.role == "system" or any(turn.role == "system" for turn in response.conversation)
                assert last.role == "assistant"
                assert last.content.strip() or last.calls or not last.train
    assert 0 < kept < 400
