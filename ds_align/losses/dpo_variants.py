"""The forms of DPO's loss: each one function of one batch of pairs, in a table by name.

Notation of the formulas: c and r are the log-ratios log pi(y|x) - log ref(y|x) of the chosen and the rejected
completion, summed over tokens (nats); z = c - r, or under another f-divergence f'(u_c) - f'(u_r); n_c and
n_r the token counts; sg the logistic function, ls its logarithm; e = label_smoothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .base import hinge, smoothed_log_sigmoid, smoothed_squared

EXO_LEAST_SMOOTHING = 1e-3


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class PairTerms:
    """What a form of the loss may look at. Tensors are [n], one entry a pair, in nats.

    chosen, rejected: log-ratios c and r. chosen_score, rejected_score: f'(u) of each, which is the log-ratio
    itself for reverse_kl. policy_gap, reference_gap: log pi(y_c|x) - log pi(y_r|x) and the same under the
    reference (0 where there is none). chosen_length, rejected_length: tokens, in chosen's dtype. delta:
    bco_pair's shift of the rewards, a constant.
    """

    beta: float
    chosen: Tensor
    rejected: Tensor
    chosen_score: Tensor
    rejected_score: Tensor
    policy_gap: Tensor
    reference_gap: Tensor
    chosen_length: Tensor
    rejected_length: Tensor
    label_smoothing: float
    tau: float
    delta: float | Tensor

    @property
    def gap(self) -> Tensor:
        """z [n]."""
        return self.chosen_score - self.rejected_score

    @property
    def chosen_per_token(self) -> Tensor:
        """c/n_c [n]."""
        return self.chosen / self.chosen_length

    @property
    def rejected_per_token(self) -> Tensor:
        """r/n_r [n]."""
        return self.rejected / self.rejected_length


def sigmoid(terms: PairTerms) -> Tensor:
    """-(1 - e) ls(beta z) - e ls(-beta z): DPO (arXiv:2305.18290, eq. 7) at e = 0.

    With e > 0 conservative DPO (Mitchell 2023, "A note on DPO with noisy preferences", eq. 3), whose optimum
    is beta z = log((1 - e)/e). With another f-divergence f-DPO (arXiv:2309.16240).
    """
    return smoothed_log_sigmoid(terms.beta * terms.gap, terms.label_smoothing)


def hinge_gap(terms: PairTerms) -> Tensor:
    """max(0, 1 - beta z): SLiC's ranking loss (arXiv:2305.10425, section 2) on log-ratios, as in statistical
    rejection sampling (arXiv:2309.06657, "hinge-norm").
    """
    return hinge(terms.beta * terms.gap)


def ipo(terms: PairTerms) -> Tensor:
    """(1 - e)(d - 1/(2 beta))^2 + e (d + 1/(2 beta))^2, d = c/n_c - r/n_r: ipo_loss with its defaults.

    Identity-PO (arXiv:2310.12036, eq. 17; beta is the paper's tau), on log-ratios a token.
    """
    return smoothed_squared(
        terms.chosen_per_token - terms.rejected_per_token, terms.beta, terms.label_smoothing
    )


def exo_pair(terms: PairTerms) -> Tensor:
    """sg(beta z)(ls(beta z) - log(1 - e)) + sg(-beta z)(ls(-beta z) - log e), where e = max(label_smoothing,
    0.001).

    EXO for pairs (arXiv:2402.00856, eq. 16): the reverse KL divergence from the policy's preference
    (sg(beta z), sg(-beta z)) to that of the labels, (1 - e, e). The floor is there because the loss is
    infinite at e = 0. It is 0 at beta z = log((1 - e)/e), its least value.
    """
    smoothing = max(terms.label_smoothing, EXO_LEAST_SMOOTHING)
    logit = terms.beta * terms.gap
    right = torch.sigmoid(logit) * (F.logsigmoid(logit) - math.log1p(-smoothing))
    wrong = torch.sigmoid(-logit) * (F.logsigmoid(-logit) - math.log(smoothing))
    return right + wrong


def nca_pair(terms: PairTerms) -> Tensor:
    """-ls(beta c) - 0.5 ls(-beta c) - 0.5 ls(-beta r): NCA for two completions (arXiv:2402.05369, section 4).

    The chosen log-ratio has its own optimum at beta c = log 2: it is held, not only kept above r.
    """
    chosen, rejected = terms.beta * terms.chosen, terms.beta * terms.rejected
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def robust(terms: PairTerms) -> Tensor:
    """[-(1 - e) ls(beta z) + e ls(-beta z)]/(1 - 2e), e < 1/2: robust DPO (arXiv:2403.00409, section 3).

    Its mean over labels of which a share e is swapped is the loss sigmoid of the right labels. It has no
    lower bound for e > 0.
    """
    logit, swapped = terms.beta * terms.gap, terms.label_smoothing
    return (swapped * F.logsigmoid(-logit) - (1.0 - swapped) * F.logsigmoid(logit)) / (1.0 - 2.0 * swapped)


def bco_pair(terms: PairTerms) -> Tensor:
    """-ls(beta c - delta) - ls(-(beta r - delta)): BCO on pairs (arXiv:2404.04656, section 4).

    A binary classifier of single completions whose logit is the reward. The shift delta, a mean of rewards,
    is the caller's and a constant here.
    """
    chosen, rejected = terms.beta * terms.chosen, terms.beta * terms.rejected
    return -F.logsigmoid(chosen - terms.delta) - F.logsigmoid(terms.delta - rejected)


def sppo_hard(terms: PairTerms) -> Tensor:
    """(c - 1/(2 beta))^2 + (r + 1/(2 beta))^2: SPPO (arXiv:2405.00675, eq. 4.7) with a win rate of 1 for the
    chosen completion and 0 for the rejected one; 1/beta is the paper's eta.
    """
    target = 1.0 / (2.0 * terms.beta)
    return (terms.chosen - target).square() + (terms.rejected + target).square()


def aot(terms: PairTerms) -> Tensor:
    """The form sigmoid on d = sorted(pi_c - pi_r) - sorted(ref_c - ref_r): AOT for pairs (arXiv:2406.05882,
    section 3), the policy's gaps made to dominate the reference's as distributions.

    Sorted over the rows given, which must be the whole global batch. The entry of a pair is that of its own
    policy gap and the reference gap of the same rank.
    """
    difference = terms.policy_gap - _of_same_rank(terms.reference_gap, terms.policy_gap)
    return smoothed_log_sigmoid(terms.beta * difference, terms.label_smoothing)


def aot_unpaired(terms: PairTerms) -> Tensor:
    """The form sigmoid on d = sorted(c) - sorted(r): AOT without pairing (arXiv:2406.05882, section 3).

    Sorted over the rows given, which must be the whole global batch. The entry of a pair is that of its own
    chosen log-ratio and the rejected log-ratio of the same rank.
    """
    difference = terms.chosen - _of_same_rank(terms.rejected, terms.chosen)
    return smoothed_log_sigmoid(terms.beta * difference, terms.label_smoothing)


def apo_zero(terms: PairTerms) -> Tensor:
    """1 - sg(beta c) + sg(beta r): APO-zero (arXiv:2408.06266, eq. 7), for chosen completions better than the
    policy's own: their likelihood goes up, that of rejected ones down.
    """
    # 1 - sg(x) is written sg(-x): the difference would round to 0 long before the loss does.
    return torch.sigmoid(-terms.beta * terms.chosen) + torch.sigmoid(terms.beta * terms.rejected)


def apo_down(terms: PairTerms) -> Tensor:
    """sg(beta c) + 1 - sg(beta z): APO-down (arXiv:2408.06266, eq. 8), for chosen completions worse than the
    policy's own: both likelihoods go down, that of rejected ones further.
    """
    return torch.sigmoid(terms.beta * terms.chosen) + torch.sigmoid(-terms.beta * terms.gap)


def discopop(terms: PairTerms) -> Tensor:
    """-ls(x)(1 - sg(x/tau)) + exp(-x) sg(x/tau), x = beta z: DiscoPOP (arXiv:2406.08414, eq. 5).

    Logistic below x = 0 and exponential above, blended over the width tau; not monotonous for small tau.
    """
    logit = terms.beta * terms.gap
    scaled = logit / terms.tau
    # One exponent: exp(-x) alone overflows where its product with the vanishing sigmoid is small.
    exponential = torch.exp(F.logsigmoid(scaled) - logit)
    return -F.logsigmoid(logit) * torch.sigmoid(-scaled) + exponential


def sigmoid_norm(terms: PairTerms) -> Tensor:
    """-(1 - e) ls(beta d) - e ls(-beta d), d = c/n_c - r/n_r: length-normalised DPO, as trained in Tulu 3
    (arXiv:2411.15124). The gap is one of nats a token, so beta is usually far above sigmoid's.
    """
    return smoothed_log_sigmoid(
        terms.beta * (terms.chosen_per_token - terms.rejected_per_token), terms.label_smoothing
    )


@dataclass(frozen=True, slots=True)
class Variant:
    """A form of the loss and what it knows.

    smoothing: label_smoothing. divergence: f_divergence_type, for losses of the difference of two rewards.
    per_token: its log-ratios are means over tokens. absolute: it looks at one reward by itself, so that it
    needs a reference. sorts: it compares sorted values of a whole global batch. shifts: it looks at delta.
    unbiased: it divides by 1 - 2 label_smoothing.
    """

    losses: Callable[[PairTerms], Tensor]
    smoothing: bool = False
    divergence: bool = False
    per_token: bool = False
    absolute: bool = False
    sorts: bool = False
    shifts: bool = False
    unbiased: bool = False


VARIANTS: dict[str, Variant] = {
    "sigmoid": Variant(sigmoid, smoothing=True, divergence=True),
    "hinge": Variant(hinge_gap, divergence=True),
    "ipo": Variant(ipo, smoothing=True, per_token=True),
    "exo_pair": Variant(exo_pair, smoothing=True, divergence=True),
    "nca_pair": Variant(nca_pair, absolute=True),
    "robust": Variant(robust, smoothing=True, divergence=True, unbiased=True),
    "bco_pair": Variant(bco_pair, absolute=True, shifts=True),
    "sppo_hard": Variant(sppo_hard, absolute=True),
    "aot": Variant(aot, smoothing=True, sorts=True),
    "aot_unpaired": Variant(aot_unpaired, smoothing=True, sorts=True),
    "apo_zero": Variant(apo_zero, absolute=True),
    "apo_down": Variant(apo_down, absolute=True),
    "discopop": Variant(discopop, divergence=True),
    "sigmoid_norm": Variant(sigmoid_norm, smoothing=True, per_token=True),
}
OLDER_NAMES = {"ipo_loss": "ipo", "aot_pair": "aot_unpaired"}


def _of_same_rank(values: Tensor, others: Tensor) -> Tensor:
    """For each entry of `others` [n] the entry of `values` [n] with the same rank; ties in row order."""
    ranks = others.argsort(stable=True).argsort()
    return values.sort(stable=True).values[ranks]
