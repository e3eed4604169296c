"""Tokenizers of published models: byte-level and byte-fallback BPE made here by the `tokenizers` library."""

import json
import pickle

import numpy as np
import pytest

tokenizers = pytest.importorskip("tokenizers", reason="the extra hf installs it")
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers  # noqa: E402

from llmlab.core.errors import UserError  # noqa: E402
from llmlab.data.tokenizer import PROBE, load_tokenizer  # noqa: E402
from llmlab.data.tokenizer_imported import ImportedChat, export_tokenizer, import_tokenizer  # noqa: E402

TEXT = ["the quick brown fox jumps over the lazy dog, 123 times; and then\n\tsays: ça va, 你好 \U0001f642"] * 20


def byte_level() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<|end|>", "<|im_start|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


def byte_fallback() -> tokenizers.Tokenizer:
    """As Llama 2's and Gemma's: spaces have a mark, what is not known is spelt in bytes."""
    learner = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    learner.normalizer = normalizers.Replace(" ", "\u2581")
    learner.train_from_iterator(["the quick fox jumps"], trainers.BpeTrainer(vocab_size=60, show_progress=False))
    known = json.loads(learner.to_str())["model"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *sorted(known["vocab"])]
    model = models.BPE(
        vocab={name: id for id, name in enumerate(dict.fromkeys(names))},
        merges=[tuple(pair) for pair in known["merges"]],
        unk_token="<unk>",
        byte_fallback=True,
        fuse_unk=True,
    )
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def folder_of(tokenizer, folder, **config):
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def gpt_like(tmp_path):
    return folder_of(byte_level(), tmp_path, eos_token={"content": "<|end|>", "special": True})


def test_a_byte_level_tokenizer_is_lossless_and_text_stays_text(gpt_like):
    tokenizer = import_tokenizer(gpt_like)
    assert tokenizer.lossless
    assert tokenizer.decode(tokenizer.encode(PROBE)) == PROBE
    ids = tokenizer.encode("a <|im_start|> b<|end|>")
    assert tokenizer.decode(ids) == "a <|im_start|> b<|end|>"
    assert not {tokenizer.eos_id, *tokenizer.control.values()} & set(ids)
    assert tokenizer.control == {"<|im_start|>": 1}
    assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 0)
    assert tokenizer.encode("the quick") == byte_level().encode("the quick").ids
    assert tokenizer.decode_bytes([tokenizer.eos_id, *tokenizer.encode("é")]) == "é".encode()
    assert tokenizer.piece(tokenizer.eos_id) == "<|end|>"


def test_bytes_of_tokens_add_up(gpt_like):
    tokenizer = import_tokenizer(gpt_like)
    lengths_V = tokenizer.token_bytes()
    assert lengths_V.shape == (tokenizer.vocab_size,)
    assert np.sum(lengths_V[tokenizer.encode(TEXT[0])]) == len(TEXT[0].encode())


def test_a_byte_fallback_tokenizer_spells_what_it_does_not_know(tmp_path):
    folder = folder_of(byte_fallback(), tmp_path, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer = import_tokenizer(folder)
    assert (tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)
    assert tokenizer.decode_bytes(tokenizer.encode("the fox: 你好")) == "the fox: 你好".encode()
    assert tokenizer.token_bytes()[tokenizer.encode("你")].tolist() == [1, 1, 1]
    assert not tokenizer.lossless  # the mark itself comes back as a space


def test_added_tokens_of_spaces_are_spaces(tmp_path):
    """Gemma has runs of spaces as added tokens, spelt with the mark."""
    library = byte_fallback()
    library.add_tokens([tokenizers.AddedToken("\u2581\u2581", normalized=True)])
    tokenizer = import_tokenizer(folder_of(library, tmp_path, bos_token="<s>", eos_token="</s>", unk_token="<unk>"))
    ids = tokenizer.encode("the  fox")
    assert library.token_to_id("\u2581\u2581") in ids
    assert tokenizer.decode_bytes(ids) == b"the  fox"
    assert tokenizer.token_bytes()[ids].sum() == 8


def test_what_is_saved_in_a_workdir_is_the_same_tokenizer(gpt_like, tmp_path):
    tokenizer = import_tokenizer(gpt_like)
    tokenizer.save(tmp_path / "tokenizer.model")
    for again in (load_tokenizer(tmp_path / "tokenizer.model"), pickle.loads(pickle.dumps(tokenizer))):
        assert again.fingerprint == tokenizer.fingerprint
        assert again.encode(TEXT[0]) == tokenizer.encode(TEXT[0])
        assert (again.bos_id, again.eos_id, again.pad_id) == (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
    out = tmp_path / "out"
    out.mkdir()
    assert export_tokenizer(tokenizer, out)["eos_token_id"] == tokenizer.eos_id
    assert (out / "tokenizer.json").read_text() == (gpt_like / "tokenizer.json").read_text()


CHAT = dict(eos_token="<|end|>", bos_token={"content": "<|im_start|>"}, chat_template="{{ bos_token }}")


def test_how_a_model_talks_comes_with_its_tokenizer(tmp_path):
    folder = folder_of(byte_level(), tmp_path, **CHAT)
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 7]}')
    (folder / "config.json").write_text('{"eos_token_id": 0}')
    chat = import_tokenizer(folder).chat
    assert chat == ImportedChat("{{ bos_token }}", {"bos_token": "<|im_start|>", "eos_token": "<|end|>"}, (1, 7, 0))
    (folder / "chat_template.jinja").write_text("a file of its own")
    assert import_tokenizer(folder).chat.template == "a file of its own"


