"""Greedy decoding of a 30M-parameter Llama, against transformers' `generate` with the same weights.

    python benchmarks/decode.py            # some minutes on 2 cores; --quick for fewer rounds
    python benchmarks/decode.py --compiled # torch.compile's side too, which takes minutes to compile

Each side has a process of its own, and they take turns (A B A B …). Printed, and written to
benchmarks/results/decode-PLATFORM.json: medians and bests, their ratios, the time of the first call (compilation), peak
memory, and the bound that reading every weight once a step sets, from the bandwidth measured in the same run. With
other work on the machine only the bests mean something, and not much: threads that wait for each other suffer most.
The side "kept" is transformers with freed memory kept, as llmlab keeps it and a user of transformers does not.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

import numpy as np
from common import Side, in_turns, machine, read_bandwidth, serve, times_faster, write_results

from llmlab.core.host_memory import keep_freed_memory

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
        sides["transformers"] = Side(theirs, weights, arguments.threads)
        sides["kept"] = Side(theirs, weights, arguments.threads, kept=True)
        if arguments.compiled:
            sides["compiled"] = Side(theirs, weights, arguments.threads, compiled=True)
        bandwidth = max(side.answer()["bandwidth"] for name, side in sides.items() if name != "ours")
        print(f"{facts['parameters'] / 1e6:.1f}M parameters on {facts['platform']}, {bandwidth / 1e9:.0f} GB/s read")
        results = [compare(sides, batch, rounds, bandwidth, facts["read_per_step"]) for batch in BATCHES]
        memory = {name: side.ask("memory") for name, side in sides.items()}
    print("peak memory: " + ", ".join(f"{name} {bytes_ / 2**20:.0f} MiB" for name, bytes_ in memory.items()))
    setting = {"prompt": PROMPT, "new_tokens": NEW, "vocab_size": VOCAB, "rounds": rounds}
    of_machine = machine() | {"bandwidth": bandwidth}
    report = {"machine": of_machine, "model": facts, "setting": setting, "peak_memory": memory, "results": results}
    print(f"written to {write_results('decode-' + facts['platform'], report)}")


def compare(sides: dict[str, Side], batch: int, rounds: int, bandwidth: float, read_per_step: int) -> dict:
    """Times of all sides at this batch size, and whether they wrote the same tokens."""
    prompt_BT = np.random.default_rng(0).integers(0, VOCAB, (batch, PROMPT))
    first = {name: side.ask(prompt_BT) for name, side in sides.items()}
    answers = in_turns(sides, prompt_BT, rounds)
    runs = {name: [seconds for _, seconds in of_side] for name, of_side in answers.items()}
    bound = bandwidth / read_per_step * batch
    print(f"\nbatch {batch}: reading the weights bounds it at {bound:.0f} tokens/s")
    result: dict = {"batch": batch, "bound_tokens_per_second": bound}
    for name, seconds in runs.items():
        speed, best = (batch * NEW / value for value in (statistics.median(seconds), min(seconds)))
        ratio = times_faster(runs["ours"], seconds)
        same = float(np.mean(first[name][0] == first["ours"][0]))
        result[name] = {
            "tokens_per_second": speed,
            "best_tokens_per_second": best,
            "first_call_seconds": first[name][1],
        }
        result[name] |= ratio | {"tokens_equal_to_ours": same, "seconds": seconds}
        print(
            f"  {name:13} {speed:6.0f} tokens/s (best {best:.0f}); ours is {ratio['ours_times_faster']:.2f} times as "
            f"fast, by bests {ratio['ours_times_faster_by_bests']:.2f}; first call {first[name][1]:.1f} s; "
            f"{same:.0%} of its tokens are ours"
        )
    return result


def ours(end: Connection, weights: str) -> None:
    keep_freed_memory()
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
    serve(end, timed(lambda prompt_BT: generate(model, params, prompt_BT, max_tokens=NEW)))


def theirs(end: Connection, weights: str, threads: int, *, compiled: bool = False, kept: bool = False) -> None:
    if kept:
        keep_freed_memory()
    import torch
    from torch_twin import transformers_llama

    from llmlab.model.config import llama

    torch.set_num_threads(threads)
    model = transformers_llama(llama("30m", vocab_size=VOCAB)).eval()
    model.generation_config.pad_token_id = 0
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

    serve(end, timed(generate))


def timed(generate: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray], tuple[np.ndarray, float]]:
    """(tokens, seconds) of a prompt."""

    def answer(prompt_BT: np.ndarray) -> tuple[np.ndarray, float]:
        start = time.perf_counter()
        return generate(prompt_BT), time.perf_counter() - start

    return answer


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


if __name__ == "__main__":
    main()
