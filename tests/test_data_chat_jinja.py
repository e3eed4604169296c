"""Templates in a sandbox: what published ones use is there, and nothing else can be reached."""

import datetime
import importlib.metadata

import pytest

pytest.importorskip("jinja2", reason="the extra hf installs it")

from llmlab.core.errors import UserError
from llmlab.data.chat_jinja import JinjaTemplate

X = [{"role": "user", "content": "<é>"}]


def write(source: str, generate: bool = False) -> str:
    return JinjaTemplate(source, {"bos_token": "<s>"}).write(X, generate)


def test_it_sees_the_messages_the_tokens_and_whether_to_go_on():
    assert write("{{ bos_token }}{{ messages[0].content }}{{ add_generation_prompt }}", True) == "<s><é>True"
    assert write("{{ tools is none }}{{ documents is none }}{{ eos_token is defined }}") == "TrueTrueFalse"


def test_blocks_take_the_line_that_they_stand_on():
    assert write("a\n  {% if true %}\n  b\n  {% endif %}\nc") == "a\n  b\nc"


def test_what_published_templates_use_is_there():
    assert write("{{ messages[0] | tojson }}") == '{"role": "user", "content": "<é>"}'
    assert write("{{ {'b': 1, 'a': [1]} | tojson(indent=1, sort_keys=true) }}") == '{\n "a": [\n  1\n ],\n "b": 1\n}'
    assert write("{% for i in [1, 2] %}{% if i > 1 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "1"
    assert write("{% for m in messages %}{% generation %}{{ m.role }}{% endgeneration %}{% endfor %}") == "user"
    assert write("{{ strftime_now('%Y') }}") in {str(datetime.datetime.now().year + i) for i in (-1, 0)}


def test_its_texts_are_known():
    template = JinjaTemplate("a{% if '<b>' in messages[0].content %}c{{ 'd' }}{% endif %}", {})
    assert {"<b>", "a", "c", "d"} <= set(template.literals)
    assert "<b>" in template.constants
    assert "a" not in template.constants


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('not\n so') }}", "refuses this conversation: not so$"),
        ("{{ ''.__class__.__mro__ }}", "refuses this conversation: .*unsafe"),
        ("{{ strftime_now.__globals__['os'] }}", "refuses this conversation: .*unsafe"),
        ("{{ messages.append(1) }}", "refuses this conversation: .*unsafe"),
        ("{{ none + 'a' }}", "fails on this conversation: unsupported operand"),
        ("{{ messages[3].content }}", "refuses this conversation: .*has no element 3"),
    ],
)
def test_what_it_must_not_or_cannot_do_is_said_in_a_line(source: str, message: str):
    with pytest.raises(UserError, match=message):
        write(source)


def test_what_is_no_template_is_refused():
    with pytest.raises(UserError, match="is no Jinja template: unexpected '}'"):
        write("{{ a } }}")


def test_an_old_sandbox_is_refused(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "3.1.5")
    with pytest.raises(UserError, match=r"jinja2 3\.1\.5 does not keep .* pip install 'jinja2>=3\.1\.6'"):
        write("")
