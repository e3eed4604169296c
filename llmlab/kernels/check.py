"""Is the chosen kernel right on this machine? Compared with its reference before a run trusts it, gradients too."""

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llmlab import __version__
from llmlab.core.errors import DiskFull
from llmlab.core.paths import write_atomic
from llmlab.kernels import attention_blockwise
from llmlab.kernels.attention import attention
from llmlab.kernels.logprobs import token_logprobs
from llmlab.kernels.ssm import ssm

LENGTH = 2 * attention_blockwise.BLOCK + 40
# Relative norms that rounding explains on products of some hundred terms, several times over.
TOLERANCES = {"float64": 1e-10, "float32": 1e-4, "bfloat16": 3e-2, "float16": 5e-3}


class Comparison(NamedTuple):
    """One output or gradient: how far it is from the reference's, in relative norm."""

    name: str
    error: float
    tolerance: float
    ok: bool


def compare(
    function: Callable[..., Any],
    reference: Callable[..., Any],
    arguments: dict[str, jax.Array],
    *,
    tolerance: float,
    reference_dtype: Any = None,
) -> list[Comparison]:
    """Both functions on the same named arrays: every output, and every argument's gradient for one fixed cotangent.

    Args:
      reference_dtype: what the arguments become for the reference; their own dtype when None.
    """
    precise = {name: x if reference_dtype is None else x.astype(reference_dtype) for name, x in arguments.items()}
    actual, truth = _outputs_and_gradients(function, arguments), _outputs_and_gradients(reference, precise)
    return [compared(name, actual[name], truth[name], tolerance) for name in truth]


def compared(name: str, actual: Any, truth: Any, tolerance: float) -> Comparison:
    """The relative difference of two arrays in Euclidean norm."""
    wanted = np.asarray(truth, np.float64)
    distance = float(np.linalg.norm(np.asarray(actual, np.float64) - wanted))
    error = distance / max(float(np.linalg.norm(wanted)), 1e-30)
    return Comparison(name, error, tolerance, bool(error <= tolerance))


def check_attention(
    head_dim: int,
    heads: int,
    kv_heads: int,
    dtype: Any,
    *,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    value_dim: int = 0,
    sinks: bool = False,
    packed: bool = False,
    implementation: str = "auto",
    length: int | None = None,
) -> list[Comparison]:
    """Attention as training calls it, at least two blocks long, against the reference in float32 or better.

    Args:
      value_dim: numbers in a head of values; 0 means head_dim. sinks: with a logit for each head in the denominator.
      packed: two documents and padding in each row, cut at different places; else one document.
      implementation: the run's, by name: "auto" would choose for the few rows of the check.
      length: tokens a row; `LENGTH`, more than two blocks, when None.
    """
    B, T = 2, length or LENGTH
    of_keys = (B, T, kv_heads)
    shapes = {"q": (B, T, heads, head_dim), "k": (*of_keys, head_dim), "v": (*of_keys, value_dim or head_dim)}
    arguments = _random(shapes | ({"sinks_N": (heads,)} if sinks else {}), dtype)
    segments_BT, positions_BT = _rows(T, packed)
    ask: Callable[..., jax.Array] = functools.partial(
        attention,
        q_positions_BT=positions_BT,
        k_positions_BS=positions_BT,
        q_segment_ids_BT=segments_BT,
        k_segment_ids_BS=segments_BT,
        causal=causal,
        window=window,
        softcap=softcap,
    )
    return compare(
        lambda q, k, v, **more: {"attention": ask(q, k, v, **more, rows_in_order=True, implementation=implementation)},
        lambda q, k, v, **more: {"attention": ask(q, k, v, **more, implementation="reference")},
        arguments,
        tolerance=_tolerance(dtype),
        reference_dtype=jnp.promote_types(dtype, jnp.float32),
    )


def check_ssm(
    head_dim: int,
    state: int,
    dtype: Any,
    *,
    chunk: int,
    groups: int = 1,
    packed: bool = False,
    implementation: str = "auto",
) -> list[Comparison]:
    """The state-space recurrence over more than two chunks, against the reference in float32 or better.

    Args:
      groups: of two heads each, two groups at most: the reference keeps every token's state.
      packed: as for attention.
    """
    B, T, K = 2, 2 * chunk + 40, min(groups, 2)
    shapes = {"x": (B, T, 2 * K, head_dim), "dt": (B, T, 2 * K), "b": (B, T, K, state), "c": (B, T, K, state)}
    segment_ids_BT, _ = _rows(T, packed)
    precise = jnp.promote_types(dtype, jnp.float32)

    def run(implementation: str, x: Any, dt: Any, rate: Any, b: Any, c: Any) -> dict[str, jax.Array]:
        dt, a = jax.nn.softplus(dt.astype(precise)), -jnp.exp(rate.astype(precise))
        y, last = ssm(x, dt, a, b, c, segment_ids_BT=segment_ids_BT, chunk=chunk, implementation=implementation)
        return {"y": y, "state": last}

    return compare(
        functools.partial(run, implementation),
        functools.partial(run, "reference"),
        _random(shapes | {"rate": (2 * K,)}, dtype),
        tolerance=_tolerance(dtype),
        reference_dtype=precise,
    )


