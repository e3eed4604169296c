"""Structured output: which tokens may come next, so that what is written fits a schema, an expression or a grammar.

A structure is compiled once and shared; each request has a `StructureLimit` of its own, whose masks are made on other
threads while the device runs. What would not be enforced is refused (`structured_schema` says why, by keyword), and so
is what takes too long or too much memory to compile: that is tried in another process first.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from llmlab.core.errors import UserError
from llmlab.data.chat import CallForm
from llmlab.data.tokenizer import Tokenizer
from llmlab.infer import structured_trial
from llmlab.infer.request import token_bits
from llmlab.infer.spoken import texts_of
from llmlab.infer.structured_schema import check_schema

Kind = Literal["schema", "regex", "grammar", "call"]
# One space, or a new line with its indentation: without a bound, a model may write blanks for ever. Without \u escapes
# every key has one spelling: llguidance does not see that "\u0061" is "a".
_JSON: Any = {
    "whitespace_pattern": r" |\n[ \t]{0,40}",
    "json_allowed_escapes": 'nrbtf\\"',
    "lenient": False,
    "coerce_one_of": False,
}


@dataclasses.dataclass(frozen=True)
class StructureLimits:
    """What a structure may take. characters: of its text. depth, parts: how deep a schema nests, and how many schemas
    and values it holds. seconds, megabytes: of compiling it, a process's start included. states: of its lexer, 1 to
    2 kB each, in every request. kept: structures that stay compiled.
    """

    characters: int = 32_768
    depth: int = 48
    parts: int = 2_000
    seconds: int = 2
    megabytes: int = 1_024
    states: int = 50_000
    kept: int = 64


class Structures:
    """The structures of one tokenizer's tokens, of a model with `vocab_size` logits.

    `stop_ids` are what the requests end with: they are allowed where the structure may end, and nowhere else. Control
    tokens and markers never are. Several threads may share it.

    Raises:
      UserError: llguidance is not installed, or there is no stop id.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        vocab_size: int,
        stop_ids: Sequence[int],
        limits: StructureLimits = StructureLimits(),
    ):
        try:
            import llguidance
        except ImportError:
            raise UserError("structured output needs llguidance: pip install 'llmlab[serve]'") from None
        if not stop_ids:
            raise UserError("structured output needs a stop id: give the template's, or the tokenizer's eos_id")
        self._library, self.limits, self.stop_ids = llguidance, limits, tuple(stop_ids)
        self._vocabulary = _Vocabulary(tokenizer, vocab_size, stop_ids)
        general = llguidance.LLTokenizer(llguidance.TokenizerWrapper(self._vocabulary), eos_token=list(stop_ids))
        self._vocabulary.greedy = general.greedy_tokenize
        self._tokenizers = {"regex": general, "grammar": general, "call": general}
        self._tokenizers["schema"] = general.with_slices(llguidance.LLTokenizer.json_slices())
        self._parser_limits = llguidance.LLParserLimits(max_lexer_states=limits.states, verbose_errors=False)
        self._kept: collections.OrderedDict[tuple[str, str], _Structure] = collections.OrderedDict()
        self._lock = threading.Lock()
        self._text_W = token_bits(self._vocabulary.text, vocab_size)
        self._stops_W = token_bits(stop_ids, vocab_size)

    def schema(self, schema: Mapping[str, Any] | bool | str) -> "StructureLimit":
        """JSON that a JSON schema, or the text of one, describes; keys come in the schema's order.

        Raises:
          UserError: it is no schema, cannot be enforced, or is too large.
        """
        if isinstance(schema, str):
            self._check_length("schema", schema)
            try:
                schema = json.loads(schema)
            except (ValueError, RecursionError) as error:
                raise UserError(f"the schema is not JSON: {_line(str(error))}") from None
        costly = check_schema(schema, depth=self.limits.depth, parts=self.limits.parts)
        return self._limit("schema", _dumps(schema), costly)

    def regex(self, pattern: str) -> "StructureLimit":
        """Text that the whole of a regular expression matches, in Rust's syntax: no look-around, no back references.

        Raises:
          UserError: it is no such expression, or too large.
        """
        return self._limit("regex", pattern, True)

    def grammar(self, lark: str) -> "StructureLimit":
        """Text of a context-free grammar, as Lark writes it; it begins with the rule `start`.

        Raises:
          UserError: it is no such grammar, or too large.
        """
        if directive := re.search(r"%(json|llguidance)\b", lark):
            raise UserError(f"the grammar cannot hold {directive[0]}, which is not checked: use a schema alone")
        return self._limit("grammar", lark, True)

    def call(self, form: CallForm, tools: Mapping[str, Mapping[str, Any] | None]) -> "StructureLimit":
        """A turn that calls one of these tools, with what its schema describes; None: with a line of text.

        Raises:
          UserError: a name holds a blank or a sign, or a schema is none, cannot be enforced, or is too large.
        """
        costly, choices = False, list[str]()
        for name, schema in tools.items():
            if not re.fullmatch(r"[\w.-]+", name):
                raise UserError(f"a call of {name!r} cannot be enforced: name it with letters, digits, _, . and -")
            given = "LINE"
            if schema is not None:
                costly |= check_schema(schema, depth=self.limits.depth, parts=self.limits.parts)
                given = f"%json {_dumps({**schema, 'x-guidance': _JSON})}"
            choices.append(f"{_lark([name, *form.between])} {given}")
        rules = [f"start: thought {_lark(form.before)} ({' | '.join(choices)}) {_lark(form.after)}", r"LINE: /[^\n]+/"]
        match form.thinking:
            case ():
                rules += ['thought: ""']
            case (int(), *_):
                rules += [f"thought: ANY {_lark(form.thinking)}", "ANY: /(?s:.*)/"]
            case (end, *rest):
                rules += [f"thought: until {_lark(rest)}", f"until[suffix={_dumps(end)}]: /(?s:.*)/"]
        markers = [id for part in form for id in part if isinstance(id, int)]
        return self._limit("call", "\n".join(rules), costly, markers)

    def _limit(self, kind: Kind, text: str, costly: bool, markers: Sequence[int] = ()) -> "StructureLimit":
        self._check_length(kind, text)
        with self._lock:
            structure = self._kept.get((kind, text))
            if structure is not None:
                self._kept.move_to_end((kind, text))
        if structure is None:
            structure = self._compiled(kind, text, costly, markers)
            with self._lock:
                self._kept[kind, text] = structure
                while len(self._kept) > self.limits.kept:
                    self._kept.popitem(last=False)
        return StructureLimit(
            structure, self._text_W | token_bits(markers, len(self._vocabulary.tokens)), self._stops_W
        )

    def _check_length(self, kind: Kind, text: str) -> None:
        if len(text) > self.limits.characters:
            raise UserError(f"the {kind} has {len(text):,} characters: at most {self.limits.characters:,} will do")

    def _compiled(self, kind: Kind, text: str, costly: bool, markers: Sequence[int]) -> "_Structure":
        matchers = self._library.LLMatcher
        try:
            match kind:
                case "schema":
                    grammar = matchers.grammar_from_json_schema(text, overrides=_JSON)
                case "regex":
                    grammar = matchers.grammar_from_regex(text)
                case "grammar" | "call":
                    grammar = matchers.grammar_from_lark(text)
        except ValueError as error:
            raise UserError(f"the {kind} cannot be read: {_line(str(error))}") from None
        if costly:
            self._try(kind, grammar)
        make = functools.partial(matchers, self._tokenizers[kind], grammar, log_level=0, limits=self._parser_limits)
        structure = _Structure(make)
        first = structure.matcher()
        if not first.is_error():
            first.compute_bitmask()
        if wrong := first.get_error() or next(iter(first.get_grammar_warnings()), ""):
            raise UserError(f"the {kind} cannot be enforced: {_line(wrong)}")
        if (
            not StructureLimit(
                structure, self._text_W | token_bits(markers, len(self._vocabulary.tokens)), self._stops_W
            )
            .allowed()
            .any()
        ):
            raise UserError(f"the {kind} cannot be enforced: this tokenizer has no token that it could begin with")
        return structure

    def _try(self, kind: Kind, grammar: str) -> None:
        """In another process, which may be as long and as large as the limits say, and may crash."""
        numbers = (self.limits.seconds, self.limits.megabytes * 2**20, self.limits.states)
        command = [sys.executable, "-P", structured_trial.__file__, *map(str, numbers)]
        done = subprocess.run(command, input=grammar.encode(), capture_output=True, check=False)
        if done.returncode:
            raise UserError(
                f"the {kind} takes more than {self.limits.seconds} s or {self.limits.megabytes:,} MiB to compile: "
                f"use fewer and smaller repetitions and patterns"
            )
        if wrong := json.loads(done.stdout):
            raise UserError(f"the {kind} cannot be enforced: {_line(wrong)}")


