"""The cached path against the full forward, and what `generate` and `stream` promise, on tiny random models."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmlab.core.errors import UserError
from llmlab.core.mesh import MeshConfig, make_partition
from llmlab.infer import generate as module
from llmlab.infer.generate import bucket, complete, continuations, generate, stream
from llmlab.model.config import gpt2, llama, mamba2
from llmlab.model.ssm import SsmConfig
from llmlab.model.transformer import make_model, unembed
from llmlab.model.types import Inputs
from tests.helpers import random_params

SHAPE = {"width": 32, "layers": 2, "heads": 4, "vocab_size": 41, "max_positions": 64}
CONFIGS = {
    "gpt2": gpt2(**SHAPE),
    "llama_gqa": llama(**SHAPE, kv_heads=2),
    "window": llama(**SHAPE, kv_heads=1, window=5, pattern=("local", "global")),
    "qk_norm_softcap": llama(**SHAPE, qk_norm="head", attention_softcap=5.0, logit_softcap=3.0, tied_embedding=True),
    "mamba": mamba2(**SHAPE, ssm=SsmConfig(state=8, head_dim=16, chunk=8)),
    "hybrid": llama(**SHAPE, pattern=("mamba", "global"), ssm=SsmConfig(state=8, head_dim=16, chunk=8, mlp=True)),
}
# Most tests are of one model, with as many rows and as many tokens: they share what was compiled.
NAME, ROWS, TIME = "window", 3, 24
SAMPLED = {"temperature": 1.2, "top_k": 20, "repetition_penalty": 1.2}


def names(*fast):
    return [pytest.param(name, marks=[] if name in fast else [pytest.mark.slow]) for name in CONFIGS]


@functools.cache
def built(name):
    model = make_model(CONFIGS[name])
    return model, random_params(model, scale=0.5), jax.jit(model.logits)


def tokens(rows, time, seed=0):
    return np.random.default_rng(seed).integers(0, SHAPE["vocab_size"], (rows, time)).astype(np.int32)


@functools.cache
def cached_logits(name):
    """A compiled call of the cached model on some tokens of every row: the first `added_B` of T are real."""
    model, params, _ = built(name)

    def call(tokens_BT, starts_B, added_B, cache):
        offsets_1T = jnp.arange(tokens_BT.shape[1])[None]
        inputs = Inputs(tokens_BT, starts_B[:, None] + offsets_1T, (offsets_1T < added_B[:, None]).astype(jnp.int32))
        out = model.apply(params, inputs, cache=cache)
        return unembed(out.hidden_BTD, model.head(params), model.config.logit_softcap), out.cache

    return jax.jit(call)


def assert_close(got, want):
    """To 1e-5 of the largest logit: the weights are large here, so that positions and masks matter."""
    np.testing.assert_allclose(got, want, atol=1e-5 * float(np.max(np.abs(want))), rtol=0)


@pytest.mark.parametrize("name", names(NAME))
def test_prefill_and_decode_are_the_full_forward(name):
    model, params, full = built(name)
    tokens_BT, lengths_B = tokens(ROWS, TIME), np.array([1, 7, 12])
    want_BTV = np.asarray(full(params, tokens_BT))
    call, cache = cached_logits(name), model.init_cache(ROWS, TIME)
    prompt_BT = np.where(np.arange(12)[None] < lengths_B[:, None], tokens_BT[:, :12], 40)
    logits_BTV, cache = call(prompt_BT, np.zeros(ROWS, int), lengths_B, cache)
    logits_BTV = np.asarray(logits_BTV)
    for row, length in enumerate(lengths_B):
        assert_close(logits_BTV[row, :length], want_BTV[row, :length])
    for step in range(12):
        at_B = lengths_B + step
        logits_BTV, cache = call(tokens_BT[np.arange(ROWS), at_B][:, None], at_B, np.ones(ROWS, int), cache)
        assert_close(np.asarray(logits_BTV)[:, 0], want_BTV[np.arange(ROWS), at_B])
    np.testing.assert_array_equal(cache["lengths_B"], lengths_B + 12)


@pytest.mark.parametrize("name", names(NAME))
def test_a_prompt_read_in_two_parts(name):
    model, params, full = built(name)
    tokens_BT, first_B, second_B = tokens(ROWS, TIME), np.array([12, 3, 7]), np.array([12, 9, 5])
    call, cache = cached_logits(name), model.init_cache(ROWS, TIME)
    first_BTV, cache = call(tokens_BT[:, :12], np.zeros(ROWS, int), first_B, cache)
    # Each row's second part starts where its first ended.
    second_BT = np.stack([tokens_BT[row, start : start + 12] for row, start in enumerate(first_B)])
    second_BTV, _ = call(second_BT, first_B, second_B, cache)
    first_BTV, second_BTV, want_BTV = map(np.asarray, (first_BTV, second_BTV, full(params, tokens_BT)))
    for row, (first, second) in enumerate(zip(first_B, second_B, strict=True)):
        assert_close(first_BTV[row, :first], want_BTV[row, :first])
        assert_close(second_BTV[row, :second], want_BTV[row, first : first + second])


@pytest.mark.parametrize("name", names(NAME, "gpt2"))
def test_greedy_is_the_argmax_of_the_full_forward(name):
    model, params, full = built(name)
    prompt_BT, lengths_B = tokens(ROWS, 8), np.array([8, 1, 4])
    out_BT = generate(model, params, prompt_BT, max_tokens=16, prompt_lengths_B=lengths_B)
    assert out_BT.shape == (ROWS, TIME)
    likeliest_BT = np.argmax(full(params, out_BT), axis=-1)
    for row, length in enumerate(lengths_B):
        np.testing.assert_array_equal(out_BT[row, :length], prompt_BT[row, :length])
        np.testing.assert_array_equal(out_BT[row, length : length + 16], likeliest_BT[row, length - 1 : length + 15])
        assert (out_BT[row, length + 16 :] == 0).all()


def test_rows_do_not_influence_each_other():
    model, params, _ = built(NAME)
    prompt_BT, lengths_B = tokens(ROWS, 9), np.array([9, 3, 5])
    settings = SAMPLED | {"max_tokens": 14}
    together_BT = generate(model, params, prompt_BT, prompt_lengths_B=lengths_B, seed=[3, 4, 5], **settings)
    for row, length in enumerate(lengths_B):
        alone_BT = generate(model, params, prompt_BT[row : row + 1, :length], seed=3 + row, **settings)
        np.testing.assert_array_equal(alone_BT[0], together_BT[row, : length + 14])


def test_seeds():
    model, params, _ = built(NAME)
    prompt_BT = np.repeat(tokens(1, 5), ROWS, axis=0)
    settings = SAMPLED | {"max_tokens": 16}
    out_BT = generate(model, params, prompt_BT, seed=[7, 7, 8], **settings)
    np.testing.assert_array_equal(out_BT[0], out_BT[1])
    assert (out_BT[0] != out_BT[2]).any()
    np.testing.assert_array_equal(generate(model, params, prompt_BT, seed=7, **settings)[[0, 1]], out_BT[[0, 2]])
    # Positions name the draws: going on from a longer prompt gives the same text.
    longer_BT = generate(model, params, out_BT[:1, :12], seed=7, **SAMPLED, max_tokens=9)
    np.testing.assert_array_equal(longer_BT[0], out_BT[0])


def test_a_stop_id_ends_its_row_only():
    model, params, _ = built(NAME)
    prompt_BT = tokens(ROWS, 6, seed=3)
    free_BT = generate(model, params, prompt_BT, max_tokens=12)
    stop = next(int(id) for id in free_BT[0, 8:] if id not in free_BT[1:, 6:])
    place = int(np.argmax(free_BT[0, 6:] == stop))
    out_BT = generate(model, params, prompt_BT, max_tokens=12, stop_ids=[stop], pad_id=40)
    np.testing.assert_array_equal(out_BT[0, : 7 + place], free_BT[0, : 7 + place])
    assert (out_BT[0, 7 + place :] == 40).all()
    np.testing.assert_array_equal(out_BT[1:], free_BT[1:])
    first, *others = continuations(out_BT, 6, 12, [stop])
    assert first == free_BT[0, 6 : 7 + place].tolist()
    assert others == free_BT[1:, 6:].tolist()
    assert list(stream(model, params, prompt_BT[0].tolist(), max_tokens=12, stop_ids=[stop])) == first


def test_the_repetition_penalty_sees_prompt_and_continuation():
    model, params, full = built(NAME)
    prompt_BT = tokens(ROWS, 8)
    out_BT = generate(model, params, prompt_BT, max_tokens=16, repetition_penalty=1e9)
    logits_BTV, avoided = np.array(full(params, out_BT)), set()
    for row, at in itertools.product(range(ROWS), range(8, TIME)):
        logits_V = logits_BTV[row, at - 1]
        likeliest = np.argmax(logits_V)
        avoided |= {"prompt"} if likeliest in prompt_BT[row] else set()
        avoided |= {"continuation"} if likeliest in set(out_BT[row, 8:at]) - set(prompt_BT[row]) else set()
        seen = np.unique(out_BT[row, :at])
        # Every penalised logit is either near zero or hugely negative.
        logits_V[seen] = np.where(logits_V[seen] > 0, logits_V[seen] / 1e9, logits_V[seen] * 1e9)
        assert out_BT[row, at] == np.argmax(logits_V)
    assert avoided == {"prompt", "continuation"}, "the test can fail for either"


@pytest.mark.parametrize(
    "settings", [SAMPLED, pytest.param({"temperature": 0.9, "top_p": 0.9}, marks=pytest.mark.slow)]
)
def test_the_stream_is_what_generate_gives(settings):
    model, params, _ = built(NAME)
    prompt_BT = tokens(1, 7)
    want_BT = generate(model, params, prompt_BT, max_tokens=15, seed=5, **settings)
    streamed = list(stream(model, params, prompt_BT[0].tolist(), max_tokens=15, seed=5, **settings))
    assert streamed == want_BT[0, 7:].tolist()


PROMPTS = [[1, 2], [3, 4, 5, 6, 7], [8]]


def test_completions_are_what_generate_gives_whatever_the_padding():
    model, params, _ = built("llama_gqa")
    lengths_B = [len(prompt) for prompt in PROMPTS]
    prompt_BT = [[*prompt, *[0] * (5 - len(prompt))] for prompt in PROMPTS]
    settings = {"max_tokens": 9, "temperature": 1.0}
    out_BT = generate(model, params, prompt_BT, prompt_lengths_B=lengths_B, seed=[3, 1, 2], **settings)
    want = continuations(out_BT, lengths_B, 9)
    settings |= {"seeds": [3, 1, 2]}
    assert complete(model, params, PROMPTS, stop_ids=[], **settings) == want
    assert complete(model, params, PROMPTS, stop_ids=[], rows=5, width=20, **settings) == want
    stop = want[0][3]
    ended = [ids[: ids.index(stop) + 1] if stop in ids else ids for ids in want]
    assert complete(model, params, PROMPTS, stop_ids=[stop], **settings) == ended
    assert len(ended[0]) <= 4


def test_no_prompts_have_no_completions():
    model, params, _ = built("llama_gqa")
    assert complete(model, params, [], max_tokens=9, seeds=[], stop_ids=[]) == []


@pytest.mark.slow
def test_a_mesh_completes_the_same_though_its_devices_outnumber_the_prompts():
    model, params, _ = built("llama_gqa")
    partition = make_partition(MeshConfig(data=2, fsdp=2), jax.devices()[:4])
    meshed = make_model(CONFIGS["llama_gqa"], partition)
    settings = {"max_tokens": 4, "temperature": 0.5, "seeds": [3, 1, 2], "stop_ids": []}
    sharded = jax.device_put(params, partition.shardings(meshed.axes))
    assert complete(meshed, sharded, PROMPTS, **settings) == complete(model, params, PROMPTS, **settings)


def test_unstacked_parameters_give_the_same():
    model, params, _ = built(NAME)
    prompt_BT = tokens(ROWS, 7)
    want_BT = generate(model, params, prompt_BT, max_tokens=12)
    unstacked = jax.jit(model.unstack)(params)
    np.testing.assert_array_equal(generate(model, unstacked, prompt_BT, max_tokens=12), want_BT)


def test_calls_that_differ_little_compile_once():
    model, params, _ = built(NAME)
    compiled = [module._generate, module._first, module._one_more]
    generate(model, params, tokens(ROWS, 9), max_tokens=14, **SAMPLED)
    list(stream(model, params, list(range(9)), max_tokens=10, **SAMPLED))
    before = [function._cache_size() for function in compiled]
    other = {"temperature": 0.9, "top_k": 5, "repetition_penalty": 1.4}
    generate(model, params, tokens(ROWS, 12), max_tokens=9, seed=3, **other)
    list(stream(model, params, list(range(7)), max_tokens=12, **other))
    assert [function._cache_size() for function in compiled] == before


def test_buckets():
    sizes = range(1, 3000)
    assert all(size <= bucket(size) <= max(16 * -(-size // 16), 1.25 * size) for size in sizes)
    assert len({bucket(size) for size in sizes}) < 30
    assert bucket(160) == 160


BAD = {
    "empty": ({"prompt_BT": np.zeros((1, 0), int)}, "empty"),
    "not a batch": ({"prompt_BT": np.zeros(3, int)}, r"\[B, T\]"),
    "no id": ({"prompt_BT": np.array([[1, 41]])}, "0 to 40"),
    "too long": ({"max_tokens": 60}, "at most 58"),
    "no tokens": ({"max_tokens": 0}, "max_tokens=0"),
    "length": ({"prompt_lengths_B": [7]}, "from 1 to 6"),
    "temperature": ({"temperature": -1.0}, "temperature=-1.0"),
    "top_k": ({"top_k": -1}, "top_k=-1"),
    "top_p": ({"top_p": 0.0}, "top_p=0.0"),
    "min_p": ({"min_p": 2.0}, "min_p=2.0"),
    "penalty": ({"repetition_penalty": 0.0}, "repetition_penalty=0.0"),
    "seeds": ({"seed": [1, 2]}, "2 seeds for 1 rows"),
}


@pytest.mark.parametrize("name", BAD)
def test_mistakes_are_user_errors(name):
    model, params, _ = built(NAME)
    arguments, message = BAD[name]
    with pytest.raises(UserError, match=message):
        generate(model, params, **{"prompt_BT": tokens(1, 6), "max_tokens": 5} | arguments)


def test_a_stream_fails_before_its_first_token():
    model, params, _ = built(NAME)
    with pytest.raises(UserError, match="empty"):
        stream(model, params, [], max_tokens=5)
