"""Chat templates in the manner of published families, each with a tiny tokenizer and what it has to write.

`Family.expected` says in Python what the template says in Jinja: the parts of a conversation, each with whether the
assistant says it. A marker of the template is written ⟦marker⟧ there, so that typed ones differ.
"""

import functools
import json
import re
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hypothesis import strategies as st

from llmlab.data.chat import ChatTemplate, Message, Rendered, ToolCall, template_for
from llmlab.data.tokenizer_imported import ImportedTokenizer, import_tokenizer

Parts = list[tuple[str, bool]]
TEXT = ["the quick brown fox jumps over the lazy dog, user assistant system tool model name arguments"] * 9


class Family(NamedTuple):
    """plain: markers that are no tokens. allows: among system, tool, call, single (call in a turn, and no text beside
    it), thinking, free (turns in any order), told (of tools).

    same: takes out what decoding does not give back. decode: whether arguments of calls are given as objects.
    """

    name: str
    template: str
    tokenizer: Callable[[], Any]
    tokens: dict[str, str]
    expected: Callable[[Sequence[Message], bool], Parts]
    allows: tuple[str, ...] = ()
    plain: tuple[str, ...] = ()
    same: Callable[[str], str] = str
    end: str = ""
    decode: bool = True

    def folder(self, folder: Path) -> Path:
        """As a published model brings it."""
        folder.mkdir(exist_ok=True)
        self.tokenizer().save(str(folder / "tokenizer.json"))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": self.template, **self.tokens}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        return folder


def byte_level(special: Sequence[str], added: Sequence[str] = (), **flags: bool) -> Any:
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.post_processor = processors.ByteLevel(trim_offsets=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    library.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    )
    library.add_special_tokens([tokenizers.AddedToken(name, normalized=False, **flags) for name in special])
    library.add_tokens([tokenizers.AddedToken(name, normalized=False) for name in added])
    return library


def byte_fallback(special: Sequence[str], added: Sequence[str] = (), spaces: str = "replace") -> Any:
    """spaces: where words get a mark: "replace" a space, "prepend" to every piece, "first" to the first one."""
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

    marked = normalizers.Replace(" ", "\u2581")
    learner = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    learner.normalizer = marked
    learner.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=60, show_progress=False))
    known = json.loads(learner.to_str())["model"]
    names = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *sorted(known["vocab"]), "\u2581"]
    library = tokenizers.Tokenizer(
        models.BPE(
            vocab={name: id for id, name in enumerate(dict.fromkeys(names))},
            merges=[tuple(pair) for pair in known["merges"]],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    if spaces == "first":
        library.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        prepended = [normalizers.Prepend("\u2581"), marked]
        library.normalizer = normalizers.Sequence(prepended) if spaces == "prepend" else marked
    library.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    library.add_special_tokens(list(special))
    library.add_tokens([tokenizers.AddedToken(name, normalized=False) for name in added])
    return library


def _turns(conversation: Sequence[Message], generate: bool, start: str, role_end: str, end: str, after: str) -> Parts:
    parts: Parts = []
    for turn in conversation:
        said = turn.role == "assistant"
        parts += [(f"{start}{turn.role}{role_end}", False), (turn.content + end, said), (after, False)]
    return [*parts, (f"{start}assistant{role_end}", False)] if generate else parts


CHATML = Family(
    "chatml",
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    lambda: byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]),
    {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>"},
    lambda turns, generate: _turns(turns, generate, "⟦<|im_start|>⟧", "\n", "⟦<|im_end|>⟧", "\n"),
    ("system", "tool", "free"),
    end="<|im_end|>",
)


def _llama3(conversation: Sequence[Message], generate: bool) -> Parts:
    stripped = [turn._replace(content=turn.content.strip()) for turn in conversation]
    start, end = "⟦<|start_header_id|>⟧", "⟦<|end_header_id|>⟧\n\n"
    return [("⟦<|begin_of_text|>⟧", False), *_turns(stripped, generate, start, end, "⟦<|eot_id|>⟧", "")]


LLAMA3 = Family(
    "llama3",
    "{{- bos_token }}\n{%- for message in messages %}\n    {{- '<|start_header_id|>' + message.role + "
    "'<|end_header_id|>\\n\\n' + message.content | trim + '<|eot_id|>' }}\n{%- endfor %}\n"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}",
    lambda: byte_level(
        ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    ),
    {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"},
    _llama3,
    ("system", "tool", "free"),
    end="<|eot_id|>",
)


def _inst(conversation: Sequence[Message], generate: bool) -> Parts:
    parts: Parts = [("⟦<s>⟧", False)]
    system = ""
    for turn in conversation:
        if turn.role == "system":
            system = f"<<SYS>>\n{turn.content}\n<</SYS>>\n\n"
        elif turn.role == "user":
            parts, system = [*parts, (f"[INST] {system}{turn.content} [/INST]", False)], ""
        else:
            parts.append((f" {turn.content.strip()}⟦</s>⟧", True))
    return parts


_INST = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}{% set first = '<<SYS>>\n' + "
    "messages[0].content + '\n<</SYS>>\n\n' %}{% else %}{% set rest = messages %}{% set first = '' %}{% endif %}"
    "{% for message in rest %}{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if message.role == 'user' %}"
    "{% if '[/INST]' in message.content %}{{ raise_exception('a marker in a text') }}{% endif %}"
    "{{ '[INST] ' + (first if loop.first else '') + message.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + message.content.strip() + eos_token }}{% endif %}{% endfor %}"
)


