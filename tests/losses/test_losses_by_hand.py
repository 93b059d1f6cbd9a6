"""The five losses against hand-worked numbers and against the formulas in plain Python floats."""

from __future__ import annotations

import math
import random

import pytest
import torch

from ds_align.losses import (
    Logps,
    LossOutput,
    PairedLogps,
    UnpairedLogps,
    cpo_loss,
    dpo_loss,
    ipo_loss,
    kto_loss,
    simpo_loss,
)


def logps(*entries: tuple[float, int], dtype: torch.dtype = torch.float64) -> Logps:
    totals, lengths = zip(*entries, strict=True)
    return Logps(torch.tensor(totals, dtype=dtype), torch.tensor(lengths))


# c = -10 - (-12) = 2, r = -20 - (-21) = 1, z = 1; per token c = 2/4 = 0.5, r = 1/5 = 0.2, gap 0.3.
# Policy alone: sums -10 and -20, means -10/4 = -2.5 and -20/5 = -4, gaps 10 and 1.5.
PAIR = PairedLogps(
    policy_chosen=logps((-10.0, 4)),
    policy_rejected=logps((-20.0, 5)),
    reference_chosen=logps((-12.0, 4)),
    reference_rejected=logps((-21.0, 5)),
)


@pytest.mark.parametrize(
    ("output", "loss", "chosen_reward", "rejected_reward"),
    [
        # -log sigmoid(0.5 * 1) = log(1 + e^-0.5) = log 1.60653066
        (dpo_loss(PAIR, beta=0.5), 0.4740769842, 1.0, 0.5),
        # 0.9 * 0.4740769842 + 0.1 * log(1 + e^0.5) = 0.4266692858 + 0.0974076984
        (dpo_loss(PAIR, beta=0.5, label_smoothing=0.1), 0.5240769842, 1.0, 0.5),
        # 1 - 0.5 * 1
        (dpo_loss(PAIR, beta=0.5, loss_type="hinge"), 0.5, 1.0, 0.5),
        # (0.3 - 1/(2 * 0.5))^2 = 0.49; rewards 0.5 * 0.5 and 0.5 * 0.2
        (dpo_loss(PAIR, beta=0.5, loss_type="ipo"), 0.49, 0.25, 0.1),
        # log(1 + e^(-0.1 * 10)) = log 1.3678794412
        (dpo_loss(PAIR, beta=0.1, reference_free=True), 0.3132616875, -1.0, -2.0),
        # (1 - 1)^2 on sums
        (ipo_loss(PAIR, beta=0.5, length_normalize=False), 0.0, 1.0, 0.5),
        # 0.8 * (0.3 - 1)^2 + 0.2 * (0.3 + 1)^2 = 0.392 + 0.338
        (ipo_loss(PAIR, beta=0.5, label_smoothing=0.2), 0.73, 0.25, 0.1),
        # log(1 + e^(-0.1 * 10)); rewards 0.1 * sums
        (cpo_loss(PAIR, beta=0.1), 0.3132616875, -1.0, -2.0),
        # 0.9 * 0.3132616875 + 0.1 * (0.3132616875 + 1): log(1 + e^x) = log(1 + e^-x) + x
        (cpo_loss(PAIR, beta=0.1, label_smoothing=0.1), 0.4132616875, -1.0, -2.0),
        # 1 - 0.05 * 10
        (cpo_loss(PAIR, beta=0.05, loss_type="hinge"), 0.5, -0.5, -1.0),
        # (1.5 - 5)^2 on means; (10 - 5)^2 on sums
        (cpo_loss(PAIR, beta=0.1, loss_type="ipo"), 12.25, -1.0, -2.0),
        (cpo_loss(PAIR, beta=0.1, loss_type="ipo", length_normalize=False), 25.0, -1.0, -2.0),
        # u = 2 * 1.5 - 2 * 0.5 = 2; log(1 + e^-2); rewards 2 * means
        (simpo_loss(PAIR), 0.1269280110, -5.0, -8.0),
        (simpo_loss(PAIR, loss_type="simpo"), 0.1269280110, -5.0, -8.0),
        # 0.1269280110 + 0.25 * 2
        (simpo_loss(PAIR, label_smoothing=0.25), 0.6269280110, -5.0, -8.0),
        # u = 1 * 1.5 - 1 * 1 = 0.5; 1 - 0.5
        (simpo_loss(PAIR, beta=1.0, gamma_beta_ratio=1.0, loss_type="hinge"), 0.5, -2.5, -4.0),
    ],
)
def test_one_pair(output: LossOutput, loss: float, chosen_reward: float, rejected_reward: float) -> None:
    assert output.losses.tolist() == [pytest.approx(loss, abs=1e-9)]
    assert output.chosen_rewards.tolist() == [pytest.approx(chosen_reward)]
    assert output.rejected_rewards.tolist() == [pytest.approx(rejected_reward)]
    assert output.rewards is None


