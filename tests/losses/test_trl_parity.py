"""The same numbers as TRL's own loss code on given log-probs, and what differs on purpose."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from ds_align.losses import Logps, PairedLogps, UnpairedLogps, cpo_loss, dpo_loss, kto_loss, simpo_loss
from ds_align.losses.dpo_variants import VARIANTS
from tests.losses.batches import as_logps, random_pairs
from tests.losses.reference import Pair

pytest.importorskip("trl")

PAIRS = random_pairs(16, seed=21, spread=4.0)
WIDTH = 31
SMOOTHING_IN_TRL = ("exo_pair", "robust", "aot", "aot_unpaired")


def per_token(logps: Logps) -> Tensor:
    """Each completion's sum spread evenly over its tokens: [n, WIDTH], zeros behind."""
    filled = torch.arange(WIDTH) < logps.length[:, None]
    return (logps.total / logps.length)[:, None] * filled


def trl_trainer(**settings: object) -> SimpleNamespace:
    """The attributes that the _compute_loss of TRL's trainers reads, for one process."""
    return SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x),
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        **settings,
    )


def trl_batch(*columns: Logps) -> tuple[dict[str, Tensor], Callable[..., SimpleNamespace]]:
    """TRL's inputs for these completions, and a model that gives their tokens' log-probs."""
    tokens = torch.cat([per_token(column) for column in columns])
    lengths = torch.cat([column.length for column in columns])
    # One prompt token in front, so that every completion token has a prediction.
    mask = (torch.arange(WIDTH + 1) <= lengths[:, None]) & (torch.arange(WIDTH + 1) > 0)
    inputs = {
        "input_ids": torch.zeros_like(mask, dtype=torch.int64),
        "attention_mask": torch.ones_like(mask, dtype=torch.int64),
        "completion_mask": mask.to(torch.int64),
    }
    nothing = torch.zeros_like(tokens)
    outputs = SimpleNamespace(log_probs=tokens, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool())
    return inputs, lambda **_: outputs


def trl_dpo(logps: PairedLogps, **settings: object) -> Tensor:
    """The batch mean that TRL's DPOTrainer computes from these log-probs."""
    from trl import DPOTrainer

    defaults = {
        "args": SimpleNamespace(discopop_tau=0.05),
        "ld_alpha": None,
        "use_weighting": False,
        "beta": 0.1,
        "label_smoothing": 0.0,
        "loss_types": ["sigmoid"],
        "loss_weights": [1.0],
        "f_divergence_type": "reverse_kl",
        "f_alpha_divergence_coef": 0.5,
    }
    inputs, model = trl_batch(logps.policy_chosen, logps.policy_rejected)
    inputs["ref_chosen_logps"] = logps.reference_chosen.total.detach()
    inputs["ref_rejected_logps"] = logps.reference_rejected.total.detach()
    trainer = trl_trainer(**{**defaults, **settings})
    return DPOTrainer._compute_loss(trainer, model, inputs, return_outputs=False)


