"""A model's part in a conversation: one reply as it comes, or many at once; the tools that it calls run in between."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from llmlab.core.errors import UserError, nearest
from llmlab.data.chat import ChatTemplate, Conversation, Message, ToolCall, prompt_of
from llmlab.infer.generate import complete, stream
from llmlab.infer.spoken import Kind, Spoken
from llmlab.model.types import Model, Params

Tool = Callable[[str], str]
Tools = Mapping[str, Tool]
Listener = Callable[[Kind, str], None]
Approve = Callable[[ToolCall], bool]

NO_TOOLS: Tools = MappingProxyType({})
MAX_CALLS = 4
REFUSED = "error: the user does not allow this call"


class Reply(NamedTuple):
    """What a model said to a conversation.

    messages: its turns, each followed by the results of the tools that it called; none where the conversation does not
    fit. ended: whether the last turn ended by itself. tokens: all that it wrote, ends included. seconds: from the first
    to the last token of every turn, where they came one by one. left_out: the earliest turns, which do not fit.
    """

    messages: tuple[Message, ...] = ()
    ended: bool = False
    tokens: int = 0
    seconds: float = 0.0
    left_out: int = 0


def reply(
    model: Model,
    params: Params,
    template: ChatTemplate,
    conversation: Sequence[Message],
    *,
    tools: Tools = NO_TOOLS,
    max_tokens: int,
    seed: int = 0,
    max_calls: int = MAX_CALLS,
    approve: Approve = lambda call: True,
    on_text: Listener | None = None,
    stop: Callable[[], bool] = lambda: False,
    **sampling: Any,
) -> Reply:
    """The next turn of the assistant; if it calls tools, also their results and what it makes of them.

    The earliest turns, but for the system's, are left out where the positions do not reach them.

    Args:
      tools: what each name runs. A tool that fails answers with its error; without tools, a call ends the reply.
      max_tokens: of each turn.
      max_calls: no tool runs that would be one more.
      approve: asked before each call whether it may run; what is refused, the model is told so.
      on_text: gets what is written as it comes, in whole characters and free of markers, with its kind. A call comes
        when it is whole, the result after it; a `note` is ours.
      stop: asked after every token whether to end here.
      sampling: temperature, top_p and what else `stream` takes.

    Raises:
      UserError: the last turn alone leaves no room for `max_tokens`, or a setting is out of its range.
    """
    say = on_text or (lambda kind, text: None)
    said, calls = Reply(), 0
    while True:
        prompt, left_out = fitted(template, (*conversation, *said.messages), model.config.max_positions - max_tokens)
        if not prompt and said.messages:
            say("note", "no room is left for another turn")
            return said._replace(ended=False)
        if not prompt:
            raise UserError(_no_room(template, conversation, max_tokens, model.config.max_positions))
        if left_out > said.left_out:
            say("note", f"the model's {model.config.max_positions:,} positions leave out the first {left_out} turns")
        ids = stream(model, params, prompt, max_tokens=max_tokens, seed=seed, stop_ids=template.stop_ids, **sampling)
        message, written, seconds = _listen(ids, Spoken(template, prompt), say, stop)
        ended = bool(written) and written[-1] in template.stop_ids
        said = Reply(
            (*said.messages, message),
            ended,
            said.tokens + len(written),
            said.seconds + seconds,
            max(left_out, said.left_out),
        )
        calls += len(message.calls)
        if not (ended and message.calls and tools) or stop():
            return said
        if calls > max_calls:
            say("note", f"no more than {max_calls} calls are run for one answer")
            return said
        for call in message.calls:
            (result,) = results([call], tools, approve)
            say("result", result.content)
            said = said._replace(messages=(*said.messages, result))
        if stop():
            return said._replace(ended=False)


def replies(
    model: Model,
    params: Params,
    template: ChatTemplate,
    conversations: Sequence[Sequence[Message]],
    *,
    tools: Tools = NO_TOOLS,
    max_tokens: int,
    seeds: Sequence[int] | None = None,
    max_calls: int = MAX_CALLS,
    approve: Approve = lambda call: True,
    batch_size: int = 16,
    progress: Callable[[int], None] = lambda done: None,
    **sampling: Any,
) -> list[Reply]:
    """What `reply` gives for each conversation, many at once; the reply to one that does not fit is empty.

    On several hosts, all call this. Each round writes one turn of every conversation that is not done, in batches of
    similar length, padded to few shapes.

    Args:
      seeds: of each; None: 0, 1, …
      progress: called with how many are done.

    Raises:
      UserError: a setting out of its range.
    """
    seeds = range(len(conversations)) if seeds is None else seeds
    said, calls = [Reply()] * len(conversations), [0] * len(conversations)
    batch_size = min(batch_size, len(conversations))
    pending, done = list(range(len(conversations))), 0
    while pending:
        prompts: dict[int, list[int]] = {}
        for i in pending:
            turns = (*conversations[i], *said[i].messages)
            prompts[i], left_out = fitted(template, turns, model.config.max_positions - max_tokens)
            said[i] = said[i]._replace(left_out=max(left_out, said[i].left_out), ended=False)
        order = sorted((i for i in pending if prompts[i]), key=lambda i: -len(prompts[i]))
        pending, done = [], done + len(pending) - len(order)
        for begin in range(0, len(order), batch_size):
            chosen = order[begin : begin + batch_size]
            written = complete(
                model,
                params,
                [prompts[i] for i in chosen],
                max_tokens=max_tokens,
                seeds=[seeds[i] for i in chosen],
                stop_ids=template.stop_ids,
                rows=batch_size,
                width=_width(len(prompts[chosen[0]])),
                **sampling,
            )
            for i, ids in zip(chosen, written, strict=True):
                message, ended = template.parse(ids, prompts[i]), ids[-1] in template.stop_ids
                said[i] = said[i]._replace(
                    messages=(*said[i].messages, message), ended=ended, tokens=said[i].tokens + len(ids)
                )
                calls[i] += len(message.calls)
                if ended and message.calls and tools and calls[i] <= max_calls:
                    said[i] = said[i]._replace(messages=(*said[i].messages, *results(message.calls, tools, approve)))
                    pending.append(i)
            done += len(chosen) - sum(i in pending for i in chosen)
            progress(done)
    return said


def results(calls: Iterable[ToolCall], tools: Tools, approve: Approve = lambda call: True) -> list[Message]:
    """The turn of the tool after each call; where there is no such tool, it fails or is refused, the turn says so."""
    return [Message("tool", _result(call, tools, approve), name=call.name) for call in calls]


def split(conversation: Conversation) -> tuple[Conversation, Conversation]:
    """Up to the last question, and what follows it."""
    questions = [place for place, message in enumerate(conversation) if message.role == "user"]
    end = questions[-1] + 1 if questions else max(0, len(conversation) - 1)
    return conversation[:end], conversation[end:]


def fitted(template: ChatTemplate, conversation: Sequence[Message], room: int) -> tuple[list[int], int]:
    """(ids, left_out): the conversation with an answer opened, in at most `room` ids, and how many turns it lost.

    It loses the earliest turns up to one of the user's, so that what is left begins with a question; never a turn of
    the system, nor the last question and what follows it. No ids where that is too long.
    """
    spoken = [place for place, message in enumerate(conversation) if message.role != "system"]
    questions = [place for place in spoken[1:] if conversation[place].role == "user"]
    for begin in (0, *questions):
        kept = [message for message in conversation[:begin] if message.role == "system"]
        ids = prompt_of(template, (*kept, *conversation[begin:]))
        if len(ids) <= room:
            return ids, begin - len(kept)
    return [], 0


def _listen(
    ids: Iterable[int], spoken: Spoken, say: Listener, stop: Callable[[], bool]
) -> tuple[Message, list[int], float]:
    """The turn that `ids` spell, all of them, and the seconds between the first and the last; says it as it comes."""
    first = last = 0.0
    for id in ids:
        last = time.perf_counter()
        first = first or last
        for piece in spoken.add(id):
            say(piece.kind, piece.text)
        if spoken.ended or stop():
            break
    for piece in spoken.end():
        say(piece.kind, piece.text)
    return spoken.message, spoken.ids, last - first


def _result(call: ToolCall, tools: Tools, approve: Approve) -> str:
    if call.name not in tools:
        return f"error: there is no tool {call.name!r}: {nearest(call.name, tools)}"
    if not approve(call):
        return REFUSED
    try:
        return tools[call.name](call.arguments)
    except Exception as error:  # Whatever a tool cannot do is an answer, which the model has to deal with.
        return f"error: {error}"


def _width(length: int) -> int:
    """The padded length of a prompt: a power of two from 32 on."""
    return max(32, 1 << (length - 1).bit_length())


def _no_room(template: ChatTemplate, conversation: Sequence[Message], max_tokens: int, reach: int) -> str:
    questions = [place for place, message in enumerate(conversation) if message.role == "user"]
    last = conversation[questions[-1] :] if questions else conversation
    length = len(prompt_of(template, last))
    return (
        f"the last turn of {length:,} tokens and max_tokens={max_tokens:,} do not fit into the model's {reach:,} "
        f"positions: shorten the one, or lower the other"
    )
