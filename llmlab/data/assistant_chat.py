"""Conversations about the standard library: questions, follow-ups, sums by the calculator, passages looked up.

Every answer has one form, `name: summary`, so that a model of a few million parameters learns it in minutes.
"""

import itertools
import random
from collections.abc import Iterator, Sequence

from llmlab.data.chat import Conversation, Example, Message, Response, ToolCall
from llmlab.data.library import Entry
from llmlab.data.split import Split, place, takes
from llmlab.data.tools import TOOLS

SHARES = {"function": 0.33, "module_or_multi_turn": 0.09, "sum": 0.34, "lookup": 0.24}
QUESTIONS_EACH = 2  # in training; they set the size of all the rest
HELD_OUT_CONVERSATIONS = 500
HELD_OUT_MODULES = 20
HELD_OUT_SUMS = 0.05
SMALL_TALK_EACH = 4
SYSTEM_SHARE = 0.1
NOTHING_SHARE = 0.05
LONGEST_ARGUMENTS = 60

QUESTIONS = {
    "function": (
        "What does {name} do?",
        "What is {name}?",
        "What is {name} for?",
        "Explain {name}.",
        "Describe {name}.",
        "Tell me about {name}.",
        "What does `{name}` do?",
        "Can you explain `{name}`?",
        "Explain what {name} does.",
        "I found {name} in some code. What does it do?",
        "In one sentence, what is {name}?",
        "What would I use {name} for?",
        "what does {name} do",
        "{name}?",
        "What does {short} in {parent} do?",
        "What is {short} in {parent}?",
        "In {parent}, what does {short} do?",
        "Explain {short} in {parent}.",
    ),
    "module": (
        "What is the module {name} for?",
        "What does the module {name} do?",
        "What is in the {name} module?",
        "What is {name}?",
        "Tell me about the module {name}.",
        "Describe the `{name}` module.",
        "When would I import {name}?",
        "What can I do with {name}?",
    ),
}
QUESTIONS["class"] = QUESTIONS["function"]
AND = ("And {name}?", "What about {name}?", "and {name}?")
ASK_ARGUMENTS = ("What are its arguments?", "What does it take?", "Which arguments does it take?", "Its arguments?")
LOOK_UP = (
    "Look up {name}.",
    "Please look up {name}.",
    "Look {name} up in the documentation.",
    "What does the documentation say about {name}?",
    "What do the docs say about `{name}`?",
    "Find {name} in the documentation.",
    "Check the documentation of {name}.",
    "Look up {short} in {parent}.",
)
SUMS = (
    "What is {a} {op} {b}?",
    "How much is {a} {op} {b}?",
    "Compute {a} {op} {b}.",
    "Calculate {a} {op} {b}.",
    "Please work out {a} {op} {b}.",
    "{a} {op} {b}",
    "{a} {op} {b} = ?",
    "What is {a} {word} {b}?",
    "How much is {a} {word} {b}?",
    "What do I get for {a} {word} {b}?",
)
OPERATORS = {"+": "plus", "-": "minus", "*": "times"}
SYSTEM = (
    "You are a helpful assistant.",
    "You answer questions about Python's standard library.",
    "You know Python. You can calculate and look things up.",
    "Answer in one sentence.",
)
SMALL_TALK = {
    "Hello. Ask me about Python's standard library.": ("Hello", "Hello!", "Hi", "Hi there.", "Good morning.", "hey"),
    "You are welcome.": ("Thanks", "Thanks!", "Thank you.", "Thank you very much.", "thanks a lot"),
    "I am a small assistant that knows Python's standard library.": ("Who are you?", "What are you?", "who are you"),
    "I explain functions and modules, calculate, and look things up.": ("What can you do?", "Help", "help me"),
    "Goodbye.": ("Bye", "Goodbye.", "See you.", "bye"),
}
UNKNOWN = ("lantern", "walnut", "gravel", "pillow", "teapot", "meadow", "anchor", "velvet", "copper", "saddle")
UNKNOWN_DEEDS = ("untie", "polish", "borrow", "sweep", "whistle", "unfold", "season", "paddle", "knit", "rinse")

Named = tuple[str, Conversation]


def examples(entries: Sequence[Entry], side: Split) -> Iterator[tuple[str, Example]]:
    """(name, example) of every conversation of one side, the kinds mixed, always in the same order.

    The kinds are function, module, multi_turn, sum, lookup and, in training, small_talk.
    """
    makers: dict[str, Iterator[Named]] = {
        "function": _about(entries, ("function", "class")),
        "module": _about(entries, ("module",)),
        "multi_turn": _multi_turns(entries, side),
        "sum": _sums(side),
        "lookup": _lookups(entries),
        "small_talk": _small_talk(),
    }
    made = [
        (f"{kind}/{name}", Example((Response(conversation),), kind))
        for kind, number in _sizes(entries, side).items()
        for name, conversation in itertools.islice(makers[kind], number)
    ]
    yield from sorted(made, key=lambda each: place(each[0]))


def question(entry: Entry, number: int) -> str:
    """A question about it: the wording of this number, counted from one that depends on the name."""
    wordings = QUESTIONS[entry.kind]
    return _named(wordings[(int(place(entry.name) * len(wordings)) + 5 * number) % len(wordings)], entry)


def answer(entry: Entry) -> str:
    """The right one."""
    return f"{entry.name}: {entry.summary}"


def opening(rng: random.Random) -> Conversation:
    """A system turn, sometimes."""
    return (Message("system", rng.choice(SYSTEM)),) if rng.random() < SYSTEM_SHARE else ()


