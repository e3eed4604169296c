"""Groups of responses, packed by hand in several ways with garbage in the padding; and gradients by differences."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import log_softmax

from llmlab.core.mesh import MeshConfig, make_partition, single_device
from llmlab.data.pipeline import GroupBatch
from llmlab.model.transformer import make_model
from llmlab.model.types import Model, Out
from llmlab.train.step import accumulated_gradients
from tests.helpers import VOCAB, assert_close, host, random_params, tiny_llama

NAN = float("nan")


class Answer(NamedTuple):
    """A response: its tokens, what comes after each, where that is to be said, marks, and what is known of all."""

    tokens: np.ndarray
    targets: np.ndarray
    said: np.ndarray
    marks: np.ndarray
    value: float
    reference: float


Group = list[Answer]


class Place(NamedTuple):
    """Where a response lies in a batch."""

    row: int
    begin: int
    end: int


def random_groups(number: int, responses: int, seed: int = 0, vocab: int = VOCAB, fewest: int = 0) -> list[Group]:
    """Groups of one prompt and `fewest` to `responses` answers of several lengths, each the last token said or not."""
    rng = np.random.default_rng(seed)
    groups = []
    for _ in range(number):
        prompt = rng.integers(vocab, size=rng.integers(1, 4))
        count = rng.integers(fewest or responses, responses + 1)
        groups.append([_answer(rng, prompt, vocab) for _ in range(count)])
    return groups


def _answer(rng: np.random.Generator, prompt: np.ndarray, vocab: int) -> Answer:
    ids = np.concatenate([prompt, rng.integers(vocab, size=rng.integers(2, 5))])
    said = np.arange(1, len(ids)) >= len(prompt)
    said[-1] = rng.random() < 0.7
    marks = np.where(rng.random(len(ids) - 1) < 0.4, rng.integers(2, 256, size=len(ids) - 1), 0)
    # Less than an unsure model gives, so that most are likelier than by the reference.
    reference = -6.0 * said.sum() + 3 * rng.standard_normal()
    return Answer(ids[:-1], ids[1:], said, marks, float(rng.integers(2)), reference)


def packed(rows: list[list[Group]], length: int, responses: int, groups_a_row: int = 0) -> GroupBatch:
    """The batch whose row b holds the groups `rows[b]`; whatever nobody should read is garbage."""
    rng = np.random.default_rng(1)
    B, T, P, R = len(rows), length, max([groups_a_row, *map(len, rows)]), responses
    garbage_BT = rng.integers(VOCAB, size=(4, B, T)).astype(np.int32)
    tokens_BT, targets_BT, positions_BT, marks_BT = garbage_BT[0], garbage_BT[1], garbage_BT[2], garbage_BT[3] + 150
    mask_BT, segment_ids_BT = np.ones((B, T), np.float32), np.zeros((B, T), np.int32)
    present_BPR, value_BPR, reference_BPR = np.zeros((B, P, R), np.float32), *np.full((2, B, P, R), NAN)
    for row, p, r, answer, place in _laid_out(rows):
        within = (row, slice(place.begin, place.end))
        tokens_BT[within], targets_BT[within], mask_BT[within] = answer.tokens, answer.targets, answer.said
        positions_BT[within] = np.arange(len(answer.tokens))
        segment_ids_BT[within], marks_BT[within] = p * R + r + 1, answer.marks
        present_BPR[row, p, r], value_BPR[row, p, r], reference_BPR[row, p, r] = 1, answer.value, answer.reference
    arrays = (tokens_BT, targets_BT, mask_BT, positions_BT, segment_ids_BT, marks_BT)
    return GroupBatch(*arrays, present_BPR, value_BPR, reference_BPR)  # type: ignore[arg-type]


def places(rows: list[list[Group]]) -> list[list[Place]]:
    """Where `packed` put every response, by group."""
    found: dict[tuple[int, int], list[Place]] = {}
    for row, p, _, _, place in _laid_out(rows):
        found.setdefault((row, p), []).append(place)
    return list(found.values())


def _laid_out(rows: list[list[Group]]) -> list[tuple[int, int, int, Answer, Place]]:
    out = []
    for row, groups in enumerate(rows):
        begin = 0
        for p, group in enumerate(groups):
            for r, answer in enumerate(group):
                end = begin + len(answer.tokens)
                out.append((row, p, r, answer, Place(row, begin, end)))
                begin = end
    return out


def check_layouts(
    config: Any, groups: list[Group], responses: int, dtype: str, *, every: bool = False, **overrides: Any
) -> None:
    """Loss, metrics and gradients of these groups are the same however they are packed, padded and split.

    `every` takes these one by one, and not all at once alone.
    """
    tolerance = 1e-5 if dtype == "float32" else 1e-10
    half = len(groups) // 2
    tight = packed([groups[:half], groups[half:]], 64, responses)
    loose = packed([groups[half:], [], *([group] for group in groups[:half])], 80, responses, len(groups))
    with jax.enable_x64(dtype == "float64"):
        model = make_model(tiny_llama(layers=1, dtype=dtype, param_dtype=dtype, **overrides))
        params, loss, fill = random_params(model), config.make(model, None), config.before(model)

        def run(batch: GroupBatch, parts: int) -> Any:
            def whole(params: Any, batch: GroupBatch) -> Any:
                filled = fill(params, batch, None) if fill and parts > 1 else batch
                return accumulated_gradients(loss, params, {}, filled, jax.random.key(0), parts)

            return jax.jit(whole)(params, jax.tree.map(jnp.asarray, batch))

        total, metrics, gradient = run(tight, 1)
        others = [(loose, len(loose.tokens_BT)), *([(tight, 2), (loose, 1)] if every else [])]
        for batch, parts in others:
            other_total, other_metrics, other_gradient = run(batch, parts)
            assert float(other_total.weight) == float(total.weight) > 0
            assert abs(float(other_total.sum - total.sum)) < tolerance * abs(float(total.sum))
            assert other_metrics.keys() == metrics.keys()
            for name, mean in metrics.items():
                assert abs(other_metrics[name].value() - mean.value()) < 10 * tolerance, name
            assert_close(other_gradient, gradient, tolerance)


def check_meshes(config: Any, groups: list[Group], responses: int, **overrides: Any) -> None:
    """Loss and gradients on eight devices, with time split and without, are one device's."""
    batch = packed([groups[row::4] for row in range(4)], 48, responses)

    def run(mesh: MeshConfig | None) -> Any:
        partition = single_device() if mesh is None else make_partition(mesh)
        model = make_model(tiny_llama(layers=1, **overrides), partition)
        params = jax.device_put(random_params(model), partition.shardings(model.axes))
        axes = {2: ("batch", "time"), 3: ("batch", None, None)}
        placed = jax.tree.map(lambda x: jax.device_put(x, partition.sharding(*axes[x.ndim])), batch)
        loss = config.make(model, None)
        whole = jax.jit(lambda p, b: accumulated_gradients(loss, p, {}, b, jax.random.key(0), 1, partition)[::2])
        return host(whole(params, placed))

    expected = run(None)
    for mesh in (MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(data=2, fsdp=2, sequence=2)):
        assert_close(run(mesh), expected, 1e-5)


