"""A `Model` from a `ModelConfig`: embedding, a stack of blocks, final norm, head.

Parameters: {"embedding", "layers": {"0": …, "1": …}, "head"}. Layers are stacked, [layers of that slot, …], one slot
for each place in the config's pattern; whether they run scanned or unrolled is a switch that no weight depends on.
Steps of one token are so short that splitting the stacks would dominate them: `unstack` splits once, beforehand.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from llmlab.core.arrays import accumulation_dtype
from llmlab.core.errors import UserError
from llmlab.core.mesh import Partition
from llmlab.model import cache as caches
from llmlab.model import weights
from llmlab.model.config import ModelConfig
from llmlab.model.layers import Block, Embedding, Head
from llmlab.model.rope import Rotary, rotary_angles
from llmlab.model.types import Cache, Inputs, Model, Out, Params, inputs

REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def make_model(config: ModelConfig, partition: Partition | None = None) -> Model:
    """The model of this config, laid out over `partition` (None: one device).

    Raises:
      UserError: the vocabulary size is not known, or the mesh does not divide one of the model's dimensions.
    """
    if not config.vocab_size:
        raise UserError("model.vocab_size=0 is the tokenizer's, which is not known here: set it")
    if partition is not None:
        check_divides(config, partition)
    blocks = [Block(config, partition, kind=config.kind(layer)) for layer in range(config.layers)]
    embedding, head = Embedding(config, partition), Head(config, partition)
    slots = len(config.pattern)

    def boxed_init(key: jax.Array) -> dict[str, Any]:
        embedding_key, layers_key, head_key = jax.random.split(key, 3)
        one = inputs(jnp.zeros((1, 1), jnp.int32))
        x_BTD = jnp.zeros((1, 1, config.width), config.dtype)
        rotary = _rotary(config, one)
        stacked = {str(s): block.clone(stack=len(blocks[s::slots])) for s, block in enumerate(blocks[:slots])}
        return {
            "embedding": embedding.init(embedding_key, one)["params"],
            "layers": {
                slot: block.init(jax.random.fold_in(layers_key, int(slot)), x_BTD, one, rotary[block.kind], None, None)[
                    "params"
                ]
                for slot, block in stacked.items()
            },
            "head": head.init(head_key, x_BTD)["params"],
        }

    def apply(params: Params, inputs: Inputs, *, cache: Cache | None = None, key: jax.Array | None = None) -> Out:
        x_BTD: Any = embedding.apply({"params": params["embedding"]}, inputs)
        rotary = _rotary(config, inputs)
        x_BTD, cache = _run_stack(config, blocks, params["layers"], x_BTD, inputs, rotary, cache)
        hidden_BTD: Any = head.apply({"params": params["head"]}, x_BTD)
        return Out(hidden_BTD, cache, {})

    def head_weight(params: Params) -> jax.Array:
        if config.tied_embedding:
            return _turned(weights.dense(params["embedding"]["tokens_VD"], config.dtype))
        return weights.dense(params["head"]["unembedding_DV"], config.dtype)

    def logits(params: Params, tokens_BT: jax.Array) -> jax.Array:
        hidden_BTD = apply(params, inputs(tokens_BT)).hidden_BTD
        return unembed(hidden_BTD, head_weight(params), config.logit_softcap)

    def init_cache(batch: int, capacity: int) -> Cache:
        layers = tuple(caches.empty(block.cache_specs(capacity), batch) for block in blocks)
        return {"lengths_B": jnp.zeros(batch, jnp.int32), "layers": layers}

    def unstack(params: Params) -> Params:
        return params | {"layers": _split(params["layers"], config.layers)}

    return Model(
        config=config,
        partition=partition,
        init=lambda key: nn.unbox(boxed_init(key)),
        apply=apply,
        head=head_weight,
        logits=logits,
        init_cache=init_cache,
        unstack=unstack,
        axes=_logical_axes(boxed_init),
    )


def _turned(w_VD: jax.Array) -> jax.Array:
    """w_DV. On CPU as an array of its own: the gradient of a tall [V, D] product takes 1.7 times that of [D, V]."""
    return jax.lax.platform_dependent(w_VD, cpu=lambda w: jax.lax.optimization_barrier(w.T), default=lambda w: w.T)


def unembed(hidden_BTD: jax.Array, w_DV: jax.Array, softcap: float | None) -> jax.Array:
    """logits_BTV in at least float32."""
    dtype = accumulation_dtype(hidden_BTD.dtype)
    logits_BTV = jnp.einsum("BTD,DV->BTV", hidden_BTD, w_DV, preferred_element_type=dtype)
    return logits_BTV if softcap is None else softcap * jnp.tanh(logits_BTV / softcap)


def check_divides(config: ModelConfig, partition: Partition) -> None:
    """Raises UserError where an axis of the model is not divided by the devices that would share it."""
    sizes = {
        "embed": ("model.width", config.width),
        "heads": ("model.heads", config.heads),
        "kv_heads": ("model.kv_heads", config.K),
        "mlp": ("model.mlp_width", config.F),
        "vocab": ("model.vocab_size", config.vocab_size),
    }
    for logical, (key, size) in sizes.items():
        devices = partition.size(logical)
        if size % devices:
            raise UserError(
                f"{key}={size} is not divided by the {devices} devices of mesh.rules.{logical}: "
                f"try {key}={-(-size // devices) * devices}, or another mesh"
            )


def _run_stack(
    config: ModelConfig,
    blocks: list[Block],
    layers: Any,
    x_BTD: jax.Array,
    inputs: Inputs,
    rotary: dict[str, Rotary | None],
    cache: Cache | None,
) -> tuple[jax.Array, Cache | None]:
    """All blocks in order: scanned over periods of the pattern where asked, else unrolled."""
    if cache is not None:
        split, kept = _split(layers, config.layers), []
        for block, params, layer_cache in zip(blocks, split, cache["layers"], strict=True):
            x_BTD, written = block.apply(
                {"params": params}, x_BTD, inputs, rotary[block.kind], cache["lengths_B"], layer_cache
            )
            kept.append(written)
        lengths_B = cache["lengths_B"] + jnp.sum(inputs.segment_ids_BT > 0, axis=1, dtype=jnp.int32)
        return x_BTD, {"lengths_B": lengths_B, "layers": tuple(kept)}

    def run(block: Block, params: Any, x_BTD: jax.Array) -> jax.Array:
        def call(params: Any, x_BTD: jax.Array) -> jax.Array:
            return block.apply({"params": params}, x_BTD, inputs, rotary[block.kind], None, None)[0]

        if config.remat != "none":
            call = jax.checkpoint(call, policy=REMAT_POLICIES[config.remat])
        return call(params, x_BTD)

    slots = len(config.pattern)
    periods = config.layers // slots if config.scan and isinstance(layers, dict) else 0
    if periods:

        def period(x_BTD: jax.Array, params: Any) -> tuple[jax.Array, None]:
            for slot in range(slots):
                x_BTD = run(blocks[slot], params[str(slot)], x_BTD)
            return x_BTD, None

        x_BTD, _ = jax.lax.scan(period, x_BTD, jax.tree.map(lambda stack: stack[:periods], layers))
        layers = {slot: jax.tree.map(lambda stack: stack[periods:], tree) for slot, tree in layers.items()}
    done = periods * slots
    for block, params in zip(blocks[done:], _split(layers, config.layers - done), strict=True):
        x_BTD = run(block, params, x_BTD)
    return x_BTD, None


def _split(layers: Any, count: int) -> tuple[Any, ...]:
    """The trees of `count` consecutive layers, from stacks by slot: one split a stack, never a slice a layer."""
    if isinstance(layers, tuple):
        return layers
    split = {slot: _split_stack(tree) for slot, tree in layers.items()}
    return tuple(split[str(layer % len(layers))][layer // len(layers)] for layer in range(count))


def _split_stack(tree: Any) -> list[Any]:
    leaves, treedef = jax.tree.flatten(tree)
    unflatten: Any = treedef.unflatten  # type: ignore[attr-defined]
    depth = leaves[0].shape[0]
    parts = [jax.lax.split(leaf, (1,) * depth, axis=0) if depth else () for leaf in leaves]
    return [unflatten([p[i].reshape(p[i].shape[1:]) for p in parts]) for i in range(depth)]


def _rotary(config: ModelConfig, inputs: Inputs) -> dict[str, Rotary | None]:
    """What each kind of layer turns by."""
    kinds = sorted(set(config.pattern))
    if config.positions != "rotary":
        return dict.fromkeys(kinds)
    ropes = {kind: config.rope.local if kind == "local" else config.rope for kind in kinds}
    angles = {rope: rotary_angles(inputs.positions_BT, rope, config.H, config.dtype) for rope in set(ropes.values())}
    return {kind: angles[rope] for kind, rope in ropes.items()}


def _logical_axes(boxed_init: Any) -> Any:
    """The tree of logical axes, from the boxes that Linen puts around what it initialises."""

    def is_box(node: Any) -> bool:
        return isinstance(node, nn.Partitioned)

    boxed = jax.eval_shape(boxed_init, jax.random.key(0))
    return jax.tree.map(lambda box: box.names, boxed, is_leaf=is_box)
