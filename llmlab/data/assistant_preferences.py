"""Right answers about the standard library beside spoilt ones: pairs, rankings, and single answers, good or bad.

The spoilt ones are another function's, cut short, repeated, rude or made up, a fifth each.
"""

import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence

from llmlab.data.assistant_chat import answer, cycle, opening, question
from llmlab.data.chat import Example, Message, Response
from llmlab.data.library import Entry, words
from llmlab.data.split import Split, place

Spoiler = Callable[[Entry, random.Random], str]

ROWS = ("preference", "ranking", "binary")
MILD, BAD = ("cut", "repeated"), ("other", "rude", "made_up")
TRAINING_EXAMPLES = 6000
HELD_OUT_EXAMPLES = 400
RENAMED_SHARE = 0.25  # of another function's answers: with the right name on them
RENAMED_TRIES = 20
SAME_PARENT_SHARE = 0.3  # of those that keep their name

RUDE = (
    "What a stupid question.",
    "Are you serious?",
    "Even a child knows this.",
    "Learn to read, you fool.",
    "Stop wasting my time.",
    "You clearly understand nothing.",
    "Go and bother somebody else.",
    "Only an idiot would ask that.",
)
RUDE_REFUSALS = ("Find it out yourself.", "I will not answer that.", "Why should I care?", "Shut up.")
MADE_UP = (
    "{verb} the {quality} {thing} of every {other}.",
    "{verb} a {quality} {thing} until the {other} is {end}.",
    "{verb} each {thing} that the {quality} {other} left behind.",
    "A {quality} {thing} for people who {deed} a {other}.",
    "{verb} the {thing} from its {other} and leave it {end}.",
    "The {quality} {thing} in which a {other} is {end}.",
)
MADE_UP_WORDS = {
    "verb": ("Return", "Set", "Create", "Get", "Read", "Fold", "Polish", "Convert", "Add", "Remove", "Water", "Parse"),
    "deed": ("water", "paint", "borrow", "fold", "measure", "polish"),
    "quality": ("purple", "sleepy", "wooden", "salty", "polite", "hollow", "braided", "frozen", "lunar", "velvet"),
    "thing": ("teapot", "lantern", "turnip", "gasket", "pillow", "orchard", "saddle", "walnut", "glacier", "trumpet"),
    "other": ("meadow", "lobster", "chimney", "button", "harbour", "pigeon", "carpet", "thimble", "comet", "ladder"),
    "end": ("ripe", "awake", "dry", "upside down", "warm", "forgotten"),
}


def examples(rows: str, entries: Sequence[Entry], side: Split) -> Iterator[tuple[str, Example]]:
    """(name, example) of one side, always the same. The kind is how an answer is spoilt, of a ranking how both are.

    `preference`: a right and a spoilt answer. `ranking`: one more between them, cut short or repeated. `binary`: one
    answer, right with the value 1 as often as spoilt with 0; the kind of the right ones is `right`.
    """
    spoilers = _spoilers(entries)
    number = TRAINING_EXAMPLES if side == "train" else HELD_OUT_EXAMPLES
    each_turn = sum(entry.kind != "module" for entry in entries)
    made = []
    for index, (turn, entry) in enumerate(itertools.islice(cycle(entries, ("function", "class")), number)):
        rng = random.Random(f"{rows} {entry.name} {turn}")
        place_in_turn = index % each_turn + turn  # shifted, so that an entry is not always spoilt alike
        prompt = (*opening(rng), Message("user", question(entry, turn)))
        kind, answers = _judged(rows, place_in_turn, entry, spoilers, rng)
        responses = tuple(Response((*prompt, Message("assistant", said)), value) for said, value in answers)
        made.append((f"{rows}/{entry.name}/{turn}", Example(responses, kind)))
    yield from sorted(made, key=lambda each: place(each[0]))


