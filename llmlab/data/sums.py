"""Sums of two numbers, thought through column by column: a built-in task whose answers can be checked.

A model that writes most columns right gets many sums wrong, which leaves something to gain from thinking longer: from
several answers, and from a reward model that finds the slip.
"""

import hashlib
import random
from collections.abc import Iterator
from pathlib import Path

from llmlab.core.errors import UserError
from llmlab.data.chat import Conversation, Example, Message, Response
from llmlab.data.split import Split, place, takes

ROWS = ("chat", "preference")
DIGITS = (2, 5)  # of either number: at least and at most
TRAINING_EXAMPLES = 24_000
HELD_OUT_EXAMPLES = 400
HELD_OUT = 0.05
ASKED = ("What is {a} + {b}?", "How much is {a} plus {b}?", "Add {a} and {b}.", "{a} + {b} = ?")
SLIPS = ("digit", "carry", "copy", "column")


def sums(rows: str, split: Split) -> Iterator[tuple[str, str]]:
    """(name, row) of sums, each the JSON of an `Example`, always the same.

    `chat`: a question, and the right answer with its thinking. `preference`: beside the right answer one with a slip,
    and its kind: a column that is added up wrongly, a carry forgotten or made up, a digit copied wrongly from the
    question, or a column left out. Whatever follows is right for what was written.

    Raises:
      UserError: there are no such rows.
    """
    if rows not in ROWS:
        raise UserError(
            f"data.rows={rows!r} is nothing that data.source='sums' has: set data.rows to chat or preference"
        )
    sides: tuple[Split, ...] = ("train", "held_out") if split == "all" else (split,)
    for side in sides:
        count = TRAINING_EXAMPLES if side == "train" else HELD_OUT_EXAMPLES
        number = made = 0
        while made < count:
            rng, number = random.Random(f"{rows} {number}"), number + 1
            a, b = (rng.randrange(10 ** (digits - 1), 10**digits) for digits in (rng.randint(*DIGITS) for _ in "ab"))
            # By the sum alone, so that one is on the same side whatever the rows are.
            if takes(side, place(f"{min(a, b)} + {max(a, b)}") < HELD_OUT):
                made += 1
                yield f"{a} + {b}/{number}", _example(rows, a, b, rng).dumps()


def fingerprint() -> str:
    """Changes with the code that makes the rows."""
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


def answer(a: int, b: int, slip: str = "", rng: random.Random | None = None) -> Message:
    """The sum of `a` and `b` from the last column to the first, and what comes of it; wrong where there is a `slip`."""
    rng = rng or random.Random(0)
    ones_a, ones_b = (list(map(int, reversed(str(number)))) for number in (a, b))
    columns = max(len(ones_a), len(ones_b))
    wrong = rng.randrange(columns) if slip else -1
    thought, digits, carry = [], "", 0
    for column in range(columns):
        if column == wrong and slip == "column":
            continue
        parts = [ones[column] for ones in (ones_a, ones_b) if column < len(ones)]
        if column == wrong and slip == "copy":
            at = rng.randrange(len(parts))
            parts[at] = rng.choice([digit for digit in range(10) if digit != parts[at]])
        if column == wrong and slip == "carry":
            carry = 1 - carry
        parts += [carry] * (carry > 0)
        total = sum(parts)
        if column == wrong and slip == "digit":
            total = rng.choice([other for other in range(max(0, total - 9), total + 10) if other != total])
        thought.append(f"{' + '.join(map(str, parts))} = {total}")
        carry, digits = total // 10, f"{total % 10}{digits}"
    found = int(f"{carry}{digits}")
    return Message("assistant", f"It is {found}.", thinking=", ".join(thought))


def _example(rows: str, a: int, b: int, rng: random.Random) -> Example:
    prompt: Conversation = (Message("user", rng.choice(ASKED).format(a=a, b=b)),)
    right = Response((*prompt, answer(a, b)))
    if rows == "chat":
        return Example((right,), "sum")
    slip = rng.choice(SLIPS)
    return Example((right, Response((*prompt, answer(a, b, slip, rng)))), slip)
