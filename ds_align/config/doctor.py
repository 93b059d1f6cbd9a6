"""The settings of the checks before and at the start of training."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from ds_align.config.schema import Schema, changed, rule


class DoctorFields(Schema):
    """What is examined before a run, and what a fault does to it."""

    group: ClassVar[str] = "Doctor"

    doctor: Literal["error", "warn", "off"] = Field(
        "error",
        description="Examine data and settings at the start: error: what cannot be meant stops the run; "
        "warn: it is said and the run goes on; off: nothing is examined.",
    )
    doctor_models: bool = Field(
        True,
        description="Score a few preferences by policy and reference before the first step (64 in "
        "launch/doctor.py, 8 in training) and hold the two against each other.",
    )

    @rule("doctor", "doctor_models")
    def _models_need_the_doctor(self) -> str | None:
        if self.doctor == "off" and changed(self, "doctor_models"):
            return "doctor_models without effect: doctor is off; leave one of the two out"
        return None
