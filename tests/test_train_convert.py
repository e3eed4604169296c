"""`llmlab convert`: open weights become a workdir that samples and evaluates, and go back as they came."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import llmlab
from llmlab.cli import run
from llmlab.core.errors import UserError
from llmlab.data.tokenizer import TokenizerConfig
from llmlab.data.tokenizer_imported import import_tokenizer
from llmlab.data.tokenizer_train import train_tokenizer
from llmlab.model import hf
from llmlab.model.transformer import make_model
from llmlab.train.convert import convert, licence_of
from tests.helpers import random_params, tiny_llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights") / "model"
    text = ["".join(chr(32 + (7 * i + j) % 90) for j in range(40)) for i in range(200)]
    tokenizer = train_tokenizer(TokenizerConfig(vocab_size=400), text)
    config = tiny_llama(vocab_size=tokenizer.vocab_size)
    model = make_model(config)
    hf.save(model, random_params(model), folder, tokenizer)
    (folder / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\n# A model\n")
    (folder / "LICENSE").write_text("the licence's text\n")
    (folder / "generation_config.json").write_text('{"temperature": 0.6}')
    return folder


def test_there_and_back(folder, tmp_path, capsys):
    assert run(["llmlab", "convert", str(folder), str(tmp_path / "work")]) == 0
    assert "licence   apache-2.0, LICENSE" in capsys.readouterr().out
    opened = llmlab.open(tmp_path / "work")
    model, params = hf.load(folder)
    assert opened.model.config == model.config
    for mine, theirs in zip(jax.tree.leaves(opened.params), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(np.asarray(mine), np.asarray(theirs))
    assert json.loads((tmp_path / "work" / "config.json").read_text())["source"]["licence"] == "apache-2.0, LICENSE"

    assert "a llama model" in convert(tmp_path / "work", tmp_path / "back")
    for name in (
        "config.json",
        "model.safetensors",
        "tokenizer.model",
        "tokenizer_config.json",
        "LICENSE",
        "README.md",
        "generation_config.json",
    ):
        assert (tmp_path / "back" / name).read_bytes() == (folder / name).read_bytes()
    assert not list(tmp_path.glob(".*"))


def test_a_reward_model_goes_there_and_back(folder, tmp_path):
    opened = hf.load(folder)[0]
    model = make_model(dataclasses.replace(opened.config, head="score"))
    params = random_params(model)
    hf.save(model, params, tmp_path / "theirs", import_tokenizer(folder))
    assert "a llama reward model" in convert(tmp_path / "theirs", tmp_path / "work")
    mine = llmlab.open(tmp_path / "work")
    assert mine.model.config.head == "score"
    assert (mine.config["objective"]["name"], mine.config["data"]["rows"]) == ("reward", "preference")
    jax.tree.map(np.testing.assert_array_equal, mine.params, params)
    assert "a llama reward model" in convert(tmp_path / "work", tmp_path / "back")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()
    keys = json.loads((tmp_path / "back" / "config.json").read_text())
    assert keys["architectures"] == ["LlamaForSequenceClassification"]
    assert keys["pad_token_id"] == mine.tokenizer.pad_id


def test_a_converted_workdir_samples_and_evaluates(folder, tmp_path, capsys):
    convert(folder, tmp_path / "work", "bfloat16")
    assert llmlab.open(tmp_path / "work").model.config.param_dtype == "bfloat16"
    convert(folder, tmp_path / "exact")
    assert run(["llmlab", "sample", f"--workdir={tmp_path / 'exact'}", "--prompt=ab", "--max_tokens=4"]) == 0
    (tmp_path / "text.txt").write_text("some text to be measured, and then some more\n" * 40)
    text = ["--source=text", f"--files={tmp_path / 'text.txt'}", "--batch_size=2"]
    assert run(["llmlab", "eval", f"--workdir={tmp_path / 'exact'}", *text]) == 0
    assert "bits per byte" in capsys.readouterr().out


def test_what_is_there_stays(folder, tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "mine").write_text("")
    with pytest.raises(UserError, match="is there already"):
        convert(folder, tmp_path / "work")
    with pytest.raises(UserError, match="there is no folder"):
        convert(tmp_path / "nothing", tmp_path / "other")


def test_a_tokenizer_of_more_ids_than_the_model_is_refused(folder, tmp_path):
    small = tmp_path / "small"
    model = make_model(tiny_llama(vocab_size=390))
    hf.save(model, random_params(model), small)
    (small / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes())
    with pytest.raises(UserError, match="the tokenizer has 400 ids, the model 390"):
        convert(small, tmp_path / "work")
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


def test_special_tokens_beyond_the_model_s_are_let_be(tmp_path):
    """As in Gemma 3's small models, whose tokenizer knows images."""
    tokenizers = pytest.importorskip("tokenizers", reason="the extra hf installs it")
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False)
    library.train_from_iterator(["ab"], trainer)
    size = library.get_vocab_size()
    library.add_special_tokens(["<image>"])
    model = make_model(tiny_llama(vocab_size=size))
    hf.save(model, random_params(model), tmp_path / "model")
    library.save(str(tmp_path / "model" / "tokenizer.json"))
    (tmp_path / "model" / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    convert(tmp_path / "model", tmp_path / "work")
    assert llmlab.open(tmp_path / "work").tokenizer.vocab_size == size + 1


@pytest.mark.parametrize(
    "readme, said",
    [
        ("---\nlicense:\n- apache-2.0\n- mit\n---\n", "apache-2.0"),
        ("---\nlicense:\nlanguage: en\n---\n", ""),
        ("---\nlicense: mit\n---\n", "mit"),
        ("---\nlicense: other\nlicense_name: llama3\nlicense_link: LICENSE\n---\n", "llama3"),
        ("# no header\nlicense: mit\n", ""),
        (None, ""),
    ],
)
def test_the_licence_is_what_the_header_names(readme, said, tmp_path):
    if readme is not None:
        (tmp_path / "README.md").write_text(readme)
    assert licence_of(tmp_path) == said
