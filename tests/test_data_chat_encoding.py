"""Ids of what a template wrote: its markers are tokens, typed ones are text, and text is as the library has it."""

import json

import pytest

pytest.importorskip("tokenizers", reason="the extra hf installs it")
pytest.importorskip("jinja2", reason="the extra hf installs it")

from llmlab.data.chat import Message, template_for
from llmlab.data.chat_encoding import Encoder
from llmlab.data.chat_jinja import JinjaTemplate
from llmlab.data.tokenizer_imported import ImportedTokenizer
from tests.chat_families import FAMILIES, HELLO, byte_level, made, of, said, spelt


def test_what_only_normalisation_makes_a_marker_is_text():
    import tokenizers

    def library():
        library = byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
        library.normalizer = tokenizers.normalizers.NFKC()
        library.add_tokens([tokenizers.AddedToken("<think>", normalized=True)])
        return library

    tokenizer, template = made(FAMILIES["thinking"], tokenizer=library)
    id = library().token_to_id("<think>")
    assert id in template.render((HELLO[0], HELLO[1]._replace(thinking="x"))).ids
    for typed in ("", " <think>"):
        rendered = template.render((Message("user", f"\uff1cthink\uff1e{typed}"), HELLO[1], HELLO[0]))
        assert id not in rendered.ids
        assert spelt(tokenizer, rendered.ids).startswith(f"⟦<|im_start|>⟧user\n<think>{typed}⟦<|im_end|>⟧\n")


def test_private_use_characters_are_text_as_any_other():
    tokenizer, template = of("chatml")
    text = "<\U000f0000|im_end|>\U000f0000<|im_end|>" + "".join(map(chr, range(0xF0001, 0xF0009)))
    rendered = template.render((Message("user", text), Message("assistant", text)))
    assert said(tokenizer, rendered) == f"{text}⟦<|im_end|>⟧"


def test_a_token_across_the_edge_of_a_turn_is_not_said():
    """The blank line of the header and the break that the assistant begins with are one token."""

    def library():
        library = byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
        library.add_tokens(["\n\n"])
        return library

    tokenizer, template = made(FAMILIES["chatml"], tokenizer=library)
    rendered = template.render((HELLO[0], Message("assistant", "\nhi")))
    assert said(tokenizer, rendered) == "hi⟦<|im_end|>⟧"


BREAKER = "\U000f0000"


def encoder_of(tokenizer) -> Encoder:
    return Encoder(tokenizer, JinjaTemplate(tokenizer.chat.template, tokenizer.chat.tokens))


def test_what_steers_a_conversation_and_what_is_a_way_to_write_text():
    names = encoder_of(of("gemma")[0]).control
    assert set(names) == {"<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"}
    added = {"<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"}
    assert set(encoder_of(of("thinking")[0]).control) == {
        *added,
        "<|fim|>",
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
    }


def test_other_added_tokens_stay_tokens_beside_what_was_typed():
    import tokenizers

    tokenizer, template = of("gemma")
    library = tokenizers.Tokenizer.from_str(tokenizer.content)
    blank, tag = library.token_to_id("\n\n"), library.token_to_id("<h1>")
    for typed in ("", "<bos>"):
        ids = template.render((Message("user", f"a\n\nb<h1>{typed}"),)).ids
        assert (ids.count(blank), ids.count(tag), ids.count(tokenizer.bos_id)) == (1, 1, 1)


def test_ids_begin_where_the_text_that_they_stand_for_begins():
    encoder = encoder_of(of("chatml")[0])
    text = f"<|im_start|>é<{BREAKER}|im_end|>\n<|im_end|>"
    encoded = encoder.encode(text, BREAKER)
    places = [place for place, _ in encoded.markers]
    assert [encoded.starts[place] for place in places] == [0, text.rindex("<|im_end|>")]
    assert [encoded.ids[place] for place in places] == [id for _, id in encoded.markers]
    assert encoded.starts[1:3] == [12, 12]  # the two bytes of é
    assert encoded.starts[encoded.first_from(text.index("|im_end"))] == text.index("|im_end")


@pytest.mark.parametrize(
    "overlapping", ["<|im_end|<|im_end|>", "<|im_<|im_end|>end|>", "<<|im_end|>>", "<|im_end|>" * 3]
)
def test_markers_within_markers_are_broken(overlapping: str):
    """Here `<<` is a token too, and ends where another may begin."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<<"]
    encoder = encoder_of(made(FAMILIES["chatml"], tokenizer=lambda: byte_level(special))[0])
    broken = encoder.broken(overlapping, BREAKER)
    assert broken.replace(BREAKER, "") == overlapping
    assert encoder.encode(broken, BREAKER).markers == []


def test_tokens_that_are_only_named_are_tokens_too():
    """`</s>` is in the vocabulary and in tokenizer_config.json, but not among the added tokens."""
    tokenizer, template = of("inst_replace")
    content = json.loads(tokenizer.content)
    content["added_tokens"] = [entry for entry in content["added_tokens"] if entry["content"] != "</s>"]
    unlisted = ImportedTokenizer(json.dumps(content), tokenizer.bos_id, tokenizer.eos_id, 0, tokenizer.chat)
    for text in ("x", "</s>"):
        turns = (Message("user", text), Message("assistant", text))
        assert template_for(unlisted).render(turns) == template.render(turns)
