"""Metrics on numbers worked out by hand, and that they add up over any split of a batch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ds_align import metrics
from ds_align.batch import GlobalBatch, Layout, PackedBatch, Pair, TokenScores, Unpaired
from ds_align.config import METHODS, BaseConfig, CPOConfig, DPOConfig, KTOConfig
from ds_align.metrics import MetricSums
from ds_align.objective import ForwardOutput, Objective
from ds_align.packing import Group, PreferenceTable, build_batch

CPU = torch.device("cpu")


def ids(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


def batches(rows: list, parts: list[list[int]]) -> list[PackedBatch]:
    """The rows numbered in each part as one micro-batch."""
    table = PreferenceTable.from_preferences(rows)

    def group(number: int) -> Group:
        members = table.members[number]
        return Group(table.prompt_of[members[0]], members, (number,), 0)

    return [
        build_batch(table, [group(number) for number in part], range(len(rows)), Layout.PLAIN)
        for part in parts
    ]


def run(
    config: BaseConfig, batch: PackedBatch, by_unit: dict[str, list[list[float]]], **owned: object
) -> ForwardOutput:
    """The objective on token values that are given by unit: "logps" and "logits"."""
    values = {
        name: torch.tensor([value for unit in batch.units.tolist() for value in lists[unit]])
        for name, lists in by_unit.items()
    }
    scores = TokenScores(values["logps"], values["logits"])
    return Objective(METHODS[config.method], config)(batch, scores, owner_of(by_unit, **owned))


def owner_of(by_unit: dict[str, list[list[float]]], **owned: object) -> GlobalBatch:
    return GlobalBatch(
        step=1,
        epoch=0.0,
        micro_batches=[],
        reference_batches=[],
        kl_batches=[],
        kl_units=torch.zeros(0, dtype=torch.long),
        num_preferences=3,
        num_chosen_tokens=6,
        num_kl=0,
        unit_lengths=torch.tensor([len(unit) for unit in by_unit["logps"]]),
        **owned,
    )


# Three pairs of prompts of their own: units 0 to 5, chosen and rejected in turn.
PAIRS = [
    Pair(ids(1), ids(5, 6), ids(7)),
    Pair(ids(2), ids(5), ids(6, 7)),
    Pair(ids(3), ids(5, 6, 7), ids(8)),
]
PAIR_VALUES = {
    "logps": [[-1.0, -1.0], [-1.5], [-3.0], [-1.0, -2.0], [-1.0, -1.0, -1.0], [-1.0]],
    "logits": [[1.0, 3.0], [4.0], [7.0], [0.0, 2.0], [1.0, 1.0, 1.0], [-2.0]],
}
# Sums: -2, -1.5, -3, -3, -3, -1; the reference's, token by token below: -3, -2, -3, -3, -2, -2.
# Log-ratios: 1, 0.5; 0, 0; -1, 1.
REFERENCE = torch.tensor([-1.0, -2.0, -2.0, -3.0, -1.0, -2.0, 0.0, -1.0, -1.0, -2.0])


def paired_means(parts: list[list[int]]) -> dict[str, float]:
    sums = MetricSums("pairs", CPU)
    for batch in batches(PAIRS, parts):
        sums.add(run(DPOConfig(beta=2.0), batch, PAIR_VALUES, reference_logps=REFERENCE), batch)
    return sums.reduce()[0]


def softplus(value: float) -> float:
    return math.log1p(math.exp(value))


def test_paired_metrics_by_hand() -> None:
    means = paired_means([[0, 1, 2]])
    # Margins at beta 2: 2 * (0.5, 0, -2) = 1, 0, -4.
    assert means == pytest.approx(
        {
            "loss": (softplus(-1) + softplus(0) + softplus(4)) / 3,
            "rewards/chosen": 2 * (1 + 0 - 1) / 3,
            "rewards/rejected": 2 * (0.5 + 0 + 1) / 3,
            # Won, tied, lost: 1 + 1/2 + 0.
            "rewards/accuracies": 0.5,
            "rewards/margins": (1 + 0 - 4) / 3,
            "logps/chosen": (-2 - 3 - 3) / 3,
            "logps/rejected": (-1.5 - 3 - 1) / 3,
            # Over tokens: (1+3+7+1+1+1)/6 and (4+0+2-2)/4.
            "logits/chosen": 14 / 6,
            "logits/rejected": 1.0,
            # 8 nats over 6 chosen tokens.
            "nll_loss": 8 / 6,
            # Per token: -1 over -1.5 won; -3 over -1.5 lost; -1 against -1 tied.
            "policy_accuracy": 0.5,
            "confidence": sum(1 / (1 + math.exp(-margin)) for margin in (1, 0, 4)) / 3,
        }
    )


@pytest.mark.parametrize("parts", [[[0], [1], [2]], [[0, 2], [1]], [[2, 1, 0]], [[], [1, 2], [], [0]]])
def test_paired_metrics_add_up_over_any_split(parts: list[list[int]]) -> None:
    assert paired_means(parts) == pytest.approx(paired_means([[0, 1, 2]]), rel=1e-12)


def test_the_logged_loss_holds_the_nll_term() -> None:
    (batch,) = batches(PAIRS, [[0, 1, 2]])
    sums = MetricSums("pairs", CPU)
    config = CPOConfig(beta=1.0, cpo_alpha=3.0)
    sums.add(run(config, batch, PAIR_VALUES), batch)
    means, _ = sums.reduce()
    # Gaps of the sums: -0.5, 0, -2; NLL 8 nats over 6 tokens, times 3.
    preference = (softplus(0.5) + softplus(0) + softplus(2)) / 3
    assert means["loss"] == pytest.approx(preference + 3 * 8 / 6)
    assert means["nll_loss"] == pytest.approx(8 / 6)


UNPAIRED = [
    Unpaired(ids(1), ids(5, 6), True),
    Unpaired(ids(2), ids(5), False),
    Unpaired(ids(3), ids(5, 6, 7), True),
    Unpaired(ids(4), ids(8), False),
    Unpaired(ids(5), ids(9), False),
]
UNPAIRED_VALUES = {
    "logps": [[-1.0, -1.0], [-1.5], [-1.0, -1.0, -1.0], [-1.0], [-3.0]],
    "logits": [[1.0, 3.0], [4.0], [1.0, 1.0, 4.0], [-2.0], [1.0]],
}
# rho: -2+3 = 1, -1.5+2 = 0.5, -3+3 = 0, -1+2 = 1, -3+3 = 0; z0 = 0.5.
# The reference's sums are -3, -2, -3, -2, -3.
UNPAIRED_REFERENCE = torch.tensor([-1.0, -2.0, -2.0, -1.0, -1.0, -1.0, -2.0, -3.0])


class Reads(TorchDispatchMode):
    """Counts the reads of a tensor's value by Python, each of which would wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


