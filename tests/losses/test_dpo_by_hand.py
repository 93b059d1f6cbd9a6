"""Every form of dpo_loss on numbers that can be followed with a pencil."""

from __future__ import annotations

import math

import pytest
import torch

from ds_align.losses import LossOutput, PairedLogps, dpo_loss
from tests.losses.batches import as_logps
from tests.losses.reference import Pair

# c = -10 + 12 = 2, r = -20 + 21 = 1, z = 1; a token c = 2/4 = 0.5, r = 1/5 = 0.2. beta = 0.5, so that
# beta c = 1, beta r = beta z = 0.5. What the arithmetic below needs:
#   ls(1) = -0.3132616875   ls(-1) = -1.3132616875   sg(1) = 0.7310585786
#   ls(0.5) = -0.4740769842   ls(-0.5) = -0.9740769842   sg(0.5) = 0.6224593312   sg(-0.5) = 0.3775406688
PAIR = as_logps([Pair(-10.0, -20.0, -12.0, -21.0, 4, 5)])
# Row 1: policy gap 4, reference gap 0, c = 1, r = -3. Row 2: gaps 1 and 2, c = -1, r = 0.
TWO = as_logps([Pair(-1.0, -5.0, -2.0, -2.0, 4, 5), Pair(-5.0, -6.0, -4.0, -6.0, 4, 5)])


def loss(logps: PairedLogps = PAIR, **settings: object) -> LossOutput:
    return dpo_loss(logps, beta=0.5, **settings)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        # the logistic loss of beta z, -ls(0.5)
        ({"loss_type": "sigmoid"}, 0.4740769842),
        # 0.9 * 0.4740769842 + 0.1 * 0.9740769842
        ({"loss_type": "sigmoid", "label_smoothing": 0.1}, 0.5240769842),
        # 1 - 0.5
        ({"loss_type": "hinge"}, 0.5),
        # the target is 1/(2 * 0.5) = 1: (0.3 - 1)^2
        ({"loss_type": "ipo"}, 0.49),
        ({"loss_type": "ipo_loss"}, 0.49),
        # sg(0.5)(ls(0.5) - log 0.9) + sg(-0.5)(ls(-0.5) - log 0.1)
        # = 0.6224593312 * (-0.4740769842 + 0.1053605157) + 0.3775406688 * (-0.9740769842 + 2.3025850930)
        # = -0.2295110062 + 0.5015658397
        ({"loss_type": "exo_pair", "label_smoothing": 0.1}, 0.2720548335),
        # e = 0.001, its least: 0.6224593312 * (-0.4740769842 + 0.0010005003)
        # + 0.3775406688 * (-0.9740769842 + 6.9077552790) = -0.2944708813 + 2.2402048814
        ({"loss_type": "exo_pair"}, 1.9457340001),
        # 0.3132616875 + 0.5 * 1.3132616875 + 0.5 * 0.9740769842
        ({"loss_type": "nca_pair"}, 1.4569310234),
        # (0.9 * 0.4740769842 - 0.1 * 0.9740769842) / 0.8, the divisor being 1 - 2 * 0.1
        ({"loss_type": "robust", "label_smoothing": 0.1}, 0.4115769842),
        # 0.3132616875 + 0.9740769842
        ({"loss_type": "bco_pair"}, 1.2873386717),
        # -ls(1 - 0.25) - ls(0.25 - 0.5) = 0.3868710061 + 0.8259394199
        ({"loss_type": "bco_pair", "bco_delta": 0.25}, 1.2128104260),
        # targets 1 and -1: (2 - 1)^2 + (1 + 1)^2
        ({"loss_type": "sppo_hard"}, 5.0),
        # 1 - 0.7310585786 + 0.6224593312
        ({"loss_type": "apo_zero"}, 0.8914007526),
        # 0.7310585786 + 1 - 0.6224593312
        ({"loss_type": "apo_down"}, 1.1085992474),
        # 0.4740769842 * 0.3775406688 + e^-0.5 * 0.6224593312 = 0.1789833419 + 0.6065306597 * 0.6224593312
        ({"loss_type": "discopop", "discopop_tau": 1.0}, 0.5565240105),
        # x/tau = 10, sg(10) = 0.9999546021: 0.4740769842 * 0.0000453979 + 0.6065306597 * 0.9999546021
        ({"loss_type": "discopop"}, 0.6065246466),
        # d = 0.3: -ls(0.5 * 0.3)
        ({"loss_type": "sigmoid_norm"}, 0.6209570478),
        # 0.9 * 0.6209570478 + 0.1 * 0.7709570478
        ({"loss_type": "sigmoid_norm", "label_smoothing": 0.1}, 0.6359570478),
        # One row is sorted already: aot and aot_unpaired are sigmoid.
        ({"loss_type": "aot"}, 0.4740769842),
        ({"loss_type": "aot_unpaired"}, 0.4740769842),
        # sigmoid + 0.5 * nca_pair = 0.4740769842 + 0.5 * 1.4569310234
        ({"loss_type": ["sigmoid", "nca_pair"], "loss_weights": [1.0, 0.5]}, 1.2025424959),
        # weights 1 each: 0.5 + 0.49
        ({"loss_type": ("hinge", "ipo")}, 0.99),
        # 2 * 0.5
        ({"loss_type": ["hinge"], "loss_weights": [2.0]}, 1.0),
    ],
)
def test_one_pair(settings: dict[str, object], expected: float) -> None:
    assert loss(**settings).losses.tolist() == [pytest.approx(expected, abs=2e-10)]


