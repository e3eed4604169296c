"""A model goes on from a prompt: a whole batch inside one compiled function, or one row as a stream of tokens.

Either way the prompt is read once, into the cache, and every further token is one short step. What compiles depends on
the model, the number of rows, which filters are on, and the lengths rounded up by `bucket`: calls that differ in less
share it.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from llmlab.core.errors import UserError
from llmlab.infer.decoder import Decoder, ready, ready_for_steps
from llmlab.infer.sampling import repetition_penalty as penalise
from llmlab.infer.sampling import sample
from llmlab.model.score import check_predicts_tokens
from llmlab.model.transformer import unembed
from llmlab.model.types import Cache, Inputs, Model, Params

Settings = dict[str, np.ndarray]


def generate(
    model: Model,
    params: Params,
    prompt_BT: ArrayLike,
    *,
    max_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int | Sequence[int] = 0,
    prompt_lengths_B: ArrayLike | None = None,
    stop_ids: Sequence[int] = (),
    pad_id: int = 0,
) -> np.ndarray:
    """Prompt and continuation, int32 [B, T + max_tokens].

    Each row is its prompt, directly followed by its continuation, up to and with the first stop id; `pad_id` fills what
    is left. `continuations` takes the rows apart. Unstacked parameters (`model.unstack`) spare every call a copy.

    Args:
      seed: rows are drawn with seed, seed + 1, …; or a seed for each row. A row's text depends on its own only.
      prompt_lengths_B: tokens in each row of a prompt that is padded on the right; None: T.

    Raises:
      UserError: an empty prompt, more tokens than the model's positions reach, a setting out of its range, or a model
        that predicts no tokens.
    """
    prompt_BT, lengths_B = _checked(model, prompt_BT, prompt_lengths_B, max_tokens)
    rows, time = prompt_BT.shape
    new_BT, count_B = _generate(
        Decoder.of(model),
        params,
        _padded(prompt_BT),
        lengths_B,
        _seeds(seed, rows),
        np.asarray(stop_ids, np.int32),
        np.int32(max_tokens),
        _settings(temperature, top_k, top_p, min_p, repetition_penalty),
        capacity=bucket(time + max_tokens),
        room=bucket(max_tokens),
    )
    new_BT, count_B = np.asarray(new_BT), np.asarray(count_B)
    out_BT = np.full((rows, time + max_tokens), pad_id, np.int32)
    for row, (length, count) in enumerate(zip(lengths_B, count_B, strict=True)):
        out_BT[row, :length] = prompt_BT[row, :length]
        out_BT[row, length : length + count] = new_BT[row, :count]
    return out_BT


def continuations(
    out_BT: np.ndarray, prompt_lengths_B: ArrayLike, max_tokens: int, stop_ids: Sequence[int] = ()
) -> list[list[int]]:
    """What `generate` wrote after each prompt, up to and with the first stop id."""
    rows = []
    for row, length in zip(out_BT, np.broadcast_to(np.asarray(prompt_lengths_B), len(out_BT)), strict=True):
        ids = [int(id) for id in row[length : length + max_tokens]]
        stop = next((place for place, id in enumerate(ids) if id in stop_ids), len(ids))
        rows.append(ids[: stop + 1])
    return rows


def complete(
    model: Model,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    seeds: Sequence[int],
    stop_ids: Sequence[int],
    rows: int = 0,
    width: int = 0,
    **sampling: Any,
) -> list[list[int]]:
    """The ids that follow each prompt, up to and with the first stop id. Each prompt has a seed of its own.

    `rows`, `width`: pad the batch to at least so many rows, and these to so many ids, so that few shapes compile.
    `sampling`: temperature, top_k and what else `generate` takes.
    """
    if not prompts:
        return []
    devices = 1 if model.partition is None else model.partition.size("batch")
    padding = -max(rows, len(prompts)) % devices + max(0, rows - len(prompts))
    # Padding repeats the first row, and so ends when that does.
    padded, padded_seeds = [*prompts, *[prompts[0]] * padding], [*seeds, *[seeds[0]] * padding]
    lengths_B = np.array([len(prompt) for prompt in padded], np.int32)
    prompt_BT = np.zeros((len(padded), max(width, *lengths_B)), np.int32)
    for row, prompt in enumerate(padded):
        prompt_BT[row, : len(prompt)] = prompt
    sampling |= {"max_tokens": max_tokens, "seed": padded_seeds, "stop_ids": stop_ids}
    out_BT = generate(model, params, prompt_BT, prompt_lengths_B=lengths_B, **sampling)
    return continuations(out_BT, lengths_B, max_tokens, stop_ids)[: len(prompts)]


def stream(
    model: Model,
    params: Params,
    prompt: Sequence[int],
    *,
    max_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    stop_ids: Sequence[int] = (),
) -> Iterator[int]:
    """The ids that follow one prompt, each as soon as it is there: those that `generate` would give.

    Raises:
      UserError: as `generate`, before the first token.
    """
    prompt_BT, lengths_B = _checked(model, np.asarray(prompt)[None], None, max_tokens)
    settings = _settings(temperature, top_k, top_p, min_p, repetition_penalty)
    decoder, seeds_B, capacity = Decoder.of(model), _seeds(seed, 1), bucket(prompt_BT.shape[1] + max_tokens)

    def ids() -> Iterator[int]:
        weights = ready(decoder, params)
        cache, state = _first(decoder, weights, _padded(prompt_BT), lengths_B, seeds_B, settings, capacity=capacity)
        for step in range(max_tokens):
            token_B = state.token_B
            # The next step starts before this token is looked at: the device does not wait for the reader.
            if step + 1 < max_tokens:
                cache, state = _one_more(decoder, weights, cache, state, seeds_B, settings)
            token = int(np.asarray(token_B)[0])
            yield token
            if token in stop_ids:
                return

    return ids()


def bucket(size: int) -> int:
    """`size` rounded up to a multiple of a quarter of the power of two below it, and of 16: few lengths compile."""
    step = max(16, 2 ** max((size - 1).bit_length() - 3, 0))
    return -(-size // step) * step


class _State(NamedTuple):
    """Between two tokens: the one just drawn, where it goes, what the rows have seen, and whether they have ended."""

    token_B: jax.Array
    position_B: jax.Array
    seen_BV: jax.Array | None
    done_B: jax.Array


@functools.partial(jax.jit, static_argnums=0, static_argnames=("capacity", "room"))
def _generate(
    decoder: Decoder,
    params: Params,
    prompt_BT: jax.Array,
    lengths_B: jax.Array,
    seeds_B: jax.Array,
    stop_ids: jax.Array,
    max_tokens: jax.Array,
    settings: Settings,
    *,
    capacity: int,
    room: int,
) -> tuple[jax.Array, jax.Array]:
    """(new_BT, count_B): at most `max_tokens` (at most `room`) new ids a row, and how many are real."""
    params = ready_for_steps(decoder, params)

    def ended(state: _State) -> _State:
        return state._replace(done_B=state.done_B | jnp.isin(state.token_B, stop_ids))

    def unfinished(loop: tuple[Any, ...]) -> jax.Array:
        step, _, state, _, _ = loop
        return (step < max_tokens) & ~jnp.all(state.done_B)

    def body(loop: tuple[Any, ...]) -> tuple[Any, ...]:
        step, cache, state, new_BT, count_B = loop
        count_B = count_B + ~state.done_B
        cache, state = _advance(decoder, params, cache, state, seeds_B, settings)
        new_BT = jax.lax.dynamic_update_slice(new_BT, state.token_B[:, None], (0, step))
        return step + 1, cache, ended(state), new_BT, count_B

    cache, state = _start(decoder, params, prompt_BT, lengths_B, seeds_B, settings, capacity)
    new_BT = jnp.zeros((len(lengths_B), room), jnp.int32).at[:, 0].set(state.token_B)
    loop = (jnp.int32(1), cache, ended(state), new_BT, jnp.ones_like(lengths_B))
    *_, new_BT, count_B = jax.lax.while_loop(unfinished, body, loop)
    if decoder.partition is None:
        return new_BT, count_B
    everywhere = decoder.partition.sharding()
    return jax.lax.with_sharding_constraint((new_BT, count_B), everywhere)


def _start(
    decoder: Decoder,
    params: Params,
    prompt_BT: jax.Array,
    lengths_B: jax.Array,
    seeds_B: jax.Array,
    settings: Settings,
    capacity: int,
) -> tuple[Cache, _State]:
    """Reads the prompt into a new cache and draws the first token."""
    rows, time = prompt_BT.shape
    offsets_BT = jnp.broadcast_to(jnp.arange(time, dtype=jnp.int32), (rows, time))
    real_BT = offsets_BT < lengths_B[:, None]
    positions_BT = jnp.minimum(offsets_BT, decoder.max_positions - 1)
    inputs = Inputs(prompt_BT, positions_BT, real_BT.astype(jnp.int32))
    out = decoder.apply(params, inputs, cache=decoder.init_cache(rows, capacity))
    last_B1D = jnp.take_along_axis(out.hidden_BTD, (lengths_B - 1)[:, None, None], axis=1)
    logits_BV = unembed(last_B1D, decoder.head(params), decoder.softcap)[:, 0]
    seen_BV = None
    if "repetition_penalty" in settings:
        rows_B1 = jnp.arange(rows)[:, None]
        seen_BV = jnp.zeros(logits_BV.shape, bool).at[rows_B1, prompt_BT].max(real_BT)
    assert out.cache is not None
    return out.cache, _draw(logits_BV, lengths_B, seen_BV, jnp.zeros(rows, bool), seeds_B, settings)


def _advance(
    decoder: Decoder, params: Params, cache: Cache, state: _State, seeds_B: jax.Array, settings: Settings
) -> tuple[Cache, _State]:
    """One token a row into the cache, and the next one drawn. A row that has ended is padding."""
    inputs = Inputs(state.token_B[:, None], state.position_B[:, None], (~state.done_B)[:, None].astype(jnp.int32))
    out = decoder.apply(params, inputs, cache=cache)
    logits_BV = unembed(out.hidden_BTD, decoder.head(params), decoder.softcap)[:, 0]
    position_B = jnp.minimum(state.position_B + 1, decoder.max_positions - 1)
    assert out.cache is not None
    return out.cache, _draw(logits_BV, position_B, state.seen_BV, state.done_B, seeds_B, settings)


def _draw(
    logits_BV: jax.Array,
    position_B: jax.Array,
    seen_BV: jax.Array | None,
    done_B: jax.Array,
    seeds_B: jax.Array,
    settings: Settings,
) -> _State:
    filters = {name: value for name, value in settings.items() if name != "repetition_penalty"}
    if seen_BV is not None:
        logits_BV = penalise(logits_BV, seen_BV, settings["repetition_penalty"])
    token_B = sample(logits_BV, seeds_B, position_B, **({"temperature": 0.0} | filters))
    if seen_BV is not None:
        seen_BV = seen_BV.at[jnp.arange(len(token_B)), token_B].set(True)
    return _State(token_B, position_B, seen_BV, done_B)


_first = jax.jit(_start, static_argnums=0, static_argnames="capacity")
_one_more = jax.jit(_advance, static_argnums=0, donate_argnums=2)


def _checked(
    model: Model, prompt_BT: ArrayLike, lengths_B: ArrayLike | None, max_tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    check_predicts_tokens(model.config)
    prompt_BT = np.asarray(prompt_BT)
    if prompt_BT.ndim != 2 or not prompt_BT.size:
        raise UserError(f"the prompt is empty or no [B, T] array of ids (shape {prompt_BT.shape}): start with bos_id")
    rows, time = prompt_BT.shape
    lengths_B = np.full(rows, time) if lengths_B is None else np.asarray(lengths_B)
    if lengths_B.shape != (rows,) or lengths_B.min() < 1 or lengths_B.max() > time:
        raise UserError(f"prompt_lengths_B={lengths_B.tolist()} should be {rows} numbers from 1 to {time}")
    vocab = model.config.vocab_size
    if not np.issubdtype(prompt_BT.dtype, np.integer) or prompt_BT.min() < 0 or prompt_BT.max() >= vocab:
        raise UserError(f"the prompt holds what is no id of this model: ids are integers from 0 to {vocab - 1}")
    if max_tokens < 1:
        raise UserError(f"max_tokens={max_tokens} should be at least 1")
    longest, reach = int(lengths_B.max()), model.config.max_positions
    if longest + max_tokens > reach:
        raise UserError(
            f"a prompt of {longest} tokens and max_tokens={max_tokens} exceed the model's {reach} positions: "
            + (f"ask for at most {reach - longest}" if longest < reach else "shorten the prompt")
        )
    return prompt_BT.astype(np.int32), lengths_B.astype(np.int32)


def _settings(temperature: float, top_k: int, top_p: float, min_p: float, repetition_penalty: float) -> Settings:
    """The settings that are on: their names decide what compiles, their values do not.

    Raises:
      UserError: a setting out of its range.
    """
    ranges = {
        "temperature": (temperature, temperature >= 0, "0 (the likeliest token) or more"),
        "top_k": (top_k, top_k >= 0, "0 (all) or more"),
        "top_p": (top_p, 0 < top_p <= 1, "above 0 and at most 1 (all)"),
        "min_p": (min_p, 0 <= min_p <= 1, "from 0 (all) to 1"),
        "repetition_penalty": (repetition_penalty, repetition_penalty > 0, "above 0; 1 is none"),
    }
    for name, (value, good, wanted) in ranges.items():
        if not good:
            raise UserError(f"{name}={value} should be {wanted}")
    off: dict[str, float] = {"temperature": 0, "top_k": 0, "top_p": 1, "min_p": 0, "repetition_penalty": 1}
    if temperature == 0:
        off |= {"top_k": top_k, "top_p": top_p, "min_p": min_p}
    return {
        name: np.asarray(value, np.int32 if name == "top_k" else np.float32)
        for name, (value, _, _) in ranges.items()
        if value != off[name]
    }


def _seeds(seed: int | Sequence[int], rows: int) -> np.ndarray:
    seeds = list(seed) if isinstance(seed, Sequence) else [seed + row for row in range(rows)]
    if len(seeds) != rows:
        raise UserError(f"{len(seeds)} seeds for {rows} rows: give one for each, or one number")
    return np.asarray([seed % 2**32 for seed in seeds], np.uint32)


def _padded(prompt_BT: np.ndarray) -> np.ndarray:
    return np.pad(prompt_BT, ((0, 0), (0, bucket(prompt_BT.shape[1]) - prompt_BT.shape[1])))
