"""Greedy decoding of a 30M-parameter Llama, against transformers' `generate` with the same weights.

    python benchmarks/decode.py            # about two minutes on 2 cores; --quick for fewer rounds
    python benchmarks/decode.py --compiled # torch.compile's side too, which takes minutes to compile

Each side has a process of its own, and they take turns (A B A B …). Printed, and written to
benchmarks/results/decode-PLATFORM.json: medians and bests, their ratios, the time of the first call (compilation), peak
memory, and the bound that reading every weight once a step sets, from the bandwidth measured in the same run. With
other work on the machine only the bests mean something, and not much: threads that wait for each other suffer most.
"""

import argparse
import json
import multiprocessing
import os
import platform
import resource
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

PROMPT, NEW, VOCAB = 32, 128, 12_288
BATCHES = (1, 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="3 rounds instead of --rounds")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each side (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="torch's threads (default: all cores)")
    parser.add_argument("--compiled", action="store_true", help="also transformers with a static cache, compiled")
    arguments = parser.parse_args()
    rounds = 3 if arguments.quick else arguments.rounds
    with tempfile.TemporaryDirectory() as folder:
        weights = os.path.join(folder, "weights.npz")
        sides = {"ours": Side(ours, weights)}
        facts = sides["ours"].answer()
        sides["transformers"] = Side(theirs, weights, arguments.threads, False)
        if arguments.compiled:
            sides["compiled"] = Side(theirs, weights, arguments.threads, True)
        bandwidth = max(side.answer()["bandwidth"] for name, side in sides.items() if name != "ours")
        print(f"{facts['parameters'] / 1e6:.1f}M parameters on {facts['platform']}, {bandwidth / 1e9:.0f} GB/s read")
        results = [compare(sides, batch, rounds, bandwidth, facts["read_per_step"]) for batch in BATCHES]
        memory = {name: side.ask("memory") for name, side in sides.items()}
    print("peak memory: " + ", ".join(f"{name} {bytes_ / 2**20:.0f} MiB" for name, bytes_ in memory.items()))
    path = Path(__file__).parent / "results" / f"decode-{facts['platform']}.json"
    path.parent.mkdir(exist_ok=True)
    machine = {"cores": os.cpu_count(), "machine": platform.machine(), "bandwidth": bandwidth}
    setting = {"prompt": PROMPT, "new_tokens": NEW, "vocab_size": VOCAB, "rounds": rounds}
    report = {"machine": machine, "model": facts, "setting": setting, "peak_memory": memory, "results": results}
    path.write_text(json.dumps(report, indent=2) + "\n")
    print(f"written to {path}")


def compare(sides: dict[str, "Side"], batch: int, rounds: int, bandwidth: float, read_per_step: int) -> dict:
    """Times of all sides at this batch size, and whether they wrote the same tokens."""
    prompt_BT = np.random.default_rng(0).integers(0, VOCAB, (batch, PROMPT))
    first = {name: side.ask(prompt_BT) for name, side in sides.items()}
    runs: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            runs[name].append(side.ask(prompt_BT)[1])
    bound = bandwidth / read_per_step * batch
    print(f"\nbatch {batch}: reading the weights bounds it at {bound:.0f} tokens/s")
    result: dict = {"batch": batch, "bound_tokens_per_second": bound}
    for name, seconds in runs.items():
        speed, best = (batch * NEW / value for value in (statistics.median(seconds), min(seconds)))
        ratio = statistics.median(theirs / ours for ours, theirs in zip(runs["ours"], seconds, strict=True))
        best_ratio = min(seconds) / min(runs["ours"])
        same = float(np.mean(first[name][0] == first["ours"][0]))
        result[name] = {
            "tokens_per_second": speed,
            "best_tokens_per_second": best,
            "first_call_seconds": first[name][1],
        }
        result[name] |= {"ours_times_faster": ratio, "ours_times_faster_by_bests": best_ratio}
        result[name] |= {"tokens_equal_to_ours": same, "seconds": seconds}
        print(
            f"  {name:13} {speed:6.0f} tokens/s (best {best:.0f}); ours is {ratio:.2f} times as fast, by bests "
            f"{best_ratio:.2f}; first call {first[name][1]:.1f} s; {same:.0%} of its tokens are ours"
        )
    return result


