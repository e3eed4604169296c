"""Chat templates against transformers: the same ids for the same messages, from the same folder."""

import json
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from llmlab.data.chat import Message, template_for
from llmlab.data.chat_encoding import Encoder, unused
from llmlab.data.chat_imported import as_dicts
from llmlab.data.chat_jinja import JinjaTemplate
from llmlab.data.tokenizer_imported import export_tokenizer, import_tokenizer
from tests.chat_families import FAMILIES, conversations, texts

pytestmark = pytest.mark.parity
transformers = pytest.importorskip("transformers", reason="`make test-parity` installs it")

TURNS = (Message("user", "hello, the fox\n"), Message("assistant", " jumps"), Message("user", "x"))


def theirs_of(folder):
    return transformers.PreTrainedTokenizerFast.from_pretrained(folder)


def ids_of(theirs, messages, generate: bool, tools=None) -> list[int]:
    return theirs.apply_chat_template(messages, tools, tokenize=True, add_generation_prompt=generate, return_dict=False)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_ids_are_those_of_transformers(name: str, tmp_path):
    """Texts hold anything but whole tokens of the vocabulary, which become markers there."""
    family = FAMILIES[name]
    folder = family.folder(tmp_path / name)
    tokenizer, theirs = import_tokenizer(folder), theirs_of(folder)
    template = template_for(tokenizer)
    encoder = Encoder(tokenizer, JinjaTemplate(tokenizer.chat.template, tokenizer.chat.tokens))
    plain = [marker for marker in family.plain if marker != "[/INST]"]  # which that template refuses
    tokens = [token for token in theirs.get_added_vocab() if token[0] in "<[" and token != "<h1>"]
    plain += [token[:-1] for token in tokens]

    @settings(max_examples=500, deadline=None)
    @given(conversations(family.allows, plain), st.booleans())
    def same(conversation, generate):
        messages = as_dicts(conversation, decode=family.decode)
        assume(not any(token in json.dumps(messages, ensure_ascii=False) for token in (*tokens, "[/INST]")))
        ids = ids_of(theirs, messages, generate)
        assert template.render(conversation, generate=generate).ids == ids
        # What has somebody's marker in it is encoded otherwise, to the same ids where there is none after all.
        written = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)
        breaker = next(unused(written))
        assert encoder.encode(written + breaker, breaker).ids == ids

    same()


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if "told" in family.allows])
def test_the_ids_are_those_of_transformers_with_tools(name: str, tmp_path):
    family = FAMILIES[name]
    folder = family.folder(tmp_path / name)
    template, theirs = template_for(import_tokenizer(folder)), theirs_of(folder)
    tokens = [token for token in theirs.get_added_vocab() if token[0] in "<["]

    @settings(max_examples=200, deadline=None)
    @given(conversations(family.allows, [token[:-1] for token in tokens]), st.booleans(), offers())
    def same(conversation, generate, tools):
        messages = as_dicts(conversation, decode=family.decode)
        assume(not any(token in json.dumps([messages, tools], ensure_ascii=False) for token in tokens))
        told, turns = template.with_tools(tools), [turn._replace(train=False) for turn in conversation]
        assert told.render(turns, generate=generate).ids == ids_of(theirs, messages, generate, tools)

    same()


def offers() -> st.SearchStrategy[list[dict]]:
    """Tools, as a client of OpenAI's API would list them."""
    kinds = st.sampled_from(
        [{"type": "string"}, {"type": "integer", "minimum": 0}, {"enum": ["a", "é"]}, {"type": "array", "items": {}}]
    )
    properties = st.dictionaries(texts(()), kinds, max_size=3)
    parameters = properties.map(lambda given: {"type": "object", "properties": given, "required": [*given]})
    function = st.fixed_dictionaries(
        {"name": st.sampled_from(["search", "f-2"]), "description": texts(()), "parameters": parameters}
    )
    return st.lists(function.map(lambda told: {"type": "function", "function": told}), min_size=1, max_size=3)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_written_back_is_the_same_template(name: str, tmp_path):
    tokenizer = import_tokenizer(FAMILIES[name].folder(tmp_path / name))
    (tmp_path / "out").mkdir()
    ids = export_tokenizer(tokenizer, tmp_path / "out")
    (tmp_path / "out" / "config.json").write_text(json.dumps(ids))
    theirs = theirs_of(tmp_path / "out")
    assert template_for(tokenizer).render(TURNS, generate=True).ids == ids_of(theirs, as_dicts(TURNS), True)
    assert theirs.eos_token_id == tokenizer.eos_id


def test_tokens_that_are_only_named_are_those_of_transformers(tmp_path):
    folder = FAMILIES["inst_replace"].folder(tmp_path / "inst")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"] = [entry for entry in content["added_tokens"] if entry["content"] == "<unk>"]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "config.json").write_text('{"bos_token_id": 1, "eos_token_id": 2}')
    ids = template_for(import_tokenizer(folder)).render(TURNS).ids
    assert ids == ids_of(theirs_of(folder), as_dicts(TURNS), False)
    assert (ids[0], ids.count(2)) == (1, 1)