def inst(spaces: str) -> Family:
    return Family(
        f"inst_{spaces}",
        _INST,
        lambda: byte_fallback(["<unk>", "<s>", "</s>"], spaces=spaces),
        {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
        _inst,
        ("system",),
        ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"),
        lambda text: text.replace(" ", "").replace("\u2581", ""),
        "</s>",
    )


def _gemma(conversation: Sequence[Message], generate: bool) -> Parts:
    stripped = [turn._replace(content=turn.content.strip()) for turn in conversation]
    parts = _turns(stripped, generate, "⟦<start_of_turn>⟧", "\n", "⟦<end_of_turn>⟧", "\n")
    return [("⟦<bos>⟧", False), *((text.replace("⟧assistant\n", "⟧model\n"), said) for text, said in parts)]


GEMMA = Family(
    "gemma",
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}{% set role = 'model' if message['role'] == 'assistant' else "
    "message['role'] %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
    lambda: byte_fallback(
        ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"],
        ["\n", "\n\n", "\n\n\n", "\u2581\u2581", "<h1>", "</h1>"],
    ),
    {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"},
    _gemma,
    ("tool", "free"),
    ("<h1>",),
    lambda text: text.replace("\u2581", " "),
    "<end_of_turn>",
)


def _thinking(conversation: Sequence[Message], generate: bool, opened: str = "") -> Parts:
    """Earlier thinking is left out; results stand together in a turn of the user's."""
    parts: Parts = []
    last = max([i for i, turn in enumerate(conversation) if turn.role == "user"], default=-1)
    for i, turn in enumerate(conversation):
        final = i == len(conversation) - 1
        if turn.role == "tool":
            if i == 0 or conversation[i - 1].role != "tool":
                parts.append(("⟦<|im_start|>⟧user", False))
            parts.append((f"\n⟦<tool_response>⟧\n{turn.content}\n⟦</tool_response>⟧", False))
            if final or conversation[i + 1].role != "tool":
                parts.append(("⟦<|im_end|>⟧\n", False))
            continue
        parts.append((f"⟦<|im_start|>⟧{turn.role}\n", False))
        if turn.role != "assistant":
            parts.append((f"{turn.content}⟦<|im_end|>⟧\n", False))
            continue
        text = turn.content
        if i > last and (final or turn.thinking):
            thinking = turn.thinking.strip("\n") + "\n⟦</think>⟧\n\n" + text.lstrip("\n")
            # What the prompt for an answer opens is not said by the assistant.
            parts.append(("⟦<think>⟧\n", not opened))
            text = thinking
        for n, call in enumerate(turn.calls):
            text += "\n" if n or turn.content else ""
            given = json.dumps(json.loads(call.arguments), ensure_ascii=False)
            text += f'⟦<tool_call>⟧\n{{"name": "{call.name}", "arguments": {given}}}\n⟦</tool_call>⟧'
        parts += [(f"{text}⟦<|im_end|>⟧", True), ("\n", False)]
    return [*parts, (f"⟦<|im_start|>⟧assistant\n{opened}", False)] if generate else parts


_THINKING = """
{%- if tools %}
    {{- '<|im_start|>system\\n' + (messages[0].content + '\\n\\n' if messages[0].role == 'system' else '') }}
    {{- 'You have these tools:\\n<tools>' }}
    {%- for tool in tools %}{{- '\\n' + tool | tojson }}{%- endfor %}
    {{- '\\n</tools>\\nTo call one:\\n<tool_call>\\n{"name": ..., "arguments": ...}\\n</tool_call><|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' and not message.content.startswith('<tool_response>') %}
        {%- set ns.last = loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {%- set content = message.content %}
        {%- set reasoning = message.reasoning_content or '' %}
        {%- if not reasoning and '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].split('<think>')[-1] %}
            {%- set content = content.split('</think>')[-1] %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.last and (loop.last or reasoning) %}
            {{- '<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}
            {{- content }}
        {%- endif %}
        {%- for call in message.tool_calls or [] %}
            {%- if not loop.first or content %}{{- '\\n' }}{%- endif %}
            {{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments if call.function.arguments is string else call.function.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- elif not (tools and loop.first and message.role == 'system') %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

THINKING = Family(
    "thinking",
    _THINKING,
    lambda: byte_level(
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>", "<|fim|>"],
    ),
    {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    _thinking,
    ("system", "tool", "call", "thinking", "free", "told"),
    end="<|im_end|>",
)
OPENED = THINKING._replace(  # the prompt for an answer begins its thinking
    name="opened",
    template=_THINKING.replace(
        "'<|im_start|>assistant\\n' }}{%- endif", "'<|im_start|>assistant\\n<think>\\n' }}{%- endif"
    ),
    expected=lambda turns, generate: _thinking(turns, generate, "⟦<think>⟧\n"),
)


def _after_marker(text: str) -> str:
    """Without blanks after a marker: the tokens take them."""
    head, *rest = text.split("⟧")
    return "⟧".join([head, *(piece.lstrip(_UNICODE_BLANKS) for piece in rest)])


# What the library takes for blank; Python adds the separators U+001C to U+001F.
_UNICODE_BLANKS = "".join(chr(code) for code in range(0x3001) if chr(code).isspace() and code not in range(0x1C, 0x20))


STRIPPING = Family(
    "stripping",
    "{% for message in messages %}{{ '<|' + message.role + '|>\n' + message.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
    lambda: byte_level(
        ["<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|end|>"], rstrip=True
    ),
    {"eos_token": "<|endoftext|>"},
    lambda turns, generate: [
        *(
            (text.lstrip(_UNICODE_BLANKS), said)
            for text, said in _turns(turns, generate, "⟦<|", "|>⟧\n", "⟦<|end|>⟧", "\n")
        ),
        *([] if generate else [("⟦<|endoftext|>⟧", False)]),
    ],
    ("system", "tool", "free"),
    same=_after_marker,
    end="<|end|>",
)


def _bars(conversation: Sequence[Message], generate: bool) -> Parts:
    """What follows the result of a tool has no header."""
    parts: Parts = [("⟦<s>⟧", False)]
    for i, turn in enumerate(conversation):
        after_tool = i > 0 and conversation[i - 1].role == "tool"
        if turn.role == "system":
            parts.append((turn.content, False))
        elif turn.role == "user":
            parts.append((f"⟦<｜User｜>⟧{turn.content}", False))
        elif turn.role == "tool":
            parts.append((f"⟦<｜output｜>⟧{turn.content}⟦<｜/output｜>⟧", False))
        else:
            calls = "".join(f"⟦<｜call｜>⟧{call.name}⟦<｜sep｜>⟧{call.arguments}⟦<｜/call｜>⟧" for call in turn.calls)
            calls = f"⟦<｜calls｜>⟧{calls}⟦<｜/calls｜>⟧" if calls else ""
            parts += [("" if after_tool else "⟦<｜Assistant｜>⟧", False)]
            parts += [(f"{turn.content}{calls}⟦</s>⟧", True)]
    if generate and conversation[-1].role != "tool":
        parts.append(("⟦<｜Assistant｜>⟧⟦<think>⟧\n", False))
    return parts


_BARS = ("User", "Assistant", "output", "/output", "calls", "call", "sep", "/call", "/calls")
BARS = Family(
    "bars",
    "{{ bos_token }}{% for tool in tools or [] %}{{ '## ' + tool.function.name + '\n' + tool.function.description }}"
    "{{ '\n' + tool.function.parameters | tojson + '\n' }}{% endfor %}"
    "{% set ns = namespace(tool=false) %}{% for message in messages %}"
    "{% if message.role == 'system' %}{{ message.content }}"
    "{% elif message.role == 'user' %}{% set ns.tool = false %}{{ '<｜User｜>' + message.content }}"
    "{% elif message.role == 'tool' %}{% set ns.tool = true %}{{ '<｜output｜>' + message.content + '<｜/output｜>' }}"
    "{% else %}{% if not ns.tool %}{{ '<｜Assistant｜>' }}{% endif %}{% set ns.tool = false %}"
    "{{ message.content.split('</think>')[-1] }}{% if message.tool_calls %}{{ '<｜calls｜>' }}"
    "{% for call in message.tool_calls %}"
    "{{ '<｜call｜>' + call.function.name + '<｜sep｜>' + call.function.arguments + '<｜/call｜>' }}{% endfor %}"
    "{{ '<｜/calls｜>' }}{% endif %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt and not ns.tool %}{{ '<｜Assistant｜><think>\n' }}{% endif %}",
    lambda: byte_level(
        ["<s>", "</s>"],
        [f"<｜{name}｜>" for name in _BARS] + ["<think>", "</think>"],
    ),
    {"bos_token": "<s>", "eos_token": "</s>"},
    _bars,
    ("system", "tool", "call", "free", "told"),
    end="</s>",
    decode=False,
)


def _objects(conversation: Sequence[Message], generate: bool) -> Parts:
    """A call is a JSON object and nothing else."""
    turns = []
    for turn in conversation:
        if turn.calls:
            given = json.dumps(json.loads(turn.calls[0].arguments), ensure_ascii=False)
            turns.append(Message("assistant", f'{{"name": "{turn.calls[0].name}", "parameters": {given}}}'))
        else:
            turns.append(turn)
    return [(text.replace("⟧tool⟦", "⟧ipython⟦"), said) for text, said in _llama3(turns, generate)]


OBJECTS = LLAMA3._replace(
    name="objects",
    template="""
{{- bos_token }}
{%- set ns = namespace(told=not tools) %}
{%- for message in messages %}
    {%- set role = 'ipython' if message.role == 'tool' else message.role %}
    {{- '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' }}
    {%- if message.tool_calls %}
        {%- if message.tool_calls | length > 1 %}{{- raise_exception('one call at a time') }}{%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '{"name": "' + call.name + '", "parameters": ' + call.arguments | tojson + '}' }}
    {%- else %}
        {%- if message.role == 'user' and not ns.told %}
            {%- set ns.told = true %}
            {{- 'To call one of these, answer {"name": ..., "parameters": ...}.\\n\\n' }}
            {%- for tool in tools %}{{- tool | tojson(indent=4) + '\\n\\n' }}{%- endfor %}
        {%- endif %}
        {{- message.content | trim }}
    {%- endif %}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}""",
    expected=_objects,
    allows=("system", "tool", "call", "single", "free", "told"),
)


def _listed(conversation: Sequence[Message], generate: bool) -> Parts:
    parts: Parts = [("⟦<s>⟧", False)]
    calls = results = 0
    for turn in conversation:
        if turn.role == "user":
            parts.append((f"⟦[INST]⟧{turn.content}⟦[/INST]⟧", False))
        elif turn.role == "tool":
            text = f'{{"content": {turn.content}, "call_id": "call{results:05}"}}'
            parts.append((f"⟦[TOOL_RESULTS]⟧{text}⟦[/TOOL_RESULTS]⟧", False))
            results += 1
        else:
            listed = []
            for call in turn.calls:
                given = json.dumps(json.loads(call.arguments), ensure_ascii=False)
                listed.append(f'{{"name": "{call.name}", "arguments": {given}, "id": "call{calls:05}"}}')
                calls += 1
            text = f"⟦[TOOL_CALLS]⟧[{', '.join(listed)}]" if listed else ""
            parts.append((f"{turn.content}{text}⟦</s>⟧", True))
    return parts


_LISTED = ("INST", "/INST", "AVAILABLE_TOOLS", "/AVAILABLE_TOOLS", "TOOL_CALLS", "TOOL_RESULTS", "/TOOL_RESULTS")
LISTED = Family(
    "listed",
    "{{ bos_token }}{% set asked = messages | selectattr('role', 'equalto', 'user') | list %}"
    "{% for message in messages %}{% if message.role == 'user' %}{% if tools and message == asked[-1] %}"
    "{{ '[AVAILABLE_TOOLS]' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{% endif %}"
    "{{ '[INST]' + message.content + '[/INST]' }}"
    "{% elif message.role == 'tool' %}{{ '[TOOL_RESULTS]{\"content\": ' + message.content + ', \"call_id\": \"' + "
    "message.tool_call_id + '\"}[/TOOL_RESULTS]' }}"
    "{% else %}{{ message.content }}{% for call in message.tool_calls or [] %}"
    "{{ ('[TOOL_CALLS][' if loop.first else ', ') + '{\"name\": \"' + call.function.name + '\", \"arguments\": ' + "
    "call.function.arguments | tojson + ', \"id\": \"' + call.id + '\"}' + (']' if loop.last else '') }}{% endfor %}"
    "{{ eos_token }}{% endif %}{% endfor %}",
    lambda: byte_level(["<s>", "</s>", *(f"[{name}]" for name in _LISTED)]),
    {"bos_token": "<s>", "eos_token": "</s>"},
    _listed,
    ("tool", "call", "told"),
    end="</s>",
)


def _late(conversation: Sequence[Message], generate: bool) -> Parts:
    """The system's turn stands in the last one, if that is the user's."""
    system = "".join(f"{turn.content}\n\n" for turn in conversation if turn.role == "system")
    turns = [turn for turn in conversation if turn.role != "system"]
    parts: Parts = [("⟦<s>⟧", False)]
    for i, turn in enumerate(turns):
        if turn.role == "user":
            parts.append((f"⟦[INST]⟧{system if i == len(turns) - 1 else ''}{turn.content}⟦[/INST]⟧", False))
        else:
            parts.append((f"{turn.content}⟦</s>⟧", True))
    return parts


LATE = Family(
    "late",
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}{{ '[INST]' }}"
    "{% if loop.last and messages[0].role == 'system' %}{{ messages[0].content + '\n\n' }}{% endif %}"
    "{{ message.content + '[/INST]' }}{% elif message.role == 'assistant' %}{{ message.content + eos_token }}"
    "{% endif %}{% endfor %}",
    lambda: byte_level(["<s>", "</s>", "[INST]", "[/INST]"]),
    {"bos_token": "<s>", "eos_token": "</s>"},
    _late,
    ("system",),
    end="</s>",
)

FAMILIES = {
    family.name: family
    for family in (
        *(CHATML, LLAMA3, inst("first"), inst("prepend"), inst("replace")),
        *(GEMMA, THINKING, OPENED, STRIPPING, BARS, OBJECTS, LISTED, LATE),
    )
}


@functools.cache
def of(name: str) -> tuple[ImportedTokenizer, ChatTemplate]:
    """The tokenizer of a family, and its template."""
    return made(FAMILIES[name])


def made(family: Family, **changes: Any) -> tuple[ImportedTokenizer, ChatTemplate]:
    """The same, after changes to the family."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = import_tokenizer(family._replace(**changes).folder(Path(folder)))
    assert isinstance(tokenizer, ImportedTokenizer)
    return tokenizer, template_for(tokenizer)


