"""The dialect of every row of a source: from its column, else a classifier, else the lexicon."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np

from ds_align.arabic.classifiers import Classifier, classify, open_classifier
from ds_align.arabic.names import LabelNames
from ds_align.arabic.record_text import record_text
from ds_align.arabic.scorer import Label, label_texts
from ds_align.config.dialects import DIALECTS
from ds_align.data.readers import BadRow, Record
from ds_align.data.schemas import Columns
from ds_align.errors import DataError

DEFAULT_COLUMN = "dialect"
SOURCES = ("column", "classifier", "lexicon")
# Texts that a classifier is given at once.
_BATCH = 1024
_SHOWN_NAMES = 20


@dataclass(slots=True)
class Annotations:
    """The label of each row. labels: number in DIALECTS, -1 for a row that takes no part; sources: number in
    SOURCES; confidences: 1 for a column, NaN where a classifier gives none.
    """

    labels: np.ndarray
    sources: np.ndarray
    confidences: np.ndarray

    def found(self) -> dict[str, int]:
        """Rows of each label."""
        return {label: int((self.labels == index).sum()) for index, label in enumerate(DIALECTS)}


@dataclass(slots=True)
class Annotator:
    """How rows are labelled. text_fields: columns that every row must have; None: prompt and answer, as the
    column map names them.
    """

    column: str = DEFAULT_COLUMN
    text_fields: Sequence[str] | None = None
    columns: Columns = field(default_factory=Columns)
    classifier: Classifier | str | Path | None = None
    names: LabelNames = field(default_factory=LabelNames)

    def annotate(
        self,
        rows: Iterable[Record | BadRow],
        name: str,
        takes_part: Callable[[Record], bool] = lambda _: True,
    ) -> Annotations:
        """Labels rows in order; those that cannot be read, or do not take part, have the label -1.

        name: what messages call the source. Raises DataError for a name in the column that is no label, for
        a column other than `dialect` that no row has, and for a row without text.
        """
        run = _Run(self)
        for row in rows:
            if isinstance(row, Record) and takes_part(row):
                run.add(row)
            else:
                run.skip()
        run.flush()
        wanted = [("text field", column) for column in self.text_fields or ()]
        if self.column != DEFAULT_COLUMN:
            wanted.insert(0, ("dialect column", self.column))
        for what, column in wanted if run.columns else ():
            if column not in run.columns:
                near = get_close_matches(column, sorted(run.columns), n=1)
                hint = f", the nearest is {near[0]!r}" if near else ""
                raise DataError(
                    f"{name}: no row has the {what} {column!r}{hint}; found "
                    f"{', '.join(sorted(run.columns))}; name another, or leave it out"
                )
        run.refuse_unknown_names(name)
        return run.finish()


class _Run:
    """One pass: texts are gathered and labelled some at a time."""

    def __init__(self, annotator: Annotator) -> None:
        self.columns: set[str] = set()
        self._annotator = annotator
        self._labels: list[int] = []
        self._sources: list[int] = []
        self._confidences: list[float] = []
        self._unknown: dict[str, DataError] = {}
        self._waiting: list[tuple[int, str]] = []
        self._classifier: Classifier | None = None

    def skip(self) -> None:
        self._put(-1, -1, np.nan)

    def add(self, row: Record) -> None:
        annotator = self._annotator
        self.columns.update(map(str, row.columns))
        given = row.columns.get(annotator.column)
        if given is None or (isinstance(given, str) and not given.strip()):
            self._waiting.append((len(self._labels), _text(row, annotator)))
            self.skip()
            if len(self._waiting) == _BATCH:
                self.flush()
            return
        where = f"{row.origin}: column {annotator.column!r}"
        if not isinstance(given, str):
            raise DataError(
                f"{where} holds {type(given).__name__} {given!r}, expected one of {', '.join(DIALECTS)}"
            )
        try:
            self._put(DIALECTS.index(annotator.names.label(given, where)), 0, 1.0)
        except DataError as error:
            self._unknown.setdefault(given, error)
            self.skip()

    def refuse_unknown_names(self, name: str) -> None:
        """Raises DataError for names in the column that are no label: all of them at once."""
        if not self._unknown:
            return
        first, *others = self._unknown
        shown = ", ".join(map(repr, others[:_SHOWN_NAMES]))
        also = f"; {name} also has {shown}{' ...' if len(others) > _SHOWN_NAMES else ''}" if others else ""
        raise DataError(f"{self._unknown[first]}{also}")

    def flush(self) -> None:
        """Labels the texts that wait."""
        if not self._waiting:
            return
        source, found = self._label([text for _, text in self._waiting])
        for (place, _), label in zip(self._waiting, found, strict=True):
            self._labels[place] = DIALECTS.index(label.name)
            self._sources[place] = source
            self._confidences[place] = np.nan if label.confidence is None else label.confidence
        self._waiting.clear()

    def finish(self) -> Annotations:
        return Annotations(
            np.asarray(self._labels, np.int8),
            np.asarray(self._sources, np.int8),
            np.asarray(self._confidences, np.float64),
        )

    def _label(self, texts: list[str]) -> tuple[int, list[Label]]:
        annotator = self._annotator
        if annotator.classifier is None:
            return SOURCES.index("lexicon"), label_texts(texts)
        if self._classifier is None:
            self._classifier = open_classifier(annotator.classifier)
        return SOURCES.index("classifier"), classify(self._classifier, texts, annotator.names)

    def _put(self, label: int, source: int, confidence: float) -> None:
        self._labels.append(label)
        self._sources.append(source)
        self._confidences.append(confidence)


def _text(row: Record, annotator: Annotator) -> str:
    return record_text(row, annotator.text_fields, annotator.columns)


def as_columns(annotations: Annotations, rows: np.ndarray) -> dict[str, list[Any]]:
    """The three columns that a balanced data set gets, for these rows; None: no confidence is known."""
    confidences = annotations.confidences[rows]
    return {
        "dialect": [DIALECTS[index] for index in annotations.labels[rows]],
        "dialect_source": [SOURCES[index] for index in annotations.sources[rows]],
        "dialect_confidence": [None if np.isnan(value) else float(value) for value in confidences],
    }
