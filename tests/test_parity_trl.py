"""The same losses and gradients as TRL's trainers, whose own code is run over numbers in place of a model."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmlab.objective.preference import kto_loss, orpo_loss, preference_loss, simpo_loss
from llmlab.objective.reward import bradley_terry, centring
from tests.helpers import relative

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="`make test-parity` installs it")
trl = pytest.importorskip("trl", reason="`make test-parity` installs it")

PAIRS, BETA, EPSILON, TOLERANCE = 5, 0.3, 0.15, 1e-6


class Metrics(dict):
    """What a trainer logs into, whatever it logs."""

    def __missing__(self, key):
        return self.setdefault(key, [] if key not in ("train", "eval") else Metrics())


def bare(trainer, **attributes):
    """A trainer that was never started: what its loss reads, and no more."""
    accelerator = SimpleNamespace(
        device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x, unwrap_model=lambda model: model
    )
    made = trainer.__new__(trainer)
    vars(made).update(
        accelerator=accelerator,
        model=SimpleNamespace(training=True),
        _metrics=Metrics(),
        aux_loss_enabled=False,
        _total_train_tokens=0,
        _tp_size=1,
        **attributes,
    )
    return made


class OfLogps:
    """In place of a language model: what its forward pass would give of log-probabilities, [response, token]."""

    training = True

    def __init__(self, logps):
        zeros = torch.zeros_like(logps)
        self.outputs = SimpleNamespace(log_probs=logps, entropy=zeros, mean_logits=zeros, is_top1=zeros > 0)

    def __call__(self, **_):
        return self.outputs


def token_logps(rng, responses):
    """(log-probabilities of tokens, a mask of which were said that has one column more, as TRL shifts it)."""
    said = np.arange(6)[None] < rng.integers(1, 7, size=(responses, 1))
    logps = np.where(said, -3 * rng.random((responses, 6)), 0)
    mask = np.concatenate([np.zeros((responses, 1)), said], axis=1).astype(np.int64)
    return torch.tensor(logps, requires_grad=True), torch.tensor(mask)


def ours(loss, *arrays):
    """(mean, gradient in each array) of a loss of arrays, in float64."""
    with jax.enable_x64(True):
        given = [jnp.asarray(x.detach().numpy() if hasattr(x, "detach") else x) for x in arrays]
        value, gradients = jax.value_and_grad(lambda *a: jnp.mean(loss(*a)), range(len(given)))(*given)
        return float(value), [np.asarray(gradient) for gradient in gradients]


@pytest.mark.parametrize(
    "kind, smoothing", [("sigmoid", 0.0), ("hinge", 0.0), ("ipo", 0.0), ("robust", EPSILON)], ids=str
)
def test_preference_losses_are_dpo_trainers(kind, smoothing):
    rng = np.random.default_rng(0)
    logps, mask = token_logps(rng, 2 * PAIRS)
    references = torch.tensor(-3 * rng.random(2 * PAIRS) * mask.sum(1).numpy())
    trainer = bare(
        trl.DPOTrainer,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[kind],
        loss_weights=[1.0],
        beta=BETA,
        label_smoothing=smoothing,
        use_weighting=False,
    )
    inputs = {
        "input_ids": torch.zeros_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "ref_chosen_logps": references[:PAIRS],
        "ref_rejected_logps": references[PAIRS:],
    }
    theirs = trainer._compute_loss(OfLogps(logps), inputs, False)
    theirs.backward()

    lengths = mask.sum(1).numpy() if kind == "ipo" else np.ones(2 * PAIRS)

    def loss(logps, references):
        sums, references = jnp.sum(logps, axis=1) / lengths, references / lengths
        pairs = (sums[:PAIRS], sums[PAIRS:], references[:PAIRS], references[PAIRS:])
        return preference_loss(*pairs, beta=BETA, kind=kind, label_smoothing=smoothing)

    value, (gradient, _) = ours(loss, logps, references)
    assert value == pytest.approx(theirs.item(), rel=TOLERANCE)
    assert relative(gradient, logps.grad) < TOLERANCE


@pytest.mark.parametrize("loss_type, kl", [("kto", 0.8), ("kto", -0.5), ("apo_zero_unpaired", 0.8)])
def test_kto_is_kto_trainers(loss_type, kl):
    rng = np.random.default_rng(0)
    logps, mask = token_logps(rng, PAIRS)
    references = torch.tensor(-3 * rng.random(PAIRS) * mask.sum(1).numpy())
    good = torch.tensor([True, False, True, True, False])
    trainer = bare(
        trl.KTOTrainer,
        precompute_ref_logps=True,
        calculate_KL=loss_type == "kto",
        loss_type=loss_type,
        beta=BETA,
        desirable_weight=1.5,
        undesirable_weight=0.5,
    )
    trainer._compute_kl_logps = lambda model, batch: torch.full((PAIRS,), kl)
    inputs = {
        "input_ids": torch.zeros_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "label": good,
        "ref_logps": references,
        "ref_KL_logps": torch.zeros(PAIRS),
    }
    theirs = trainer._compute_loss(OfLogps(logps), inputs, False)
    theirs.backward()
    baseline = max(kl, 0) if loss_type == "kto" else 0.0

    def loss(logps, references):
        return kto_loss(jnp.sum(logps, axis=1), references, good.numpy(), baseline, beta=BETA, weights=(1.5, 0.5))

    value, (gradient, _) = ours(loss, logps, references)
    assert value == pytest.approx(theirs.item(), rel=TOLERANCE)
    assert relative(gradient, logps.grad) < TOLERANCE


def pairs(rng):
    return [torch.tensor(-3 * rng.random(PAIRS), requires_grad=True) for _ in range(2)]


def test_the_odds_ratio_is_orpo_trainers():
    from trl.experimental.orpo import ORPOTrainer

    chosen, rejected = pairs(np.random.default_rng(0))
    # Their part of the loss is the odds ratio's, which they subtract, and compute in float32.
    theirs = -bare(ORPOTrainer, beta=BETA).odds_ratio_loss(chosen, rejected)[0].mean()
    theirs.backward()

    def loss(chosen, rejected):
        return orpo_loss(chosen, rejected, weight=BETA) + chosen

    value, gradients = ours(loss, chosen, rejected)
    assert value == pytest.approx(theirs.item(), rel=TOLERANCE)
    for mine, tensor in zip(gradients, (chosen, rejected), strict=True):
        assert relative(mine, tensor.grad) < TOLERANCE


def test_simpo_is_cpo_trainers():
    from trl.experimental.cpo import CPOTrainer

    chosen, rejected = pairs(np.random.default_rng(0))
    trainer = bare(CPOTrainer, beta=2.0, simpo_gamma=0.7, loss_type="simpo", label_smoothing=0.0, alpha=0.0)
    theirs = trainer.cpo_loss(chosen, rejected)[0].mean()
    theirs.backward()
    value, gradients = ours(lambda c, r: simpo_loss(c, r, beta=2.0, gamma=0.7), chosen, rejected)
    assert value == pytest.approx(theirs.item(), rel=TOLERANCE)
    for mine, tensor in zip(gradients, (chosen, rejected), strict=True):
        assert relative(mine, tensor.grad) < TOLERANCE


@pytest.mark.parametrize("weight", [None, 0.1])
@pytest.mark.parametrize("has_margin", [False, True])
def test_bradley_terry_and_centring_are_reward_trainers(has_margin, weight):
    rng = np.random.default_rng(0)
    scores = torch.tensor(rng.standard_normal(2 * PAIRS), requires_grad=True)
    margin = torch.tensor(rng.random(PAIRS))
    trainer = bare(trl.RewardTrainer, args=SimpleNamespace(center_rewards_coefficient=weight))
    inputs = {"attention_mask": torch.ones(2 * PAIRS, 1)} | ({"margin": margin} if has_margin else {})
    theirs = trainer.compute_loss(lambda **_: SimpleNamespace(logits=scores[:, None]), inputs)
    theirs.backward()

    def loss(scores):
        chosen, rejected = scores[:PAIRS], scores[PAIRS:]
        pairs_P2 = jnp.stack([chosen, rejected], axis=-1)
        given = margin.numpy() if has_margin else None
        return bradley_terry(chosen, rejected, given) + (weight or 0) * centring(pairs_P2, jnp.ones((PAIRS, 2)))

    value, (gradient,) = ours(loss, scores)
    assert value == pytest.approx(theirs.item(), rel=TOLERANCE)
    assert relative(gradient, scores.grad) < TOLERANCE
