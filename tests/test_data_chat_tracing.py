"""Where the assistant speaks: found by signs, or by headers, or not at all, but never in a wrong place."""

import pytest

pytest.importorskip("tokenizers", reason="the extra hf installs it")
pytest.importorskip("jinja2", reason="the extra hf installs it")

from llmlab.core.errors import UserError
from llmlab.data.chat import Message, Step
from llmlab.data.chat_jinja import JinjaTemplate
from llmlab.data.chat_tracing import Form, form_of
from tests.chat_families import FAMILIES, HELLO, made, of, said


def test_turns_are_found_by_their_header_where_signs_change_what_is_written():
    tokenizer, template = of("chatml")
    rendered = template.render((HELLO[1], HELLO[0], HELLO[1]), generate=True)  # nothing comes before the first
    assert said(tokenizer, rendered) == "hi⟦<|im_end|>⟧hi⟦<|im_end|>⟧"
    cutting = FAMILIES["chatml"].template.replace("message['content'] +", "message['content'][:4] +")
    tokenizer, template = made(FAMILIES["chatml"], template=cutting)
    rendered = template.render((HELLO[0], Message("assistant", "longer than four"), *HELLO))
    assert said(tokenizer, rendered) == "long⟦<|im_end|>⟧hi⟦<|im_end|>⟧"


def test_a_turn_that_cannot_be_found_is_refused():
    family = FAMILIES["inst_replace"]
    cutting = family.template.replace("message.content.strip()", "message.content.strip()[:4]")
    _, template = made(family, template=cutting)
    with pytest.raises(UserError, match="it cannot be told what the assistant says"):
        template.render((HELLO[0], Message("assistant", "longer than four")))


def test_a_template_that_ends_no_turn_is_refused_for_learning_only():
    _, template = made(
        FAMILIES["chatml"], template="{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content }}{% endfor %}"
    )
    assert template.render(HELLO[:1]).ids
    with pytest.raises(UserError, match="no token that ends a turn"):
        template.render(HELLO)


def test_an_end_may_be_left_to_the_next_turn_of_another():
    """Only the last of two turns has an end: it is not taken for the first one's."""
    ends = "{{ '<|im_end|>' if loop.last or message.role == 'user' else '' }}\n"
    _, template = made(
        FAMILIES["chatml"], template=FAMILIES["chatml"].template.replace("'<|im_end|>\n' }}", "'' }}" + ends)
    )
    assert sum(template.render(HELLO).mask) == 3
    with pytest.raises(UserError, match="no token that ends a turn"):
        template.render((*HELLO, *HELLO))


def test_the_end_of_an_empty_turn_is_not_taken_for_that_of_the_turn_before():
    ends = "{{ '' if 'hi' in message.content else '<|im_end|>' }}\n"
    endless = FAMILIES["chatml"].template.replace("'<|im_end|>\n' }}", "'' }}" + ends)
    _, template = made(FAMILIES["chatml"], template=endless)
    with pytest.raises(UserError, match="no token that ends a turn"):
        template.render((*HELLO, Message("assistant", "")))


def test_what_the_prompt_begins_is_said_where_the_assistant_said_it():
    """Every turn that is to be generated begins so, and one that was given does by chance."""
    begun = FAMILIES["chatml"].template.replace("<|im_start|>assistant\n", "<|im_start|>assistant\nSure: ")
    tokenizer, template = made(FAMILIES["chatml"], template=begun)
    turns = (HELLO[0], Message("assistant", "Sure: yes"), *HELLO)
    assert said(tokenizer, template.render(turns)) == "Sure: yes⟦<|im_end|>⟧hi⟦<|im_end|>⟧"
    with pytest.raises(UserError, match="cannot be told what the assistant says"):
        template.render(turns[1:])  # begins with the assistant, whose turn is then known by nothing but its header


def test_an_end_within_a_turn_is_not_its_end():
    """Thinking is ended by what ends a turn."""
    thinking = "(message.thinking + '<|im_end|>' if message.thinking else '')"
    ended = FAMILIES["chatml"].template.replace("message['content'] +", f"{thinking} + message['content'] +")
    tokenizer, template = made(FAMILIES["chatml"], template=ended)
    turns = (HELLO[0], HELLO[1]._replace(thinking="so"), *HELLO)
    assert said(tokenizer, template.render(turns)) == "so⟦<|im_end|>⟧hi⟦<|im_end|>⟧hi⟦<|im_end|>⟧"


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("chatml", Form("<|im_start|>assistant\n", "", "<|im_end|>\n")),
        ("llama3", Form("<|start_header_id|>assistant<|end_header_id|>\n\n", "", "<|eot_id|>")),
        ("inst_first", Form("", "", "</s>")),
        ("gemma", Form("<start_of_turn>model\n", "", "<end_of_turn>\n")),
        ("opened", Form("<|im_start|>assistant\n", "<think>\n", "<|im_end|>\n")),
        ("bars", Form("<｜Assistant｜>", "<think>\n", "</s>")),
    ],
)
def test_how_a_template_opens_and_ends_a_turn(name: str, form: Form):
    chat = of(name)[0].chat
    assert form_of(JinjaTemplate(chat.template, chat.tokens).write) == form


def test_an_empty_turn_before_changes_nothing():
    for name in FAMILIES:
        tokenizer, template = of(name)
        blank = template.render((Message("user", ""), HELLO[1]))
        assert said(tokenizer, blank) == said(tokenizer, template.render(HELLO))


def test_steps_that_cannot_be_placed_are_refused():
    cutting = FAMILIES["chatml"].template.replace("message['content'] +", "message['content'][:4] +")
    _, template = made(FAMILIES["chatml"], template=cutting)
    with pytest.raises(UserError, match="it cannot be told what the assistant says"):
        template.render((HELLO[0], Message("assistant", "", steps=(Step("longer", 1.0),))))
