"""Verbs in which a model writes: sample, chat, rank."""

import sys
from typing import TYPE_CHECKING

from absl import flags as f
from absl.flags import FlagValues

from llmlab.core.errors import UserError, nearest
from llmlab.core.flags import define_workdir, none_left, required
from llmlab.verbs.common import CHAT_TEMPERATURE, Verb, define_sampling, sampling, start_jax, tools
from llmlab.verbs.indexing import finder

if TYPE_CHECKING:
    from llmlab.data.tokenizer import Tokenizer
    from llmlab.infer.tools import FunctionTool


def _define_sample(flags: FlagValues, argv: list[str]) -> None:
    define_workdir(flags, "The run to sample from.")
    f.DEFINE_string("prompt", "", "The text to go on from.", flag_values=flags)
    define_sampling(flags, max_tokens=128, temperature=0.8)


def _sample(flags: FlagValues, rest: list[str]) -> None:
    none_left(rest)
    start_jax()
    import llmlab
    from llmlab.infer.stream import sample_command

    sample_command(
        llmlab.open(required(flags, "workdir")),
        flags.prompt,
        out=sys.stdout,
        **sampling(flags),
    )


def _define_chat(flags: FlagValues, argv: list[str]) -> None:
    define_workdir(flags, "The run to talk with.")
    f.DEFINE_string("system", "", "What the conversation begins with.", flag_values=flags)
    define_sampling(flags, max_tokens=256, temperature=CHAT_TEMPERATURE)
    f.DEFINE_list(
        "tools", "calculator,lookup", "What the model may call; also python, FILE.py:NAME.", flag_values=flags
    )
    f.DEFINE_list("allow", "calculator,lookup", "Of these, what runs unasked; the rest asks.", flag_values=flags)
    f.DEFINE_integer("max_calls", 4, "The most calls of tools for one answer.", flag_values=flags)
    f.DEFINE_string("index", "", "What `llmlab index` made: its passages come with every question.", flag_values=flags)
    f.DEFINE_integer("passages", 3, "How many of them, at most.", flag_values=flags)


def _chat(flags: FlagValues, rest: list[str]) -> None:
    none_left(rest)
    from llmlab.infer.tools import HARMLESS, named

    workdir, called = required(flags, "workdir"), named(flags.tools)
    for name in flags.allow:
        if name not in called and name not in HARMLESS:
            raise UserError(f"--allow: there is no {name!r} among --tools: {nearest(name, called)}")
    start_jax()
    import llmlab
    from llmlab.infer.talk import chat_command
    from llmlab.infer.terminal import Terminal

    opened = llmlab.open(workdir)
    if not flags["tools"].present and not _may_be_told(opened.tokenizer, called):
        called = {}  # nobody asked for them
    find = finder(opened, flags.index, flags.passages) if flags.index else None
    settings = {"system": flags.system, "tools": called, "allowed": flags.allow, "max_calls": flags.max_calls}
    chat_command(opened, Terminal(), find=find, **settings, **sampling(flags))


def _may_be_told(tokenizer: "Tokenizer", tools: dict[str, "FunctionTool"]) -> bool:
    """Whether the model that this tokenizer is of has a way to be told of tools."""
    from llmlab.data.chat import template_for
    from llmlab.infer.tools import told

    try:
        told(template_for(tokenizer), tools)
    except UserError:
        return False
    return True


def _define_rank(flags: FlagValues, argv: list[str]) -> None:
    define_workdir(flags, "The run whose answers to order.")
    f.DEFINE_string("prompts", "", "Prompts: JSON lines, or a text with one a line.", flag_values=flags)
    f.DEFINE_string("out", "", "The JSON lines file to append to; goes on after the prompts in it.", flag_values=flags)
    f.DEFINE_integer("answers", 4, "To each prompt, from 2 to 9.", flag_values=flags)
    choices = ["none", "best", "adjacent"]
    f.DEFINE_enum("pairs", "none", choices, "Keep pairs: the best with each, or each with the next.", flag_values=flags)
    f.DEFINE_bool("drafts", False, "Keep or edit one answer to each prompt instead.", flag_values=flags)
    define_sampling(flags, max_tokens=256, temperature=0.8)


def _rank(flags: FlagValues, rest: list[str]) -> None:
    none_left(rest)
    from llmlab.infer.rank import RankConfig, rank_command
    from llmlab.infer.terminal import Terminal

    files = {name: required(flags, name) for name in ("prompts", "out")}
    config = RankConfig(**files, answers=flags.answers, pairs=flags.pairs, drafts=flags.drafts)
    start_jax()
    import llmlab

    opened = llmlab.open(required(flags, "workdir"))
    rank_command(opened, Terminal(), config, tools=tools(), **sampling(flags))


VERBS = {
    "sample": Verb(
        "let a trained model go on from a prompt",
        "--workdir=DIR --prompt=TEXT",
        "Example:  llmlab sample --workdir=runs/quickstart --prompt='def' --temperature=0.8",
        _define_sample,
        _sample,
    ),
    "chat": Verb(
        "talk with a trained model",
        "--workdir=DIR [--system=TEXT] [--tools=calculator,python] [--allow=calculator] [--index=DIR]",
        "Streams, keeps what was said, and runs the tools that the model calls: those of --allow unasked, the others\n"
        "if you say yes to the call. --tools=python runs its code shut in; FILE.py:NAME is a function of yours, which\n"
        "runs with your rights; --tools= gives none. /help says what else there is.\n"
        "Where standard input is no terminal, each of its lines is a question, and only what --allow names is run:\n"
        "\n"
        "  echo 'What is 12 + 30?' | llmlab chat --workdir=runs/sft --temperature=0",
        _define_chat,
        _chat,
    ),
    "rank": Verb(
        "order a model's answers, or mend drafts, for training",
        "--workdir=DIR --prompts=FILE --out=FILE.jsonl [--pairs=best|--drafts]",
        "Appends a row for each prompt at once: orders, which data.rows=ranking reads; with --pairs pairs, which\n"
        "data.rows=preference reads; with --drafts conversations, which data.rows=chat reads. A prompt file is a text\n"
        'with one a line, or rows {"prompt": …}. The same command goes on after the prompts that are done.',
        _define_rank,
        _rank,
    ),
}
