"""What the settings for faults do; flags_table.py takes these entries over."""

from __future__ import annotations

from tests.flags_entries import Effect, Refused

TRAINING = "losses grad_norms weights"
# The first update throws the weights so far that the second gradient is not finite.
OVERSHOOT = {"learning_rate": 1e30}
SKIPPING = {"non_finite": "skip"} | OVERSHOOT

FAULTS = {
    "non_finite": [
        Effect(
            SKIPPING,
            "losses grad_norms weights printed",
            holds=lambda run: (
                run["printed"].count("the gradient is not finite") == 2 and run["status"] == "completed"
            ),
        ),
        Refused(OVERSHOOT, "step 2: the gradient is not finite"),
    ],
    "max_skipped_steps": [
        Effect(
            SKIPPING | {"max_skipped_steps": 2},
            "losses grad_norms weights printed",
            holds=lambda run: run["status"] == "completed",
        ),
        Refused(SKIPPING | {"max_skipped_steps": 1}, "2 steps in a row"),
        Refused({"max_skipped_steps": 5}, "max_skipped_steps without effect"),
    ],
    "hang_timeout": [
        Effect({"hang_timeout": 900}, "watched", TRAINING, holds=lambda run: run["watched"] == [900.0]),
        Effect({"hang_timeout": None}, "watched", TRAINING, holds=lambda run: run["watched"] == [None]),
    ],
}
