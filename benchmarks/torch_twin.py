"""The other side, in PyTorch: a small GPT of our own, transformers' GPT-2 and Llama, and a training step."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from llmlab.model.config import ModelConfig


class Block(nn.Module):
    """One layer: attention with one product for queries, keys and values, then the MLP."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.heads = c.heads
        self.attention_norm = nn.LayerNorm(c.width, eps=c.norm_epsilon, bias=c.bias)
        self.qkv = nn.Linear(c.width, 3 * c.width, bias=c.bias)
        self.out = nn.Linear(c.width, c.width, bias=c.bias)
        self.mlp_norm = nn.LayerNorm(c.width, eps=c.norm_epsilon, bias=c.bias)
        self.up = nn.Linear(c.width, c.F, bias=c.bias)
        self.down = nn.Linear(c.F, c.width, bias=c.bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        B, T, D = x_BTD.shape
        q, k, v = self.qkv(self.attention_norm(x_BTD)).view(B, T, 3 * self.heads, -1).transpose(1, 2).chunk(3, dim=1)
        out_BNTH = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_BTD = x_BTD + self.out(out_BNTH.transpose(1, 2).reshape(B, T, D))
        return x_BTD + self.down(functional.gelu(self.up(self.mlp_norm(x_BTD)), approximate="tanh"))


class Twin(nn.Module):
    """GPT-2's architecture, initialised as it is: normal(0.02), 1/sqrt(2·layers) of it into the residual stream."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.tokens = nn.Embedding(c.vocab_size, c.width)
        self.positions = nn.Embedding(c.max_positions, c.width)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.norm = nn.LayerNorm(c.width, eps=c.norm_epsilon, bias=c.bias)
        for name, weight in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(weight)
            elif weight.ndim == 2:
                into_residual = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(weight, std=c.init_std / (math.sqrt(2 * c.layers) if into_residual else 1))

    def forward(self, tokens_BT: Tensor) -> Tensor:
        x_BTD = self.tokens(tokens_BT) + self.positions(torch.arange(tokens_BT.shape[1]))
        for block in self.blocks:
            x_BTD = block(x_BTD)
        return functional.linear(self.norm(x_BTD), self.tokens.weight)


class Transformers(nn.Module):
    """transformers' model of this config with random weights, as a function of tokens to logits."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.model = transformers_gpt2(c) if c.positions == "learned" else transformers_llama(c)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        return self.model(input_ids=tokens_BT, use_cache=False).logits


def transformers_gpt2(c: ModelConfig) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=c.vocab_size,
        n_positions=c.max_positions,
        n_embd=c.width,
        n_layer=c.layers,
        n_head=c.heads,
        layer_norm_epsilon=c.norm_epsilon,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
    )
    return GPT2LMHeadModel(config)


def transformers_llama(c: ModelConfig) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=c.vocab_size,
        max_position_embeddings=c.max_positions,
        hidden_size=c.width,
        intermediate_size=c.F,
        num_hidden_layers=c.layers,
        num_attention_heads=c.heads,
        num_key_value_heads=c.K,
        rms_norm_eps=c.norm_epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope.base},
        tie_word_embeddings=c.tied_embedding,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config)


def adamw(
    model: nn.Module, *, learning_rate: float, betas: tuple[float, float], weight_decay: float, fused: bool = False
) -> torch.optim.AdamW:
    """AdamW with decay on matrices only."""
    matrices = [weight for weight in model.parameters() if weight.ndim >= 2]
    vectors = [weight for weight in model.parameters() if weight.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=1e-8, fused=fused)


def make_step(model: nn.Module, optimizer: torch.optim.Optimizer, clip: float) -> Callable[[Tensor, Tensor], float]:
    """(tokens_BT, targets_BT) -> loss: forward, backward, clip, update."""

    def step(tokens_BT: Tensor, targets_BT: Tensor) -> float:
        loss = functional.cross_entropy(model(tokens_BT).flatten(0, 1), targets_BT.flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        return loss.item()

    return step
