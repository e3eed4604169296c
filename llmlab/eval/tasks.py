"""Tasks are local JSON lines files, one question a line; here they become rows, and rows become prompts.

    {"prompt": "The sky is", "choices": ["blue", "loud"], "answer": 0}      scored by likelihood
    {"question": "What is 6 times 7?", "answer": ["42", "forty-two"]}       scored by generation

A `prompt` is used as it stands; a `question` becomes "Question: …⏎Answer:". The answer of a row with choices is the
index of the right one, from 0, or its text. Other keys are not read. All rows of a file are of one kind.

An answer follows its prompt after one space, unless either brings white space of its own. Examples of a few-shot
prompt are question and answer in the same way, each followed by an empty line.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llmlab.core.errors import UserError, nearest
from llmlab.data.tokenizer import refuse_surrogates

SHOT_ORDER_SEED = 0


@dataclass(frozen=True)
class Row:
    """One question. `choices` is empty where the answer is generated; `answers` are the accepted texts."""

    line: int
    prompt: str
    choices: tuple[str, ...]
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Task:
    """The rows of one file, in its order."""

    path: Path
    rows: tuple[Row, ...]

    @property
    def name(self) -> str:
        """The file's name, without its ending."""
        return self.path.stem

    @property
    def kind(self) -> Literal["choices", "generation"]:
        """How its rows are scored."""
        return "choices" if self.rows[0].choices else "generation"


def read_task(path: str | Path) -> Task:
    """The task in a file.

    Raises:
      UserError: no such file, no row in it, or a bad row, named as file:line.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(f"there is no task file {path}: give a JSON lines file with a prompt and an answer a line")
    rows: list[Row] = []
    for number, line in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if line.strip():
            where = f"{path}:{number}"
            row = _row(number, _fields(line, where), where)
            if rows and bool(row.choices) != bool(rows[0].choices):
                has, first = ("has", "has none") if row.choices else ("has no", "has them")
                raise UserError(
                    f"{where} {has} choices, but line {rows[0].line} {first}: put the two kinds of rows in files apart"
                )
            rows.append(row)
    if not rows:
        raise UserError(f"{path} holds no rows: write one JSON object a line, with a prompt and an answer")
    return Task(path, tuple(rows))


def contexts(task: Task, shots: int, source: Task | None = None) -> list[str]:
    """What the model sees of each row before it answers: `shots` solved examples, then the prompt.

    Examples come from the rows of `source` (the task itself by default) in one shuffled order that is always the same.
    A row is never its own example, nor is another row with its prompt.

    Raises:
      UserError: there are not that many examples for some row.
    """
    pool = list((source or task).rows)
    random.Random(SHOT_ORDER_SEED).shuffle(pool)
    # From its own file each row takes those that follow it, so that no example is used more than the others.
    begins = {row.line: place + 1 for place, row in enumerate(pool)} if source is None else {}
    return [_context(row, _examples(row, pool, begins.get(row.line, 0), shots, task, source)) for row in task.rows]


def continuation(prompt: str, answer: str) -> str:
    """`answer` as it stands after `prompt`: after one space, unless either brings white space of its own."""
    return answer if not prompt or prompt[-1].isspace() or answer[0].isspace() else f" {answer}"


def _context(row: Row, examples: Sequence[Row]) -> str:
    solved = [f"{shot.prompt}{continuation(shot.prompt, shot.answers[0])}\n\n" for shot in examples]
    return "".join(solved) + row.prompt


def _examples(row: Row, pool: Sequence[Row], begin: int, shots: int, task: Task, source: Task | None) -> list[Row]:
    found: list[Row] = []
    for step in range(len(pool)):
        if len(found) == shots:
            break
        candidate = pool[(begin + step) % len(pool)]
        if candidate.prompt != row.prompt:
            found.append(candidate)
    if len(found) < shots:
        raise UserError(
            f"{task.path}:{row.line} cannot have {shots} examples: {(source or task).path} has {len(found)} rows with "
            f"another prompt; lower few_shot or give a larger few_shot_file"
        )
    return found


def _fields(line: bytes, where: str) -> dict[str, Any]:
    try:
        fields = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8: byte {line[error.start]:#04x} at {error.start}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON: {error.msg} at column {error.colno}; write one object a line") from None
    if not isinstance(fields, dict):
        raise UserError(f'{where} is not a JSON object: write {{"prompt": …, "answer": …}}')
    return fields


def _row(number: int, fields: dict[str, Any], where: str) -> Row:
    given = [key for key in ("prompt", "question") if key in fields]
    if len(given) != 1:
        problem = "both prompt and question: keep one" if given else f"no prompt: {_instead('prompt', fields)}"
        raise UserError(f"{where} has {problem}")
    prompt = _text(fields[given[0]], f"{where}: {given[0]}", empty=True)
    if given[0] == "question":
        prompt = f"Question: {prompt}\nAnswer:"
    if "answer" not in fields:
        raise UserError(f"{where} has no answer: {_instead('answer', fields)}")
    if "choices" not in fields:
        return Row(number, prompt, (), _accepted(fields["answer"], where))
    choices = fields["choices"]
    if not isinstance(choices, list) or len(choices) < 2:
        raise UserError(f"{where}: choices={choices!r} should be a list of at least two texts")
    texts = tuple(_text(choice, f"{where}: choices[{i}]") for i, choice in enumerate(choices))
    return Row(number, prompt, texts, (_right(fields["answer"], texts, where),))


def _right(answer: Any, choices: tuple[str, ...], where: str) -> str:
    if isinstance(answer, int) and not isinstance(answer, bool):
        if not 0 <= answer < len(choices):
            raise UserError(f"{where}: answer={answer} should be from 0 to {len(choices) - 1}, the index of a choice")
        return choices[answer]
    if answer not in choices:
        raise UserError(f"{where}: answer={answer!r} is neither an index nor a choice: {nearest(str(answer), choices)}")
    return answer


def _accepted(answer: Any, where: str) -> tuple[str, ...]:
    if isinstance(answer, list):
        if not answer:
            raise UserError(f"{where}: answer=[] accepts nothing: name at least one text")
        return tuple(_text(text, f"{where}: answer[{i}]") for i, text in enumerate(answer))
    return (_text(answer, f"{where}: answer"),)


def _text(value: Any, where: str, *, empty: bool = False) -> str:
    if not isinstance(value, str) or not (value.strip() or empty):
        raise UserError(f"{where}={value!r} should be text" + ("" if empty else ", and not blank"))
    try:
        refuse_surrogates(value)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return value


def _instead(key: str, fields: dict[str, Any]) -> str:
    return f"its keys are {', '.join(map(repr, fields))}" if fields else f"the object is empty; give it {key!r}"
