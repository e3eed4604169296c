"""What `llmlab rank` does: a person orders a model's answers, or mends drafts, and each becomes a row at once."""

import dataclasses
import json
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, TypeVar

from llmlab.core.errors import UserError
from llmlab.data.chat import ChatTemplate, Conversation, Message, template_for
from llmlab.data.rows import BadRowError, examples
from llmlab.infer.chat import NO_TOOLS, Reply, Tools, replies, split
from llmlab.infer.kept import Row, append_rows, as_turns, read_rows
from llmlab.infer.terminal import Terminal
from llmlab.workdir.open import Opened

Pairs = Literal["none", "best", "adjacent"]
Item = TypeVar("Item")
Made = TypeVar("Made")
DRAWS = 3  # times that a model is asked for answers that differ


@dataclasses.dataclass(frozen=True)
class RankConfig:
    """What is asked, and what is kept.

    prompts: a file of prompts, JSON lines or a text with one a line. out: the file of rows, which goes on where it
    ends. answers: to each prompt. pairs: keep pairs and not the whole order: the best with each other, or each with the
    next. drafts: keep one answer to each prompt, as it is or edited.
    """

    prompts: str
    out: str
    answers: int = 4
    pairs: Pairs = "none"
    drafts: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.answers <= 9:
            raise UserError(f"--answers={self.answers} should be from 2 to 9")
        if self.drafts and self.pairs != "none":
            raise UserError(f"--pairs={self.pairs} is for orders, and --drafts asks for none: leave one of them out")


