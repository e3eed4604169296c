"""The start-up check: passes what is right, catches what is planted, and runs once per device and version."""

import jax
import jax.numpy as jnp
import pytest

from llmlab.kernels import check
from llmlab.kernels.attention_blockwise import BLOCK
from llmlab.kernels.check import Comparison, check_attention, check_token_logprobs, checked_once, compare


def failed(rows):
    return [row.name for row in rows if not row.ok]


@pytest.mark.parametrize(
    "kind",
    [
        {"implementation": "blockwise"},
        {"implementation": "blockwise", "packed": True, "window": 50},
        {"implementation": "short", "packed": True, "softcap": 5.0},
        {"causal": False},
    ],
    ids=str,
)
def test_attention_passes(kind):
    rows = check_attention(16, 4, 2, jnp.float32, **kind)
    assert {row.name for row in rows} == {"attention", "gradient of q", "gradient of k", "gradient of v"}
    assert failed(rows) == []


def test_attention_in_bfloat16_passes_its_own_tolerance():
    rows = check_attention(16, 2, 2, jnp.bfloat16, implementation="blockwise", packed=True)
    assert failed(rows) == []
    assert all(row.error > 1e-4 for row in rows)  # it was bfloat16 that was compared, with something more precise


def test_the_check_is_two_blocks_long():
    seen = []

    def spy(*args, **kwargs):
        seen.append(args[0].shape[1])
        return attention(*args, **kwargs)

    attention = check.attention
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(check, "attention", spy)
        check_attention(8, 1, 1, jnp.float32)
    assert min(seen) >= 2 * BLOCK


def test_ignored_segment_ids_are_caught(monkeypatch):
    attention = check.attention

    def forgetful(*args, implementation, **kwargs):
        if implementation != "reference":
            kwargs |= {"q_segment_ids_BT": None, "k_segment_ids_BS": None}
        return attention(*args, implementation=implementation, **kwargs)

    monkeypatch.setattr(check, "attention", forgetful)
    kind = {"implementation": "blockwise", "length": 64}
    assert failed(check_attention(8, 2, 1, jnp.float32, packed=False, **kind)) == []
    assert "attention" in failed(check_attention(8, 2, 1, jnp.float32, packed=True, **kind))


@pytest.mark.parametrize("implementation", ["plain", "chunked"])
def test_token_logprobs_pass(implementation):
    rows = check_token_logprobs(32, 100, jnp.float32, temperature=0.7, implementation=implementation, chunk=20)
    assert {row.name for row in rows} == {"logp_BT", "logz_BT", "entropy_BT", "gradient of hidden", "gradient of w"}
    assert failed(rows) == []


def test_a_wrong_gradient_with_the_right_value_is_caught():
    @jax.custom_vjp
    def square(x):
        return {"y": x**2}

    square.defvjp(lambda x: (square(x), x), lambda x, g: (1.9 * x * g["y"],))
    rows = compare(square, lambda x: {"y": x**2}, {"x": jnp.arange(1.0, 5.0)}, tolerance=1e-3)
    assert failed(rows) == ["gradient of x"]
    assert rows[1].error == pytest.approx(0.05, rel=1e-3)


def test_a_result_that_is_not_a_number_is_not_ok():
    rows = compare(lambda x: {"y": x * jnp.nan}, lambda x: {"y": x}, {"x": jnp.ones(2)}, tolerance=1e9)
    assert failed(rows) == ["y", "gradient of x"]


class Counter:
    """A check that counts how often it ran."""

    def __init__(self, ok=True):
        self.runs, self.rows = 0, [Comparison("x", 1e-7, 1e-4, ok)]

    def __call__(self):
        self.runs += 1
        return self.rows


def test_it_runs_once_per_key(tmp_path):
    run = Counter()
    for key in (["attention", 64], ["attention", 64], ["attention", 128]):
        assert checked_once(key, run, tmp_path / "cache") == run.rows
    assert run.runs == 2


def test_another_version_runs_again(tmp_path, monkeypatch):
    run = Counter()
    checked_once([], run, tmp_path)
    monkeypatch.setattr(check, "__version__", "another")
    checked_once([], run, tmp_path)
    assert run.runs == 2


def test_a_failure_is_not_remembered(tmp_path):
    run = Counter(ok=False)
    assert [checked_once([], run, tmp_path) for _ in range(2)] == [run.rows] * 2
    assert run.runs == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("torn", ["", '{"rows": [["x", 1e-7', "[]", '{"rows": [["x"]]}', '{"rows": []}'])
def test_a_torn_marker_only_means_another_check(tmp_path, torn):
    run = Counter()
    checked_once([], run, tmp_path)
    (marker,) = tmp_path.iterdir()
    marker.write_text(torn)
    assert checked_once([], run, tmp_path) == run.rows
    assert run.runs == 2
    checked_once([], run, tmp_path)
    assert run.runs == 2
    assert list(tmp_path.iterdir()) == [marker]


def test_a_cache_that_cannot_be_written_does_no_harm(tmp_path):
    (tmp_path / "file").write_text("")
    run = Counter()
    assert checked_once([], run, tmp_path / "file" / "cache") == run.rows
