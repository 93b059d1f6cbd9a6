"""The settings of a run that meets a fault."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from ds_align.config.schema import Count, PositiveNumber, Schema, changed, rule


class SurvivalFields(Schema):
    """What a gradient that is not finite does, and when a run counts as hanging."""

    group: ClassVar[str] = "Faults"

    non_finite: Literal["stop", "skip"] = Field(
        "stop",
        description="A step whose gradient is not finite changes no weight, and its rows are written to "
        "nan_step_N.json. stop: the run ends with exit code 5; skip: it goes on. In float16 such steps "
        "belong to the search for a loss scale, and always go on.",
    )
    max_skipped_steps: Count = Field(
        20, description="So many such steps in a row end the run all the same (skip and float16)."
    )
    hang_timeout: PositiveNumber | None = Field(
        1800.0,
        description="Seconds without progress (a micro-batch, a batch of an evaluation, a checkpoint) after "
        "which a rank shows where it waits and ends; none: it waits for ever.",
    )

    @rule("non_finite", "max_skipped_steps", "dtype")
    def _a_limit_needs_skipping(self) -> str | None:
        if changed(self, "max_skipped_steps") and self.non_finite == "stop" and self.dtype != "float16":
            return "max_skipped_steps without effect: non_finite is stop; set it to skip"
        return None
