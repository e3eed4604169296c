"""Chat templates in Jinja, as published models bring them: run in a sandbox, with what transformers gives them.

A template is a program from elsewhere: it sees plain dictionaries, and its own failures are said in one line.
"""

import datetime
import importlib.metadata
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from llmlab.core.errors import UserError

MARKER = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")
_SAFE = (3, 1, 6)  # older sandboxes have known ways out


class JinjaTemplate:
    """A compiled template.

    Attributes:
      literals: every text that stands in it.
      constants: those of them that its code may look for in what people write.

    Raises:
      UserError: jinja2 is missing or too old, or this is no template.
    """

    def __init__(self, source: str, tokens: Mapping[str, str]):
        try:
            import jinja2
            from jinja2 import nodes
        except ImportError:
            raise UserError("the chat template of a model needs the library jinja2: pip install 'llmlab[hf]'") from None
        version = importlib.metadata.version("jinja2")
        if tuple(map(int, re.findall(r"\d+", version)[:3])) < _SAFE:
            raise UserError(f"jinja2 {version} does not keep a template from elsewhere in: pip install 'jinja2>=3.1.6'")
        environment = _environment()
        try:
            tree = environment.parse(source)
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise UserError(f"the chat template of this model is no Jinja template: {_line(error)}") from None
        self.constants = [node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)]
        self.literals = [*self.constants, *(node.data for node in tree.find_all(nodes.TemplateData))]
        self._tokens = dict(tokens)

    def write(self, messages: Sequence[dict[str, Any]], generate: bool = False, *, tools: Any = None) -> str:
        """The conversation as this template spells it. tools: what may be called, as OpenAI's API lists it.

        Raises:
          UserError: the template refuses it, or fails.
        """
        import jinja2

        given = {"messages": list(messages), "tools": tools, "documents": None, "add_generation_prompt": generate}
        try:
            return self._template.render(**self._tokens, **given)
        except jinja2.TemplateError as error:
            raise UserError(f"the chat template of this model refuses this conversation: {_line(error)}") from None
        except Exception as error:  # what a program from elsewhere does with a conversation it did not expect
            raise UserError(f"the chat template of this model fails on this conversation: {_line(error)}") from None


def _environment() -> Any:
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}`, by which some templates say what an assistant wrote: found here without it."""

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    Generation.tags = {"generation"}

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def to_json(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda format: datetime.datetime.now().strftime(format)
    return environment


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
