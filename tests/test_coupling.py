"""Losses over a whole global batch, on numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from ds_align.config import METHODS, DPOConfig
from ds_align.coupling import LogpsTable, RunningMean
from ds_align.losses import Logps, PairedLogps, UnpairedLogps
from ds_align.objective import Objective


def sigma(value: float) -> float:
    return 1.0 / (1.0 + math.exp(-value))


def paired(*totals: list[float]) -> PairedLogps:
    return PairedLogps(
        *(Logps(torch.tensor(t, dtype=torch.float64), torch.full((len(t),), 2)) for t in totals)
    )


def dpo(**settings: object) -> Objective:
    return Objective(METHODS["dpo"], DPOConfig(**settings))


# Policy gaps 1 - 0 = 1 and 5 - 2 = 3; reference gaps 4 - 0 = 4 and 2 - 1 = 1.
TWO_PAIRS = paired([1.0, 5.0], [0.0, 2.0], [4.0, 2.0], [0.0, 1.0])


def test_aot_compares_sorted_gaps() -> None:
    terms = dpo(loss_type="aot", beta=0.5).couple(LogpsTable.flatten(TWO_PAIRS), kl=None, training=True)
    # Sorted: policy 1, 3; reference 1, 4; differences 0 and -1. Unsorted they would be -3 and 2.
    assert terms.losses.sum().item() == pytest.approx(-math.log(sigma(0.0)) - math.log(sigma(-0.5)))
    # d / d gap = -beta sigma(-beta difference): -0.25 for the first pair, -0.5 sigma(0.5) for the second.
    slopes = [[-0.25, 0.25], [-0.5 * sigma(0.5), 0.5 * sigma(0.5)]]
    assert terms.slopes.tolist() == [pytest.approx(row) for row in slopes]
    # Rewards are the pairs' own: beta (1 - 4), beta (5 - 2) and beta (0 - 0), beta (2 - 1).
    assert terms.rewards.tolist() == [[-1.5, 0.0], [1.5, 0.5]]


def test_aot_does_not_depend_on_the_order_of_pairs() -> None:
    table = torch.randn(7, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    order = torch.tensor([3, 6, 0, 5, 1, 4, 2])
    objective = dpo(loss_type="aot_unpaired")
    first = objective.couple(table, kl=None, training=True)
    second = objective.couple(table[order], kl=None, training=True)
    torch.testing.assert_close(first.slopes[order], second.slopes)
    assert first.losses.sum().item() == pytest.approx(second.losses.sum().item())


def test_bco_takes_the_mean_of_the_steps_so_far() -> None:
    objective = dpo(loss_type="bco_pair", beta=0.5)
    table = LogpsTable.flatten(TWO_PAIRS)
    # Rewards -1.5, 1.5, 0, 0.5: mean 0.125, used in the same step.
    terms = objective.couple(table, kl=None, training=True)
    assert float(objective.running_delta.mean) == pytest.approx(0.125)
    first = -math.log(sigma(-1.5 - 0.125)) - math.log(sigma(-(0.0 - 0.125)))
    assert terms.losses[0].item() == pytest.approx(first)
    # A second step whose rewards are all 2.5 (log-ratio 5): (0.125 + 2.5) / 2.
    second = LogpsTable.flatten(paired([5.0], [5.0], [0.0], [0.0]))
    objective.couple(second, kl=None, training=True)
    assert float(objective.running_delta.mean) == pytest.approx(1.3125)
    # An evaluation takes the mean as it is.
    terms = objective.couple(table, kl=None, training=False)
    assert float(objective.running_delta.mean) == pytest.approx(1.3125)
    expected = -math.log(sigma(1.5 - 1.3125)) - math.log(sigma(-(0.5 - 1.3125)))
    assert terms.losses[1].item() == pytest.approx(expected)


def test_the_mean_is_restored() -> None:
    objective, other = dpo(loss_type="bco_pair"), dpo(loss_type="bco_pair")
    table = LogpsTable.flatten(TWO_PAIRS)
    for _ in range(3):
        objective.couple(table, kl=None, training=True)
    other.load_state_dict(objective.state_dict())
    for one in (objective, other):
        one.couple(2 * table, kl=None, training=True)
    assert other.state_dict() == objective.state_dict()
    assert dpo().state_dict() == {}


def test_running_mean() -> None:
    mean = RunningMean()
    for value, expected in ((4.0, 4.0), (2.0, 3.0), (9.0, 5.0)):
        mean.add(value)
        assert mean.mean == expected


@pytest.mark.parametrize("reference", [True, False])
def test_tables_hold_everything(reference: bool) -> None:
    logps = [Logps(torch.randn(3).double(), torch.tensor([1, 2, 3])) for _ in range(4 if reference else 2)]
    pairs = PairedLogps(*logps)
    table = LogpsTable.flatten(pairs)
    assert table.shape == (3, LogpsTable.num_columns("pairs", has_reference=reference))
    back = LogpsTable.restore(table, "pairs", has_reference=reference, kl=None)
    assert torch.equal(back.policy_rejected.total, pairs.policy_rejected.total)
    assert (back.reference_chosen is not None) is reference
    assert back.policy_chosen.total.requires_grad and back.policy_chosen.length.tolist() == [1, 2, 3]
    single = UnpairedLogps(
        policy=logps[0],
        reference=logps[1] if reference else None,
        desirable=torch.tensor([True, False, True]),
        kl=0.25,
    )
    table = LogpsTable.flatten(single)
    assert table.shape == (3, LogpsTable.num_columns("unpaired", has_reference=reference))
    back = LogpsTable.restore(table, "unpaired", has_reference=reference, kl=torch.tensor(0.25))
    assert back.desirable.tolist() == [True, False, True] and float(back.kl) == 0.25
    assert torch.equal(back.policy.total, single.policy.total)
