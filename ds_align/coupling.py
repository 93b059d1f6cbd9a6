"""Losses that couple the preferences of a global batch: sorted, or shifted by a mean over all of them.

Their gradient needs every log-prob before any backward. So the log-probs of all ranks are put into one small
table, the loss is taken over the whole of it, and each preference keeps its own share of the value and of the
derivative by its log-probs; the micro-batches then run with those (GradCache, arXiv:2101.06983).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ds_align.batch import CoupledTerms
from ds_align.losses import Logps, LossOutput, PairedLogps, UnpairedLogps


class RunningMean:
    """Mean over steps of one number a step; it stays on the device, so that no step waits for it."""

    def __init__(self) -> None:
        self.mean: torch.Tensor | float = 0.0
        self.count = 0

    def add(self, value: torch.Tensor | float) -> None:
        """Takes in the number of another step."""
        self.count += 1
        self.mean = self.mean + (value - self.mean) / self.count

    def state_dict(self) -> dict[str, float]:
        """Mean and number of steps."""
        return {"mean": float(self.mean), "count": self.count}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Takes over what state_dict() gave."""
        self.mean, self.count = float(state["mean"]), int(state["count"])


class LogpsTable:
    """Log-probs as a float64 table, one row a preference, so that one sum over ranks gathers them.

    Columns: (total, length) of each completion under the policy, then under the reference if there is one;
    unpaired data have one more for the label.
    """

    @staticmethod
    def num_columns(inputs: str, *, has_reference: bool) -> int:
        """Columns of the table."""
        if inputs == "pairs":
            return 8 if has_reference else 4
        return 5 if has_reference else 3

    @staticmethod
    def flatten(logps: PairedLogps | UnpairedLogps) -> torch.Tensor:
        """float64 [n, columns]."""
        if isinstance(logps, PairedLogps):
            members = (
                logps.policy_chosen,
                logps.policy_rejected,
                logps.reference_chosen,
                logps.reference_rejected,
            )
            last = []
        else:
            members = (logps.policy, logps.reference)
            last = [logps.desirable]
        columns = [column for one in members if one is not None for column in (one.total, one.length)]
        return torch.stack([column.double() for column in (*columns, *last)], dim=1)

    @staticmethod
    def restore(
        table: torch.Tensor, inputs: str, *, has_reference: bool, kl: torch.Tensor | None
    ) -> PairedLogps | UnpairedLogps:
        """The log-probs of a table, the policy's totals as new leaves that require a gradient."""
        columns = list(table.unbind(1))
        count = 2 if inputs == "pairs" else 1
        num_logps = count * (2 if has_reference else 1)
        members = []
        for number in range(num_logps):
            total = columns[2 * number].clone().requires_grad_(number < count)
            members.append(Logps(total, columns[2 * number + 1]))
        if inputs == "pairs":
            return PairedLogps(*members)
        return UnpairedLogps(
            policy=members[0],
            reference=members[1] if has_reference else None,
            desirable=columns[-1] > 0.5,
            kl=0.0 if kl is None else kl,
        )

    @staticmethod
    def mean_reward(logps: PairedLogps, beta: float) -> torch.Tensor:
        """beta times the mean log-ratio over the chosen and rejected completions of all pairs, a scalar."""
        chosen = logps.policy_chosen.total - logps.reference_chosen.total
        rejected = logps.policy_rejected.total - logps.reference_rejected.total
        return beta * torch.cat([chosen, rejected]).detach().mean()


def couple(
    loss: Callable[..., LossOutput], logps: PairedLogps | UnpairedLogps, parameters: dict[str, Any]
) -> CoupledTerms:
    """The loss over all preferences given, taken apart by preference."""
    if isinstance(logps, PairedLogps):
        leaves = [logps.policy_chosen.total, logps.policy_rejected.total]
    else:
        leaves = [logps.policy.total]
    with torch.enable_grad():
        output = loss(logps, **parameters)
        slopes = torch.autograd.grad(output.losses.sum(), leaves)
    rewards = [output.chosen_rewards, output.rejected_rewards] if output.rewards is None else [output.rewards]
    return CoupledTerms(output.losses.detach(), torch.stack(rewards, dim=1), torch.stack(slopes, dim=1))
