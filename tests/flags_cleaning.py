"""What the settings of the training data's cleaning do; flags_table.py takes these entries over."""

from __future__ import annotations

from collections.abc import Callable

from tests.flags_entries import Effect, Refused


def removed(number: int) -> Callable[[dict], bool]:
    """Of 15 rows so many are left out; two that contradict each other stay and are named."""
    words = (f"{number} of 15 rows repeat", "2 rows say the opposite", "repeated.jsonl:3 and ", "jsonl:15;")
    return lambda run: run["train_rows"] == 15 - number and all(text in run["printed"] for text in words)


CLEANING = {
    "deduplicate": [
        *(
            Effect(
                {"deduplicate": value},
                "train_rows tokens",
                base={"dataset_path": "WORK/repeated.jsonl"},
                holds=removed(number),
            )
            for value, number in (("exact", 1), ("near", 2))
        ),
        Refused({"deduplicate": "all"}, "deduplicate"),
    ],
}
