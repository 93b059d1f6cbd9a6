"""The objective on numbers worked out by hand: sums, members, reference, z0 and the NLL's share."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ds_align.batch import GlobalBatch, Layout, PackedBatch, Pair, TokenScores, Unpaired
from ds_align.config import METHODS, CPOConfig, DPOConfig, IPOConfig, KTOConfig, SimPOConfig
from ds_align.objective import Objective, load_loss, sum_by_completion
from ds_align.packing import Group, PreferenceTable, build_batch


def ids(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


# Units 0 (2 tokens), 1 (1), 2 (3) under one prompt; the second pair takes unit 2 over unit 1.
PAIRS = [
    Pair(ids(1), ids(2, 3), ids(4)),
    Pair(ids(1), ids(5, 6, 7), ids(4)),
]
# Sums: unit 0: -1 - 2 = -3; unit 1: -4; unit 2: -1 - 1 - 1 = -3.
TOKEN_LOGPS = [-1.0, -2.0, -4.0, -1.0, -1.0, -1.0]


def pairs_batch() -> PackedBatch:
    table = PreferenceTable.from_preferences(PAIRS)
    return build_batch(table, [Group(0, (0, 1, 2), (0, 1), 7)], [0, 1], Layout.SHARED)


def owner(**values: object) -> GlobalBatch:
    """A global batch of 4 pairs with 10 chosen tokens, of which this micro-batch is a part."""
    given = {
        "step": 1,
        "epoch": 0.0,
        "micro_batches": [],
        "reference_batches": [],
        "kl_batches": [],
        "kl_units": torch.zeros(0, dtype=torch.long),
        "num_preferences": 4,
        "num_chosen_tokens": 10,
        "num_kl": 0,
        "unit_lengths": torch.tensor([2, 1, 3]),
    }
    return GlobalBatch(**(given | values))


def objective(config) -> Objective:
    return Objective(METHODS[config.method], config)


def scores(token_logps, mean_logits=None, log_collision=None) -> TokenScores:
    given = (token_logps, mean_logits, log_collision)
    return TokenScores(*(torch.tensor(v) if isinstance(v, list) else v for v in given))


def log_sigmoid(value: float) -> float:
    return -math.log1p(math.exp(-value))


def losses(config, **values: object) -> list[float]:
    output = objective(config)(pairs_batch(), scores(TOKEN_LOGPS), owner(**values))
    return output.losses.tolist()


# Token by token; the sums of the units: -2 - 3 = -5, -4.5, -1 - 1 - 2 = -4.
REFERENCE = torch.tensor([-2.0, -3.0, -4.5, -1.0, -1.0, -2.0])


def test_dpo() -> None:
    # Log-ratios by unit: -3+5 = 2, -4+4.5 = 0.5, -3+4 = 1. Gaps: 2 - 0.5 = 1.5 and 1 - 0.5 = 0.5.
    found = losses(DPOConfig(beta=0.5), reference_logps=REFERENCE)
    assert found == pytest.approx([-log_sigmoid(0.75), -log_sigmoid(0.25)])


def test_dpo_without_a_reference() -> None:
    # Gaps of the log-probs: -3+4 = 1, -3+4 = 1.
    found = losses(DPOConfig(beta=0.5, reference_free=True))
    assert found == pytest.approx([-log_sigmoid(0.5)] * 2)


def test_ipo() -> None:
    # Per token: 2/2 - 0.5/1 = 0.5 and 1/3 - 0.5 = -1/6; the target is 1/(2*0.5) = 1.
    found = losses(IPOConfig(beta=0.5), reference_logps=REFERENCE)
    assert found == pytest.approx([0.25, (7 / 6) ** 2])


def test_cpo_adds_the_share_of_the_nll() -> None:
    # NLL of the chosen: 3 and 3; a mean per token over 10 tokens, and the engine divides by 4 pairs:
    # 0.5 * 4/10 * 3 = 0.6 each.
    found = losses(CPOConfig(beta=0.5, cpo_alpha=0.5))
    assert found == pytest.approx([-log_sigmoid(0.5) + 0.6] * 2)
    assert losses(CPOConfig(beta=0.5, cpo_alpha=0.0)) == pytest.approx([-log_sigmoid(0.5)] * 2)


def test_simpo_adds_its_sft_term() -> None:
    # Per token: -1.5 + 4 = 2.5 and -1 + 4 = 3; beta 2, gamma = 2 * 0.5 = 1: u = 4 and 5.
    plain = [-log_sigmoid(4.0), -log_sigmoid(5.0)]
    assert losses(SimPOConfig()) == pytest.approx(plain)
    # 1 * 4/10 * 3 = 1.2.
    assert losses(SimPOConfig(sft_weight=1.0)) == pytest.approx([value + 1.2 for value in plain])


def test_nll_normalizations() -> None:
    # NLL 3 over 2 tokens and 3 over 3. Per token of the 10: 4/10 * 3; per sequence: 3/2 and 3/3; sums: 3, 3.
    plain = losses(CPOConfig(cpo_alpha=0.0))
    for kind, terms in (("token", [1.2, 1.2]), ("sequence", [1.5, 1.0]), ("sum", [3.0, 3.0])):
        found = losses(CPOConfig(cpo_alpha=2.0, nll_normalization=kind))
        assert found == pytest.approx([loss + 2 * term for loss, term in zip(plain, terms, strict=True)])


def test_sft_in_a_list_of_types_is_the_nll_term() -> None:
    config = DPOConfig(beta=0.5, loss_type=["sigmoid", "sft"], loss_weights=[2.0, 0.5])
    found = losses(config, reference_logps=REFERENCE)
    # The gaps of test_dpo; 0.5 * 4/10 * 3 = 0.6.
    assert found == pytest.approx([-2 * log_sigmoid(0.75) + 0.6, -2 * log_sigmoid(0.25) + 0.6])


def test_ld_weighs_what_is_beyond_the_shorter_completion() -> None:
    # Pair 1: 2 and 1 tokens, one is shared: chosen -1 + a(-2), rejected -4; the reference: -2 + a(-3), -4.5.
    # a = 0.25: c = -1.5 + 2.75 = 1.25, r = 0.5. Pair 2: 3 and 1: chosen -1.5, reference -1 + a(-3) = -1.75:
    # c = 0.25, r = 0.5.
    config = DPOConfig(beta=1.0, ld_alpha=0.25)
    assert losses(config, reference_logps=REFERENCE) == pytest.approx(
        [-log_sigmoid(0.75), -log_sigmoid(-0.25)]
    )
    whole = losses(DPOConfig(beta=1.0, ld_alpha=1.0), reference_logps=REFERENCE)
    assert whole == losses(DPOConfig(beta=1.0), reference_logps=REFERENCE)


def test_wpo_weighs_pairs_by_how_likely_the_policy_writes_them() -> None:
    # log p - log sum p^2 by token; means: (-1+1.5 -2+1.5)/2 = 0, -4+3 = -1, 0 each for the third: e^-1 both.
    collision = [-1.5, -1.5, -3.0, -1.0, -1.0, -1.0]
    config = DPOConfig(beta=0.5, use_weighting=True)
    logps = torch.tensor(TOKEN_LOGPS, requires_grad=True)
    given = owner(reference_logps=REFERENCE)
    output = objective(config)(pairs_batch(), scores(logps, None, collision), given)
    plain = objective(DPOConfig(beta=0.5))(pairs_batch(), scores(logps), given)
    torch.testing.assert_close(output.losses, math.exp(-1) * plain.losses)
    # The weight is a constant: gradients are those of the plain losses, weighted.
    (weighted,) = torch.autograd.grad(output.losses.sum(), logps)
    (unweighted,) = torch.autograd.grad(plain.losses.sum(), logps)
    torch.testing.assert_close(weighted, math.exp(-1) * unweighted)


def test_the_experts_balance_is_spread_over_the_preferences() -> None:
    # Two experts chosen 3 times and once in 4 token-layers: 2 (3 * 1.5 + 1 * 0.5) / 4^2 = 0.625 from this
    # micro-batch. The engine divides the sum over its two pairs by the 4 of the global batch: 1.25 a pair.
    probabilities = torch.tensor([1.5, 0.5], requires_grad=True)
    given = owner(reference_logps=REFERENCE, router_load=torch.tensor([3.0, 1.0, 4.0]))
    token_scores = TokenScores(torch.tensor(TOKEN_LOGPS), router_probabilities=probabilities)
    output = objective(DPOConfig(beta=0.5, router_aux_loss_coef=0.1))(pairs_batch(), token_scores, given)
    plain = losses(DPOConfig(beta=0.5), reference_logps=REFERENCE)
    assert output.losses.tolist() == pytest.approx([loss + 0.125 for loss in plain])
    assert output.parts["aux_loss"].tolist() == pytest.approx([1.25, 1.25])
    (output.losses.sum() / 4).backward()
    # 0.1 * 2 * 3 / 16 and 0.1 * 2 * 1 / 16.
    assert probabilities.grad.tolist() == pytest.approx([0.0375, 0.0125])


def unpaired_batch() -> PackedBatch:
    rows = [Unpaired(ids(1), ids(2, 3), True), Unpaired(ids(1), ids(4), False)]
    table = PreferenceTable.from_preferences(rows)
    return build_batch(table, [Group(0, (0, 1), (0, 1), 4)], [0, 1], Layout.SHARED)


def test_kto() -> None:
    # rho: -3+5 = 2 and -4+4.5 = 0.5; z0 = 1. Desirable: 2 (1 - sigma(0.5 * 1)); undesirable:
    # 3 (1 - sigma(0.5 * (1 - 0.5))).
    config = KTOConfig(beta=0.5, desirable_weight=2.0, undesirable_weight=3.0)
    logps = scores(TOKEN_LOGPS[:3])
    kl = torch.tensor(1.0, dtype=torch.float64)
    output = objective(config)(unpaired_batch(), logps, owner(reference_logps=REFERENCE, kl=kl))
    expected = [2 * (1 - 1 / (1 + math.exp(-0.5))), 3 * (1 - 1 / (1 + math.exp(-0.25)))]
    assert output.losses.tolist() == pytest.approx(expected)
    assert output.rewards.tolist() == pytest.approx([1.0, 0.25])
    assert output.chosen_rewards is None


def test_kto_without_a_reference() -> None:
    # rho = log pi: -3 and -4; z0 = -3.5.
    config = KTOConfig(beta=1.0, use_ref_model=False)
    output = objective(config)(unpaired_batch(), scores(TOKEN_LOGPS[:3]), owner(kl=torch.tensor(-3.5)))
    assert output.losses.tolist() == pytest.approx([1 - 1 / (1 + math.exp(-0.5))] * 2)


def test_the_gradient_reaches_every_token_of_its_completion() -> None:
    # d loss / d gap = -sigma(-beta gap) beta: chosen tokens get it, rejected ones its negative; unit 1 is
    # rejected twice. beta 0.5, gaps 1.5 and 0.5.
    logps = torch.tensor(TOKEN_LOGPS, requires_grad=True)
    output = objective(DPOConfig(beta=0.5))(pairs_batch(), scores(logps), owner(reference_logps=REFERENCE))
    output.losses.sum().backward()
    first, second = (-0.5 / (1 + math.exp(0.5 * gap)) for gap in (1.5, 0.5))
    expected = [first, first, -first - second, second, second, second]
    assert logps.grad.tolist() == pytest.approx(expected)
    assert not (output.totals.requires_grad or output.chosen_rewards.requires_grad)


def test_rewards_totals_and_mean_logits() -> None:
    mean_logits = torch.tensor([1.0, 3.0, 5.0, 0.0, 1.0, 2.0])
    output = objective(DPOConfig(beta=0.5))(
        pairs_batch(), scores(TOKEN_LOGPS, mean_logits), owner(reference_logps=REFERENCE)
    )
    assert output.chosen_rewards.tolist() == pytest.approx([1.0, 0.5])
    assert output.rejected_rewards.tolist() == pytest.approx([0.25, 0.25])
    assert output.totals.tolist() == [-3.0, -4.0, -3.0]
    assert output.mean_logits.tolist() == [2.0, 5.0, 1.0]


def test_an_unprepared_batch_is_an_error() -> None:
    with pytest.raises(AssertionError, match="not prepared"):
        losses(DPOConfig())
    with pytest.raises(AssertionError, match="not prepared"):
        objective(KTOConfig(use_ref_model=False))(unpaired_batch(), scores([0.0] * 3), owner())


@pytest.mark.parametrize("config", [DPOConfig(), IPOConfig(), CPOConfig(), SimPOConfig(sft_weight=1.0)])
def test_a_dummy_pack_has_no_losses_and_stays_attached(config) -> None:
    batch = build_batch(PreferenceTable.from_preferences(PAIRS), (), (), Layout.SHARED)
    logps = torch.zeros(0, requires_grad=True)
    output = objective(config)(batch, scores(logps, torch.zeros(0)), owner(reference_logps=REFERENCE))
    assert output.losses.shape == (0,)
    output.losses.sum().backward()
    assert logps.grad is not None


def test_a_dummy_pack_of_kto() -> None:
    rows = [Unpaired(ids(1), ids(2, 3), True)]
    batch = build_batch(PreferenceTable.from_preferences(rows), (), (), Layout.SHARED)
    logps = torch.zeros(0, requires_grad=True)
    prepared = owner(reference_logps=REFERENCE, kl=torch.tensor(0.0))
    objective(KTOConfig())(batch, scores(logps), prepared).losses.sum().backward()
    assert logps.grad is not None


def test_long_completions_are_summed_in_float64() -> None:
    # 4096 * -0.1 in float32 steps drifts by about 1e-3; the sum of the float32 value in float64 does not.
    table = PreferenceTable.from_preferences([Unpaired(ids(1), np.zeros(4096, dtype=np.int32), True)])
    batch = build_batch(table, [Group(0, (0,), (0,), 4097)], [0], Layout.SHARED)
    total = sum_by_completion(torch.full((4096,), -0.1), batch)
    assert total.dtype == torch.float64
    assert total.item() == pytest.approx(4096 * float(np.float32(-0.1)), rel=1e-13)


def test_losses_are_found_by_their_path() -> None:
    from ds_align.losses import kto_loss

    assert load_loss("ds_align.losses.kto:kto_loss") is kto_loss