@pytest.mark.parametrize(
    ("loss_type", "first", "second"),
    [
        # Policy gaps (4, 1) against the sorted reference gaps (0, 2): 4 - 2 = 2 and 1 - 0 = 1, not 4 and -1.
        # Times beta: -ls(1) and -ls(0.5).
        ("aot", 0.3132616875, 0.4740769842),
        # c = (1, -1) against the sorted r = (-3, 0): 1 - 0 = 1 and -1 + 3 = 2, not 4 and -1.
        ("aot_unpaired", 0.4740769842, 0.3132616875),
        ("aot_pair", 0.4740769842, 0.3132616875),
        # hinge of beta z = (2, -0.5) on top of aot: 0 and 1.5
        (["aot", "hinge"], 0.3132616875, 1.9740769842),
    ],
)
def test_two_pairs_in_order_of_rank(loss_type: str | list[str], first: float, second: float) -> None:
    output = loss(TWO, loss_type=loss_type)
    assert output.losses.tolist() == pytest.approx([first, second], abs=1e-10)
    assert output.chosen_rewards.tolist() == [0.5, -0.5]
    assert output.rejected_rewards.tolist() == [-1.5, 0.0]


@pytest.mark.parametrize(
    ("settings", "expected", "rewards"),
    [
        # 1 - e^-2 = 0.8646647168 and 1 - e^-1 = 0.6321205588: -ls(0.5 * 0.2325441579)
        ({"f_divergence_type": "forward_kl"}, 0.6367000896, (0.4323323584, 0.3160602794)),
        # log 2 + ls(2) = 0.6931471806 - 0.1269280110 and log 2 + ls(1) = 0.6931471806 - 0.3132616875:
        # their difference is 0.1863336765, the loss -ls(0.5 * 0.1863336765)
        ({"f_divergence_type": "js"}, 0.6476483767, (0.2831095848, 0.1899427465)),
        # (1 - e^-1)/0.5 = 1.2642411177 and (1 - e^-0.5)/0.5 = 0.7869386806: -ls(0.5 * 0.4773024371)
        ({"f_divergence_type": "alpha"}, 0.5809240409, (0.6321205588, 0.3934693403)),
        # 1 - 0.5 * 0.2325441579
        (
            {"f_divergence_type": "forward_kl", "loss_type": "hinge"},
            0.8837279210,
            (0.4323323584, 0.3160602794),
        ),
    ],
)
def test_f_divergences(settings: dict[str, object], expected: float, rewards: tuple[float, float]) -> None:
    output = loss(**settings)
    assert output.losses.item() == pytest.approx(expected, abs=1e-10)
    assert output.chosen_rewards.item() == pytest.approx(rewards[0], abs=1e-10)
    assert output.rejected_rewards.item() == pytest.approx(rewards[1], abs=1e-10)


