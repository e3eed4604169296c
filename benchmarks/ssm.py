"""The state-space recurrence, value and gradients: in chunks against one token after the other.

    python benchmarks/ssm.py            # about a minute on 2 cores; --quick for fewer turns

Both run in this process and take turns (A B A B …), on a row of 2,048 tokens in float32. Printed, and written to
benchmarks/results/ssm-PLATFORM.json: medians, bests and their ratio. The plain recurrence keeps every token's state for
its backward pass: half a gigabyte here.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from common import machine, times_faster, write_results

from llmlab.core.host_memory import keep_freed_memory
from llmlab.kernels.ssm import ssm

LENGTH, HEADS, HEAD_DIM, STATE = 2048, 8, 64, 128
GATE = 5.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="3 turns of each side instead of --rounds")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each side (default: %(default)s)")
    parser.add_argument("--chunks", type=int, nargs="+", default=[32, 64, 128], help="(default: %(default)s)")
    arguments = parser.parse_args()
    keep_freed_memory()
    sides = {f"chunks of {chunk}": step("chunked", chunk) for chunk in arguments.chunks}
    sides["recurrence"] = step("reference", 1)
    for side in sides.values():
        side()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(3 if arguments.quick else arguments.rounds):
        for name, side in sides.items():
            begin = time.perf_counter()
            side()
            seconds[name].append(time.perf_counter() - begin)
    results = {}
    for name, of_side in seconds.items():
        ratio = times_faster(of_side, seconds["recurrence"])
        results[name] = ratio | {"milliseconds": 1e3 * statistics.median(of_side), "seconds": of_side}
        print(
            f"{name:14} {results[name]['milliseconds']:7.1f} ms (best {1e3 * min(of_side):.1f}); "
            f"{ratio['ours_times_faster']:.1f} times as fast as the recurrence (asked: {GATE:.0f})"
        )
    platform = jax.default_backend()
    setting = {"length": LENGTH, "heads": HEADS, "head_dim": HEAD_DIM, "state": STATE}
    path = write_results(f"ssm-{platform}", {"machine": machine(), "setting": setting, "results": results})
    print(f"written to {path}")


def step(implementation: str, chunk: int) -> Callable[[], None]:
    """A call that computes the value and every gradient, and waits for them."""
    rng = np.random.default_rng(0)
    shapes = [(1, LENGTH, HEADS, HEAD_DIM), (1, LENGTH, HEADS), (HEADS,), (1, LENGTH, 1, STATE), (1, LENGTH, 1, STATE)]
    x, dt, a, b, c = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes)
    arguments = (x, jax.nn.softplus(dt - 3), -jnp.exp(a), b, c)
    options = dict(chunk=chunk, implementation=implementation, segment_ids_BT=jnp.ones((1, LENGTH), jnp.int32))
    run = functools.partial(ssm, **options)

    def loss(arguments: tuple[jax.Array, ...]) -> jax.Array:
        return jnp.sum(jnp.square(run(*arguments)[0]))

    compiled = jax.jit(jax.value_and_grad(loss))

    def call() -> None:
        jax.block_until_ready(compiled(arguments))

    return call


if __name__ == "__main__":
    main()