def hidden_model(**overrides: Any) -> Model:
    """A model whose parameters are its hidden states, its unembedding and its score: all that an objective reads."""

    def apply(params: Any, inputs: Any, *, cache: Any = None, key: Any = None) -> Out:
        return Out(params["hidden_BTD"], None, {})

    return make_model(tiny_llama(**overrides))._replace(
        apply=apply,
        head=lambda params: params["w_DV"],
        score=lambda params, hidden_BTD: jnp.einsum("BTD,D->BT", hidden_BTD, params["score_D"]),
    )


def hidden_params(batch: GroupBatch, width: int = 3, seed: int = 2) -> dict[str, np.ndarray]:
    """Parameters of `hidden_model`; the hidden states of padding are large."""
    rng = np.random.default_rng(seed)
    hidden_BTD = rng.standard_normal((*batch.tokens_BT.shape, width))
    hidden_BTD = np.where(np.asarray(batch.segment_ids_BT)[..., None] > 0, hidden_BTD, 1e3 * hidden_BTD)
    return {
        "hidden_BTD": hidden_BTD,
        "w_DV": 0.5 * rng.standard_normal((width, VOCAB)),
        "score_D": rng.standard_normal(width),
    }


def numpy_logps(params: dict[str, np.ndarray], groups: list[Group], rows: list[list[Group]]) -> np.ndarray:
    """[group, response]: the log-probability that `hidden_model` gives what is said of each."""
    return np.array([[logp for logp, _, _ in group] for group in _each(params, groups, rows)])