def rank_command(
    opened: Opened,
    terminal: Terminal,
    config: RankConfig,
    *,
    tools: Tools = NO_TOOLS,
    max_tokens: int,
    seed: int = 0,
    **sampling: Any,
) -> int:
    """Asks about every prompt that `config.out` has no row of, and returns how many rows it added.

    Tools run for drafts only: what is ordered is the next turn. A turn has at most half of the model's positions.

    Raises:
      UserError: a setting or file that cannot work, or a tokenizer without a chat template.
    """
    template = template_for(opened.tokenizer)
    if not config.drafts and not sampling.get("temperature"):
        raise UserError("--temperature=0 always gives the same answer: choose one above 0, such as 0.8")
    prompts = list(dict.fromkeys(read_prompts(config.prompts)))
    done = {_key(_asked(row)) for row in read_rows(config.out)}
    append_rows(config.out, [])  # what cannot be written to is refused before anybody has thought about anything
    left = [prompt for prompt in prompts if _key(as_turns(prompt)) not in done]
    if len(left) < len(prompts):
        terminal.aside(f"{len(prompts) - len(left)} of {len(prompts)} prompts are done: on with the rest")
    ask = _draft if config.drafts else _order
    added = 0

    settings = {"tools": tools if config.drafts else NO_TOOLS, **sampling}
    settings["max_tokens"] = min(max_tokens, max(1, opened.model.config.max_positions // 2))

    def answered(prompt: Conversation) -> list[Reply]:
        return _answers(opened, template, prompt, config, seed, settings)

    try:
        for number, (prompt, answers) in enumerate(_one_ahead(answered, left), start=1):
            terminal.line(f"--- {number} of {len(left)} ---", bold=True)
            for message in prompt:
                terminal.line(f"{message.role}: {message.content}", dim=message.role == "system")
            rows = ask(prompt, answers, terminal, config)
            append_rows(config.out, rows)
            added += len(rows)
    except (EOFError, KeyboardInterrupt):
        terminal.line()
    terminal.aside(f"{added} rows added to {config.out}")
    return added


def read_prompts(path: str) -> list[Conversation]:
    """The prompts in a file, each ending with a turn of the user.

    A row of JSON lines is one that `data.rows=chat` reads, with or without its last answer.

    Raises:
      UserError: no such file, nothing in it, or a row that holds no prompt.
    """
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts={path} cannot be read: {error}") from None
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not lines:
        raise UserError(f"--prompts={path} is empty: give it a prompt a line")
    if Path(path).suffix != ".jsonl":
        return [(Message("user", line.strip()),) for _, line in lines]
    return [_prompt_in(line, f"{path}, line {number}") for number, line in lines]


def ranking_rows(prompt: Conversation, ordered: Sequence[Sequence[Message]], pairs: Pairs) -> list[Row]:
    """The rows that keep these answers, best first, to a prompt."""
    turns, answers = as_turns(prompt), [as_turns(answer) for answer in ordered]
    if pairs == "none":
        return [{"prompt": turns, "responses": answers}]
    better = [answers[0]] * (len(answers) - 1) if pairs == "best" else answers[:-1]
    return [{"prompt": turns, "chosen": a, "rejected": b} for a, b in zip(better, answers[1:], strict=True)]


def order_of(line: str, count: int) -> list[int] | None:
    """The places that `2 1 3` names, from 0; None where it does not name each of `count` once."""
    parts = list(line) if line.isdecimal() else re.split(r"[\s,>]+", line.strip())
    if not all(part.isdecimal() for part in parts):
        return None
    order = [int(part) - 1 for part in parts]
    return order if sorted(order) == list(range(count)) else None


def _order(prompt: Conversation, said: list[Reply], terminal: Terminal, config: RankConfig) -> list[Row]:
    """The rows of the order that the person gives; none where it is skipped."""
    answers = [reply.messages for reply in said]
    if len(answers) < 2:
        terminal.line("skipped: the model always answers the same, or nothing", dim=True)
        return []
    for number, answer in enumerate(answers, start=1):
        _show(answer, terminal, f"[{number}] ")
    while True:
        line = terminal.ask("best first (2 1 3 …), e N edits N into another, s skips, q leaves: ").strip()
        if line == "q":
            raise EOFError
        if line == "s":
            return []
        if (edit := re.fullmatch(r"e\s*(\d+)", line)) and 0 < int(edit[1]) <= len(answers):
            answer = _edited(answers[int(edit[1]) - 1], terminal)
            if not answer[-1].content.strip() or answer in answers:
                terminal.line("an answer that is empty or there already is not added", dim=True)
                continue
            answers.append(answer)
            _show(answer, terminal, f"[{len(answers)}] ")
        elif (order := order_of(line, len(answers))) is not None:
            return ranking_rows(prompt, [answers[place] for place in order], config.pairs)
        else:
            terminal.line(f"each number from 1 to {len(answers)} once, the best first; no ties", dim=True)


def _draft(prompt: Conversation, said: list[Reply], terminal: Terminal, config: RankConfig) -> list[Row]:
    """The row of the answer that the person keeps; none where it is skipped. Others are shown on demand."""
    place = 0
    while True:
        answer = said[place].messages if said else (Message("assistant"),)
        _show(answer, terminal, "")
        line = terminal.ask("k keeps, e edits and keeps, r shows another, s skips, q leaves: ").strip()
        if line == "q":
            raise EOFError
        if line == "s":
            return []
        if line == "r":
            place = (place + 1) % max(1, len(said))
        elif line in ("k", "e"):
            answer = _edited(answer, terminal) if line == "e" else answer
            if answer[-1].content.strip():
                return [{"messages": as_turns((*prompt, *answer))}]
            terminal.line("an empty answer is not kept", dim=True)


def _answers(
    opened: Opened,
    template: ChatTemplate,
    prompt: Conversation,
    config: RankConfig,
    seed: int,
    settings: dict[str, Any],
) -> list[Reply]:
    """Answers that differ, none empty or cut at `max_tokens`, in any order; fewer where there are no more."""
    found: dict[tuple[Message, ...], Reply] = {}
    for draw in range(1 if config.drafts else DRAWS):
        seeds = range(seed + draw * config.answers, seed + (draw + 1) * config.answers)
        prompts = [prompt] * config.answers
        for reply in replies(opened.model, opened.params, template, prompts, seeds=seeds, **settings):
            # One that was cut would teach to stop in the middle of a sentence.
            if reply.ended and (reply.messages[-1].content.strip() or reply.messages[-1].calls):
                found.setdefault(reply.messages, reply)
        if len(found) >= config.answers:
            break
    answers = list(found.values())[: config.answers]
    random.Random(seed).shuffle(answers)
    return answers


def _one_ahead(make: Callable[[Item], Made], items: Iterable[Item]) -> Iterator[tuple[Item, Made]]:
    """Each with what `make` makes of it, the next one made while this one is looked at."""
    with ThreadPoolExecutor(1) as pool:
        before = None
        for item in items:
            made = pool.submit(make, item)
            if before is not None:
                yield before[0], before[1].result()
            before = item, made
        if before is not None:
            yield before[0], before[1].result()


def _show(answer: Sequence[Message], terminal: Terminal, label: str) -> None:
    terminal.line(label.rstrip(), bold=True)
    for message in answer:
        if message.thinking:
            terminal.say("thinking", message.thinking)
        if message.content:
            terminal.say("result" if message.role == "tool" else "text", message.content)
        for call in message.calls:
            terminal.say("call", f"{call.name} {call.arguments}")
    terminal.end_line()


def _edited(answer: Sequence[Message], terminal: Terminal) -> tuple[Message, ...]:
    """With another text in its last turn, in place of its calls too."""
    return (*answer[:-1], answer[-1]._replace(content=terminal.edited(answer[-1].content).strip(), calls=()))


def _key(turns: Any) -> str:
    return json.dumps(turns, sort_keys=True)


def _asked(row: Row) -> Any:
    """The turns that a row asks with: its prompt, or its messages up to the last of the user."""
    turns = row.get("prompt", row.get("messages"))
    if not isinstance(turns, list):
        return turns
    users = [place for place, turn in enumerate(turns) if isinstance(turn, dict) and turn.get("role") == "user"]
    return turns[: users[-1] + 1] if users else []


def _prompt_in(line: str, where: str) -> Conversation:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict):
        raise UserError(f"{where} is not a JSON object: mend or delete that line")
    for name in ("messages", "conversations"):
        if isinstance(row.get(name), list):
            row[name] = [*row[name], {"role": "assistant", "content": _ANY}]
    try:
        (example,) = examples(row | dict.fromkeys(("completion", "output", "answer"), _ANY), "chat")
    except BadRowError as error:
        raise UserError(f"{where} holds no prompt: {error}") from None
    prompt, _ = split(example.responses[0].conversation)
    return tuple(message._replace(train=True) for message in prompt)


_ANY = "-"  # stands for the answer that a row of prompts does not have
