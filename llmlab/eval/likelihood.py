"""How likely a model finds a continuation of a prompt: the sum of the log-probabilities of its tokens.

Prompt and continuation are token ids already, encoded apart and then joined: what is scored is exactly the ids that
were given, and the prompt's are the same for every continuation.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from llmlab.data.pipeline import TokenBatch
from llmlab.kernels.logprobs import token_logprobs
from llmlab.model.types import Inputs, Model, Params

SHORTEST_BUCKET = 32

Pair = tuple[Sequence[int], Sequence[int]]
LogLikelihoods = Callable[[Params, Sequence[Pair], Callable[[int], None]], np.ndarray]


def make_log_likelihoods(model: Model, batch_size: int) -> LogLikelihoods:
    """score(params, pairs, progress) -> float64 nats for each (prompt, continuation), of which neither is empty.

    A pair has at most max_positions + 1 tokens, of which the last is only predicted. Pairs run longest first, in
    batches padded to few lengths, so that little compiles and a lack of memory shows at once. `progress` is called with
    the number of pairs done.
    """
    partition = model.partition
    sharding = None if partition is None else partition.sharding("batch", "time")
    devices, pieces = (1, 1) if partition is None else (partition.size("batch"), partition.size("time"))
    rows = -(-batch_size // devices) * devices

    def summed(params: Params, batch: TokenBatch) -> jax.Array:
        out = model.apply(params, Inputs(batch.tokens_BT, batch.positions_BT, batch.segment_ids_BT))
        logp_BT, _, _ = token_logprobs(
            out.hidden_BTD,
            model.head(params),
            batch.targets_BT,
            softcap=model.config.logit_softcap,
            flatten=pieces == 1,
        )
        return jnp.sum(jnp.where(batch.mask_BT > 0, logp_BT, 0), axis=1)

    summed = jax.jit(summed, out_shardings=None if partition is None else partition.sharding())

    def score(params: Params, pairs: Sequence[Pair], progress: Callable[[int], None]) -> np.ndarray:
        order = sorted(range(len(pairs)), key=lambda i: -sum(map(len, pairs[i])))
        out = np.zeros(len(pairs))
        for begin in range(0, len(order), rows):
            chosen = order[begin : begin + rows]
            time = bucket(max(sum(map(len, pairs[i])) for i in chosen) - 1, model.config.max_positions)
            batch = _rows([pairs[i] for i in chosen], rows, -(-time // pieces) * pieces)
            logp_B = summed(params, TokenBatch(*jax.device_put(tuple(batch), sharding)))
            out[chosen] = np.asarray(jax.device_get(logp_B), np.float64)[: len(chosen)]
            progress(begin + len(chosen))
        return out

    return score


def bucket(length: int, longest: int) -> int:
    """The padded length: the next of 32, 48, 64, 96, 128, …, but no more than `longest`."""
    size = SHORTEST_BUCKET
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size // 3 * 4
    return min(size, longest)


def fit(prompt: Sequence[int], room: int) -> tuple[list[int], bool]:
    """A prompt of at most `room` tokens, and whether it was cut: its first token (BOS) stays, then its end."""
    if len(prompt) <= room:
        return list(prompt), False
    return [prompt[0], *prompt[len(prompt) - room + 1 :]], True


def _rows(pairs: Sequence[Pair], rows: int, time: int) -> TokenBatch:
    """Arrays [rows, time] of the pairs, masked but for the continuations, then rows of padding."""
    tokens_BT, targets_BT, positions_BT, segment_ids_BT = (np.zeros((rows, time), np.int32) for _ in range(4))
    mask_BT = np.zeros((rows, time), np.float32)
    for row, (prompt, continuation) in enumerate(pairs):
        ids = [*prompt, *continuation]
        end = len(ids) - 1
        tokens_BT[row, :end], targets_BT[row, :end] = ids[:-1], ids[1:]
        positions_BT[row, :end], segment_ids_BT[row, :end] = np.arange(end), 1
        mask_BT[row, len(prompt) - 1 : end] = 1
    return TokenBatch(tokens_BT, targets_BT, mask_BT, positions_BT, segment_ids_BT)  # type: ignore[arg-type]
