"""What each setting of the checkpoints does; see flags_table.py."""

from __future__ import annotations

from tests.flags_entries import Effect, Refused

TRAINING = "losses grad_norms weights"


def saved_steps(run: dict) -> list[int]:
    """The steps of the checkpoints that a run left."""
    manifests = [name.split("/") for name in run["files"] if name.endswith("manifest.json")]
    return [int(parts[1].removeprefix("step-")) for parts in manifests if parts[0] == "checkpoints"]


CHECKPOINTS = {
    "save_steps": [
        Effect({"save_steps": 2}, "files", TRAINING, holds=lambda run: saved_steps(run) == [2]),
    ],
    "save_total_limit": [
        Effect(
            {"save_total_limit": 2},
            "files",
            TRAINING,
            base={"save_steps": 1},
            holds=lambda run: saved_steps(run) == [2, 3],
        ),
        Refused({"save_total_limit": 2}, "save_total_limit=2 without effect"),
    ],
    "resume": [
        Effect(
            {"resume": "auto"},
            "printed",
            TRAINING,
            holds=lambda run: "starting at the first step" in run["printed"],
        ),
        Effect(
            {"resume_from_checkpoint": "true"},
            "printed",
            TRAINING,
            holds=lambda run: "starting at the first step" in run["printed"],
        ),
        Refused({"resume": "WORK/nowhere"}, "there is no such file"),
    ],
}
