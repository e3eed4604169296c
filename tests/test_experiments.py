"""Every experiment file: what its docstring promises, the sizes it names, and real steps of its tiny variant."""

import dataclasses
import functools
import importlib.util
import re
import types
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from llmlab.core.config import to_json
from llmlab.core.errors import UserError
from llmlab.data.pipeline import TokenBatch
from llmlab.model.cost import abstract_params, parameter_count
from llmlab.model.transformer import make_model
from llmlab.train.check import random_batch
from llmlab.train.config import Experiment, resolve
from llmlab.train.describe import describe, estimate
from llmlab.train.optimizer import make_optimizer, make_schedule
from llmlab.train.state import init_state
from llmlab.train.step import make_step
from llmlab.workdir.files import Workdir

FOLDER = Path(__file__).parent.parent / "experiments"
FILES = sorted(FOLDER.rglob("*.py"))
NAMES = {path: path.relative_to(FOLDER).with_suffix("").as_posix() for path in FILES}
VOCAB = 64

# The released models' own counts, with their own vocabularies.
PUBLISHED = {
    ("gpt2", "124m", 50257): 124_439_808,
    ("gpt2", "350m", 50257): 354_823_168,
    ("gpt2", "774m", 50257): 774_030_080,
    ("gpt2", "1558m", 50257): 1_557_611_200,
    ("llama", "1b", 128256): 1_235_814_400,
    ("llama", "3b", 128256): 3_212_749_824,
    ("llama", "8b", 128256): 8_030_261_248,
    ("mamba", "130m", 50288): 128_989_632,
}