def assert_same(ours: Callable[[PairedLogps], Tensor], theirs: Callable[[PairedLogps], Tensor]) -> None:
    """Mean loss and its gradient with respect to the policy's sums agree to 1e-6."""
    results = []
    for mean_loss in (lambda logps: ours(logps).mean(), theirs):
        logps = as_logps(PAIRS, grad=True)
        loss = mean_loss(logps)
        loss.backward()
        results.append((loss.detach(), logps.policy_chosen.total.grad, logps.policy_rejected.total.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("beta", [0.1, 0.7])
def test_every_form(name: str, beta: float) -> None:
    # TRL's exo_pair is infinite without smoothing, so both get some.
    smoothing = 0.1 if name in SMOOTHING_IN_TRL else 0.0
    assert_same(
        lambda logps: dpo_loss(logps, beta=beta, loss_type=name, label_smoothing=smoothing).losses,
        lambda logps: trl_dpo(logps, beta=beta, loss_types=[name], label_smoothing=smoothing),
    )


@pytest.mark.parametrize(("ours", "theirs"), [("forward_kl", "forward_kl"), ("js", "js_divergence")])
@pytest.mark.parametrize("name", [name for name, variant in VARIANTS.items() if variant.divergence])
def test_divergences(name: str, ours: str, theirs: str) -> None:
    smoothing = 0.1 if name in SMOOTHING_IN_TRL else 0.0
    assert_same(
        lambda logps: (
            dpo_loss(logps, loss_type=name, label_smoothing=smoothing, f_divergence_type=ours).losses
        ),
        lambda logps: trl_dpo(logps, loss_types=[name], label_smoothing=smoothing, f_divergence_type=theirs),
    )


def test_the_alpha_coefficient_is_one_minus_ours() -> None:
    # Ours is the paper's alpha, f' = (1 - u^-alpha)/alpha; TRL writes f' = (u^(a - 1) - 1)/(a - 1). TRL has
    # no float64 branch there, hence float32.
    logps = as_logps(PAIRS, torch.float32)
    kind = {"f_divergence_type": "alpha_divergence"}
    ours = dpo_loss(logps, f_divergence_type="alpha", f_alpha_divergence_coef=0.3).losses.mean()
    theirs = {
        coefficient: trl_dpo(logps, f_alpha_divergence_coef=coefficient, **kind) for coefficient in (0.7, 0.3)
    }
    torch.testing.assert_close(ours, theirs[0.7], rtol=1e-6, atol=1e-6)
    assert abs(ours - theirs[0.3]) > 1e-3


def test_mixtures() -> None:
    names, weights = ["aot_unpaired", "sigmoid_norm", "bco_pair"], [0.4, 2.0, 1.0]
    assert_same(
        lambda logps: dpo_loss(logps, loss_type=names, loss_weights=weights).losses,
        lambda logps: trl_dpo(logps, loss_types=names, loss_weights=weights),
    )


@pytest.mark.parametrize("name", ["sigmoid", "ipo", "sigmoid_norm"])
def test_trl_leaves_label_smoothing_out_of_these(name: str) -> None:
    logps = as_logps(PAIRS)
    theirs = [trl_dpo(logps, loss_types=[name], label_smoothing=e) for e in (0.0, 0.2)]
    assert torch.equal(*theirs)
    ours = dpo_loss(logps, loss_type=name, label_smoothing=0.2)
    # -(1 - e) ls(x) - e ls(-x) = -ls(x) + e x, and (d - t)^2 + e 4 t d with 4 t = 2/beta.
    margin = ours.chosen_rewards - ours.rejected_rewards
    slope = 2 / 0.1**2 if name == "ipo" else 1.0
    torch.testing.assert_close(
        ours.losses.mean(), theirs[1] + 0.2 * slope * margin.mean(), rtol=1e-9, atol=1e-9
    )


def test_exo_has_a_floor_here_and_is_infinite_there() -> None:
    logps = as_logps(PAIRS)
    assert trl_dpo(logps, loss_types=["exo_pair"]) == math.inf
    ours = dpo_loss(logps, loss_type="exo_pair").losses.mean()
    floor = trl_dpo(logps, loss_types=["exo_pair"], label_smoothing=1e-3)
    torch.testing.assert_close(ours, floor, rtol=1e-6, atol=1e-6)


def test_bco_has_a_shift_here() -> None:
    # TRL's bco_pair is the paper's loss at delta = 0; a shift of both sums by delta/beta gives the others.
    shifted = [
        Pair(pair.pi_c - 3.0, pair.pi_r - 3.0, pair.ref_c, pair.ref_r, pair.n_c, pair.n_r) for pair in PAIRS
    ]
    ours = dpo_loss(as_logps(PAIRS), loss_type="bco_pair", bco_delta=0.3).losses.mean()
    theirs = trl_dpo(as_logps(shifted), loss_types=["bco_pair"])
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)
    assert abs(ours - trl_dpo(as_logps(PAIRS), loss_types=["bco_pair"])) > 1e-3


@pytest.mark.parametrize("name", ["ipo", "sigmoid_norm"])
def test_a_divergence_a_token_is_refused_here_and_computed_there(name: str) -> None:
    # TRL divides f'(u) of the whole completion by its length, which no paper defines.
    logps = as_logps(PAIRS)
    plain, other = (
        trl_dpo(logps, loss_types=[name], f_divergence_type=kind) for kind in ("reverse_kl", "js_divergence")
    )
    assert abs(plain - other) > 1e-6
    with pytest.raises(ValueError, match="has no meaning"):
        dpo_loss(logps, loss_type=name, f_divergence_type="js")


def trl_cpo(chosen: Tensor, rejected: Tensor, **settings: object) -> tuple[Tensor, Tensor, Tensor]:
    cpo = pytest.importorskip("trl.experimental.cpo")
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(device="cpu"),
        **{"alpha": 0.0, "beta": 0.1, "label_smoothing": 0.0, "simpo_gamma": 0.0, **settings},
    )
    return cpo.CPOTrainer.cpo_loss(trainer, chosen, rejected)


