"""lm_eval over the server, as its users run it: the figures of `llmlab eval`, and the same text."""

import importlib.util
import io
import json
import os
import random
import subprocess
import sys

import pytest

import llmlab
from llmlab.data.tokenizer import TokenizerConfig
from llmlab.data.tokenizer_train import train_tokenizer
from llmlab.eval.command import EvalConfig, eval_command
from llmlab.model import hf
from llmlab.model.transformer import make_model
from llmlab.train.convert import convert
from tests.helpers import random_params, tiny_llama
from tests.serve_for_tests import TEXTS, running

pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="`make test-parity` installs lm_eval"),
]
REACH, NEW_TOKENS = 256, 24
WORDS = " ".join(TEXTS).split()
# By lm_eval's names, of what it does with a row of a file of this name.
TASKS = {
    "text": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}, {"metric": "byte_perplexity"}],
    },
    "choosing": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{prompt}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}],
    },
    "writing": {
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": NEW_TOKENS},
        "metric_list": [{"metric": "exact_match"}],
    },
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model in both forms, `hf` and `run`, and of each task its file and what lm_eval is to do with it."""
    folder = tmp_path_factory.mktemp("lm_eval")
    tokenizer = train_tokenizer(TokenizerConfig(vocab_size=400), TEXTS * 30)
    model = make_model(tiny_llama(vocab_size=tokenizer.vocab_size, max_positions=REACH))
    hf.save(model, random_params(model), folder / "hf", tokenizer)
    convert(folder / "hf", folder / "run")
    draw = random.Random(0)

    def words(least, most):
        return " ".join(draw.choice(WORDS) for _ in range(draw.randint(least, most)))

    choices = ["quick fox", "lazy dog", "naïve 日本語"]
    write_rows(folder / "text.jsonl", [{"text": words(1, 30) + draw.choice(["", "\n"])} for _ in range(20)])
    rows = [{"prompt": words(4, 8), "choices": choices, "answer": draw.randrange(3)} for _ in range(10)]
    write_rows(folder / "choosing.jsonl", rows)
    write_rows(folder / "writing.jsonl", [{"prompt": words(2, 8), "answer": "the"} for _ in range(6)])
    for name, task in TASKS.items():
        files = {"data_files": {"test": str(folder / f"{name}.jsonl")}}
        source = {"task": name, "dataset_path": "json", "dataset_kwargs": files, "test_split": "test"}
        (folder / f"{name}.yaml").write_text(json.dumps(source | task))
    return folder


@pytest.fixture(scope="module")
def server(place):
    with running(place, {"run": llmlab.open(place / "run")}) as made:
        yield made


@pytest.fixture(scope="module")
def ours(place):
    """What `llmlab eval` makes of the same files."""
    tasks = tuple(str(place / f"{name}.jsonl") for name in ("choosing", "writing"))
    settings = EvalConfig(source="jsonl", files=(str(place / "text.jsonl"),), tasks=tasks, max_tokens=NEW_TOKENS)
    return eval_command(llmlab.open(place / "run"), place / "run", settings, out=io.StringIO(), quiet=True)


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def lm_eval(server, place, out, *tasks, **settings):
    """{task: its metrics} and {task: the responses to its rows}."""
    settings = {"model": "run", "base_url": f"{server.url}/v1/completions", "max_length": REACH, **settings}
    arguments = ",".join(f"{name}={value}" for name, value in settings.items())
    command = [sys.executable, "-m", "lm_eval", "run", "--model=local-completions", f"--model_args={arguments}"]
    command += [f"--include_path={place}", f"--tasks={','.join(tasks)}", f"--output_path={out}", "--log_samples"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(place / "home")}
    done = subprocess.run(command, cwd=out, env=os.environ | offline, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-5000:]
    (results,) = out.rglob("results_*.json")
    samples = {task: read_rows(next(out.rglob(f"samples_{task}_*.jsonl"))) for task in tasks}
    answers = {
        task: [row["filtered_resps"] for row in sorted(rows, key=lambda row: row["doc_id"])]
        for task, rows in samples.items()
    }
    return json.loads(results.read_text())["results"], answers


def test_perplexity_is_that_of_llmlab_eval(server, place, ours, tmp_path):
    """With nothing but the address: lm_eval asks the server for the tokens."""
    results, _ = lm_eval(server, place, tmp_path, "text")
    for name in ("bits_per_byte", "byte_perplexity"):
        assert results["text"][f"{name},none"] == pytest.approx(ours["held_out"][name], rel=1e-5)


def test_choices_and_writing_are_those_of_llmlab_eval(server, place, ours, tmp_path):
    """With the tokenizer of the converted model, which puts BOS in front; several requests at a time."""
    tokenizer = {"tokenizer": place / "hf", "tokenizer_backend": "huggingface", "add_bos_token": True}
    results, answers = lm_eval(server, place, tmp_path, "choosing", "writing", num_concurrent=4, **tokenizer)
    choosing, writing = (read_rows(place / "run" / "eval" / f"{name}.jsonl") for name in ("choosing", "writing"))
    for theirs, row in zip(answers["choosing"], choosing, strict=True):
        assert [float(nats) for nats, _ in theirs] == pytest.approx(row["log_likelihoods"], abs=1e-3)
    assert results["choosing"]["acc,none"] == pytest.approx(ours["tasks"][0]["acc"])
    assert [text for (text,) in answers["writing"]] == [row["written"].split("\n")[0] for row in writing]
    assert len({row["written"] for row in writing}) > 3