def test_of_several_templates_the_default_is_taken(tmp_path):
    named = [{"name": "tool_use", "template": "a"}, {"name": "default", "template": "b"}]
    assert import_tokenizer(folder_of(byte_level(), tmp_path, **CHAT | {"chat_template": named})).chat.template == "b"
    assert import_tokenizer(folder_of(byte_level(), tmp_path, **CHAT | {"chat_template": named[:1]})).chat is None


def test_tokens_may_be_named_in_a_file_of_their_own(tmp_path):
    folder = folder_of(byte_level(), tmp_path, **CHAT)
    (folder / "special_tokens_map.json").write_text(
        '{"pad_token": "<|end|>", "eos_token": {"content": "<|im_start|>"}}'
    )
    assert import_tokenizer(folder).chat.tokens == {
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_start|>",
        "pad_token": "<|end|>",
    }


def test_how_a_model_talks_is_saved_and_written_back(tmp_path):
    folder = folder_of(byte_level(), tmp_path, **CHAT)
    tokenizer = import_tokenizer(folder)
    tokenizer.save(tmp_path / "tokenizer.model")
    for again in (load_tokenizer(tmp_path / "tokenizer.model"), pickle.loads(pickle.dumps(tokenizer))):
        assert (again.chat, again.fingerprint) == (tokenizer.chat, tokenizer.fingerprint)
    for name in ("out", "kept"):
        (tmp_path / name).mkdir()
    (tmp_path / "kept" / "tokenizer_config.json").write_text(json.dumps({"here": "already", **CHAT}))
    for name in ("out", "kept"):
        export_tokenizer(tokenizer, tmp_path / name)
        assert import_tokenizer(tmp_path / name).chat.template == tokenizer.chat.template
    assert json.loads((tmp_path / "kept" / "tokenizer_config.json").read_text())["here"] == "already"
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {"eos_token_id": [0]}


def test_a_tokenizer_saved_without_a_template_opens_as_it_was(gpt_like, tmp_path):
    tokenizer = import_tokenizer(gpt_like)
    tokenizer.save(tmp_path / "tokenizer.model")
    fields = json.loads((tmp_path / "tokenizer.model").read_text())
    assert list(fields) == ["format", "bos_id", "eos_id", "pad_id", "tokenizer"]
    assert load_tokenizer(tmp_path / "tokenizer.model").chat is None


def test_the_end_of_a_document_may_be_named_by_the_model(tmp_path):
    folder = folder_of(byte_level(), tmp_path)
    with pytest.raises(UserError, match="what ends a document"):
        import_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps({"eos_token_id": [1, 0], "pad_token_id": 1}))
    tokenizer = import_tokenizer(folder)
    assert (tokenizer.eos_id, tokenizer.bos_id, tokenizer.pad_id) == (1, 1, 0)


@pytest.mark.parametrize("content", ["", "{", '{"model": {}}'])
def test_a_torn_file_is_said_to_be_torn(content, tmp_path):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match="torn"):
        import_tokenizer(tmp_path)


def test_a_tokenizer_whose_tokens_are_no_bytes_is_refused(tmp_path):
    words = tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    folder = folder_of(words, tmp_path)
    (folder / "config.json").write_text(json.dumps({"eos_token_id": 1}))
    with pytest.raises(UserError, match="WordPiece is not supported"):
        import_tokenizer(folder)


def test_a_folder_without_one_says_so(tmp_path):
    with pytest.raises(UserError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        import_tokenizer(tmp_path)