def numpy_through_logps(
    params: dict[str, np.ndarray], groups: list[Group], rows: list[list[Group]], slope: np.ndarray
) -> dict[str, np.ndarray]:
    """The gradient of hidden states and unembedding, of what has this slope in the log-probabilities."""
    out = {name: np.zeros_like(params[name]) for name in ("hidden_BTD", "w_DV")}
    for group, spots, of_group in zip(_each(params, groups, rows), places(rows), slope, strict=True):
        for (_, hidden_TD, dlogits_TV), place, weight in zip(group, spots, of_group, strict=True):
            out["hidden_BTD"][place.row, place.begin : place.end] += weight * dlogits_TV @ params["w_DV"].T
            out["w_DV"] += weight * hidden_TD.T @ dlogits_TV
    return out


def numpy_scores(params: dict[str, np.ndarray], spots: list[tuple[int, int]]) -> np.ndarray:
    """The score that `hidden_model` gives at each of these tokens."""
    return np.array([params["hidden_BTD"][spot] @ params["score_D"] for spot in spots])


def numpy_through_scores(
    params: dict[str, np.ndarray], spots: list[tuple[int, int]], slope: np.ndarray
) -> dict[str, np.ndarray]:
    """The gradient of hidden states and score, of what has this slope in the scores at these tokens."""
    out = {name: np.zeros_like(params[name]) for name in ("hidden_BTD", "score_D")}
    for spot, weight in zip(spots, slope, strict=True):
        out["hidden_BTD"][spot] += weight * params["score_D"]
        out["score_D"] += weight * params["hidden_BTD"][spot]
    return out


def _each(params: dict[str, np.ndarray], groups: list[Group], rows: list[list[Group]]) -> list[list[tuple]]:
    return [
        [_said(params, answer, place) for answer, place in zip(group, spots, strict=True)]
        for group, spots in zip(groups, places(rows), strict=True)
    ]


def _said(params: dict[str, np.ndarray], answer: Answer, place: Place) -> tuple[float, np.ndarray, np.ndarray]:
    """(log-probability, hidden states, its gradient in the logits) of a response."""
    hidden_TD = params["hidden_BTD"][place.row, place.begin : place.end]
    logp_TV = log_softmax(hidden_TD @ params["w_DV"], axis=-1)
    is_target_TV = answer.targets[:, None] == np.arange(logp_TV.shape[1])
    logp = logp_TV[is_target_TV][answer.said].sum()
    return logp, hidden_TD, (is_target_TV - np.exp(logp_TV)) * answer.said[:, None]


def slopes(function: Any, params: dict[str, np.ndarray], step: float = 1e-5) -> dict[str, np.ndarray]:
    """The gradient of a function of arrays in float64, by central differences in each of their numbers."""
    out = {}
    for name, array in params.items():
        out[name] = np.zeros_like(array)
        for index in np.ndindex(array.shape):
            moved = []
            for sign in (1, -1):
                changed = array.copy()
                changed[index] += sign * step
                moved.append(function(params | {name: changed}))
            out[name][index] = (moved[0] - moved[1]) / (2 * step)
    return out


def value_and_gradient(loss: Any, params: Any, batch: GroupBatch, dtype: str) -> tuple[float, Any]:
    """Of the sum that `loss` gives, computed in this dtype."""
    params = jax.tree.map(lambda x: jnp.asarray(x, dtype), params)
    value, gradient = jax.jit(jax.value_and_grad(lambda p: loss(p, batch, None)[0].sum))(params)
    return float(value), jax.tree.map(np.asarray, gradient)