class Side:
    """One competitor in its own process: answers (tokens, seconds) to a prompt, and its peak memory in bytes."""

    def __init__(self, work, *arguments):
        context = multiprocessing.get_context("spawn")
        self.end, other = context.Pipe()
        self.process = context.Process(target=work, args=(other, *arguments), daemon=True)
        self.process.start()

    def ask(self, question):
        self.end.send(question)
        return self.answer()

    def answer(self):
        return self.end.recv()


def serve(end: Connection, generate) -> None:
    """Answers until the other end closes."""
    while True:
        try:
            question = end.recv()
        except EOFError:
            return
        if isinstance(question, str):
            end.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
            continue
        start = time.perf_counter()
        tokens_BT = generate(question)
        end.send((tokens_BT, time.perf_counter() - start))


def ours(end: Connection, weights: str) -> None:
    import jax

    from llmlab.infer.generate import generate
    from llmlab.model.config import llama
    from llmlab.model.transformer import make_model

    model = make_model(llama("30m", vocab_size=VOCAB))
    params = jax.jit(model.init)(jax.random.key(0))
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    np.savez(weights, **state_dict(jax.tree.map(np.asarray, params)))
    read = 4 * (count - params["embedding"]["tokens_VD"].size)
    end.send({"parameters": count, "read_per_step": read, "platform": jax.default_backend()})
    params = jax.block_until_ready(jax.jit(model.unstack)(params))
    serve(end, lambda prompt_BT: generate(model, params, prompt_BT, max_tokens=NEW))


def theirs(end: Connection, weights: str, threads: int, compiled: bool) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from llmlab.model.config import llama

    torch.set_num_threads(threads)
    c = llama("30m", vocab_size=VOCAB)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=c.width,
        intermediate_size=c.F,
        num_hidden_layers=c.layers,
        num_attention_heads=c.heads,
        num_key_value_heads=c.K,
        rms_norm_eps=c.norm_epsilon,
        max_position_embeddings=c.max_positions,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict({name: torch.from_numpy(value.copy()) for name, value in np.load(weights).items()})
    end.send({"bandwidth": read_bandwidth(torch)})
    options = {"max_new_tokens": NEW, "do_sample": False, "use_cache": True}
    if compiled:
        model.forward = torch.compile(model.forward)
        options["cache_implementation"] = "static"

    def generate(prompt_BT: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            prompt = torch.from_numpy(prompt_BT)
            return model.generate(prompt, attention_mask=torch.ones_like(prompt), **options).numpy()

    serve(end, generate)


def state_dict(params: dict) -> dict[str, np.ndarray]:
    """Our weights under the names, and in the layout, of transformers' Llama."""
    layers, head = params["layers"]["0"], params["head"]
    out = {
        "model.embed_tokens.weight": params["embedding"]["tokens_VD"],
        "model.norm.weight": head["norm"]["scale"],
        "lm_head.weight": head["unembedding_DV"].T,
    }
    attention = {"q_proj": "query_DNH", "k_proj": "key_DKH", "v_proj": "value_DKH"}
    mlp = {"gate_proj": "gate_DF", "up_proj": "up_DF", "down_proj": "down_FD"}
    for layer, width in enumerate([out["model.norm.weight"].size] * len(layers["mlp"]["up_DF"])):
        name = f"model.layers.{layer}"
        out[f"{name}.input_layernorm.weight"] = layers["attention_norm"]["scale"][layer]
        out[f"{name}.post_attention_layernorm.weight"] = layers["mlp_norm"]["scale"][layer]
        for theirs_, ours_ in attention.items():
            out[f"{name}.self_attn.{theirs_}.weight"] = layers["attention"][ours_][layer].reshape(width, -1).T
        out[f"{name}.self_attn.o_proj.weight"] = layers["attention"]["out_NHD"][layer].reshape(-1, width).T
        for theirs_, ours_ in mlp.items():
            out[f"{name}.mlp.{theirs_}.weight"] = layers["mlp"][ours_][layer].T
    return out


def read_bandwidth(torch) -> float:
    """Bytes a second that a sum over 256 MiB reads, the best of ten."""
    x = torch.ones(2**26)
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        x.sum()
        seconds.append(time.perf_counter() - start)
    return x.numel() * 4 / min(seconds)


if __name__ == "__main__":
    main()
