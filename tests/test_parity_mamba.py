"""The same numbers as transformers' Mamba-2 with the same weights: logits, gradients, and what both write."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmlab.infer.generate import generate
from llmlab.model.config import mamba2
from llmlab.model.ssm import SsmConfig
from llmlab.model.transformer import make_model
from tests.helpers import VOCAB, assert_close, host, random_params, relative

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="`make test-parity` installs it")
transformers = pytest.importorskip("transformers", reason="`make test-parity` installs it")

SHAPE = dict(width=16, layers=2, vocab_size=VOCAB, max_positions=64, norm_epsilon=1e-3)
CONFIGS = {
    "plain": mamba2(**SHAPE, ssm=SsmConfig(state=6, head_dim=4, chunk=4)),
    "groups, biases and limits": mamba2(
        **SHAPE,
        tied_embedding=False,
        ssm=SsmConfig(state=6, head_dim=4, chunk=8, groups=2, conv=3, bias=True, dt_min=0.4, dt_max=0.9),
    ),
    "no biases": mamba2(**SHAPE, ssm=SsmConfig(state=5, head_dim=8, groups=4, expand=4, conv_bias=False)),
}


def theirs(config):
    s = config.ssm
    limit = (s.dt_min, float("inf") if s.dt_max is None else s.dt_max)
    return transformers.Mamba2ForCausalLM(
        transformers.Mamba2Config(
            hidden_size=config.width,
            num_hidden_layers=config.layers,
            vocab_size=config.vocab_size,
            tie_word_embeddings=config.tied_embedding,
            layer_norm_epsilon=config.norm_epsilon,
            num_heads=config.ssm_heads,
            head_dim=s.head_dim,
            state_size=s.state,
            expand=s.expand,
            n_groups=s.groups,
            conv_kernel=s.conv,
            chunk_size=s.chunk,
            use_bias=s.bias,
            use_conv_bias=s.conv_bias,
            time_step_limit=limit,
        )
    ).eval()


def their_names(tree: dict) -> dict[str, np.ndarray]:
    """A tree like our parameters under their names and in their layout: the five projections side by side."""
    table = tree["embedding"]["tokens_VD"]
    out = {
        "backbone.embeddings.weight": table,
        "backbone.norm_f.weight": tree["head"]["norm"]["scale"],
        "lm_head.weight": tree["head"]["unembedding_DV"].T if "unembedding_DV" in tree["head"] else table,
    }
    stack = tree["layers"]["0"]
    for layer in range(len(stack["mamba"]["skip_N"])):
        w = jax.tree.map(lambda leaf, i=layer: leaf[i], stack)
        mamba, name = w["mamba"], f"backbone.layers.{layer}"
        parts = ("z_DNH", "x_DNH", "b_DKZ", "c_DKZ", "dt_DN")
        conv = ("conv_x_WNH", "conv_b_WKZ", "conv_c_WKZ")
        out |= {
            f"{name}.norm.weight": w["mamba_norm"]["scale"],
            f"{name}.mixer.in_proj.weight": np.concatenate([mamba[p].reshape(len(mamba[p]), -1).T for p in parts]),
            f"{name}.mixer.conv1d.weight": np.concatenate([mamba[p].reshape(len(mamba[p]), -1).T for p in conv])[
                :, None
            ],
            f"{name}.mixer.A_log": mamba["log_rate_N"],
            f"{name}.mixer.D": mamba["skip_N"],
            f"{name}.mixer.dt_bias": mamba["dt_bias_N"],
            f"{name}.mixer.norm.weight": mamba["gate"]["scale"],
            f"{name}.mixer.out_proj.weight": mamba["out_NHD"].reshape(-1, mamba["out_NHD"].shape[-1]).T,
        }
        if "conv_x_WNH_bias" in mamba:
            out[f"{name}.mixer.conv1d.bias"] = np.concatenate([mamba[f"{p}_bias"].reshape(-1) for p in conv])
        if "z_DNH_bias" in mamba:
            out[f"{name}.mixer.in_proj.bias"] = np.concatenate([mamba[f"{p}_bias"].reshape(-1) for p in parts])
            out[f"{name}.mixer.out_proj.bias"] = mamba["out_NHD_bias"]
    return out


def both(name):
    model = make_model(CONFIGS[name])
    params = random_params(model)
    torch_model = theirs(CONFIGS[name])
    torch_model.load_state_dict({name: torch.tensor(value) for name, value in their_names(host(params)).items()})
    return model, params, torch_model


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_every_gradient_are_theirs(name):
    model, params, torch_model = both(name)
    tokens_BT = np.random.default_rng(0).integers(VOCAB, size=(2, 13))
    weights_BTV = np.random.default_rng(1).standard_normal((2, 13, VOCAB)).astype(np.float32)

    def loss(params):
        logits_BTV = model.logits(params, jnp.asarray(tokens_BT, jnp.int32))
        return jnp.sum(logits_BTV * weights_BTV), logits_BTV

    gradients, logits_BTV = jax.jit(jax.grad(loss, has_aux=True))(params)
    their_logits_BTV = torch_model(torch.tensor(tokens_BT)).logits
    assert relative(logits_BTV, their_logits_BTV.detach()) < 1e-5
    np.testing.assert_allclose(logits_BTV, their_logits_BTV.detach(), atol=1e-4)
    (their_logits_BTV * torch.tensor(weights_BTV)).sum().backward()
    mine = their_names(host(gradients))
    their_gradients = {name: weight.grad.numpy() for name, weight in torch_model.named_parameters()}
    assert_close({name: mine[name] for name in their_gradients}, their_gradients, 1e-4)


def test_greedy_continuations_are_theirs():
    model, params, torch_model = both("plain")
    prompt_BT = np.random.default_rng(2).integers(VOCAB, size=(2, 7))
    with torch.inference_mode():
        prompt = torch.tensor(prompt_BT)
        their_BT = torch_model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False, eos_token_id=-1
        )
    np.testing.assert_array_equal(generate(model, params, prompt_BT, max_tokens=12), their_BT)
