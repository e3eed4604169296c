import jax
import numpy as np
import pytest

from llmlab.core.mesh import MeshConfig, make_partition
from llmlab.data.tokenizer_character import CharacterTokenizer
from llmlab.eval.samples import complete, write_samples
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


PROMPTS = [[TOKENIZER.bos_id, *TOKENIZER.encode(text)] for text in ("a", "bc de", "fed")]


@pytest.mark.parametrize("padding", [{}, {"rows": 5}])
def test_completions_are_the_greedy_continuations_whatever_the_padding(trained, padding):
    written = complete(*trained, PROMPTS, max_tokens=6, temperature=0.0, seeds=[0, 0, 0], stop_ids=[], **padding)
    assert written == [greedy(*trained, prompt, 6) for prompt in PROMPTS]


def test_a_completion_ends_with_its_first_stop_id(trained):
    whole = [greedy(*trained, prompt, 6) for prompt in PROMPTS]
    stop = whole[0][2]
    written = complete(*trained, PROMPTS, max_tokens=6, temperature=0.0, seeds=[0, 0, 0], stop_ids=[stop])
    assert written == [ids[: ids.index(stop) + 1] if stop in ids else ids for ids in whole]
    assert len(written[0]) <= 3


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


@pytest.mark.slow
def test_a_mesh_writes_the_same_though_its_devices_outnumber_the_prompts(trained):
    model, params = trained
    partition = make_partition(MeshConfig(data=2, fsdp=2), jax.devices()[:4])
    meshed = make_model(CONFIG, partition)
    settings = {"max_tokens": 4, "temperature": 0.5, "seeds": [3, 1, 2], "stop_ids": []}
    sharded = jax.device_put(params, partition.shardings(meshed.axes))
    assert complete(meshed, sharded, PROMPTS, **settings) == complete(model, params, PROMPTS, **settings)


def test_no_prompts_are_no_samples(trained, tmp_path):
    assert write_samples(*trained, TOKENIZER, [], max_tokens=4, temperature=0.0, seed=0, path=tmp_path / "s.txt") == []
