"""The paired losses against the formulas in 50-digit arithmetic, one pair at a time."""

from __future__ import annotations

import pytest
import torch

from ds_align.losses import dpo_loss, simpo_loss
from ds_align.losses.divergence import DIVERGENCES
from ds_align.losses.dpo_variants import VARIANTS
from tests.losses import reference
from tests.losses.batches import as_logps, random_pairs
from tests.losses.reference import Pair, Settings

CASES = [
    (name, smoothing, divergence)
    for name, variant in VARIANTS.items()
    for smoothing in ((0.0, 0.0004, 0.3) if variant.smoothing else (0.0,))
    for divergence in (DIVERGENCES if variant.divergence else ("reverse_kl",))
]


def floats(values: list) -> list[float]:
    return [float(value) for value in values]


@pytest.mark.parametrize(("name", "smoothing", "divergence"), CASES)
@pytest.mark.parametrize("beta", [0.1, 1.7])
def test_every_form(name: str, smoothing: float, divergence: str, beta: float) -> None:
    pairs = random_pairs(40, seed=11, spread=4.0)
    s = Settings(beta, smoothing, divergence, alpha=0.3, tau=0.4, delta=0.6)
    output = dpo_loss(
        as_logps(pairs),
        beta=beta,
        loss_type=name,
        label_smoothing=smoothing,
        f_divergence_type=divergence,
        f_alpha_divergence_coef=0.3,
        discopop_tau=0.4,
        bco_delta=0.6,
    )
    assert output.losses.tolist() == pytest.approx(floats(reference.dpo(name, pairs, s)), rel=1e-9, abs=1e-9)
    chosen, rejected = zip(*(reference.rewards(name, pair, s) for pair in pairs), strict=True)
    assert output.chosen_rewards.tolist() == pytest.approx(floats(chosen), rel=1e-9, abs=1e-9)
    assert output.rejected_rewards.tolist() == pytest.approx(floats(rejected), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("weights", [None, [0.2, 1.5, 3.0]])
def test_mixtures(weights: list[float] | None) -> None:
    pairs, names = random_pairs(30, seed=3), ["aot_unpaired", "sigmoid_norm", "robust"]
    output = dpo_loss(as_logps(pairs), loss_type=names, loss_weights=weights, label_smoothing=0.2)
    parts = [reference.dpo(name, pairs, Settings(smoothing=0.2)) for name in names]
    expected = [
        sum(weight * value for weight, value in zip(weights or [1, 1, 1], row, strict=True))
        for row in zip(*parts, strict=True)
    ]
    assert output.losses.tolist() == pytest.approx(floats(expected), rel=1e-9)


@pytest.mark.parametrize(
    "name", [name for name, kind in VARIANTS.items() if not (kind.absolute or kind.sorts)]
)
def test_a_uniform_reference(name: str) -> None:
    pairs = random_pairs(20, seed=4)
    alone = [Pair(pair.pi_c, pair.pi_r, 0.0, 0.0, pair.n_c, pair.n_r) for pair in pairs]
    losses = dpo_loss(as_logps(pairs), loss_type=name, reference_free=True).losses
    assert losses.tolist() == pytest.approx(floats(reference.dpo(name, alone, Settings())), rel=1e-9)


@pytest.mark.parametrize("alpha", [-0.7, -1e-9, 0.0, 1e-12, 0.25, 2.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_alphapo(alpha: float, smoothing: float) -> None:
    pairs = [
        Pair(pair.pi_c, pair.pi_r, 0.0, 0.0, pair.n_c + 20, pair.n_r + 20)
        for pair in random_pairs(40, seed=6)
    ]
    output = simpo_loss(
        as_logps(pairs), beta=2.5, gamma_beta_ratio=0.3, label_smoothing=smoothing, alpha=alpha
    )
    expected = [reference.simpo(pair, 2.5, 0.75, smoothing, alpha) for pair in pairs]
    assert output.losses.tolist() == pytest.approx(floats(expected), rel=1e-9)
    rewards = [reference.alphapo_reward(pair.pi_c, pair.n_c, 2.5, alpha) for pair in pairs]
    assert output.chosen_rewards.tolist() == pytest.approx(floats(rewards), rel=1e-9)


FAR = [
    Pair(chosen, rejected, -1.0, -1.0)
    for chosen in (-1e4, -2.0, 0.0)
    for rejected in (-1e4, -1.5, 0.0)
    if chosen != rejected
]


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("tau", [0.05, 1.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-12)])
def test_ten_thousand_nats_away(name: str, tau: float, dtype: torch.dtype, tolerance: float) -> None:
    # beta 1: the logits are +-1e4, where exp() has long left the floating range and the losses have not.
    logps = as_logps(FAR, dtype, grad=True)
    smoothing = 0.1 if VARIANTS[name].smoothing else 0.0
    losses = dpo_loss(logps, beta=1.0, loss_type=name, label_smoothing=smoothing, discopop_tau=tau).losses
    expected = reference.dpo(name, FAR, Settings(1.0, smoothing, tau=tau))
    assert losses.tolist() == pytest.approx(floats(expected), rel=tolerance, abs=tolerance)
    losses.sum().backward()
    assert logps.policy_chosen.total.grad.isfinite().all()
    assert logps.policy_rejected.total.grad.isfinite().all()


def test_ten_thousand_nats_away_under_js() -> None:
    losses = dpo_loss(as_logps(FAR, torch.float32), beta=1.0, f_divergence_type="js").losses
    expected = reference.dpo("sigmoid", FAR, Settings(1.0, divergence="js"))
    assert losses.tolist() == pytest.approx(floats(expected), rel=2e-6, abs=2e-6)
