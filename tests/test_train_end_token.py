"""The control: a model learns to stop from the token that ends a turn, and from nothing else."""

import jax
import pytest

import llmlab
from llmlab.cli import run
from llmlab.data.chat import Example, MarkerTemplate, template_for
from llmlab.eval.conversations import measure, summary
from tests.runs import ROOT
from tests.stages_for_tests import write_rows

pytestmark = pytest.mark.slow
LONG = (
    "run.steps=400",
    "optimizer.learning_rate=1e-2",
    "optimizer.ema=0",
    "optimizer.accumulate=1",
    "run.eval_every=0",
)


@pytest.mark.parametrize("masked", [False, True])
def test_it_stops_where_the_end_is_learned_and_only_there(masked, tmp_path, monkeypatch):
    monkeypatch.setenv("LLMLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("atexit.register", lambda *_: None)
    before = jax.config.jax_compilation_cache_dir
    if masked:
        real = MarkerTemplate.render

        def without_ends(self, conversation, *, generate=False):
            rendered = real(self, conversation, generate=generate)
            mask = [int(m and id not in self.stop_ids) for m, id in zip(rendered.mask, rendered.ids, strict=True)]
            return rendered._replace(mask=mask)

        monkeypatch.setattr(MarkerTemplate, "render", without_ends)
    config = f"--config={ROOT / 'tests' / 'stages_for_tests.py'}:sft,{write_rows(tmp_path / 'rows')}"
    assert (
        run(["llmlab", "train", config, f"--workdir={tmp_path / 'run'}", *(f"--config.{each}" for each in LONG)]) == 0
    )
    jax.config.update("jax_compilation_cache_dir", before)
    opened = llmlab.open(tmp_path / "run")
    asked = [Example.loads(text) for text in sums()]
    outcomes = measure(opened.model, opened.params, template_for(opened.tokenizer), asked, max_tokens=32)
    ended = summary(outcomes)["ended"]
    assert ended <= 0.01 if masked else ended >= 0.99


def sums():
    from llmlab.data.rows import examples

    for a in range(10):
        for b in range(10):
            (example,) = examples({"prompt": f"{a}+{b}", "completion": str(a + b)}, "chat")
            yield example.dumps()