def cycle(entries: Sequence[Entry], kinds: Sequence[str]) -> Iterator[tuple[int, Entry]]:
    """The entries of these kinds in an order of their own, again and again, each with how often it came before."""
    chosen = sorted((entry for entry in entries if entry.kind in kinds), key=lambda entry: place(entry.name))
    for turn in itertools.count() if chosen else ():
        for entry in chosen:
            yield turn, entry


def _sizes(entries: Sequence[Entry], side: Split) -> dict[str, int]:
    modules = sum(entry.kind == "module" for entry in entries)
    if side == "train":
        total = round(QUESTIONS_EACH * (len(entries) - modules) / SHARES["function"])
        modules, small_talk = QUESTIONS_EACH * modules, SMALL_TALK_EACH * sum(map(len, SMALL_TALK.values()))
    else:
        total, modules, small_talk = HELD_OUT_CONVERSATIONS, min(modules, HELD_OUT_MODULES), 0
    sizes = {kind: round(share * total) for kind, share in SHARES.items()}
    multi_turn = max(sizes.pop("module_or_multi_turn") - modules, 0)
    return sizes | {"module": modules, "multi_turn": multi_turn, "small_talk": small_talk}


def _about(entries: Sequence[Entry], kinds: Sequence[str]) -> Iterator[Named]:
    for turn, entry in cycle(entries, kinds):
        name = f"{entry.name}/{turn}"
        yield name, (*opening(_random("about", name)), *_said(question(entry, turn), answer(entry)))


def _multi_turns(entries: Sequence[Entry], side: Split) -> Iterator[Named]:
    sums, lookups = _sums(side, "multi_turn"), _lookups(entries)
    siblings: dict[str, list[Entry]] = {}
    for entry in entries:
        siblings.setdefault(entry.parent, []).append(entry)
    for turn, entry in cycle(entries, ("function", "class", "module")):
        rng = _random("multi_turn", entry.name, turn)
        messages = [*opening(rng), *_said(question(entry, turn), answer(entry))]
        about: Entry | None = entry  # what a follow-up would be understood of
        for _ in range(rng.choice((1, 1, 2))):
            draw = rng.random()
            if about and _arguments_of(about) and draw < 0.4:
                messages += _said(rng.choice(ASK_ARGUMENTS), _arguments_of(about))
                about = None
            elif about and draw < 0.75:
                near = [each for each in siblings[about.parent] if each != about]
                about = rng.choice(near or entries)
                name = about.short if near and rng.random() < 0.5 else about.name
                messages += _said(rng.choice(AND).format(name=name), answer(about))
            elif draw < 0.5:
                about = rng.choice(entries)
                messages += _said(question(about, turn), answer(about))
            else:
                messages += next(sums if draw < 0.9 else lookups)[1]
                about = None
        yield f"{entry.name}/{turn}", tuple(messages)


def _sums(side: Split, purpose: str = "sum") -> Iterator[Named]:
    for number in itertools.count():
        rng = _random(purpose, number)
        a, b = (rng.randrange(10 ** rng.randint(1, 3)) for _ in "ab")
        op = rng.choice(list(OPERATORS))
        expression = f"{a} {op} {b}"
        if takes(side, place(expression) < HELD_OUT_SUMS):
            asked = rng.choice(SUMS).format(a=a, b=b, op=op, word=OPERATORS[op])
            yield f"{expression}/{number}", _called(asked, "calculator", expression, f"{expression} = {{}}.")


def _lookups(entries: Sequence[Entry]) -> Iterator[Named]:
    for turn, entry in cycle(entries, ("function", "class", "module")):
        rng = _random("lookup", entry.name, turn)
        if rng.random() < NOTHING_SHARE:
            name = f"{rng.choice(UNKNOWN)}.{rng.choice(UNKNOWN_DEEDS)}"
            asked = rng.choice(LOOK_UP[:-1]).format(name=name)
            yield f"{name}/{entry.name}/{turn}", _called(asked, "lookup", name, f"I found nothing about {name}.")
        else:
            asked = _named(rng.choice(LOOK_UP if entry.parent else LOOK_UP[:-1]), entry)
            yield f"{entry.name}/{turn}", _called(asked, "lookup", entry.name, "{}")


def _small_talk() -> Iterator[Named]:
    for turn in itertools.count():
        for said, greetings in SMALL_TALK.items():
            for greeting in greetings:
                name = f"{greeting}/{turn}"
                yield name, (*opening(_random(name)), *_said(greeting, said))


def _said(asked: str, said: str) -> Conversation:
    return Message("user", asked), Message("assistant", said)


def _called(asked: str, tool: str, arguments: str, said: str) -> Conversation:
    """A question, the call, what the tool gives, and the answer: `said` with the tool's words in it."""
    result = TOOLS[tool].run(arguments)
    return (
        Message("user", asked),
        Message("assistant", calls=(ToolCall(tool, arguments),)),
        Message("tool", result, name=tool),
        Message("assistant", said.replace("{}", result)),
    )


def _arguments_of(entry: Entry) -> str:
    """What it takes, as an answer; empty where that is unknown or long."""
    if entry.arguments is None or len(entry.arguments) > LONGEST_ARGUMENTS:
        return ""
    return f"{entry.name} takes {entry.arguments or 'no arguments'}."


def _named(wording: str, entry: Entry) -> str:
    return wording.format(name=entry.name, short=entry.short, parent=entry.parent)


def _random(*names: object) -> random.Random:
    return random.Random("/".join(map(str, names)))
