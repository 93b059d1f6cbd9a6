"""What a run counts while it trains: the window since the last logged step, and the totals of all steps."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import torch

from ds_align.batch import GlobalBatch, PackedBatch
from ds_align.metrics import MetricSums
from ds_align.objective import ForwardOutput


@dataclasses.dataclass(slots=True)
class Window:
    """Counts of this rank since the last logged step, and the time that they took."""

    started: float = dataclasses.field(default_factory=time.perf_counter)
    preferences: int = 0
    tokens: int = 0
    unshared_tokens: int = 0
    padded_tokens: int = 0
    slots: int = 0
    steps: int = 0
    imbalance: float = 1.0
    reference_seconds: float = 0.0
    oversized: int = 0

    @property
    def seconds(self) -> float:
        """Time since the window was opened, pauses left out."""
        return time.perf_counter() - self.started


class Tally:
    """Sums of the open window and totals of the run; all of the loop's own state."""

    def __init__(self, inputs: str, device: torch.device) -> None:
        self.sums = MetricSums(inputs, device)
        self.window = Window()
        self._kept = Window()
        self.loss_sum = 0.0
        self.totals: dict[str, float] = {}
        self.step_seconds = 0.0
        self.reference_seconds = 0.0

    def add(self, output: ForwardOutput, batch: PackedBatch) -> None:
        """Counts one micro-batch."""
        self.sums.add(output, batch)
        window = self.window
        window.preferences += batch.num_preferences
        window.tokens += batch.num_tokens
        window.unshared_tokens += batch.num_unshared_tokens
        window.padded_tokens += batch.num_padded_tokens
        window.slots += batch.input_ids.numel() if batch.num_tokens else 0

    def end_step(self, batch: GlobalBatch) -> None:
        """Counts one optimizer step."""
        self.window.steps += 1
        self.window.imbalance = max(self.window.imbalance, batch.rank_imbalance)
        self.window.oversized += batch.num_oversized
        self.window.reference_seconds += batch.reference_seconds
        self.sums.keep()
        self._kept = dataclasses.replace(self.window)

    def drop_step(self) -> None:
        """A step that changed nothing counts for nothing but its time."""
        self.sums.drop()
        self.window = dataclasses.replace(self._kept, started=self.window.started)

    def reduce(self) -> tuple[dict[str, float], dict[str, float]]:
        """(means, token counts over ranks) of the window. Collective: every rank must call this."""
        counters = ("preferences", "tokens", "unshared_tokens", "padded_tokens", "slots")
        return self.sums.reduce(**{name: getattr(self.window, name) for name in counters})

    @property
    def reference_time_fraction(self) -> float:
        """Share of the time of all closed windows' steps in which this rank scored the reference."""
        return self.reference_seconds / self.step_seconds if self.step_seconds else 0.0

    def close_window(self, means: dict[str, float], counts: dict[str, float]) -> None:
        """Adds the window, with its mean loss and step_time in seconds, to the totals; opens the next one."""
        self.loss_sum += means["loss"] * self.window.steps
        self.step_seconds += means["step_time"] * self.window.steps
        self.reference_seconds += self.window.reference_seconds
        self.totals = {name: self.totals.get(name, 0.0) + value for name, value in counts.items()}
        self.sums.reset()
        self.window = Window()
        self._kept = Window()

    def state(self) -> dict[str, Any]:
        """The totals as JSON values, the same on every rank."""
        return {"loss_sum": self.loss_sum, "totals": self.totals}

    def rank_state(self) -> dict[str, Any]:
        """The open window of this rank, and its clock: plain values and a tensor."""
        window = dataclasses.asdict(self.window) | {"started": self.window.seconds}
        seconds = {"step_seconds": self.step_seconds, "reference_seconds": self.reference_seconds}
        return {"window": window, "sums": self.sums.state(), **seconds}

    def load(self, state: dict[str, Any], rank_state: dict[str, Any]) -> None:
        """Goes on from state() and rank_state()."""
        self.loss_sum, self.totals = state["loss_sum"], dict(state["totals"])
        self.sums.load(rank_state["sums"])
        self.step_seconds = rank_state["step_seconds"]
        self.reference_seconds = rank_state["reference_seconds"]
        window = rank_state["window"]
        self.window = Window(**window | {"started": time.perf_counter() - window["started"]})
        self._kept = dataclasses.replace(self.window)
