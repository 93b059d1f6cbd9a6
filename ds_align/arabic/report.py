"""What balancing found and took, as a table and as plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from ds_align.arabic.annotate import SOURCES, Annotations
from ds_align.config.dialects import DIALECTS


@dataclass(frozen=True, slots=True)
class BalanceReport:
    """found: rows of each dialect; sources: who labelled them; mean_confidence: of those that have one;
    quotas: rows of each dialect in the result, repeated ones counted as often as they stand there.
    """

    name: str
    rows_read: int
    rows: int
    shares: dict[str, float]
    quotas: dict[str, int]
    found: dict[str, int]
    sources: dict[str, dict[str, int]]
    mean_confidence: dict[str, float | None]

    @classmethod
    def of(
        cls, name: str, annotations: Annotations, shares: Mapping[str, Fraction], quotas: Mapping[str, int]
    ) -> BalanceReport:
        """Counts what the annotations say."""
        sources: dict[str, dict[str, int]] = {}
        confidence: dict[str, float | None] = {}
        for index, label in enumerate(DIALECTS):
            of_label = annotations.labels == index
            counts = np.bincount(annotations.sources[of_label], minlength=len(SOURCES))
            sources[label] = {
                source: int(count) for source, count in zip(SOURCES, counts, strict=True) if count
            }
            known = annotations.confidences[of_label]
            known = known[~np.isnan(known)]
            confidence[label] = float(known.mean()) if len(known) else None
        return cls(
            name,
            len(annotations.labels),
            sum(quotas.values()),
            {label: float(share) for label, share in shares.items()},
            dict(quotas),
            annotations.found(),
            sources,
            confidence,
        )

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [
            f"{self.name}: {self.rows} of {self.rows_read} rows by dialect",
            f"{'dialect':<9}{'share':>8}{'found':>9}{'taken':>9}{'confidence':>12}  labelled by",
        ]
        for label in DIALECTS:
            if not self.found[label] and label not in self.shares:
                continue
            share = f"{self.shares.get(label, 0):.4g}"
            confidence = self.mean_confidence[label]
            shown = "-" if confidence is None else f"{confidence:.2f}"
            by = ", ".join(f"{source} {count}" for source, count in self.sources[label].items())
            lines.append(
                f"{label:<9}{share:>8}{self.found[label]:>9}{self.quotas.get(label, 0):>9}{shown:>12}  {by}"
            )
        none = [label for label in self.shares if not self.quotas.get(label)]
        if none:
            lines.append(f"{', '.join(none)}: the share is less than a row of {self.rows}, so none is taken")
        return "\n".join(lines)
