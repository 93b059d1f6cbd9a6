"""What the logged figures of a run say about it: each thing at most once."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from statistics import fmean, pstdev

EARLY_SHARE = 0.1
EARLY_ACCURACY = 0.98
LATE_SHARE = 0.3
UNDECIDED = (0.48, 0.52)
LARGE_GRAD_NORM = 100.0
# An accuracy of fewer preferences is a matter of chance.
MIN_EARLY = 32
MIN_LATE = 100
# A loss so far above the mean of the logged ones before it, in that mean and in their deviations.
SPIKE_FACTOR = 2.0
SPIKE_DEVIATIONS = 6.0
MIN_LOSSES = 10
_REMEMBERED_LOSSES = 50


class Watch:
    """Looks at each logged row of a run; the same on every rank, no communication."""

    def __init__(self, num_steps: int, *, has_reference: bool) -> None:
        self.num_steps = num_steps
        self.has_reference = has_reference
        self._said: set[str] = set()
        self._early = [0.0, 0.0]
        self._late = [0.0, 0.0]
        self._losses: deque[float] = deque(maxlen=_REMEMBERED_LOSSES)

    def look(self, step: int, metrics: Mapping[str, float], num_preferences: float) -> list[str]:
        """New sentences about the window that was logged at `step` (from 1), of so many preferences."""
        found = {
            "accuracy": self._accuracy(step, metrics, num_preferences),
            "gradient": self._gradient(metrics),
            "chosen": self._chosen(step, metrics),
        }
        new = {name: text for name, text in found.items() if text and name not in self._said}
        self._said |= set(new)
        return list(new.values())

    def spike(self, loss: float) -> str | None:
        """What there is to say of a logged loss that leaps over those before it."""
        before = list(self._losses)
        self._losses.append(loss)
        if len(before) < MIN_LOSSES:
            return None
        mean, deviation = fmean(before), pstdev(before)
        if loss - mean <= max((SPIKE_FACTOR - 1.0) * abs(mean), SPIKE_DEVIATIONS * deviation):
            return None
        usual = f"the mean of the {len(before)} logged before is {mean:.4f}"
        return f"warning: the loss leaps to {loss:.4f}, {usual}"

    def _accuracy(self, step: int, metrics: Mapping[str, float], number: float) -> str | None:
        accuracy = metrics.get("rewards/accuracies")
        if accuracy is None:
            return None
        if step <= EARLY_SHARE * self.num_steps:
            mean, count = _add(self._early, accuracy, number)
            if count >= MIN_EARLY and mean > EARLY_ACCURACY:
                return (
                    f"warning: rewards/accuracies is {mean:.3f} after {step} of {self.num_steps} steps: "
                    "trivial data, or the answer shows in the prompt; look at a few rows"
                )
        if step > LATE_SHARE * self.num_steps:
            mean, count = _add(self._late, accuracy, number)
            if count >= MIN_LATE and UNDECIDED[0] <= mean <= UNDECIDED[1]:
                return (
                    f"warning: rewards/accuracies is still {mean:.3f} after {step} of {self.num_steps} "
                    "steps: swapped labels, or a learning_rate that is too low"
                )
        return None

    def _gradient(self, metrics: Mapping[str, float]) -> str | None:
        norm = metrics.get("grad_norm", 0.0)
        if norm <= LARGE_GRAD_NORM:
            return None
        return f"warning: grad_norm is {norm:.1f}, above {LARGE_GRAD_NORM:g}: lower learning_rate or beta"

    def _chosen(self, step: int, metrics: Mapping[str, float]) -> str | None:
        reward = metrics.get("rewards/chosen", 0.0)
        if not self.has_reference or step <= LATE_SHARE * self.num_steps or reward >= 0.0:
            return None
        return f"rewards/chosen has fallen to {reward:.3f}: normal, as long as rewards/margins grows"


def _add(sums: list[float], value: float, weight: float) -> tuple[float, float]:
    """Adds to [weighted sum, weight]; returns the mean so far and the weight."""
    sums[0] += value * weight
    sums[1] += weight
    return sums[0] / max(1.0, sums[1]), sums[1]