COUPLED = ({"loss_type": "aot"}, {"loss_type": "bco_pair"})


@pytest.mark.parametrize("settings", [{}, {"rpo_alpha": 1.0, "ld_alpha": 0.5}, *COUPLED])
def test_no_value_is_read_between_logged_steps(settings: dict) -> None:
    config = DPOConfig(**settings)
    objective, sums = Objective(METHODS["dpo"], config), MetricSums("pairs", CPU)
    (batch,) = batches(PAIRS, [[0, 1, 2]])
    values = [value for unit in batch.units.tolist() for value in PAIR_VALUES["logps"][unit]]
    scores = TokenScores(torch.tensor(values), torch.zeros(len(values)))
    given = owner_of(PAIR_VALUES, reference_logps=REFERENCE)
    with Reads() as reads:
        if config.coupled:
            given.coupled = objective.couple(objective.table(batch, scores, given), kl=None, training=True)
        sums.add(objective(batch, scores, given), batch)
    assert reads.count == 0
    with reads:
        assert sums.reduce()[0]["loss"] > 0
    assert reads.count > 0, "the figures are read when they are logged"


def test_all_figures_come_from_one_sum_over_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    over_ranks = metrics.distributed.all_reduce_sum

    def counted(*arguments: object) -> torch.Tensor:
        calls.append(arguments)
        return over_ranks(*arguments)

    monkeypatch.setattr(metrics.distributed, "all_reduce_sum", counted)
    sums = MetricSums("pairs", CPU)
    for batch in batches(PAIRS, [[0], [1, 2]]):
        sums.add(run(DPOConfig(), batch, PAIR_VALUES, reference_logps=REFERENCE), batch)
    assert not calls
    means, counters = sums.reduce(tokens=17.0, seconds=2.5)
    assert len(calls) == 1 and len(means) > 10 and len(counters) == 2


