"""What a config would run, worked out before anything is compiled: `llmlab train --print_config`."""

import dataclasses
import functools
import json
from typing import Any

import jax
import jax.numpy as jnp

from llmlab.core.config import to_json
from llmlab.data.config import DataConfig
from llmlab.data.pipeline import GroupBatch, TokenBatch
from llmlab.model.adapters import adapter_axes, add_adapter, frozen_base
from llmlab.model.cost import abstract_params, flops_per_token, parameter_count, tree_bytes
from llmlab.model.transformer import make_model
from llmlab.train.config import Experiment
from llmlab.train.optimizer import make_optimizer
from llmlab.train.progress import thousands
from llmlab.train.state import merge


def describe(experiment: Experiment, devices: int) -> str:
    """The resolved config as JSON, then a line each: parameters, FLOPs per token, tokens in all, estimated memory."""
    facts = estimate(experiment, devices)
    lines = [json.dumps(to_json(experiment), indent=2), ""]
    if not experiment.model.vocab_size:
        lines.append(f"vocabulary        {facts['vocab_size']:,} (asked of the tokenizer, which may find fewer)")
    if experiment.adapter.kind != "none":
        lines.append(f"trained           {facts['trained']:,} of an adapter; the parameters stay frozen")
    lines += [
        f"parameters        {facts['parameters']:,}",
        f"FLOPs per token   {thousands(facts['flops_per_token'])}",
        f"tokens in all     {facts['tokens']:,} ({experiment.run.steps:,} steps)",
        f"memory            about {facts['bytes_per_device'] / 2**30:.2f} GiB on each of {devices} devices: "
        f"weights, gradients and optimizer {facts['state_bytes'] / 2**30:.2f}, "
        f"activations {facts['activation_bytes'] / 2**30:.2f} in all",
    ]
    return "\n".join(lines)


def estimate(experiment: Experiment, devices: int) -> dict[str, Any]:
    """The same as numbers. Bytes assume that the mesh splits what it can evenly; a compiler may need more."""
    data, optimizer = experiment.data, experiment.optimizer
    config = experiment.model
    if not config.vocab_size:
        config = dataclasses.replace(config, vocab_size=data.tokenizer.vocab_size)
    model = make_model(config)
    params = abstract_params(model)
    trainable, axes = params, model.axes
    frozen: Any = {}
    if (adapter := experiment.adapter).kind != "none":
        frozen = jax.eval_shape(functools.partial(frozen_base, model, config=adapter), params)
        fresh = functools.partial(add_adapter, model, config=adapter, key=jax.random.key(0))
        trainable, axes = jax.eval_shape(fresh, frozen), adapter_axes(model, adapter)
    moments = jax.eval_shape(make_optimizer(optimizer, experiment.run.steps, axes).init, trainable)
    weights = tree_bytes(trainable) + tree_bytes(frozen)
    state = weights + tree_bytes(trainable) * (2 if optimizer.ema else 1) + tree_bytes(moments)
    rows = data.batch_size // optimizer.accumulate
    batch = _abstract_batch(data, rows)
    loss = experiment.objective.make(model, jnp.zeros(config.vocab_size, jnp.int32))

    def residuals(trainable: Any, frozen: Any, batch: Any) -> Any:
        """What the forward pass keeps for the backward: the leaves of the function that runs it."""
        return jax.vjp(lambda trained: jnp.asarray(loss(merge(trained, frozen), batch, None)[0].sum), trainable)[1]

    activations = max(0, tree_bytes(jax.eval_shape(residuals, trainable, frozen, batch)) - weights)
    shape = experiment.mesh.shape(devices)
    copies = shape[0] * shape[3]  # `data` and `sequence` replicate the weights
    # Under an adapter the weights are read whole, and quantised then.
    at_start = tree_bytes(params) if frozen else 0
    return {
        "vocab_size": config.vocab_size,
        "parameters": parameter_count(params),
        "trained": parameter_count(trainable),
        "flops_per_token": flops_per_token(config, data.sequence_length, frozen=bool(frozen)),
        "tokens": experiment.run.steps * data.batch_size * data.sequence_length,
        "state_bytes": state,
        "activation_bytes": activations,
        "bytes_per_device": max(state * copies + activations, at_start * copies) / devices,
    }


def _abstract_batch(data: DataConfig, rows: int) -> Any:
    """A batch of so many rows. How many pairs share a row depends on their lengths: here it is one in 128 tokens."""
    batch_BT = jax.ShapeDtypeStruct((rows, data.sequence_length), jnp.int32)
    if data.rows in ("text", "chat"):
        return TokenBatch(**dict.fromkeys(TokenBatch._fields, batch_BT))  # type: ignore[arg-type]
    of_groups_BPR = jax.ShapeDtypeStruct((rows, -(-data.sequence_length // 128), 2), jnp.float32)
    names = [name for name in GroupBatch._fields if name not in GroupBatch._field_defaults]
    return GroupBatch(**{name: of_groups_BPR if name.endswith("BPR") else batch_BT for name in names})  # type: ignore[arg-type]
