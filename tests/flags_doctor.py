"""What the settings of the doctor do; flags_table.py takes these entries over."""

from __future__ import annotations

from tests.flags_entries import Effect, Refused

TRAINING = "losses grad_norms weights"
FAULTY = {"dataset_path": "WORK/several_eos.jsonl"}

DOCTOR = {
    "doctor": [
        Effect({"doctor": "off"}, "printed", TRAINING, holds=lambda run: "doctor" not in run["printed"]),
        Effect(
            {"doctor": "warn"} | FAULTY,
            "tokens printed",
            holds=lambda run: "hold more than one EOS" in run["printed"] and run["status"] == "completed",
        ),
        Refused(FAULTY, "hold more than one EOS"),
    ],
    "doctor_models": [
        Effect(
            {"doctor_models": False},
            "printed",
            TRAINING,
            holds=lambda run: "nats a token before training" not in run["printed"],
        ),
        Refused({"doctor_models": False, "doctor": "off"}, "doctor_models without effect"),
    ],
}