def unpaired_means(rows: list[Unpaired], parts: list[list[int]]) -> dict[str, float]:
    sums = MetricSums("unpaired", CPU)
    kl = torch.tensor(0.5, dtype=torch.float64)
    for batch in batches(rows, parts):
        config = KTOConfig(beta=2.0)
        output = run(config, batch, UNPAIRED_VALUES, reference_logps=UNPAIRED_REFERENCE, kl=kl)
        sums.add(output, batch)
    return sums.reduce()[0]


def test_unpaired_metrics_by_hand() -> None:
    means = unpaired_means(UNPAIRED, [[0, 1, 2, 3, 4]])
    # beta * sign * (rho - z0): 1, 0, -1, -1, 1; losses are the sigmoid of the negative.
    sigmoid = 1 / (1 + math.exp(-1))
    assert means == pytest.approx(
        {
            "loss": (2 * (1 - sigmoid) + 0.5 + 2 * sigmoid) / 5,
            "rewards/chosen": 2 * (1 + 0) / 2,
            "rewards/rejected": 2 * (0.5 + 1 + 0) / 3,
            "rewards/margins": 1 - 1,
            # Right: 1, a tie with z0 1/2, 0, 0, 1.
            "rewards/accuracies": 2.5 / 5,
            "desirable_accuracy": 0.5,
            "undesirable_accuracy": 1.5 / 3,
            "logps/chosen": (-2 - 3) / 2,
            "logps/rejected": (-1.5 - 1 - 3) / 3,
            # Over tokens: (1+3+1+1+4)/5 and (4-2+1)/3.
            "logits/chosen": 2.0,
            "logits/rejected": 1.0,
            "kl": 0.5,
        }
    )


@pytest.mark.parametrize("parts", [[[0], [1, 2], [3, 4]], [[4, 0], [], [3, 2, 1]]])
def test_unpaired_metrics_add_up_over_any_split(parts: list[list[int]]) -> None:
    expected = unpaired_means(UNPAIRED, [[0, 1, 2, 3, 4]])
    assert unpaired_means(UNPAIRED, parts) == pytest.approx(expected, rel=1e-12)


def test_a_metric_of_nothing_is_left_out() -> None:
    means = unpaired_means(UNPAIRED, [[0, 2]])
    missing = {"rewards/rejected", "rewards/margins", "undesirable_accuracy", "logps/rejected"}
    assert not means.keys() & missing
    assert means["desirable_accuracy"] == 0.5 and all(math.isfinite(value) for value in means.values())
    assert MetricSums("pairs", CPU).reduce() == ({}, {})


def test_reset_forgets_and_counters_pass_through() -> None:
    sums = MetricSums("pairs", CPU)
    first, second = batches(PAIRS, [[0], [2]])
    sums.add(run(DPOConfig(), first, PAIR_VALUES, reference_logps=REFERENCE), first)
    sums.reset()
    sums.add(run(DPOConfig(), second, PAIR_VALUES, reference_logps=REFERENCE), second)
    means, counters = sums.reduce(tokens=17.0, seconds=2.5)
    assert means["rewards/accuracies"] == 0.0
    assert counters == {"tokens": 17.0, "seconds": 2.5}