@functools.cache
def load(name: str) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(f"experiment_{name.replace('/', '_')}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def resolved(name: str, arg: str, vocab_size: int = 0) -> Experiment:
    config = load(name).get_config(arg)
    if config.data.source == "text" and not config.data.files:
        config.data.files = ("corpus.txt",)
    if vocab_size:
        config.model.vocab_size = vocab_size
    return resolve(config)


def documented_sizes(name: str) -> list[str]:
    found = re.search(r"Sizes: ([^.]*)\.", load(name).__doc__ or "")
    return found[1].replace(",", "").split() if found else []


SIZES = [(name, size) for name in ("gpt2", "llama", "mamba") for size in documented_sizes(name)]


@functools.cache
def count(name: str, size: str, vocab_size: int) -> int:
    return parameter_count(abstract_params(make_model(resolved(name, size, vocab_size).model)))


@functools.cache
def estimated(name: str, size: str) -> dict[str, Any]:
    return estimate(resolved(name, size), 8)


def test_the_experiments_are_all_here():
    stages = ["assistant/dpo", "assistant/pretrain", "assistant/reward", "assistant/sft"]
    others = ["experts", "gpt2", "llama", "longer", "mamba", "quickstart", "shakespeare_char"]
    assert list(NAMES.values()) == ["adapter", *stages, *others, "sums/reward", "sums/sft"]


@pytest.mark.parametrize("path", FILES, ids=NAMES.get)
def test_a_file_is_short_and_says_its_exact_command(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert len(path.read_text().splitlines()) <= 100
    command = re.search(r"^    llmlab train (?:.|\\\n)*", load(NAMES[path]).__doc__ or "", re.MULTILINE)
    assert command, "the docstring has no command, indented by four, that begins with `llmlab train`"
    flags = dict(re.findall(r"--([\w.]+)=(\S+)", command[0]))
    file, _, arg = flags.pop("config").partition(":")
    assert FOLDER.parent / file == path
    assert flags.pop("workdir").startswith("runs/")
    if arg.startswith("runs/"):  # the workdir of another run
        monkeypatch.chdir(tmp_path)
        Path(arg).mkdir(parents=True)
        Workdir(arg).write_config(to_json(resolved("llama", "tiny")), {})
    config = load(NAMES[path]).get_config(arg)
    for key, value in flags.items():
        # An override of a key that is not there is an error: this is what the command line does.
        config.update_from_flattened_dict({key.removeprefix("config."): _like(config, key, value)})
    resolve(config)


def _like(config: Any, key: str, value: str) -> Any:
    for part in key.removeprefix("config.").split("."):
        config = config[part]
    return (value.strip("'"),) if isinstance(config, tuple) else value.strip("'")


@pytest.mark.parametrize("name,size", SIZES, ids=lambda value: value)
def test_a_documented_size_has_about_as_many_parameters_as_its_name_says(name: str, size: str):
    experiment = resolved(name, size)
    vocab = experiment.data.tokenizer.vocab_size
    named = float(size[:-1]) * {"m": 1e6, "b": 1e9}[size[-1]]
    # Names count what is learnt beside one table of the vocabulary, or with it: round figures, in the field's custom.
    tables = 1 if experiment.model.tied_embedding else 2
    whole = count(name, size, vocab)
    body = whole - tables * vocab * experiment.model.width
    assert 0.6 * named < whole < 3 * named
    assert body < 1.3 * named


@pytest.mark.parametrize("name,size,vocab", PUBLISHED, ids=str)
def test_a_released_size_has_the_released_model_s_parameters(name: str, size: str, vocab: int):
    assert count(name, size, vocab) == PUBLISHED[name, size, vocab]


def test_every_documented_size_is_a_setting_and_every_setting_is_documented():
    for name in ("gpt2", "llama", "mamba"):
        assert documented_sizes(name) == list(load(name).SETTINGS)


@pytest.mark.parametrize("name,size", SIZES, ids=lambda value: value)
def test_a_size_s_costs_are_known_before_anything_is_compiled(name: str, size: str):
    experiment = resolved(name, size)
    facts = estimated(name, size)
    vocab = experiment.data.tokenizer.vocab_size
    assert facts["vocab_size"] == vocab
    assert facts["parameters"] == count(name, size, vocab)
    assert facts["tokens"] == experiment.run.steps * experiment.data.batch_size * experiment.data.sequence_length
    # Weights, gradients and Adam's two moments, in float32.
    assert 16 <= facts["state_bytes"] / facts["parameters"] < 16.1
    assert facts["flops_per_token"] > 6 * (facts["parameters"] - vocab * experiment.model.width) * 0.95


@pytest.mark.parametrize("size", ["10m", "30m", "70m", "150m", "400m", "1b", "3b", "8b"])
def test_llama_sizes_see_about_twenty_tokens_a_parameter(size: str):
    facts = estimated("llama", size)
    assert 10 < facts["tokens"] / facts["parameters"] < 40


@pytest.mark.parametrize("path", FILES, ids=NAMES.get)
def test_an_unknown_argument_is_answered_with_the_nearest(path: Path):
    if not documented_sizes(NAMES[path]):
        return
    with pytest.raises(UserError, match="did you mean"):
        load(NAMES[path]).get_config(documented_sizes(NAMES[path])[0] + "x")


@pytest.mark.parametrize("path", FILES, ids=NAMES.get)
def test_the_tiny_variant_describes_itself(path: Path):
    text = describe(resolved(NAMES[path], "tiny"), 1)
    assert re.search(r"^parameters +[\d,]+$", text, re.MULTILINE)
    assert "about 0.0" in text


# The same model as another's, or half of it; the quickstart is what `test_end_to_end.py` runs.
OTHERS_SHOW = [
    *((name, "tiny") for name in ("adapter", "assistant/pretrain", "assistant/sft", "gpt2", "longer", "quickstart"))
]
OTHERS_SHOW += [("mamba", "tiny_hybrid")]
VARIANTS = [(NAMES[path], "tiny") for path in FILES if (NAMES[path], "tiny") not in OTHERS_SHOW]


@pytest.mark.parametrize(
    "name,variant", [*VARIANTS, *(pytest.param(*other, marks=pytest.mark.slow) for other in OTHERS_SHOW)]
)
def test_the_tiny_variant_trains(name: str, variant: str):
    experiment = resolved(name, variant, VOCAB)
    # A schedule of a few steps would end in its warm-up, where a step moves too little to be seen.
    data, config = experiment.data, dataclasses.replace(experiment.optimizer, warmup=0)
    model = make_model(dataclasses.replace(experiment.model, scan=True))  # two layers compile as fast as one
    optimizer = make_optimizer(config, 1000, model.axes)
    fresh = functools.partial(init_state, model, optimizer, window=config.skip_window, ema=bool(config.ema))
    state = jax.jit(fresh)(jax.random.key(0))
    judged = data.rows not in ("text", "chat")
    batch: Any = random_batch(experiment) if judged else random_tokens(data.batch_size, data.sequence_length)
    if model.config.head == "tokens":
        logits_BTV = jax.eval_shape(model.logits, state.params, batch.tokens_BT)
        assert logits_BTV.shape == (data.batch_size, data.sequence_length, VOCAB)

    loss = experiment.objective.make(model, np.ones(VOCAB, np.int32))
    step = jax.jit(make_step(loss, optimizer, make_schedule(config, 1000), config, seed=0), donate_argnums=0)
    losses = []
    for _ in range(3):
        state, metrics = step(state, batch)
        losses.append(metrics["loss"].value())
    # Random tokens hold nothing to know, so an untrained model is about as good as a guess, and then learns them.
    if not judged:
        assert np.log(VOCAB) - 0.1 < losses[0] < np.log(VOCAB) + 1.5
    assert losses[0] > losses[1] > losses[2]
    assert int(state.step) == 3
    assert int(state.guard.skipped) == 0


def random_tokens(rows: int, length: int) -> TokenBatch:
    tokens_BT = np.random.default_rng(0).integers(VOCAB, size=(rows, length + 1)).astype(np.int32)
    ones_BT = np.ones((rows, length), np.int32)
    positions_BT = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
    mask_BT = ones_BT.astype(np.float32)
    return TokenBatch(tokens_BT[:, :-1], tokens_BT[:, 1:], mask_BT, positions_BT, ones_BT)  # type: ignore[arg-type]