class StructureLimit:
    """What may come next in one request; see `llmlab.infer.request.Limit`."""

    def __init__(self, structure: "_Structure", text_W: np.ndarray, stops_W: np.ndarray):
        self._structure, self._text_W, self._stops_W = structure, text_W, stops_W
        self._matcher = structure.matcher()
        self._tokens: list[int] = []
        self._mask = _threads().submit(self._masked)

    def fresh(self) -> "StructureLimit":
        return StructureLimit(self._structure, self._text_W, self._stops_W)

    def ready(self, within: float) -> bool:
        return bool(concurrent.futures.wait([self._mask], within).done)

    def allowed(self) -> np.ndarray:
        return self._mask.result()

    def accept(self, token: int) -> None:
        self._mask.result()
        self._mask = _threads().submit(self._after, token)

    def _after(self, token: int) -> np.ndarray:
        self._tokens.append(token)
        self._matcher.consume_token(token)
        return self._masked()

    def _masked(self) -> np.ndarray:
        allowed_W = np.zeros_like(self._text_W)
        if not self._filled(allowed_W):
            # Past a limit, perhaps because of what others have made the lexer learn: it begins anew.
            self._matcher = self._structure.anew()
            self._matcher.consume_tokens(self._tokens)
            if not self._filled(allowed_W):  # Past a limit by itself; that must not look like an end.
                return np.zeros_like(allowed_W)
        # A grammar may name tokens, and so markers.
        if self._matcher.is_accepting():
            return allowed_W & (self._text_W | self._stops_W)
        return allowed_W & self._text_W

    def _filled(self, allowed_W: np.ndarray) -> bool:
        if self._matcher.is_error():
            return False
        self._matcher.unsafe_compute_mask_ptr(allowed_W.ctypes.data, allowed_W.nbytes)
        return not self._matcher.is_error()


