"""The training rows of a run, cut down to its dialect_distribution before they are tokenized."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from fractions import Fraction
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ds_align.arabic.annotate import Annotator
from ds_align.arabic.balance import choose
from ds_align.arabic.classifiers import open_classifier
from ds_align.arabic.names import LabelNames
from ds_align.arabic.record_text import fields_from_text
from ds_align.arabic.shares import exact_shares
from ds_align.data.readers import Record, RecordSet
from ds_align.data.schemas import ColumnFields, Columns
from ds_align.data.subset import Chosen, pick_rows
from ds_align.errors import ConfigError
from ds_align.file_digests import FileDigests


class DialectSettings(ColumnFields, Protocol):
    """What this room reads from a config."""

    dialect_distribution: dict[str, float] | None
    dialect_column: str
    dialect_text_field: str | None
    dialect_classifier: str | None
    dialect_label_map: dict[str, str] | None
    seed: int


@dataclass(frozen=True, slots=True)
class DialectSubset:
    """A choice of rows, as the data room asks for one. key: all that it depends on beside the rows."""

    shares: Mapping[str, Fraction]
    annotator: Annotator
    seed: int
    key: Any

    @classmethod
    def from_config(cls, config: DialectSettings) -> DialectSubset | None:
        """None where no dialect_distribution is asked for. Raises ConfigError for a classifier that cannot
        be used, without loading it.
        """
        if config.dialect_distribution is None:
            return None
        columns = Columns.from_config(config)
        fields = fields_from_text(config.dialect_text_field)
        annotator = Annotator(
            config.dialect_column,
            fields,
            columns,
            config.dialect_classifier,
            LabelNames(config.dialect_label_map),
        )
        shares = exact_shares(config.dialect_distribution)
        key = {
            "shares": [[label, str(share)] for label, share in shares.items()],
            "column": config.dialect_column,
            "text": [annotator.text_fields, asdict(columns)],
            "classifier": _classifier_digest(config.dialect_classifier),
            "label_map": sorted((config.dialect_label_map or {}).items()),
            "seed": config.seed,
            "code": _code_digest(),
        }
        return cls(shares, annotator, config.seed, key)

    def choose(self, records: RecordSet, is_usable: Callable[[Record], bool]) -> Chosen:
        """The rows that train; those that cannot be used come along, to be judged as they always are.

        Raises DataError as ArabicDialectDatasetProcessor.balance_dataset does.
        """
        annotations = self.annotator.annotate(records.rows(), records.name, is_usable)
        taken, report = choose(records, annotations, self.shares, self.seed)
        numbers = np.union1d(taken, np.flatnonzero(annotations.labels < 0))
        counts = {
            f"dialect_{label}_{what}": number
            for what, numbers_of in (("found", report.found), ("taken", report.quotas))
            for label, number in numbers_of.items()
            if number or label in self.shares
        }
        return Chosen(pick_rows(records, numbers), counts, (str(report),), report.as_dict())


def _classifier_digest(path: str | None) -> list[str] | None:
    """Of the content of its files; opening the path checks what it is."""
    if path is None:
        return None
    place, digests = Path(path), FileDigests(None)
    if not place.exists():
        open_classifier(path)
    files = [place] if place.is_file() else sorted(file for file in place.rglob("*") if file.is_file())
    try:
        return [f"{file.name} {digests.digest(file)}" for file in files]
    except OSError as error:
        raise ConfigError(
            f"dialect_classifier={path!r}: cannot be read ({error.strerror}: {error.filename}); check it"
        ) from error


def _code_digest() -> str:
    """Of this room's own code and words: whoever changes how a row is labelled makes old tokens void."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return sha256("".join(sha256(file.read_bytes()).hexdigest() for file in files).encode()).hexdigest()
