"""Data sets in which the Arabic dialects have given shares."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ds_align.arabic.annotate import DEFAULT_COLUMN, Annotations, Annotator, as_columns
from ds_align.arabic.classifiers import Classifier, open_classifier
from ds_align.arabic.names import LabelNames
from ds_align.arabic.record_text import fields_from_text
from ds_align.arabic.report import BalanceReport
from ds_align.arabic.shares import draw, exact_shares, fits, largest_quotas, quotas
from ds_align.data.readers import BadRow, RecordSet, open_records
from ds_align.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

    from ds_align.data.readers import Source

_SHOWN_BAD = 3


class ArabicDialectDatasetProcessor:
    """Labels rows by dialect and takes those that meet a target distribution.

    classifier: a function (texts -> names, or (name, confidence)), a fastText model (.bin, .ftz) or a
    directory of a Hugging Face text classifier, for rows whose column says nothing; None: the built-in
    lexicon. label_map: what other names in the column or of the classifier mean. report: of the last
    balance_dataset.
    Raises ConfigError for a classifier that cannot be used.
    """

    def __init__(
        self,
        classifier: Classifier | str | Path | None = None,
        *,
        label_map: Mapping[str, str] | None = None,
    ) -> None:
        self._classifier = None if classifier is None else open_classifier(classifier)
        self._names = LabelNames(label_map)
        self.report: BalanceReport | None = None

    def balance_dataset(
        self,
        dataset_path: Source,
        target_distribution: Mapping[str, float],
        *,
        dialect_column: str = DEFAULT_COLUMN,
        text_field: str | Sequence[str] | None = None,
        allow_repeat: bool = False,
        size: int | None = None,
        seed: int = 42,
        split: str | None = None,
    ) -> Dataset:
        """The largest part of a data set in which the dialects have these shares, in file order.

        dataset_path: a path, a list of dicts or a datasets.Dataset. target_distribution: label to share;
        they sum to 1 within 1e-6; rows of other dialects are left out. text_field: columns (a list, or one
        text with commas) that rows without a label are judged by; None: prompt and chosen, or completion, the
        best answer of a ranked list, conversations, messages, text. size: so many rows instead of the most.
        allow_repeat: rows of a dialect that has too few are taken more than once, all of them about equally
        often; the size is then the number of rows of the wanted dialects where it is not given.

        Numbers of rows are those of largest remainder. Which rows depends on the data and the seed alone.
        All columns are kept; `dialect` (the label), `dialect_source` and `dialect_confidence` are added, or
        written anew. Raises DataError, also where a wanted dialect has no row.
        """
        shares = exact_shares(target_distribution)
        fields = fields_from_text(text_field)
        annotator = Annotator(dialect_column, fields, classifier=self._classifier, names=self._names)
        records = open_records(dataset_path, split)
        rows = list(records.rows())
        _refuse_bad_rows(rows, records.name)
        annotations = annotator.annotate(rows, records.name)
        if dialect_column != DEFAULT_COLUMN and any(DEFAULT_COLUMN in row.columns for row in rows):
            raise DataError(
                f"{records.name}: there is a column {DEFAULT_COLUMN!r} beside dialect_column="
                f"{dialect_column!r}, and the result's labels go there; rename or remove it"
            )
        wanted = _wanted(annotations, shares, records.name, size=size, allow_repeat=allow_repeat)
        taken = draw(annotations.labels, wanted, seed)
        self.report = BalanceReport.of(records.name, annotations, shares, wanted)
        return _as_dataset(
            _table(dataset_path, split), rows, taken, as_columns(annotations, taken), records.name
        )


def choose(
    records: RecordSet, annotations: Annotations, shares: Mapping[str, Fraction], seed: int
) -> tuple[np.ndarray, BalanceReport]:
    """The rows that balance_dataset would take, in file order, and the report. Raises DataError."""
    wanted = _wanted(annotations, shares, records.name)
    return draw(annotations.labels, wanted, seed), BalanceReport.of(records.name, annotations, shares, wanted)


def _wanted(
    annotations: Annotations,
    shares: Mapping[str, Fraction],
    name: str,
    *,
    size: int | None = None,
    allow_repeat: bool = False,
) -> dict[str, int]:
    """Rows of each dialect to take. Raises DataError where that cannot be."""
    found = annotations.found()
    counts = ", ".join(f"{label} {number}" for label, number in found.items() if number) or "none"
    missing = [label for label in shares if not found[label]]
    if missing:
        raise DataError(
            f"{name}: no row of {', '.join(missing)}, which the wanted shares name; found {counts}; "
            "give such rows, label them in a column, or leave the dialect out"
        )
    if size is not None and size < 1:
        raise DataError(f"{name}: size={size}, expected 1 or more")
    if allow_repeat:
        natural = sum(found[label] for label in shares)
        return quotas(natural if size is None else size, shares)
    most = largest_quotas(found, shares)
    if size is None:
        return most
    wanted = quotas(size, shares)
    if not fits(wanted, found):
        raise DataError(
            f"{name}: size={size} needs {', '.join(f'{label} {n}' for label, n in wanted.items())}; found "
            f"{counts}; at most {sum(most.values())} rows meet the shares; lower it or set allow_repeat"
        )
    return wanted


def _refuse_bad_rows(rows: Iterable[Any], name: str) -> None:
    bad = [row for row in rows if isinstance(row, BadRow)]
    if bad:
        shown = " | ".join(f"{row.origin}: {row.reason}" for row in bad[:_SHOWN_BAD])
        raise DataError(f"{name}: {len(bad)} rows cannot be read; mend or remove them: {shown}")


def _table(source: Any, split: str | None) -> Dataset | None:
    """The datasets.Dataset that a source is, with its own types; None for files and lists."""
    from datasets import Dataset, DatasetDict, load_from_disk

    if isinstance(source, str | Path) and Path(source).is_dir():
        source = load_from_disk(str(source))
    if isinstance(source, DatasetDict):
        source = source.get(split or ("train" if "train" in source else next(iter(source))))
    return source if isinstance(source, Dataset) else None


def _as_dataset(
    table: Dataset | None, rows: list[Any], taken: np.ndarray, added: dict[str, list[Any]], name: str
) -> Dataset:
    """The taken rows with all their columns, and the added ones."""
    from datasets import Dataset, Features, Value, concatenate_datasets

    types = {"dialect": "string", "dialect_source": "string", "dialect_confidence": "float64"}
    labels = Dataset.from_dict(added, features=Features({name: Value(kind) for name, kind in types.items()}))
    if table is not None and len(table) == len(rows):
        kept = table.select(taken)
        kept = kept.remove_columns([name for name in added if name in kept.column_names])
    else:
        columns = list(dict.fromkeys(key for row in rows for key in row.columns))
        chosen = [rows[number].columns for number in taken]
        values = {column: [row.get(column) for row in chosen] for column in columns if column not in added}
        kept = _from_columns(values, name)
    return concatenate_datasets([kept, labels], axis=1) if kept.column_names else labels


def _from_columns(table: dict[str, list[Any]], where: str) -> Dataset:
    import pyarrow as pa
    from datasets import Dataset

    for name, values in table.items():
        try:
            pa.array(values)
        except (pa.ArrowInvalid, pa.ArrowTypeError, UnicodeEncodeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise DataError(
                f"{where}: column {name!r} holds what a datasets.Dataset cannot ({reason}); give the column "
                "one type and valid text"
            ) from error
    return Dataset.from_dict(table)
