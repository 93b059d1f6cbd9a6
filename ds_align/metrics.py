"""Running sums of what is logged, reduced over ranks in one collective a logged step."""

from __future__ import annotations

import torch

from ds_align import distributed
from ds_align.batch import PackedBatch
from ds_align.losses import PairedLogps
from ds_align.objective import ForwardOutput

# Of ForwardOutput.parts; a run logs those that its loss has.
PARTS = ("nll_loss", "wpo_weight", "bco_delta", "aux_loss")
_PAIRED = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
    "logits/chosen",
    "logits/rejected",
    "policy_accuracy",
    "confidence",
    *PARTS,
)
_UNPAIRED = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "desirable_accuracy",
    "undesirable_accuracy",
    "logps/chosen",
    "logps/rejected",
    "logits/chosen",
    "logits/rejected",
    "kl",
    *PARTS,
)


class MetricSums:
    """Sums and counts of each metric, kept on the device; no synchronisation until reduce."""

    def __init__(self, inputs: str, device: torch.device) -> None:
        self.names = _PAIRED if inputs == "pairs" else _UNPAIRED
        self.device = device
        self.reset()

    def reset(self) -> None:
        """Forgets all sums."""
        self._totals = torch.zeros(2, len(self.names), dtype=torch.float64, device=self.device)
        self._kept = self._totals.clone()

    def keep(self) -> None:
        """A step ends: what was added counts."""
        self._kept.copy_(self._totals)

    def drop(self) -> None:
        """Forgets what was added since the last step that counts."""
        self._totals.copy_(self._kept)

    def state(self) -> torch.Tensor:
        """The sums so far, of this rank; load() takes them over."""
        return self._totals.cpu()

    def load(self, state: torch.Tensor) -> None:
        """Goes on from the sums that state() gave."""
        self._totals.copy_(state)
        self.keep()

    def add(self, output: ForwardOutput, batch: PackedBatch) -> None:
        """Adds one micro-batch; batch may still be on the CPU."""
        batch = batch.to(self.device)
        if isinstance(output.logps, PairedLogps):
            entries = _paired_entries(output, batch)
        else:
            entries = _unpaired_entries(output, batch)
        assert tuple(entries) == self.names
        sums, counts = zip(*entries.values(), strict=True)
        self._totals += torch.stack([torch.stack(sums), torch.stack(counts)])

    def reduce(self, **counters: float) -> tuple[dict[str, float], dict[str, float]]:
        """(means since the last reset, counters summed over ranks). Collective: every rank must call this.

        A metric that nothing counted towards (no undesirable example, say) is left out.
        """
        extra = torch.tensor(list(counters.values()), dtype=torch.float64, device=self.device)
        reduced = distributed.all_reduce_sum(torch.cat([self._totals.flatten(), extra]), self.device).cpu()
        sums, counts = reduced[: self._totals.numel()].reshape(2, -1)
        means = {
            name: float(total / count)
            for name, total, count in zip(self.names, sums, counts, strict=True)
            if count > 0
        }
        if "rewards/chosen" in means and "rewards/rejected" in means:
            means.setdefault("rewards/margins", means["rewards/chosen"] - means["rewards/rejected"])
        return means, dict(zip(counters, reduced[self._totals.numel() :].tolist(), strict=True))


Entry = tuple[torch.Tensor, torch.Tensor]


def _mean(values: torch.Tensor, weights: torch.Tensor | None = None) -> Entry:
    """(sum, count) of values, weighted: the parts of a mean that add up over micro-batches and ranks."""
    values = values.detach().double()
    weights = torch.ones_like(values) if weights is None else weights.double()
    return (values * weights).sum(), weights.sum()


def _parts(output: ForwardOutput) -> dict[str, Entry]:
    """The parts of the loss by name; one that this loss does not have counts nothing."""
    return {name: _mean(output.parts.get(name, output.losses[:0])) for name in PARTS}


def _better(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """1 where first > second, one half where they tie, else 0."""
    return (first > second).double() + 0.5 * (first == second).double()


def _paired_entries(output: ForwardOutput, batch: PackedBatch) -> dict[str, Entry]:
    chosen, rejected = output.chosen_rewards, output.rejected_rewards
    margins = chosen - rejected
    first, second = batch.members.unbind(1)
    means, lengths = output.mean_logits, batch.completion_lengths
    policy_chosen, policy_rejected = output.totals[first], output.totals[second]
    return {
        "loss": _mean(output.losses),
        "rewards/chosen": _mean(chosen),
        "rewards/rejected": _mean(rejected),
        "rewards/accuracies": _mean(_better(chosen, rejected)),
        "rewards/margins": _mean(margins),
        "logps/chosen": _mean(policy_chosen),
        "logps/rejected": _mean(policy_rejected),
        "logits/chosen": _mean(means[first], lengths[first]),
        "logits/rejected": _mean(means[second], lengths[second]),
        "policy_accuracy": _mean(_better(policy_chosen / lengths[first], policy_rejected / lengths[second])),
        "confidence": _mean(torch.sigmoid(margins.abs())),
        **_parts(output),
    }


def _unpaired_entries(output: ForwardOutput, batch: PackedBatch) -> dict[str, Entry]:
    logps = output.logps
    good, bad = logps.desirable, ~logps.desirable
    total = logps.policy.total.detach()
    rho = total if logps.reference is None else total - logps.reference.total
    z0 = torch.as_tensor(logps.kl, dtype=rho.dtype, device=rho.device)
    right = torch.where(good, _better(rho, z0), _better(z0, rho))
    members = batch.members[:, 0]
    means, lengths = output.mean_logits[members], batch.completion_lengths[members]
    return {
        "loss": _mean(output.losses),
        "rewards/chosen": _mean(output.rewards, good),
        "rewards/rejected": _mean(output.rewards, bad),
        "rewards/accuracies": _mean(right),
        "desirable_accuracy": _mean(right, good),
        "undesirable_accuracy": _mean(right, bad),
        "logps/chosen": _mean(total, good),
        "logps/rejected": _mean(total, bad),
        "logits/chosen": _mean(means, lengths * good),
        "logits/rejected": _mean(means, lengths * bad),
        "kl": _mean(z0.expand(len(total))),
        **_parts(output),
    }
