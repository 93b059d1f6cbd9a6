"""What is left out of the training data before training."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from ds_align.config.schema import Schema


class CleaningFields(Schema):
    """Which rows are not trained on, although they can be read."""

    group: ClassVar[str] = "Data"

    deduplicate: Literal["none", "exact", "near"] = Field(
        "none",
        description="Rows of the training data that are left out: exact: those whose prompt, answers and "
        "label repeat an earlier row's; near: those, too, that nearly do. Rows that contradict each other "
        "stay and are named.",
    )
