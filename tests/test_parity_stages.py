"""Every stage on rows as they are published, from a model of ours and an imported one, and back in transformers.

Where the developers' copies of published sets are at hand, they are read too.
"""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import gzip
import json

import jax
import numpy as np
import pytest

import llmlab
from llmlab.cli import run
from llmlab.data.tokenizer import CHAT_MARKERS
from llmlab.data.tokenizer_character import CharacterTokenizer
from tests.chat_families import CHATML
from tests.runs import ROOT

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="`make test-parity` installs it")
transformers = pytest.importorskip("transformers", reason="`make test-parity` installs it")

EXPERIMENTS = ROOT / "experiments" / "assistant"
SHARED = [folder / "shared" / "data" for folder in (ROOT, ROOT.parent)]
ROWS = [
    {"instruction": f"Say {word}{mark}", "input": "", "output": word, "chosen": f"{word}.", "rejected": "No."}
    for word in ("yes", "blue", "Monday", "seven")
    for mark in ".!?,;:"
]
SMALL = ("data.sequence_length=256", "data.batch_size=8", "run.steps=2", "run.eval_every=0", "run.sample_every=0")


def rows_of(source, folder):
    """A file of instruction rows with preferences, short enough for tiny models."""
    rows = ROWS * 20
    if source == "shared":
        found = [path for each in SHARED if (path := each / "instruction-data-with-preference.json.gz").exists()]
        if not found:
            pytest.skip("the developers' copy of this set is not at hand")
        kept = [row for row in json.loads(gzip.decompress(found[0].read_bytes())) if row["chosen"] != row["rejected"]]
        rows = sorted(kept, key=lambda row: sum(map(len, map(str, row.values()))))[:150]
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder / "rows.json"


def start_of(model, folder):
    """The workdir to begin from: one trained here, or converted from a folder as transformers saves it."""
    if model == "ours":
        CharacterTokenizer("".join(map(chr, range(32, 127))), CHAT_MARKERS).save(folder / "tokenizer")
        (folder / "text.txt").write_text("say yes. say blue. " * 200)
        flags = (f"data.files={folder / 'text.txt'}", "data.source=text", f"data.tokenizer.file={folder / 'tokenizer'}")
        config = f"--config={EXPERIMENTS / 'pretrain.py'}:tiny"
        given = [f"--config.{flag}" for flag in (*flags, "data.batch_size=8", "run.steps=2", "run.eval_every=0")]
        assert run(["llmlab", "train", config, *given, f"--workdir={folder / 'start'}"]) == 0
        return folder / "start"
    source = CHATML.folder(folder / "source")
    size = max(json.loads((source / "tokenizer.json").read_text())["model"]["vocab"].values()) + 64
    settings = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=size)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings, max_position_embeddings=512))
    theirs.save_pretrained(source)
    assert run(["llmlab", "convert", str(source), str(folder / "start")]) == 0
    return folder / "start"


@pytest.mark.parametrize("model", ["ours", "imported"])
@pytest.mark.parametrize("source", ["made here", "shared"])
def test_every_stage_trains_and_loads_in_transformers(model, source, tmp_path, monkeypatch):
    monkeypatch.setenv("LLMLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("atexit.register", lambda *_: None)
    cache = jax.config.jax_compilation_cache_dir
    rows, before = rows_of(source, tmp_path), start_of(model, tmp_path)
    try:
        for stage in ("sft", "reward", "dpo"):
            config = f"--config={EXPERIMENTS / stage}.py:{before}"
            given = [f"--config.{flag}" for flag in (*SMALL, "data.source=jsonl", f"data.files={rows}")]
            workdir = tmp_path / stage
            assert run(["llmlab", "train", config, *given, f"--workdir={workdir}"]) == 0
            assert run(["llmlab", "convert", str(workdir), str(tmp_path / f"{stage}-out")]) == 0
            compare(workdir, tmp_path / f"{stage}-out", scores=stage == "reward")
            before = workdir if stage == "sft" else before
    finally:
        jax.config.update("jax_compilation_cache_dir", cache)


def compare(workdir, folder, *, scores):
    """The logits of a whole text, or its score, here and there."""
    opened = llmlab.open(workdir)
    tokens_BT = np.random.default_rng(0).integers(1, opened.tokenizer.vocab_size, (1, 24)).astype(np.int32)
    kind = transformers.AutoModelForSequenceClassification if scores else transformers.AutoModelForCausalLM
    theirs = kind.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens_BT).long(), attention_mask=torch.ones(1, 24).long()).logits.numpy()
    if scores:
        from llmlab.model.types import inputs

        hidden_BTD = opened.model.apply(opened.params, inputs(tokens_BT)).hidden_BTD
        np.testing.assert_allclose(opened.model.score(opened.params, hidden_BTD)[:, -1:], expected, atol=1e-4)
    else:
        np.testing.assert_allclose(opened.model.logits(opened.params, tokens_BT), expected, atol=1e-4)
