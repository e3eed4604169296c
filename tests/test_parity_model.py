"""The same numbers as transformers and torch: logits and gradients of the same weights, AdamW, a first loss."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmlab.model.config import ModelConfig
from llmlab.model.rope import RopeConfig
from llmlab.model.transformer import make_model
from llmlab.objective import next_token
from llmlab.train.optimizer import adamw, make_optimizer, make_schedule
from llmlab.train.state import start
from llmlab.train.step import accumulated_gradients, make_step
from tests.helpers import assert_close, packed_batch, random_params, relative, tiny_gpt2, tiny_llama

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="`make test-parity` installs it")
pytest.importorskip("transformers", reason="`make test-parity` installs it")

from benchmarks import torch_twin  # noqa: E402

# float32 differs by rounding alone: in float64 the same comparison holds to 1e-10.
TOLERANCE = {"float32": 1e-5, "float64": 1e-10}
FAMILIES = {
    "gpt2": (tiny_gpt2(), torch_twin.transformers_gpt2),
    "llama": (tiny_llama(rope=RopeConfig(base=500.0), norm_epsilon=1e-3), torch_twin.transformers_llama),
    "twin": (tiny_gpt2(bias=False), torch_twin.Twin),
}


def gpt2_weights(tree: dict) -> dict[str, np.ndarray]:
    """A tree like our parameters under the names, and in the layout, of transformers' GPT-2: weights [in, out]."""
    stack, norm = tree["layers"]["0"], tree["head"]["norm"]
    out = {
        "transformer.wte.weight": tree["embedding"]["tokens_VD"],
        "transformer.wpe.weight": tree["embedding"]["positions_PD"],
        "transformer.ln_f.weight": norm["scale"],
        "transformer.ln_f.bias": norm["bias"],
        "lm_head.weight": tree["embedding"]["tokens_VD"],
    }
    for layer in range(len(stack["mlp"]["up_DF"])):
        w = jax.tree.map(lambda leaf, i=layer: leaf[i], stack)
        attention, mlp, name = w["attention"], w["mlp"], f"transformer.h.{layer}"
        qkv = [attention[part] for part in ("query_DNH", "key_DKH", "value_DKH")]
        biases = [attention[f"{part}_bias"] for part in ("query_DNH", "key_DKH", "value_DKH")]
        width = len(qkv[0])
        for ours, theirs in (("attention_norm", "ln_1"), ("mlp_norm", "ln_2")):
            out |= {f"{name}.{theirs}.weight": w[ours]["scale"], f"{name}.{theirs}.bias": w[ours]["bias"]}
        out[f"{name}.attn.c_attn.weight"] = np.concatenate([part.reshape(width, -1) for part in qkv], axis=1)
        out[f"{name}.attn.c_attn.bias"] = np.concatenate([bias.reshape(-1) for bias in biases])
        out[f"{name}.attn.c_proj.weight"] = attention["out_NHD"].reshape(-1, width)
        out[f"{name}.attn.c_proj.bias"] = attention["out_NHD_bias"]
        for ours, theirs in (("up_DF", "c_fc"), ("down_FD", "c_proj")):
            out |= {f"{name}.mlp.{theirs}.weight": mlp[ours], f"{name}.mlp.{theirs}.bias": mlp[f"{ours}_bias"]}
    return out


