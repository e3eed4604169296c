"""The state-space recurrence in chunks against one token after the other: by itself, and in a whole training step.

    python benchmarks/ssm.py            # about four minutes on 2 cores; --quick for fewer turns

All run in this process and take turns (A B A B …), on a row of 2,048 tokens in float32. `recurrence` is its value and
gradients; `training step` is that of a Mamba-2 of two layers of width 256: forward, loss, backward and AdamW. Printed,
and written to benchmarks/results/ssm-PLATFORM.json: medians, bests and their ratio. The plain recurrence keeps every
token's state for its backward pass: half a gigabyte here, and as much for each layer.
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
from llmlab.data.pipeline import TokenBatch
from llmlab.kernels.ssm import ssm
from llmlab.model.config import mamba2
from llmlab.model.ssm import SsmConfig
from llmlab.model.transformer import make_model
from llmlab.objective import next_token
from llmlab.train.optimizer import adamw, make_optimizer, make_schedule
from llmlab.train.state import init_state
from llmlab.train.step import make_step

LENGTH, HEADS, HEAD_DIM, STATE, VOCAB = 2048, 8, 64, 128, 512
GATE = 5.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="3 turns of each side instead of --rounds")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each side (default: %(default)s)")
    parser.add_argument("--chunks", type=int, nargs="+", default=[32, 64, 128], help="(default: %(default)s)")
    arguments = parser.parse_args()
    keep_freed_memory()
    rounds = 3 if arguments.quick else arguments.rounds
    results = {work: compare(make, arguments.chunks, rounds) for work, make in WORK.items()}
    for work, of_work in results.items():
        for name, result in of_work.items():
            print(
                f"{work:14} {name:14} {result['milliseconds']:7.1f} ms (best {result['best']:.1f}); "
                f"{result['ours_times_faster']:.1f} times as fast as plain (asked: {GATE:.0f})"
            )
    setting = {"length": LENGTH, "heads": HEADS, "head_dim": HEAD_DIM, "state": STATE}
    report = {"machine": machine(), "setting": setting, "results": results}
    print(f"written to {write_results(f'ssm-{jax.default_backend()}', report)}")


def compare(make: Callable[[str, int], Callable[[], None]], chunks: list[int], rounds: int) -> dict[str, dict]:
    """Chunks of each size and the plain recurrence, in turns."""
    sides = {f"chunks of {chunk}": make("chunked", chunk) for chunk in chunks}
    sides["plain"] = make("reference", 1)
    for side in sides.values():
        side()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            begin = time.perf_counter()
            side()
            seconds[name].append(time.perf_counter() - begin)
    return {
        name: times_faster(of_side, seconds["plain"])
        | {"milliseconds": 1e3 * statistics.median(of_side), "best": 1e3 * min(of_side), "seconds": of_side}
        for name, of_side in seconds.items()
    }


def training_step(implementation: str, chunk: int) -> Callable[[], None]:
    """A call that takes one step, and waits for it."""
    shape = SsmConfig(state=STATE, head_dim=HEAD_DIM, chunk=chunk, implementation=implementation)
    model = make_model(mamba2(width=HEADS * HEAD_DIM // 2, layers=2, vocab_size=VOCAB, ssm=shape))
    settings = adamw(learning_rate=1e-4, warmup=0, schedule="constant")
    optimizer = make_optimizer(settings, 1000, model.axes)
    loss = next_token().make(model, np.ones(VOCAB, np.int32))
    step = jax.jit(make_step(loss, optimizer, make_schedule(settings, 1000), settings, seed=0), donate_argnums=0)
    init = functools.partial(init_state, model, optimizer, window=settings.skip_window, ema=False)
    state = jax.jit(init)(jax.random.key(0))
    tokens_BT = np.random.default_rng(0).integers(VOCAB, size=(1, LENGTH + 1)).astype(np.int32)
    ones_BT, positions_BT = np.ones((1, LENGTH), np.int32), np.arange(LENGTH, dtype=np.int32)[None]
    batch = TokenBatch(tokens_BT[:, :-1], tokens_BT[:, 1:], ones_BT.astype(np.float32), positions_BT, ones_BT)

    def call() -> None:
        nonlocal state
        state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))

    return call


def recurrence(implementation: str, chunk: int) -> Callable[[], None]:
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


WORK = {"recurrence": recurrence, "training step": training_step}

if __name__ == "__main__":
    main()