def test_kto_examples() -> None:
    # rho = 3 and -2, z0 = 1, beta 0.5. Desirable: 2 (1 - sigmoid(0.5 * 2)) = 2 * 0.2689414214.
    # Undesirable: 3 (1 - sigmoid(0.5 * 3)) = 3 * 0.1824255238.
    examples = UnpairedLogps(
        policy=logps((-7.0, 3), (-9.0, 2)),
        reference=logps((-10.0, 3), (-7.0, 2)),
        desirable=torch.tensor([True, False]),
        kl=1.0,
    )
    output = kto_loss(examples, beta=0.5, desirable_weight=2.0, undesirable_weight=3.0)
    assert output.losses.tolist() == pytest.approx([0.5378828428, 0.5472765714], abs=1e-9)
    assert output.rewards.tolist() == pytest.approx([1.5, -1.0])
    assert output.chosen_rewards is None and output.rejected_rewards is None


def test_kto_without_a_reference() -> None:
    # rho = log pi = -4, z0 = -5 (a mean that is not clamped): 1 - sigmoid(0.5 * 1) = 0.3775406688.
    examples = UnpairedLogps(policy=logps((-4.0, 3)), desirable=torch.tensor([True]), kl=torch.tensor([-5.0]))
    output = kto_loss(examples, beta=0.5)
    assert output.losses.tolist() == [pytest.approx(0.3775406688, abs=1e-9)]
    assert output.rewards.tolist() == [-2.0]


def test_kto_as_apo_zero() -> None:
    # rho = 3 and -2, whatever z0 is. Desirable: 2 (1 - sigmoid(0.5 * 3)) = 2 * 0.1824255238.
    # Undesirable: 3 sigmoid(0.5 * -2) = 3 * 0.2689414214.
    examples = UnpairedLogps(
        policy=logps((-7.0, 3), (-9.0, 2)),
        reference=logps((-10.0, 3), (-7.0, 2)),
        desirable=torch.tensor([True, False]),
        kl=17.0,
    )
    output = kto_loss(
        examples, beta=0.5, loss_type="apo_zero_unpaired", desirable_weight=2.0, undesirable_weight=3.0
    )
    assert output.losses.tolist() == pytest.approx([0.3648510476, 0.8068242641], abs=1e-9)
    assert output.rewards.tolist() == pytest.approx([1.5, -1.0])


def test_apo_zero_of_single_completions_adds_up_to_that_of_pairs() -> None:
    # The chosen completions as desirable examples, the rejected ones as undesirable.
    chosen, rejected = logps((-10.0, 4), (-3.0, 2)), logps((-20.0, 5), (-1.0, 2))
    reference = logps((-12.0, 4), (-2.0, 2)), logps((-21.0, 5), (-4.0, 2))
    parts = [
        kto_loss(
            UnpairedLogps(policy=policy, reference=ref, desirable=torch.tensor([label, label])),
            beta=0.5,
            loss_type="apo_zero_unpaired",
        ).losses
        for policy, ref, label in ((chosen, reference[0], True), (rejected, reference[1], False))
    ]
    pairs = dpo_loss(PairedLogps(chosen, rejected, *reference), beta=0.5, loss_type="apo_zero")
    assert torch.equal(parts[0] + parts[1], pairs.losses)


# Means -0.5 and -1 nats a token, mean probabilities e^-0.5 and e^-1.
NEAR = PairedLogps(policy_chosen=logps((-1.0, 2)), policy_rejected=logps((-2.0, 2)))


