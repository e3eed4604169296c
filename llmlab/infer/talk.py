"""What `llmlab chat` does: asks for a line, lets the model answer as it comes, and keeps what was said."""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from llmlab.core.errors import LlmlabError, UserError, nearest
from llmlab.data.chat import ChatTemplate, Conversation, MarkerTemplate, Message, ToolCall, template_for
from llmlab.infer.chat import NO_TOOLS, Approve, Reply, Tools, fitted, reply
from llmlab.infer.kept import append_rows, as_turns
from llmlab.infer.retrieval import Found, asked_with, sources
from llmlab.infer.terminal import Terminal, interruptible
from llmlab.infer.tools import told
from llmlab.workdir.open import Opened

HELP = """\
/reset       begins a new conversation
/undo        takes the last question back, with what was answered
/save FILE   appends the conversation to FILE, as a row that data.rows=chat reads
/tools       what the model may call, and what of it runs unasked
/help        shows this
Ctrl-C stops an answer, Ctrl-D leaves. A line that begins with a space is never a command."""


def chat_command(
    opened: Opened,
    terminal: Terminal,
    *,
    system: str = "",
    tools: Tools = NO_TOOLS,
    allowed: Iterable[str] = (),
    find: Callable[[str], list[Found]] | None = None,
    max_tokens: int,
    seed: int = 0,
    **sampling: Any,
) -> None:
    """Talks until there are no more lines. Half of the model's positions at most are kept for an answer.

    The model is told of the tools that describe themselves. Those that are `allowed` run unasked. The others ask on a
    terminal before each call, and do not run elsewhere.
    find: gives the passages that are laid before a question, whose sources are then shown.

    Raises:
      UserError: the tokenizer has no chat template, or one that cannot tell of tools, or a setting is out of its range.
    """
    template = told(template_for(opened.tokenizer), tools)
    max_tokens = min(max_tokens, max(1, opened.model.config.max_positions // 2))
    start: Conversation = (Message("system", system),) if system else ()
    conversation, answers = start, 0
    allowed = set(allowed)
    commands = COMMANDS | {"/tools": functools.partial(_tools, tools, allowed)}
    if only_text(opened, template):
        terminal.aside("this model was last trained on plain text, not on conversations: expect no answers from it")
    if terminal.interactive:
        terminal.aside(f"step {opened.step:,}; /help says what else there is, Ctrl-D leaves")
    while True:
        try:
            line = terminal.ask("> ")
        except EOFError:
            if terminal.interactive:
                terminal.line()
            return
        except KeyboardInterrupt:
            if not terminal.interactive:
                raise
            terminal.line()
            continue
        if line.startswith("/"):
            conversation = _commanded(line, conversation, start, terminal, commands)
        elif line.strip():
            found = find(line) if find else []
            question = asked_with(found, line.strip())
            room = opened.model.config.max_positions - max_tokens
            while found and not fitted(template, (*start, question), room)[0]:
                found = found[:-1]
                question = asked_with(found, line.strip())
            asked = (*conversation, question)
            conversation = _answered(
                opened,
                template,
                asked,
                terminal,
                tools=tools,
                approve=functools.partial(_approved, terminal=terminal, allowed=allowed),
                max_tokens=max_tokens,
                seed=seed + answers,
                **sampling,
            )
            answers += 1
            if found and len(conversation) > len(asked):
                terminal.line(f"sources: {', '.join(sources(conversation[-1].content, found))}", dim=True)


def only_text(opened: Opened, template: ChatTemplate) -> bool:
    """Whether the last training was on plain text, and the template is our own: no conversation was ever seen."""
    rows = opened.config.get("data", {}).get("rows", "text")
    return rows == "text" and isinstance(template, MarkerTemplate)


def _answered(
    opened: Opened,
    template: ChatTemplate,
    asked: Conversation,
    terminal: Terminal,
    *,
    approve: Approve,
    max_tokens: int,
    **settings: Any,
) -> Conversation:
    """The conversation with what the model says to it, or without the question where that cannot be answered."""
    parts = opened.model, opened.params, template
    with interruptible() as stopped:
        try:
            said = reply(
                *parts,
                asked,
                max_tokens=max_tokens,
                on_text=terminal.say,
                stop=stopped,
                approve=lambda call: not stopped() and approve(call) and not stopped(),
                **settings,
            )
        except KeyboardInterrupt:
            terminal.say("note", "given up, and the question with it")
            return asked[:-1]
        except UserError as error:
            if not terminal.interactive:
                raise
            terminal.say("note", str(error))
            return asked[:-1]
        terminal.end_line()
        if stopped():
            terminal.say("note", "stopped")
        elif not said.ended:
            terminal.say("note", f"cut at max_tokens={max_tokens}")
    if speed := speed_text(said):
        terminal.aside(speed)
    if not said.messages or (said.ended and not stopped()):
        return (*asked, *said.messages)
    # Its end is not the model's: what is saved of it must not teach to stop there.
    return (*asked, *said.messages[:-1], said.messages[-1]._replace(train=False))


def speed_text(said: Reply) -> str:
    """How fast it wrote; empty where nothing can be said."""
    turns = sum(message.role == "assistant" for message in said.messages)
    if not said.seconds or said.tokens <= turns:
        return ""
    return f"{said.tokens} tokens, {(said.tokens - turns) / said.seconds:.1f} tokens/s"


def _approved(call: ToolCall, *, terminal: Terminal, allowed: set[str]) -> bool:
    """Whether the call may run; whoever says `always` is not asked again for that tool."""
    if call.name in allowed or not terminal.interactive:
        return call.name in allowed
    while True:
        try:
            said = terminal.ask(f"run {call.name}? [y]es, [n]o, [a]lways: ").strip().lower()
        except EOFError:
            return False
        if said and "always".startswith(said):
            allowed.add(call.name)
        if said and any(word.startswith(said) for word in ("yes", "always", "no")):
            return not "no".startswith(said)


def _commanded(
    line: str,
    conversation: Conversation,
    start: Conversation,
    terminal: Terminal,
    commands: Mapping[str, "Command"],
) -> Conversation:
    """The conversation after a line that begins with a slash."""
    name, _, argument = line.partition(" ")
    if name not in commands:
        terminal.line(f"there is no {name}: {nearest(name, commands)}", dim=True)
        return conversation
    return commands[name](conversation, start, argument.strip(), terminal)


def _tools(
    tools: Tools, allowed: set[str], conversation: Conversation, start: Conversation, argument: str, terminal: Terminal
) -> Conversation:
    for name, tool in tools.items():
        asked = "" if name in allowed else " (asks first)" if terminal.interactive else " (does not run: --allow it)"
        terminal.line(f"{name}{asked}: {getattr(tool, 'description', '')}", dim=True)
    if not tools:
        terminal.line("the model has no tools: --tools gives it some", dim=True)
    return conversation


def _help(conversation: Conversation, start: Conversation, argument: str, terminal: Terminal) -> Conversation:
    terminal.line(HELP, dim=True)
    return conversation


def _reset(conversation: Conversation, start: Conversation, argument: str, terminal: Terminal) -> Conversation:
    terminal.line("a new conversation", dim=True)
    return start


def _undo(conversation: Conversation, start: Conversation, argument: str, terminal: Terminal) -> Conversation:
    questions = [place for place, message in enumerate(conversation) if message.role == "user"]
    if not questions:
        terminal.line("there is no question to take back", dim=True)
        return conversation
    terminal.line(f"taken back: {conversation[questions[-1]].content}", dim=True)
    return conversation[: questions[-1]]


def _save(conversation: Conversation, start: Conversation, argument: str, terminal: Terminal) -> Conversation:
    if not argument or conversation == start:
        missing = "say where: /save FILE" if not argument else "there is nothing to save yet"
        terminal.line(missing, dim=True)
        return conversation
    try:
        append_rows(argument, [{"messages": as_turns(conversation)}])
        terminal.line(f"appended to {argument}", dim=True)
    except LlmlabError as error:
        terminal.line(str(error), dim=True)
    return conversation


Command = Callable[[Conversation, Conversation, str, Terminal], Conversation]
COMMANDS: dict[str, Command] = {"/help": _help, "/reset": _reset, "/undo": _undo, "/save": _save}