def llama_weights(tree: dict) -> dict[str, np.ndarray]:
    """Likewise for transformers' Llama: weights [out, in]."""
    stack = tree["layers"]["0"]
    out = {
        "model.embed_tokens.weight": tree["embedding"]["tokens_VD"],
        "model.norm.weight": tree["head"]["norm"]["scale"],
        "lm_head.weight": tree["head"]["unembedding_DV"].T,
    }
    for layer in range(len(stack["mlp"]["up_DF"])):
        w = jax.tree.map(lambda leaf, i=layer: leaf[i], stack)
        name, width = f"model.layers.{layer}", len(w["mlp"]["up_DF"])
        out[f"{name}.input_layernorm.weight"] = w["attention_norm"]["scale"]
        out[f"{name}.post_attention_layernorm.weight"] = w["mlp_norm"]["scale"]
        for ours, theirs in (("query_DNH", "q_proj"), ("key_DKH", "k_proj"), ("value_DKH", "v_proj")):
            out[f"{name}.self_attn.{theirs}.weight"] = w["attention"][ours].reshape(width, -1).T
        out[f"{name}.self_attn.o_proj.weight"] = w["attention"]["out_NHD"].reshape(-1, width).T
        for ours, theirs in (("gate_DF", "gate_proj"), ("up_DF", "up_proj"), ("down_FD", "down_proj")):
            out[f"{name}.mlp.{theirs}.weight"] = w["mlp"][ours].T
    return out


def twin_weights(tree: dict) -> dict[str, np.ndarray]:
    """Likewise for the twin of benchmarks/: weights [out, in], no biases."""
    stack = tree["layers"]["0"]
    out = {
        "tokens.weight": tree["embedding"]["tokens_VD"],
        "positions.weight": tree["embedding"]["positions_PD"],
        "norm.weight": tree["head"]["norm"]["scale"],
    }
    for layer in range(len(stack["mlp"]["up_DF"])):
        w = jax.tree.map(lambda leaf, i=layer: leaf[i], stack)
        attention, width = w["attention"], len(w["mlp"]["up_DF"])
        qkv = [attention[part].reshape(width, -1) for part in ("query_DNH", "key_DKH", "value_DKH")]
        out |= {f"blocks.{layer}.{norm}.weight": w[norm]["scale"] for norm in ("attention_norm", "mlp_norm")}
        out[f"blocks.{layer}.qkv.weight"] = np.concatenate(qkv, axis=1).T
        out[f"blocks.{layer}.out.weight"] = attention["out_NHD"].reshape(-1, width).T
        out[f"blocks.{layer}.up.weight"] = w["mlp"]["up_DF"].T
        out[f"blocks.{layer}.down.weight"] = w["mlp"]["down_FD"].T
    return out


NAMES = {"gpt2": gpt2_weights, "llama": llama_weights, "twin": twin_weights}


@pytest.fixture(params=TOLERANCE)
def dtype(request):
    with jax.enable_x64(request.param == "float64"):
        yield request.param


def both(family: str, dtype: str) -> tuple[Any, Any, Any, Any]:
    """(our model, our parameters, their model with the same, a batch of whole rows)."""
    config, build = FAMILIES[family]
    model = make_model(dataclasses.replace(config, dtype=dtype, param_dtype=dtype))
    params = random_params(model)
    torch_model = build(config).to(getattr(torch, dtype))
    state = {name: torch.tensor(np.asarray(value)) for name, value in NAMES[family](host(params)).items()}
    torch_model.load_state_dict(state)
    batch = packed_batch(rows=2, length=12)
    whole = jnp.ones((2, 12), jnp.int32)
    positions_BT = whole * jnp.arange(12, dtype=jnp.int32)[None]
    batch = batch._replace(mask_BT=whole.astype(dtype), positions_BT=positions_BT, segment_ids_BT=whole)
    return model, params, torch_model, batch


def host(tree: Any) -> Any:
    return jax.tree.map(np.asarray, tree)


def their_logits(torch_model: Any, tokens_BT: Any) -> Any:
    out = torch_model(torch.tensor(np.asarray(tokens_BT)).long())
    return out if isinstance(out, torch.Tensor) else out.logits


def their_loss(torch_model: Any, batch: Any) -> Any:
    logits_BTV = their_logits(torch_model, batch.tokens_BT)
    targets = torch.tensor(np.asarray(batch.targets_BT)).long().flatten()
    return torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), targets)