@pytest.mark.parametrize(
    ("loss_type", "smoothing"), [("sigmoid", 0.0), ("sigmoid", 0.2), ("hinge", 0.0), ("ipo", 0.0)]
)
def test_cpo(loss_type: str, smoothing: float) -> None:
    logps = as_logps(PAIRS)
    chosen, rejected = logps.policy_chosen, logps.policy_rejected
    ours = cpo_loss(logps, loss_type=loss_type, label_smoothing=smoothing)
    sums = (chosen.total, rejected.total)
    means = (chosen.total / chosen.length, rejected.total / rejected.length)
    theirs = trl_cpo(*(means if loss_type == "ipo" else sums), loss_type=loss_type, label_smoothing=smoothing)
    torch.testing.assert_close(ours.losses, theirs[0], rtol=1e-6, atol=1e-9)
    # Rewards are of sums here whatever the form; TRL's are of what its loss was given.
    torch.testing.assert_close(ours.chosen_rewards, 0.1 * chosen.total, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("alpha", [0.0, 0.25, -0.5])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_simpo_and_alphapo(alpha: float, smoothing: float) -> None:
    logps = as_logps(PAIRS)
    chosen, rejected = logps.policy_chosen, logps.policy_rejected
    ours = simpo_loss(logps, beta=2.0, gamma_beta_ratio=0.25, label_smoothing=smoothing, alpha=alpha)
    theirs = trl_cpo(
        chosen.total / chosen.length,
        rejected.total / rejected.length,
        loss_type="simpo",
        beta=2.0,
        simpo_gamma=0.5,
        label_smoothing=smoothing,
        alpha=alpha,
    )
    for one, other in zip((ours.losses, ours.chosen_rewards, ours.rejected_rewards), theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
@pytest.mark.parametrize("kl", [2.5, 0.0])
def test_kto(loss_type: str, kl: float) -> None:
    from trl import KTOTrainer

    logps = as_logps(PAIRS)
    policy = Logps(
        torch.cat([logps.policy_chosen.total, logps.policy_rejected.total]),
        torch.cat([logps.policy_chosen.length, logps.policy_rejected.length]),
    )
    reference = Logps(
        torch.cat([logps.reference_chosen.total, logps.reference_rejected.total]), policy.length
    )
    desirable = torch.arange(2 * len(PAIRS)) < len(PAIRS)
    inputs, model = trl_batch(policy)
    # Mismatched completions whose mean log-ratio is kl, or so far below 0 that TRL's clamp makes it 0.
    inputs |= {
        "label": desirable,
        "ref_logps": reference.total,
        "ref_KL_logps": torch.zeros(2, dtype=torch.float64),
    }
    mismatched = torch.tensor([kl - 1.0, kl + 1.0] if kl else [-3.0, -1.0], dtype=torch.float64)
    trainer = trl_trainer(
        beta=0.3,
        loss_type=loss_type,
        calculate_KL=loss_type == "kto",
        desirable_weight=1.5,
        undesirable_weight=0.7,
        _compute_kl_logps=lambda *_: mismatched,
    )
    theirs = KTOTrainer._compute_loss(trainer, model, inputs, return_outputs=False)
    examples = UnpairedLogps(policy=policy, reference=reference, desirable=desirable, kl=kl)
    ours = kto_loss(examples, beta=0.3, loss_type=loss_type, desirable_weight=1.5, undesirable_weight=0.7)
    torch.testing.assert_close(ours.losses.mean(), theirs, rtol=1e-6, atol=1e-9)