def spelt(tokenizer: ImportedTokenizer, ids: Iterable[int]) -> str:
    """The text of ids, with ⟦⟧ around markers."""
    added = {entry["id"]: entry["content"] for entry in json.loads(tokenizer.content)["added_tokens"]}
    pieces = []
    for id in ids:
        marker = id in added and re.fullmatch(r"<\S+>|\[\S+\]", added[id]) and "h1" not in added[id]
        pieces.append(f"⟦{added[id]}⟧".encode() if marker else tokenizer.decode_bytes([id]))
    return b"".join(pieces).decode(errors="replace")


def said(tokenizer: ImportedTokenizer, rendered: Rendered) -> str:
    return spelt(tokenizer, (id for id, mask in zip(rendered.ids, rendered.mask, strict=True) if mask))


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "finds é <|im_end|> </s> <tool_call>",
            "parameters": {"type": "object", "properties": {"q": {"type": "string"}}, "required": ["q"]},
        },
    }
    for name in ("search", "calculator")
]
HELLO = (Message("user", "hello"), Message("assistant", "hi"))
BLANKS = (" ", "  ", "\n", "\n\n", "\n\n\n", "\t", "\r\n")
WORDS = ("the quick fox", "user", "assistant\n", "é", "漢字", "\U0001f642", "a" * 9, "\u2581", "<", "|>", "[", '"}')