class _Structure:
    """A compiled structure. All of its matchers share a lexer, which learns as they go, and has its limits."""

    def __init__(self, make: Callable[[], Any]):
        self._make, self._start = make, make()

    def matcher(self) -> Any:
        """One at the beginning."""
        return self._start.deep_copy()

    def anew(self) -> Any:
        """One at the beginning, for which, and for those after it, the lexer has learnt nothing yet."""
        self._start = self._make()
        return self.matcher()


class _Vocabulary:
    """A tokenizer as llguidance reads one: the bytes of every id, none for what is no text."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, stop_ids: Sequence[int]):
        self._tokenizer = tokenizer
        self.tokens = texts_of(tokenizer, vocab_size, stop_ids)
        self.text = [id for id, text in enumerate(self.tokens) if text]
        self.special_token_ids = [id for id, text in enumerate(self.tokens) if not text]
        self.eos_token_id, self.bos_token_id = stop_ids[0], tokenizer.bos_id
        self.greedy: Any = None

    def __call__(self, text: str) -> list[int]:
        """How the tokenizer spells what has to come; where it spells something else, as a blank in front, any way."""
        if not isinstance(text, str):
            raise TypeError("text, not bytes")  # asked once, to know
        ids = self._tokenizer.encode(text)
        return ids if b"".join(self.tokens[id] for id in ids) == text.encode() else self.greedy(text)


@functools.cache
def _threads() -> concurrent.futures.ThreadPoolExecutor:
    return concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1), "masks")


def _lark(spelling: Iterable[str | int]) -> str:
    """Text, and markers by their ids, as a grammar has them."""
    return " ".join(f"<[{piece}]>" if isinstance(piece, int) else _dumps(piece) for piece in spelling)


def _dumps(value: Any) -> str:
    try:
        return json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UserError(f"the schema cannot be written as JSON: {_line(str(error))}") from None


def _line(message: str) -> str:
    """What a library says, as one short line: the reason, where it gives one after where it stands."""
    message = message.removeprefix("panic: ").replace("<non-verbose/>", "").partition("<backtrace>")[0]
    reason = message.rpartition("error: ")[2].strip().partition("\n")[0]
    line = " ".join((reason or message).split())
    return line if len(line) <= 200 else f"{line[:197]}…"