@pytest.mark.parametrize(
    ("loss_type", "chosen", "rejected"),
    [
        # beta c and beta r; a token beta c/n_c and beta r/n_r; of a list those of its first type.
        ("exo_pair", 1.0, 0.5),
        ("apo_down", 1.0, 0.5),
        ("bco_pair", 1.0, 0.5),
        ("aot_unpaired", 1.0, 0.5),
        ("ipo", 0.25, 0.1),
        ("sigmoid_norm", 0.25, 0.1),
        (["sigmoid_norm", "hinge"], 0.25, 0.1),
        (["hinge", "sigmoid_norm"], 1.0, 0.5),
    ],
)
def test_rewards(loss_type: str | list[str], chosen: float, rejected: float) -> None:
    output = loss(loss_type=loss_type, bco_delta=0.3)
    assert output.chosen_rewards.tolist() == [pytest.approx(chosen)]
    assert output.rejected_rewards.tolist() == [pytest.approx(rejected)]


STEP_ZERO = {
    "sigmoid": math.log(2),
    "hinge": 1.0,
    "ipo": 1 / (4 * 0.37**2),
    "exo_pair": 0.5 * (math.log(0.5) - math.log(0.999)) + 0.5 * (math.log(0.5) - math.log(0.001)),
    "nca_pair": 2 * math.log(2),
    "robust": math.log(2),
    "bco_pair": 2 * math.log(2),
    "sppo_hard": 2 / (4 * 0.37**2),
    "aot": math.log(2),
    "aot_unpaired": math.log(2),
    "apo_zero": 1.0,
    "apo_down": 1.0,
    "discopop": 0.5 * math.log(2) + 0.5,
    "sigmoid_norm": math.log(2),
}


@pytest.mark.parametrize("loss_type", STEP_ZERO)
def test_losses_at_the_start_of_training(loss_type: str) -> None:
    same = as_logps([Pair(-3.0, -8.0, -3.0, -8.0, 2, 4), Pair(-9.0, -2.0, -9.0, -2.0, 5, 1)])
    output = dpo_loss(same, beta=0.37, loss_type=loss_type)
    assert output.losses.tolist() == pytest.approx([STEP_ZERO[loss_type]] * 2, rel=1e-12)
    assert output.chosen_rewards.tolist() == output.rejected_rewards.tolist() == [0.0, 0.0]


def test_a_delta_that_is_a_tensor_is_a_constant() -> None:
    delta = torch.tensor([0.25], requires_grad=True)
    output = loss(
        as_logps([Pair(-10.0, -20.0, -12.0, -21.0)], grad=True), loss_type="bco_pair", bco_delta=delta
    )
    assert output.losses.shape == (1,) and output.losses.dtype == torch.float64
    assert output.losses.item() == pytest.approx(1.2128104260, abs=1e-10)
    output.losses.sum().backward()
    assert delta.grad is None


@pytest.mark.parametrize(
    ("loss_type", "pair", "expected"),
    [
        # c = 100, r = -110: 1 - sg(100) is e^-100 = 3.7e-44; as a difference it would be 0 in float64.
        ("apo_zero", Pair(100.0, -110.0, 0.0, 0.0), math.exp(-100.0) + math.exp(-110.0)),
        # c = -110, r = -210, z = 100: sg(c) + 1 - sg(z)
        ("apo_down", Pair(-110.0, -210.0, 0.0, 0.0), math.exp(-110.0) + math.exp(-100.0)),
    ],
)
def test_sigmoids_that_saturate_keep_their_digits(loss_type: str, pair: Pair, expected: float) -> None:
    losses = dpo_loss(as_logps([pair]), beta=1.0, loss_type=loss_type).losses
    assert losses.item() == pytest.approx(expected, rel=1e-12)