@pytest.mark.parametrize(
    ("settings", "loss", "chosen_reward", "rejected_reward"),
    [
        # alpha 0.5: 2 (1 - e^0.25)/0.5 = 4 * -0.2840254167 and 2 (1 - e^0.5)/0.5 = 4 * -0.6487212707;
        # u = -1.1361016668 + 2.5948850828 - 1 = 0.4587834160
        ({"alpha": 0.5}, 0.4898381938, -1.1361016668, -2.5948850828),
        # 0.4898381938 + 0.1 * 0.4587834160
        ({"alpha": 0.5, "label_smoothing": 0.1}, 0.5357165354, -1.1361016668, -2.5948850828),
        # alpha -1: 2 (e^-0.5 - 1) and 2 (e^-1 - 1); u = -0.7869386806 + 1.2642411177 - 1 = -0.5226975629
        ({"alpha": -1.0}, 0.9882657153, -0.7869386806, -1.2642411177),
        # alpha 0 is SimPO: u = -1 + 2 - 1 = 0, log 2
        ({"alpha": 0.0}, 0.6931471806, -1.0, -2.0),
    ],
)
def test_alphapo(
    settings: dict[str, float], loss: float, chosen_reward: float, rejected_reward: float
) -> None:
    output = simpo_loss(NEAR, **settings)
    assert output.losses.tolist() == [pytest.approx(loss, abs=1e-9)]
    assert output.chosen_rewards.tolist() == [pytest.approx(chosen_reward, abs=1e-9)]
    assert output.rejected_rewards.tolist() == [pytest.approx(rejected_reward, abs=1e-9)]


def test_alphapo_runs_into_simpo() -> None:
    exact = simpo_loss(NEAR).losses.item()
    # d loss/d alpha at 0 is -sigmoid(-u) * -beta (m_c^2 - m_r^2)/2 = -0.5 * -2 * (0.25 - 1)/2 = -0.375.
    for alpha in (1e-2, 1e-4, 1e-8, 1e-12):
        gap = simpo_loss(NEAR, alpha=alpha).losses.item() - exact
        assert gap == pytest.approx(-0.375 * alpha, abs=alpha**2 + 1e-15)


def test_kto_losses_keep_their_digits_where_the_sigmoid_saturates() -> None:
    # 1 - sigmoid(100) is e^-100 = 3.7e-44; as a difference it would be exactly 0 in float64.
    examples = UnpairedLogps(policy=logps((100.0, 3)), desirable=torch.tensor([True]))
    assert kto_loss(examples, beta=1.0).losses.item() == pytest.approx(math.exp(-100.0), rel=1e-9)


def log_sigmoid(value: float) -> float:
    return -math.log1p(math.exp(-value)) if value > -30 else value - math.log1p(math.exp(value))


def smoothed(value: float, smoothing: float) -> float:
    return -(1 - smoothing) * log_sigmoid(value) - smoothing * log_sigmoid(-value)


def test_random_pairs_against_plain_python() -> None:
    rng = random.Random(5)
    rows = [[(rng.uniform(-40, -1), rng.randint(1, 30)) for _ in range(4)] for _ in range(50)]
    pairs = PairedLogps(*(logps(*column) for column in zip(*rows, strict=True)))
    outputs = {
        "dpo": dpo_loss(pairs, beta=0.3, label_smoothing=0.2),
        "ipo": ipo_loss(pairs, beta=0.3, label_smoothing=0.2),
        "cpo": cpo_loss(pairs, beta=0.3, label_smoothing=0.2),
        "simpo": simpo_loss(pairs, beta=2.5, gamma_beta_ratio=0.3, label_smoothing=0.2),
    }
    for index, ((pi_c, n_c), (pi_r, n_r), (ref_c, _), (ref_r, _)) in enumerate(rows):
        gap = (pi_c - ref_c) / n_c - (pi_r - ref_r) / n_r
        expected = {
            "dpo": smoothed(0.3 * ((pi_c - ref_c) - (pi_r - ref_r)), 0.2),
            "ipo": 0.8 * (gap - 1 / 0.6) ** 2 + 0.2 * (gap + 1 / 0.6) ** 2,
            "cpo": smoothed(0.3 * (pi_c - pi_r), 0.2),
            "simpo": smoothed(2.5 * (pi_c / n_c - pi_r / n_r - 0.3), 0.2),
        }
        for name, value in expected.items():
            assert outputs[name].losses[index].item() == pytest.approx(value, rel=1e-12), name


def test_losses_at_the_start_of_training() -> None:
    same = PairedLogps(logps((-3.0, 2)), logps((-8.0, 4)), logps((-3.0, 2)), logps((-8.0, 4)))
    assert dpo_loss(same, beta=0.37).losses.item() == pytest.approx(math.log(2.0))
    assert dpo_loss(same, beta=0.37, label_smoothing=0.3).losses.item() == pytest.approx(math.log(2.0))
    assert ipo_loss(same, beta=0.2).losses.item() == pytest.approx(1 / (4 * 0.2**2))
    examples = UnpairedLogps(
        policy=logps((-3.0, 2), (-8.0, 4)),
        reference=logps((-3.0, 2), (-8.0, 4)),
        desirable=torch.tensor([True, False]),
    )
    assert kto_loss(examples, beta=0.37).losses.tolist() == [0.5, 0.5]
