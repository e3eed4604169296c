import jax
import numpy as np
import pytest

from llmlab.data.tokenizer_character import CharacterTokenizer
from llmlab.eval.samples import write_samples
from llmlab.model.config import ModelConfig
from llmlab.model.transformer import make_model

TOKENIZER = CharacterTokenizer("\n abcdef")
V = TOKENIZER.vocab_size
CONFIG = ModelConfig(width=16, layers=1, heads=2, vocab_size=V, max_positions=24, init_std=1.0)

MODEL = make_model(CONFIG)
LOGITS = jax.jit(MODEL.logits)


@pytest.fixture(scope="module")
def trained():
    return MODEL, jax.jit(MODEL.init)(jax.random.key(1))


def greedy(model, params, prompt, count):
    """By whole forward passes, one for each token."""
    ids_1T = np.zeros((1, CONFIG.max_positions), int)
    ids_1T[0, : len(prompt)] = prompt
    for end in range(len(prompt), len(prompt) + count):
        ids_1T[0, end] = np.argmax(np.asarray(LOGITS(params, ids_1T))[0, end - 1])
    return ids_1T[0, len(prompt) : len(prompt) + count].tolist()


def test_samples_are_returned_and_written_apart_from_their_prompts(trained, tmp_path):
    path = tmp_path / "samples" / "10.txt"
    prompts = ["a", "bc\nde"]
    settings = {"max_tokens": 5, "temperature": 0.7, "seed": 3, "path": path}
    texts = write_samples(*trained, TOKENIZER, prompts, **settings)
    page = path.read_text()
    for number, (prompt, text) in enumerate(zip(prompts, texts, strict=True), 1):
        assert f"=== prompt {number} ===\n{prompt}\n--- the model goes on ---\n{text}\n" in page
    assert write_samples(*trained, TOKENIZER, prompts, **settings) == texts
    assert [entry.name for entry in path.parent.iterdir()] == ["10.txt"]


def test_a_prompt_too_long_for_the_positions_loses_its_beginning(trained, tmp_path):
    settings = {"max_tokens": 8, "temperature": 0.0, "seed": 0, "path": tmp_path / "s.txt"}
    (text,) = write_samples(*trained, TOKENIZER, ["ab" * 30], **settings)
    kept = [TOKENIZER.bos_id, *TOKENIZER.encode("ab" * 30)[-15:]]
    ids = greedy(*trained, kept, 8)
    ids = ids[: ids.index(TOKENIZER.eos_id)] if TOKENIZER.eos_id in ids else ids
    assert text == TOKENIZER.decode(ids)


def test_no_prompts_are_no_samples(trained, tmp_path):
    assert write_samples(*trained, TOKENIZER, [], max_tokens=4, temperature=0.0, seed=0, path=tmp_path / "s.txt") == []
