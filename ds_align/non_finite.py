"""Steps whose gradient is not finite: what is written of them, and when they end the run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

from ds_align import checkpoint, distributed
from ds_align.batch import GlobalBatch, PackedBatch
from ds_align.config import BaseConfig
from ds_align.engine import StepResult
from ds_align.errors import NonFiniteError

_SHOWN_ROWS = 8


class NonFiniteSteps:
    """Judges every step; the engine has left the weights as they were where one was skipped.

    scales_losses: float16 skips steps while it looks for a loss scale.
    """

    def __init__(self, config: BaseConfig, directory: Path, *, scales_losses: bool) -> None:
        self.limit = config.max_skipped_steps if config.non_finite == "skip" or scales_losses else 0
        self.num_in_a_row = 0
        self._config = config
        self._directory = directory
        self._losses: list[tuple[PackedBatch, torch.Tensor]] = []

    def add(self, batch: PackedBatch, losses: torch.Tensor) -> None:
        """Keeps the losses of a micro-batch, one a preference, until the step ends."""
        self._losses.append((batch, losses.detach()))

    def judge(self, result: StepResult, batch: GlobalBatch) -> str | None:
        """What the user should know of the step; None where all is well.

        Collective where the step was skipped, which every rank knows. Raises NonFiniteError.
        """
        losses, self._losses = self._losses, []
        if not result.skipped:
            self.num_in_a_row = 0
            return None
        self.num_in_a_row += 1
        rows = self._describe(losses, batch)
        path = self._directory / f"nan_step_{batch.step}.json"
        whole = {"step": batch.step, "epoch": batch.epoch, "grad_norm": str(float(result.grad_norm)), **rows}
        written = distributed.broadcast_object(self._write(path, whole))
        wrong = rows["rows_with_a_loss_that_is_not_finite"]
        shown = ", ".join(map(str, wrong[:_SHOWN_ROWS])) + (" ..." if len(wrong) > _SHOWN_ROWS else "")
        found = f"the loss of rows {shown} is not finite" if wrong else "every loss is finite"
        said = f"the gradient is not finite ({found}); no weight was changed, {written}"
        if self.num_in_a_row > self.limit:
            again = f", {self.num_in_a_row} steps in a row" if self.num_in_a_row > 1 else ""
            raise NonFiniteError(
                f"step {batch.step}: {said}{again}; lower learning_rate (now "
                f"{self._config.learning_rate:g}), "
                "look at these rows, use bfloat16 instead of float16, or set non_finite=skip"
            )
        return said

    def _write(self, path: Path, whole: dict[str, Any]) -> str:
        """Writes the file on the main rank; says what became of it."""
        try:
            if distributed.is_main():
                checkpoint.write_durably(path, json.dumps(whole, indent=1) + "\n")
        except OSError as error:
            return f"{path.name} cannot be written ({error.strerror})"
        return f"{path.name} has its rows"

    def _describe(self, losses: list[tuple[PackedBatch, torch.Tensor]], batch: GlobalBatch) -> dict[str, Any]:
        """The rows of every rank's micro-batches with their losses; collective."""
        mine = [
            {"rank": distributed.rank(), "rows": list(map(int, packed.rows)), "losses": values.tolist()}
            for packed, values in losses
            if packed.num_preferences
        ]
        packs = [pack for part in distributed.gather_objects(mine) for pack in part]
        wrong = sorted(
            row
            for pack in packs
            for row, value in zip(pack["rows"], pack["losses"], strict=True)
            if not math.isfinite(value)
        )
        for pack in packs:
            # JSON has no name for them.
            pack["losses"] = [value if math.isfinite(value) else str(value) for value in pack["losses"]]
        counted = {"num_preferences": batch.num_preferences}
        return counted | {"rows_with_a_loss_that_is_not_finite": wrong, "micro_batches": packs}