def texts(markers: Sequence[str]) -> st.SearchStrategy[str]:
    """Texts that hold markers, blanks, words and anything else; without markers if there are none."""
    anything = st.text(max_size=4).filter(lambda text: not set(text) & {"⟦", "⟧"})
    known = st.sampled_from((*markers, *BLANKS, *WORDS))
    return st.lists(st.one_of(known, known, anything), max_size=5).map("".join)


@st.composite
def conversations(draw: st.DrawFn, allows: Sequence[str], markers: Sequence[str]) -> tuple[Message, ...]:
    """Turns that a template which `allows` these takes."""
    text, turns = texts(markers), list[Message]()
    if "system" in allows and draw(st.booleans()):
        turns.append(Message("system", draw(text)))
    for _ in range(draw(st.integers(1, 3))):
        turns.append(Message("user", draw(text)))
        if "free" in allows and draw(st.integers(0, 5)) == 0:
            continue
        turns.append(draw(_assistant(allows, text)))
        while "tool" in allows and turns[-1].calls and len(turns) < 9:
            turns += [Message("tool", draw(text), name=call.name) for call in turns[-1].calls]
            turns.append(draw(_assistant(allows, text)))
    if draw(st.booleans()):
        turns.append(Message("user", draw(text)))
        if "free" not in allows and turns[-2].role == "user":
            turns.pop()
    return tuple(turns)


@st.composite
def _assistant(draw: st.DrawFn, allows: Sequence[str], text: st.SearchStrategy[str]) -> Message:
    thinking = draw(text) if "thinking" in allows and draw(st.booleans()) else ""
    most = 1 if "single" in allows else 2
    calls = draw(st.lists(_calls(text), max_size=most)) if "call" in allows and draw(st.booleans()) else []
    content = "" if "single" in allows and calls else draw(text)
    return Message("assistant", content, thinking, tuple(calls), train=draw(st.integers(0, 3)) > 0)


def _calls(text: st.SearchStrategy[str]) -> st.SearchStrategy[ToolCall]:
    values = st.one_of(text, st.integers(-9, 9), st.lists(text, max_size=2), st.none())
    given = st.dictionaries(text, values, max_size=2).map(lambda value: json.dumps(value, ensure_ascii=False))
    return st.builds(ToolCall, st.sampled_from(("search", "calculator")), given)