def check_token_logprobs(
    width: int,
    vocabulary: int,
    dtype: Any,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    implementation: str = "auto",
    length: int = 48,
    chunk: int | None = None,
) -> list[Comparison]:
    """Token log-probabilities, log-normaliser and entropy against the reference in float32 or better."""
    B = 2
    arguments = _random({"hidden": (B, length, width), "w": (width, vocabulary)}, dtype)
    arguments["w"] = arguments["w"] * jnp.asarray(width**-0.5, dtype)
    target_BT = jnp.asarray(np.random.default_rng(1).integers(0, vocabulary, (B, length)), jnp.int32)
    ask = functools.partial(token_logprobs, target_BT=target_BT, temperature=temperature, softcap=softcap)
    return compare(
        lambda hidden, w: ask(hidden, w, implementation=implementation, chunk=chunk)._asdict(),
        lambda hidden, w: ask(hidden, w, implementation="reference")._asdict(),
        arguments,
        tolerance=_tolerance(dtype),
        reference_dtype=jnp.promote_types(dtype, jnp.float32),
    )


def checked_once(
    key_parts: Sequence[object], run: Callable[[], list[Comparison]], cache_dir: str | os.PathLike[str]
) -> list[Comparison]:
    """The rows of `run()`, remembered per device, versions and `key_parts`; only a check that passed is remembered."""
    device = jax.devices()[0]
    # The compiler and the driver can go wrong as well as the code: each has a version of its own.
    compiler = [jax.__version__, metadata.version("jaxlib"), str(getattr(device.client, "platform_version", ""))]
    key = [device.platform, device.device_kind, *compiler, __version__, *map(str, key_parts)]
    marker = Path(cache_dir) / f"check-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]}.json"
    remembered = _read_marker(marker)
    if remembered is not None:
        return remembered
    rows = run()
    if all(row.ok for row in rows):
        _write_marker(marker, {"key": key, "rows": [list(row) for row in rows]})
    return rows


def _outputs_and_gradients(function: Callable[..., Any], arguments: dict[str, jax.Array]) -> dict[str, jax.Array]:
    def weighted(arguments: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
        out = function(**arguments)
        parts = []
        for i, x in enumerate(out.values()):
            dtype = jnp.promote_types(x.dtype, jnp.float32)
            # Irregular, and of both signs: a constant cotangent would hide errors that cancel over a softmax.
            cotangent = jnp.cos(jnp.arange(x.size, dtype=dtype) + i).reshape(x.shape)
            parts.append(jnp.sum(x.astype(dtype) * cotangent))
        return sum(parts[1:], parts[0]), out

    grads, out = jax.jit(jax.grad(weighted, has_aux=True))(arguments)
    return out | {f"gradient of {name}": grad for name, grad in grads.items()}


def _rows(T: int, packed: bool) -> tuple[jax.Array, jax.Array]:
    """Segment ids and positions of two rows: two documents and padding in each, or one document."""
    index_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], (2, T))
    if not packed:
        return jnp.ones_like(index_BT), index_BT
    cuts_B1 = jnp.array([[T // 3], [T // 2]], jnp.int32)
    segments_BT = jnp.where(index_BT >= T - 9, 0, 1 + (index_BT >= cuts_B1))
    return segments_BT, jnp.where(index_BT >= cuts_B1, index_BT - cuts_B1, index_BT)


def _tolerance(dtype: Any) -> float:
    # Products of float32 go through TensorFloat-32 or bfloat16 on accelerators unless the precision is raised.
    name = jnp.dtype(dtype).name
    return TOLERANCES["bfloat16" if name == "float32" and jax.default_backend() != "cpu" else name]


def _random(shapes: Mapping[str, tuple[int, ...]], dtype: Any) -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    return {name: jnp.asarray(rng.standard_normal(shape, np.float32)).astype(dtype) for name, shape in shapes.items()}


def _read_marker(marker: Path) -> list[Comparison] | None:
    """What an earlier check found, or None when there is no marker that can be read."""
    try:
        rows = [Comparison(*row) for row in json.loads(marker.read_text())["rows"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return rows if rows and all(row.ok is True for row in rows) else None


def _write_marker(marker: Path, content: dict[str, Any]) -> None:
    """A cache that cannot be written costs only the next check."""
    with contextlib.suppress(OSError, DiskFull):
        marker.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(marker, json.dumps(content).encode())