# transformers' Llama normalises and rotates in float32, whatever its dtype: nothing to compare in float64.
@pytest.mark.parametrize(
    "family, dtype",
    [("gpt2", "float32"), ("gpt2", "float64"), ("llama", "float32"), ("twin", "float32"), ("twin", "float64")],
    indirect=["dtype"],
)
def test_logits_and_every_gradient_are_theirs(family, dtype):
    model, params, torch_model, batch = both(family, dtype)
    logits_BTV = jax.jit(model.logits)(params, batch.tokens_BT)
    assert logits_BTV.dtype == dtype
    assert relative(logits_BTV, their_logits(torch_model, batch.tokens_BT).detach()) < TOLERANCE[dtype]

    loss = next_token().make(model, np.ones(model.config.vocab_size, np.int32))
    key = jax.random.key(0)
    gradients = jax.jit(lambda params: accumulated_gradients(loss, params, {}, batch, key, 1)[2])(params)
    their_loss(torch_model, batch).backward()
    mine = NAMES[family](host(gradients))
    theirs = {name: weight.grad.numpy() for name, weight in torch_model.named_parameters()}
    mine = {name: mine[name] for name in theirs}  # a tied head has two names
    assert_close(mine, theirs, TOLERANCE[dtype])


@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_five_steps_of_adamw_are_torchs(clip, dtype):
    """Loss by loss and weight by weight; 0.05 is below every gradient norm here, so that clipping binds."""
    model, params, torch_model, batch = both("twin", dtype)
    config = adamw(learning_rate=1e-2, warmup=2, schedule="linear", weight_decay=0.3, clip=clip)
    schedule = make_schedule(config, 5)
    optimizer = make_optimizer(config, 5, model.axes)
    loss = next_token().make(model, np.ones(model.config.vocab_size, np.int32))
    step = jax.jit(make_step(loss, optimizer, schedule, config, seed=0))
    state = start(params, optimizer, window=config.skip_window, ema=False)
    torch_optimizer = torch_twin.adamw(
        torch_model, learning_rate=0.0, betas=(config.beta1, config.beta2), weight_decay=config.weight_decay
    )
    for number in range(5):
        state, metrics = step(state, batch)
        for group in torch_optimizer.param_groups:
            group["lr"] = float(schedule(number))
        torch_optimizer.zero_grad()
        their = their_loss(torch_model, batch)
        their.backward()
        norm = torch.nn.utils.clip_grad_norm_(torch_model.parameters(), clip or float("inf"))
        assert norm > 0.05
        torch_optimizer.step()
        # Not tighter in float64: our learning rate is a float32, and torch's clipping adds 1e-6 to the norm.
        assert metrics["loss"].value() == pytest.approx(their.item(), rel=1e-5)
        assert metrics["grad_norm"].value() == pytest.approx(norm.item(), rel=1e-5)
    mine = twin_weights(host(state.params))
    theirs = {name: weight.detach().numpy() for name, weight in torch_model.named_parameters()}
    assert_close(mine, theirs, 2e-5)


def test_the_twin_starts_where_our_experiment_does():
    """The first loss of both initialisations, which are drawn apart, and the spread of each kind of weight."""
    config: ModelConfig = dataclasses.replace(FAMILIES["twin"][0], width=64, vocab_size=65)
    torch.manual_seed(0)
    torch_model = torch_twin.Twin(config)
    model = make_model(config)
    params = jax.jit(model.init)(jax.random.key(0))
    spreads = {name: float(np.std(value)) for name, value in twin_weights(host(params)).items()}
    for name, weight in torch_model.named_parameters():
        assert spreads[name] == pytest.approx(float(weight.detach().std(correction=0)), rel=0.1, abs=1e-9), name
    batch = packed_batch(rows=4, length=16, vocab=65)
    logits_BTV = np.asarray(jax.jit(model.logits)(params, batch.tokens_BT), np.float64)
    logp_BTV = logits_BTV - np.log(np.exp(logits_BTV).sum(-1, keepdims=True))
    mine = -np.take_along_axis(logp_BTV, batch.targets_BT[..., None], axis=-1).mean()
    assert mine == pytest.approx(their_loss(torch_model, batch).item(), abs=0.05)
    assert mine == pytest.approx(np.log(65), abs=0.05)
