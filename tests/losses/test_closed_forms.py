"""Plain gradient descent on the log-probs themselves must end at the optimum that pen and paper give."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ds_align.losses import (
    Logps,
    PairedLogps,
    UnpairedLogps,
    cpo_loss,
    dpo_loss,
    ipo_loss,
    kto_loss,
    simpo_loss,
)

ONE = torch.ones(1, dtype=torch.float64)
REFERENCE = Logps(math.log(0.5) * ONE, ONE)


def two_answers(difference: Tensor) -> tuple[Logps, Logps]:
    """One-token answers of a policy that knows two: log p and log (1 - p), log-odds = difference."""
    return (
        Logps(torch.nn.functional.logsigmoid(difference), ONE),
        Logps(torch.nn.functional.logsigmoid(-difference), ONE),
    )


def pair(first: Logps, second: Logps) -> PairedLogps:
    return PairedLogps(first, second, REFERENCE, REFERENCE)


def minimise(objective: Callable[[Tensor], Tensor], steps: int = 60) -> float:
    difference = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([difference], max_iter=steps, tolerance_grad=1e-13, tolerance_change=1e-15)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = objective(difference).sum()
        loss.backward()
        return loss

    for _ in range(5):
        optimizer.step(closure)
    return difference.item()


@pytest.mark.parametrize(("smoothing", "beta"), [(0.1, 1.0), (0.3, 0.5), (0.5, 0.2)])
def test_conservative_dpo(smoothing: float, beta: float) -> None:
    # beta h* = log((1 - e)/e) and the loss there is the entropy of e.
    found = minimise(lambda h: dpo_loss(pair(*two_answers(h)), beta=beta, label_smoothing=smoothing).losses)
    assert beta * found == pytest.approx(math.log((1 - smoothing) / smoothing), abs=1e-6)
    end = torch.tensor([found], dtype=torch.float64)
    entropy = -smoothing * math.log(smoothing) - (1 - smoothing) * math.log(1 - smoothing)
    loss = dpo_loss(pair(*two_answers(end)), beta=beta, label_smoothing=smoothing).losses.item()
    assert loss == pytest.approx(entropy, abs=1e-9)


@pytest.mark.parametrize("share", [0.6, 0.75, 1.0])
@pytest.mark.parametrize("by_smoothing", [True, False])
def test_ipo_with_a_share_of_correct_labels(share: float, by_smoothing: bool) -> None:
    # h* = (2p - 1)/(2 beta), loss* = p(1 - p)/beta^2, whether the wrong labels are in the data or smoothed
    # in.
    beta = 0.4

    def objective(h: Tensor) -> Tensor:
        first, second = two_answers(h)
        if by_smoothing:
            return ipo_loss(pair(first, second), beta=beta, label_smoothing=1 - share).losses
        right, wrong = ipo_loss(pair(first, second), beta=beta), ipo_loss(pair(second, first), beta=beta)
        return share * right.losses + (1 - share) * wrong.losses

    found = minimise(objective)
    assert found == pytest.approx((2 * share - 1) / (2 * beta), abs=1e-7)
    loss = objective(torch.tensor([found], dtype=torch.float64)).item()
    assert loss == pytest.approx(share * (1 - share) / beta**2, abs=1e-9)


def test_ipo_descent_follows_its_recurrence() -> None:
    # d loss/d h = 2 (h - t); with the two logits as parameters each moves by lr times it, so h moves twice as
    # far: h_k = t (1 - (1 - 4 lr)^k), t = 1/(2 beta) = 2.5.
    logits = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    for step in range(1, 6):
        chosen, rejected = torch.log_softmax(logits, 0).split(1)
        ipo_loss(pair(Logps(chosen, ONE), Logps(rejected, ONE)), beta=0.2).losses.sum().backward()
        with torch.no_grad():
            logits -= 0.05 * logits.grad
            logits.grad = None
        assert (logits[0] - logits[1]).item() == pytest.approx(2.5 * (1 - 0.8**step), abs=1e-12)


def noisy(loss: Callable[[PairedLogps], Tensor], quality: float) -> Callable[[Tensor], Tensor]:
    """Objective over pairs of which a share `quality` has the right order."""

    def objective(h: Tensor) -> Tensor:
        first, second = two_answers(h)
        return quality * loss(pair(first, second)) + (1 - quality) * loss(pair(second, first))

    return objective


@pytest.mark.parametrize(
    ("beta", "alpha", "expected"), [(0.1, 0.0, 10.98612), (0.1, 1.0, 1.21938504), (1.0, 1.0, math.log(3.0))]
)
def test_cpo_with_label_noise(beta: float, alpha: float, expected: float) -> None:
    # beta (q - s(beta m)) + alpha (q - s(m)) = 0 at q = 3/4; the NLL term is the caller's, added here.
    found = minimise(
        noisy(lambda pairs: cpo_loss(pairs, beta=beta).losses - alpha * pairs.policy_chosen.total, 0.75)
    )
    assert found == pytest.approx(expected, abs=1e-4)


def test_simpo_with_label_noise() -> None:
    # e^u = [(2q-1) g + sqrt((2q-1)^2 g^2 + 4q(1-q))] / (2(1-q)) with g = e^gamma; q = 3/4, gamma = 1: u =
    # 1.78195956.
    growth = math.e
    expected = math.log((0.5 * growth + math.sqrt(0.25 * growth**2 + 0.75)) / 0.5)
    assert expected == pytest.approx(1.78195956, abs=1e-8)
    found = minimise(noisy(lambda pairs: simpo_loss(pairs, beta=2.0, gamma_beta_ratio=0.5).losses, 0.75))
    assert 2.0 * found == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("desirable_weight", "sign"), [(1.0, -1.0), (3.0, 0.0), (4.0, 1.0)])
def test_kto_turns_where_the_weighted_shares_meet(desirable_weight: float, sign: float) -> None:
    # A share q = 1/4 of the labels of one answer is desirable: at the start the pull is q w_d - (1 - q) w_u,
    # 0 at w_d = 3, w_u = 1; the loss is (q w_d + (1 - q) w_u)/2.
    total = torch.full((4,), math.log(0.5), dtype=torch.float64, requires_grad=True)
    four = torch.ones(4, dtype=torch.float64)
    examples = UnpairedLogps(
        policy=Logps(total, four),
        reference=Logps(math.log(0.5) * four, four),
        desirable=torch.tensor([True, False, False, False]),
    )
    output = kto_loss(examples, desirable_weight=desirable_weight)
    assert output.losses.mean().item() == pytest.approx((0.25 * desirable_weight + 0.75) / 2)
    output.losses.sum().backward()
    pull = -total.grad.sum().item()
    assert (abs(pull) < 1e-15) if sign == 0.0 else (math.copysign(1.0, pull) == sign)
