import io
import json
import lzma

import jax
import numpy as np
import pytest

from llmlab.core.config import to_json
from llmlab.core.errors import UserError
from llmlab.data.config import DataConfig, MixturePart
from llmlab.data.tokenizer_character import CharacterTokenizer
from llmlab.eval import command
from llmlab.eval.command import EvalConfig, eval_command, text_of
from llmlab.model.config import ModelConfig
from llmlab.model.transformer import make_model
from llmlab.objective import NextTokenConfig
from llmlab.workdir.open import Opened

CHARACTERS = "\n abcdefgh"
TOKENIZER = CharacterTokenizer(CHARACTERS)
CONFIG = ModelConfig(width=16, layers=1, heads=2, vocab_size=TOKENIZER.vocab_size, max_positions=64)
MODEL = make_model(CONFIG)
LOGITS = jax.jit(MODEL.logits)


@pytest.fixture(scope="module")
def params():
    return jax.jit(MODEL.init)(jax.random.key(0))


@pytest.fixture
def opened(params, tmp_path):
    text = "".join(np.random.default_rng(0).choice(list(CHARACTERS), 4000))
    (tmp_path / "text.txt").write_text(text)
    data = DataConfig(
        source="text",
        files=(str(tmp_path / "text.txt"),),
        sequence_length=32,
        batch_size=4,
        workers=1,
        cache_dir=str(tmp_path / "cache"),
    )
    config = {"model": to_json(CONFIG), "data": to_json(data), "objective": to_json(NextTokenConfig())}
    return Opened(MODEL, params, TOKENIZER, 7, config), text[3600:]


def logits(opened, ids):
    """[len(ids), V] in float64; padded behind, so that one shape compiles once."""
    padded = np.append(ids, np.zeros(CONFIG.max_positions - len(ids), int))
    return np.asarray(LOGITS(opened.params, padded[None]), np.float64)[0, : len(ids)]


def run(opened, folder, **settings):
    out = io.StringIO()
    return eval_command(opened, folder, EvalConfig(**settings), out=out, quiet=True), out.getvalue()


def test_held_out_figures_are_those_of_the_model_and_stand_beside_xz(opened, tmp_path):
    opened, text = opened
    result, printed = run(opened, tmp_path)
    scores = result["held_out"]
    # One document of 400 characters and its EOS: pieces of 32 predictions that each see only themselves.
    ids = np.array([TOKENIZER.bos_id, *TOKENIZER.encode(text), TOKENIZER.eos_id])
    nats, text_nats = 0.0, 0.0
    for begin in range(0, len(ids) - 1, 32):
        piece = ids[begin : begin + 33]
        logits_TV = logits(opened, piece[:-1])
        logp_TV = logits_TV - np.log(np.exp(logits_TV).sum(-1, keepdims=True))
        logp_T = logp_TV[np.arange(len(piece) - 1), piece[1:]]
        nats -= logp_T.sum()
        text_nats -= logp_T[piece[1:] != TOKENIZER.eos_id].sum()
    np.testing.assert_allclose(scores["loss"], nats / 401, rtol=1e-5)
    np.testing.assert_allclose(scores["perplexity"], np.exp(nats / 401), rtol=1e-5)
    np.testing.assert_allclose(scores["bits_per_byte"], text_nats / np.log(2) / 400, rtol=1e-5)
    np.testing.assert_allclose(scores["byte_perplexity"], np.exp(text_nats / 400), rtol=1e-5)
    assert scores["xz_bits_per_byte"] == 8 * len(lzma.compress(text.encode(), preset=9)) / 400
    assert (scores["split"], scores["documents"], scores["bytes"]) == ("held_out", 1, 400)
    assert json.loads((tmp_path / "eval.json").read_text()) == result
    assert result["step"] == 7
    for name in ("loss", "bits_per_byte", "byte_perplexity", "xz_bits_per_byte"):
        assert f"{scores[name]:.4f}" in printed


def test_batch_size_changes_no_figure(opened, tmp_path):
    (one, _), (many, _) = (run(opened[0], tmp_path, batch_size=size) for size in (1, 16))
    np.testing.assert_allclose(one["held_out"]["loss"], many["held_out"]["loss"], rtol=1e-6)


def test_other_files_are_evaluated_whole(opened, tmp_path):
    (tmp_path / "other.txt").write_text("abc abc\n" * 20)
    result, _ = run(opened[0], tmp_path, files=(str(tmp_path / "other.txt"),))
    assert (result["held_out"]["split"], result["held_out"]["bytes"]) == ("all", 160)


def test_which_text_is_meant():
    python = {"data": to_json(DataConfig())}
    mixed = {"data": to_json(DataConfig(source="mixture", mixture=(MixturePart(source="python"),)))}
    assert text_of(python, EvalConfig()) == (DataConfig(), "held_out")
    assert text_of(python, EvalConfig(source="python"))[1] == "held_out"  # never what it was trained on
    assert text_of(python, EvalConfig(split="train"))[1] == "train"
    assert text_of(mixed, EvalConfig(source="python")) == (DataConfig(), "all")
    data, split = text_of(mixed, EvalConfig(files=("a.txt",)))
    assert (data.source, data.files, data.mixture, split) == ("text", ("a.txt",), (), "all")
    data, _ = text_of(python, EvalConfig(source="jsonl", files=("a.jsonl",), field="body"))
    assert (data.source, data.field) == ("jsonl", "body")
    with pytest.raises(UserError, match="did you mean 'jsonl'"):
        text_of(python, EvalConfig(source="json", files=("a",)))


