"""A `Model` from a `ModelConfig`: embedding, a stack of blocks, final norm, head.

Parameters: {"embedding", "layers": {"0": …, "1": …}, "head"}. Layers are stacked, [layers of that slot, …], one slot
for each of `config.stacks()`; whether they run scanned or unrolled is a switch that no weight depends on.
Steps of one token are so short that splitting the stacks would dominate them: `unstack` splits once, beforehand.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from llmlab.core.arrays import Metrics, accumulation_dtype
from llmlab.core.errors import UserError
from llmlab.core.mesh import Partition
from llmlab.model import cache as caches
from llmlab.model import weights
from llmlab.model.block import Block
from llmlab.model.config import ModelConfig
from llmlab.model.layers import Embedding, Head
from llmlab.model.rope import Rotary, rotary_angles
from llmlab.model.routing import LOAD, corrected, over_layers
from llmlab.model.score import check_predicts_tokens, check_scores, scored
from llmlab.model.types import Cache, Inputs, Model, Out, Params, inputs


def _saves_products(prim: Any, *operands: Any, **settings: Any) -> Any:
    """Weight products, of which those of experts are grouped."""
    if prim.name == "ragged_dot_general":
        return True
    return jax.checkpoint_policies.dots_with_no_batch_dims_saveable(prim, *operands, **settings)


REMAT_POLICIES = {
    "dots": _saves_products,
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
    blocks = [
        Block(config, partition, kind=config.kind(layer), has_experts=config.has_experts(layer))
        for layer in range(config.layers)
    ]
    embedding, head = Embedding(config, partition), Head(config, partition)

    def boxed_init(key: jax.Array) -> dict[str, Any]:
        embedding_key, layers_key, head_key = jax.random.split(key, 3)
        one = inputs(jnp.zeros((1, 1), jnp.int32))
        x_BTD = jnp.zeros((1, 1, config.width), config.dtype)
        rotary = _rotary(config, one)
        stacks = enumerate(config.stacks())
        stacked = {str(slot): blocks[stack[0]].clone(stack=len(stack)) for slot, stack in stacks}
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
        x_BTD, cache, aux = _run_stack(config, blocks, params["layers"], x_BTD, inputs, rotary, cache)
        hidden_BTD: Any = head.apply({"params": params["head"]}, x_BTD)
        return Out(hidden_BTD, cache, aux)

    def head_weight(params: Params) -> jax.Array:
        check_predicts_tokens(config)
        if config.tied_embedding:
            return weights.dense(params["embedding"]["tokens_VD"], config.dtype).T
        return weights.dense(params["head"]["unembedding_DV"], config.dtype)

    def logits(params: Params, tokens_BT: jax.Array) -> jax.Array:
        w_DV = head_weight(params)
        return unembed(apply(params, inputs(tokens_BT)).hidden_BTD, w_DV, config.logit_softcap)

    def score(params: Params, hidden_BTD: jax.Array) -> jax.Array:
        check_scores(config)
        return scored(params, hidden_BTD)

    def init_cache(batch: int, capacity: int) -> Cache:
        layers = tuple(caches.empty(block.cache_specs(capacity), batch) for block in blocks)
        return {"lengths_B": jnp.zeros(batch, jnp.int32), "layers": layers}

    def init_pages(rows: int, pages: int, size: int, *, int8: bool = False) -> Cache:
        def kept(spec: caches.CacheSpec) -> Any:
            whole = (None, *spec.axes[1:])
            place = partition.constrain if partition is not None else lambda x, *axes: x
            if not spec.grows:
                return place(spec.empty(rows), *whole)
            return jax.tree.map(lambda x: place(x, *whole[: x.ndim]), spec.pool(pages, size, int8=int8))

        specs = [block.cache_specs(config.max_positions) for block in blocks]
        layers = tuple({name: kept(spec) for name, spec in of_layer.items()} for of_layer in specs)
        return {"lengths_B": jnp.zeros(rows, jnp.int32), "layers": layers}

    def unstack(params: Params) -> Params:
        return params | {"layers": _split(config, params["layers"])}

    def post_step(params: Params, aux: Metrics) -> Params:
        corrects = config.experts.count and config.experts.correction
        return _corrected(config, params, aux[LOAD].sum) if corrects else params

    return Model(
        config=config,
        partition=partition,
        init=lambda key: nn.unbox(boxed_init(key)),
        apply=apply,
        head=head_weight,
        logits=logits,
        score=score,
        init_cache=init_cache,
        init_pages=init_pages,
        unstack=unstack,
        post_step=post_step,
        axes=_logical_axes(boxed_init),
    )


def embed(model: Model, params: Params, tokens_BT: jax.Array) -> jax.Array:
    """embeddings_BTD of tokens: given to the model as such, they are what it would have looked up itself."""
    embedding = Embedding(model.config, model.partition)
    return embedding.apply({"params": params["embedding"]}, tokens_BT, method="look_up")  # type: ignore[return-value]


def unembed(hidden_BTD: jax.Array, w_DV: jax.Array, softcap: float | None) -> jax.Array:
    """logits_BTV in at least float32."""
    dtype = accumulation_dtype(hidden_BTD.dtype)
    logits_BTV = jnp.einsum("BTD,DV->BTV", hidden_BTD, w_DV, preferred_element_type=dtype)
    return logits_BTV if softcap is None else softcap * jnp.tanh(logits_BTV / softcap)


def check_divides(config: ModelConfig, partition: Partition) -> None:
    """Raises UserError where an axis of the model is not divided by the devices that would share it."""
    experts, latent = config.experts, config.latent
    sizes = [("embed", "model.width", config.width), ("vocab", "model.vocab_size", config.vocab_size)]
    if config.attends:
        sizes += [("heads", "model.heads", config.heads), ("kv_heads", "model.kv_heads", config.K)]
    if "mamba" in config.pattern:
        sizes += [("heads", "model.ssm.heads", config.ssm_heads)]
    if any(config.has_mlp(config.kind(layer)) and not config.has_experts(layer) for layer in range(config.layers)):
        sizes += [("mlp", "model.mlp_width", config.F)]
    if experts.count:
        width = "model.experts.width" if experts.width else "model.mlp_width"
        sizes += [("experts", "model.experts.count", experts.count), ("mlp", width, config.expert_width)]
    if latent.kv_rank:
        sizes += [("latent", "model.latent.kv_rank", latent.kv_rank), ("latent", "model.latent.q_rank", latent.q_rank)]
    for logical, key, size in sizes:
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
) -> tuple[jax.Array, Cache | None, Metrics]:
    """All blocks in order: scanned over periods of the pattern where asked, else unrolled; decoding counts nothing."""
    if cache is not None:
        kept = []
        filled = caches.Filled(cache["lengths_B"], cache.get("table_BP"))
        for block, params, layer_cache in zip(blocks, _split(config, layers), cache["layers"], strict=True):
            out: Any = block.apply({"params": params}, x_BTD, inputs, rotary[block.kind], filled, layer_cache)
            x_BTD, written, _ = out
            kept.append(written)
        lengths_B = cache["lengths_B"] + jnp.sum(inputs.segment_ids_BT > 0, axis=1, dtype=jnp.int32)
        return x_BTD, cache | {"lengths_B": lengths_B, "layers": tuple(kept)}, {}

    def run(block: Block, params: Any, x_BTD: jax.Array) -> tuple[jax.Array, Metrics]:
        def call(params: Any, x_BTD: jax.Array) -> tuple[jax.Array, Metrics]:
            out: Any = block.apply({"params": params}, x_BTD, inputs, rotary[block.kind], None, None)
            return out[0], out[2]

        if config.remat != "none":
            call = jax.checkpoint(call, policy=REMAT_POLICIES[config.remat])
        return call(params, x_BTD)

    auxes: list[Metrics] = []
    if config.scan and isinstance(layers, dict):
        slots = iter(layers[str(slot)] for slot in range(len(layers)))
        for segment in config.segments():
            stacks = [next(slots) for _ in segment[: len(config.pattern)]]
            x_BTD, more = _scan_segment(run, blocks[segment.start : segment.stop], stacks, x_BTD)
            auxes += more
    else:
        for block, params in zip(blocks, _split(config, layers), strict=True):
            x_BTD, aux = run(block, params, x_BTD)
            auxes.append(aux)
    return x_BTD, None, over_layers(auxes)


def _scan_segment(
    run: Callable[[Block, Any, jax.Array], tuple[jax.Array, Metrics]],
    blocks: list[Block],
    stacks: list[Any],
    x_BTD: jax.Array,
) -> tuple[jax.Array, list[Metrics]]:
    """A scan over whole periods, one stack for each place of it; what is left of the last period is unrolled."""
    places = len(stacks)
    periods = len(blocks) // places

    def period(x_BTD: jax.Array, layers: list[Any]) -> tuple[jax.Array, list[Metrics]]:
        auxes = []
        for block, params in zip(blocks, layers, strict=False):
            x_BTD, aux = run(block, params, x_BTD)
            auxes.append(aux)
        return x_BTD, auxes

    x_BTD, scanned = jax.lax.scan(period, x_BTD, jax.tree.map(lambda stack: stack[:periods], stacks))
    auxes = [jax.tree.map(lambda leaf, i=i: leaf[i], aux) for i in range(periods) for aux in scanned]
    for block, tree in zip(blocks[periods * places :], stacks, strict=False):
        (params,) = _split_stack(jax.tree.map(lambda stack: stack[periods:], tree))
        x_BTD, aux = run(block, params, x_BTD)
        auxes.append(aux)
    return x_BTD, auxes


def _split(config: ModelConfig, layers: Any) -> tuple[Any, ...]:
    """The trees of all layers in order, from stacks by slot: one split a stack, never a slice a layer."""
    if isinstance(layers, tuple):
        return layers
    trees: dict[int, Any] = {}
    for slot, stack in enumerate(config.stacks()):
        trees |= dict(zip(stack, _split_stack(layers[str(slot)]), strict=True))
    return tuple(trees[layer] for layer in range(config.layers))


def _split_stack(tree: Any) -> list[Any]:
    leaves, treedef = jax.tree.flatten(tree)
    unflatten: Any = treedef.unflatten  # type: ignore[attr-defined]
    depth = leaves[0].shape[0]
    parts = [jax.lax.split(leaf, (1,) * depth, axis=0) for leaf in leaves]
    return [unflatten([p[i].reshape(p[i].shape[1:]) for p in parts]) for i in range(depth)]


def _corrected(config: ModelConfig, params: Params, count_LE: jax.Array) -> Params:
    """The parameters with each router's correction moved by the tokens that its experts saw, [expert layer, E]."""
    layers, routed = dict(params["layers"]), [layer for layer in range(config.layers) if config.has_experts(layer)]
    for slot, stack in enumerate(config.stacks()):
        if config.has_experts(stack[0]):
            name, mlp = "correction_E", layers[str(slot)]["mlp"]
            seen_LE = count_LE[np.searchsorted(routed, stack)]
            moved_LE = corrected(mlp[name], seen_LE, config.experts.correction_speed)
            layers[str(slot)] = layers[str(slot)] | {"mlp": mlp | {name: moved_LE}}
    return params | {"layers": layers}


def _rotary(config: ModelConfig, inputs: Inputs) -> dict[str, Rotary | None]:
    """What each kind of layer turns by; None where it does not."""
    kinds = sorted(set(config.pattern))
    if config.positions != "rotary":
        return dict.fromkeys(kinds)
    ropes = {kind: config.rope.local if kind == "local" else config.rope for kind in kinds if kind != "mamba"}
    angles = {
        rope: rotary_angles(inputs.positions_BT, rope, config.rotary_dim, config.dtype) for rope in set(ropes.values())
    }
    return {kind: angles[ropes[kind]] if kind in ropes else None for kind in kinds}


def _logical_axes(boxed_init: Any) -> Any:
    """The tree of logical axes, from the boxes that Linen puts around what it initialises."""

    def is_box(node: Any) -> bool:
        return isinstance(node, nn.Partitioned)

    boxed = jax.eval_shape(boxed_init, jax.random.key(0))
    return jax.tree.map(lambda box: box.names, boxed, is_leaf=is_box)