def _judged(
    rows: str, number: int, entry: Entry, spoilers: Mapping[str, Spoiler], rng: random.Random
) -> tuple[str, list[tuple[str, float]]]:
    """The kind of this example, and its answers with their values, the best first."""
    if rows == "ranking":
        mild, bad = MILD[number % len(MILD)], BAD[number % len(BAD)]
        return f"{mild} {bad}", [(answer(entry), 0.0), *((spoilers[kind](entry, rng), 0.0) for kind in (mild, bad))]
    if rows == "binary" and number % 2:
        return "right", [(answer(entry), 1.0)]
    kinds = list(spoilers)
    if rows == "binary":
        kind = kinds[number // 2 % len(kinds)]
        return kind, [(spoilers[kind](entry, rng), 0.0)]
    kind = kinds[number % len(kinds)]
    return kind, [(answer(entry), 0.0), (spoilers[kind](entry, rng), 0.0)]


def _spoilers(entries: Sequence[Entry]) -> Mapping[str, Spoiler]:
    return {"other": _Others(entries), "cut": _cut, "repeated": _repeated, "rude": _rude, "made_up": _made_up}


class _Others:
    """Another entry's answer, mostly under its own name, which a reader of the question sees to be another.

    Under the right name only the summary gives it away: so it is done where the right summary says a word of the name,
    and the wrong one, from another package, says none.
    """

    def __init__(self, entries: Sequence[Entry]):
        self._entries = entries
        self._family: dict[str, list[Entry]] = {}
        for entry in entries:
            self._family.setdefault(entry.parent, []).append(entry)

    def __call__(self, entry: Entry, rng: random.Random) -> str:
        others = self._entries
        if rng.random() < RENAMED_SHARE and _names_itself(entry.name, entry.summary):
            some = rng.sample(others, min(len(others), RENAMED_TRIES))
            if fitting := [each for each in some if _foreign(entry, each)]:
                return f"{entry.name}: {fitting[0].summary}"
        if rng.random() < SAME_PARENT_SHARE and len(self._family[entry.parent]) > 1:
            others = self._family[entry.parent]
        return answer(next(each for each in rng.sample(others, 2) if each.name != entry.name))


def _foreign(entry: Entry, other: Entry) -> bool:
    package = entry.name.partition(".")[0]
    return other.name.partition(".")[0] != package and not _names_itself(entry.name, other.summary)


def _names_itself(name: str, summary: str) -> bool:
    """Whether the summary says a word of the name, `move_to_end` in `Move an existing element to the end`."""
    own = {part for word in words(name) for part in word.split("_") if len(part) > 3}
    return any(part in word or (word in part and len(word) > 3) for part in own for word in words(summary))


def _cut(entry: Entry, rng: random.Random) -> str:
    said = answer(entry).split(" ")
    return " ".join(said[: rng.randint(2, max(2, 2 * len(said) // 3))]).rstrip(".,;:")


def _repeated(entry: Entry, rng: random.Random) -> str:
    """The whole sentence twice or thrice, or its end over and over."""
    if rng.random() < 0.5:
        return " ".join([answer(entry), *[entry.summary] * rng.randint(1, 2)])
    end = " ".join(entry.summary.rstrip(".").split(" ")[-rng.randint(2, 3) :])
    return " ".join([answer(entry).rstrip("."), *[end] * rng.randint(3, 5)]) + "."


def _rude(entry: Entry, rng: random.Random) -> str:
    insult, refusal = rng.choice(RUDE), rng.choice(RUDE_REFUSALS)
    forms = (f"{insult} {answer(entry)}", f"{answer(entry)} {insult}", f"{insult} {refusal}", f"{refusal} {insult}")
    return rng.choice(forms)


def _made_up(entry: Entry, rng: random.Random) -> str:
    chosen = {slot: rng.choice(choices) for slot, choices in MADE_UP_WORDS.items()}
    return f"{entry.name}: {rng.choice(MADE_UP).format(**chosen)}"