def test_tasks_are_scored_and_each_row_can_be_looked_at(opened, tmp_path):
    opened, _ = opened
    rows = [{"prompt": f"{c}{d}", "choices": ["a", "b"], "answer": 0} for c in "abcd" for d in "ef"]
    path = tmp_path / "letters.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result, printed = run(opened, tmp_path, held_out=False, tasks=(str(path),), few_shot=2, limit=6)
    (scores,) = result["tasks"]
    outcomes = [json.loads(line) for line in (tmp_path / "eval" / "letters.jsonl").read_text().splitlines()]
    assert len(outcomes) == scores["rows"] == 6
    assert scores["acc"] == np.mean([outcome["correct"] for outcome in outcomes])
    for row, outcome in zip(rows, outcomes, strict=False):
        assert outcome["prompt"].endswith(f"\n\n{row['prompt']}")
        ids = np.array([TOKENIZER.bos_id, *TOKENIZER.encode(f"{outcome['prompt']} a")])
        logits_TV = logits(opened, ids[:-1])
        logp_TV = logits_TV - np.log(np.exp(logits_TV).sum(-1, keepdims=True))
        last_two = logp_TV[-2, ids[-2]] + logp_TV[-1, ids[-1]]
        np.testing.assert_allclose(outcome["log_likelihoods"][0], last_two, rtol=1e-5)
    assert "letters" in printed
    assert "held_out" not in result


def test_written_answers_are_the_models_own(opened, tmp_path):
    opened, _ = opened
    rows = []
    for first in "abcdefgh":
        ids = [TOKENIZER.bos_id, *TOKENIZER.encode(first)]
        for _ in range(3):
            ids.append(int(np.argmax(logits(opened, np.array(ids))[-1])))
        line = TOKENIZER.decode(ids[2:]).split("\n")[0]
        if line.strip() and TOKENIZER.eos_id not in ids:
            rows += [{"prompt": first, "answer": line}, {"prompt": first, "answer": f"{line}!"}]
    assert rows
    path = tmp_path / "words.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result, _ = run(opened, tmp_path, held_out=False, tasks=(str(path),), max_tokens=3)
    assert result["tasks"][0]["exact_match"] == 0.5


def test_mistakes_are_found_before_anything_is_computed(opened, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "held_out", lambda *args, **kwargs: pytest.fail("computed something"))
    (tmp_path / "a").mkdir()
    for path in (tmp_path / "t.jsonl", tmp_path / "a" / "t.jsonl"):
        path.write_text('{"prompt": "a", "answer": "b"}\n')
    with pytest.raises(UserError, match="two files named t"):
        run(opened[0], tmp_path, tasks=(str(tmp_path / "t.jsonl"), str(tmp_path / "a" / "t.jsonl")))
    with pytest.raises(UserError, match="no task file"):
        run(opened[0], tmp_path, tasks=(str(tmp_path / "none.jsonl"),))
    assert not (tmp_path / "eval.json").exists()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"few_shot": -1}, "--few_shot=-1 should be at least 0"),
        ({"max_tokens": 0}, "--max_tokens=0 should be at least 1"),
        ({"split": "heldout"}, "did you mean 'held_out'"),
        ({"extract": "numbers"}, "did you mean 'number'"),
        ({"turn_tokens": 0}, "--turn_tokens=0 should be at least 1"),
        ({"held_out": False, "conversations": False}, "nothing to evaluate"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        EvalConfig(**settings)


def test_a_diverged_model_is_reported_in_strict_json(opened, tmp_path):
    opened, _ = opened
    broken = opened._replace(params=jax.tree.map(lambda x: x * np.nan, opened.params))
    run(broken, tmp_path)
    content = (tmp_path / "eval.json").read_text()
    assert json.loads(content, parse_constant=pytest.fail)["held_out"]["loss"] is None


def test_results_are_added_to_what_is_known(opened, tmp_path):
    """Training's end leaves the compressor's figure, which the report shows beside the loss."""
    opened, _ = opened
    file, other, task = (tmp_path / name for name in ("eval.json", "other.txt", "t.jsonl"))
    file.write_text('{"xz_bits_per_byte": 1.5}')
    other.write_text("abc abc\n" * 20)
    task.write_text('{"prompt": "a", "choices": ["a", "b"], "answer": 0}\n')
    on_other, _ = run(opened, tmp_path, files=(str(other),))
    known = json.loads(file.read_text())
    assert known == {"xz_bits_per_byte": 1.5, **on_other}
    run(opened, tmp_path, held_out=False, tasks=(str(task),))
    assert json.loads(file.read_text())["held_out"] == known["held_out"]
    own, _ = run(opened, tmp_path, batch_size=2)
    known = json.loads(file.read_text())
    assert set(known) == {"step", "held_out", "tasks", "xz_bits_per_byte"}
    assert known["held_out"] == own["held_out"]
    assert known["xz_bits_per_byte"] == own["held_out"]["xz_bits_per_byte"] != 1.5


def test_scores_of_another_step_go_and_a_torn_file_is_begun_anew(opened, tmp_path):
    opened, _ = opened
    file, task = tmp_path / "eval.json", tmp_path / "t.jsonl"
    task.write_text('{"prompt": "a", "choices": ["a", "b"], "answer": 0}\n')
    file.write_text('{"step": 3, "held_out": {"loss": 9.0}, "xz_bits_per_byte": 1.5}')
    run(opened, tmp_path, held_out=False, tasks=(str(task),))
    assert set(json.loads(file.read_text())) == {"step", "tasks", "xz_bits_per_byte"}
    for torn in ('{"xz_bits', "[]"):
        file.write_text(torn)
        result, _ = run(opened, tmp_path, held_out=False, tasks=(str(task),))
        assert json.loads(file.read_text()) == result
