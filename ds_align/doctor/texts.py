"""The rows as texts, read once more: mojibake, near duplicates, prompts that are nearly the same."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from ds_align.config import METHODS, BaseConfig
from ds_align.data.deduplicate import JoinedPreferences, ParsedRecords
from ds_align.data.mixture import PartFields, source_of
from ds_align.data.ranked import PairRules
from ds_align.data.readers import CHUNK_ROWS, open_records
from ds_align.data.schemas import Columns, RowLayout, recognise_layout, texts_of
from ds_align.doctor.facts import TextFacts
from ds_align.errors import DataError

if TYPE_CHECKING:
    from ds_align.data.build import DataFields
    from ds_align.data.duplicates import DuplicateReport
    from ds_align.splits import DataSource, Splits

# Of the rows; with fewer that have Arabic letters, dialects are not asked for.
ARABIC_SHARE = 0.01
_SHOWN = 3
# What UTF-8 looks like that was read as Windows-1252 or Latin-1: a lead byte with its continuation bytes.
_LEADS = "[\u00c2-\u00df][{0}]|[\u00e0-\u00ef][{0}]{{2}}|[\u00f0-\u00f4][{0}]{{3}}"
_CONTINUATIONS = "\u0080-\u00bf" + "".join(
    bytes([code]).decode("cp1252", "ignore") for code in range(0x80, 0xA0)
).replace("-", "\\-")
_GARBLED = re.compile(_LEADS.format(_CONTINUATIONS))
_REPLACEMENT = "\ufffd"
_ARABIC = re.compile("[\u0621-\u064a]")


def is_garbled(text: str) -> bool:
    """Whether a text holds U+FFFD, or twice what only UTF-8 read as another encoding looks like.

    Once may be meant: a capital with an accent before a closing quotation mark.
    """
    if text.isascii():
        return False
    return _REPLACEMENT in text or len(list(islice(_GARBLED.finditer(text), 2))) == 2


def _preferences(config: BaseConfig, fields: DataFields, source: DataSource, split: str | None) -> Rows:
    """The rows of a source that can be used; fields: the config, or that with a mixture part's columns."""
    columns = Columns.from_config(fields)
    records = open_records(source, split, columns=columns)
    first, inputs = islice(records.rows(), CHUNK_ROWS), METHODS[config.method].inputs
    layout = recognise_layout(first, inputs, columns, records.name)
    return Rows(ParsedRecords(records, layout, columns, PairRules.from_config(fields)), layout)


@dataclass(frozen=True, slots=True)
class Rows:
    """Preferences of one source, and what its rows hold."""

    preferences: ParsedRecords
    layout: RowLayout


def _training_rows(config: BaseConfig, splits: Splits) -> list[Rows]:
    """Those of the source, or of all parts of a mixture: of each part every row, taken or not."""
    if splits.train_source is not None:
        return [_preferences(config, config, *splits.train_source)]
    return [
        _preferences(config, PartFields(config, part.columns), source_of(part), part.split)
        for part in config.mixture_parts
    ]


def read_texts(config: BaseConfig, splits: Splits) -> TextFacts:
    """What the checks need of all texts, which are read several times. Raises what reading raises."""
    from ds_align.data.duplicates import prompt_overlap

    members = _training_rows(config, splits)
    rows = JoinedPreferences([member.preferences for member in members])
    num_rows, num_garbled, num_arabic = 0, 0, 0
    garbled: list[str] = []
    for preference in rows:
        num_rows += 1
        if any(is_garbled(text) for text in texts_of(preference)):
            num_garbled += 1
            garbled += [preference.origin] if len(garbled) < _SHOWN else []
        num_arabic += any(not text.isascii() and _ARABIC.search(text) for text in texts_of(preference))
    overlap = None
    if splits.eval_source is not None:
        overlap = prompt_overlap(rows, _preferences(config, config, *splits.eval_source).preferences)
    dialects, remarks = None, ()
    if num_arabic > ARABIC_SHARE * num_rows:
        dialects, remarks = _dialects(config, splits)
    return TextFacts(
        num_rows,
        num_garbled,
        tuple(garbled),
        duplicates=_duplicates(members),
        overlap=overlap,
        dialects=dialects,
        remarks=remarks,
    )


def _duplicates(members: list[Rows]) -> DuplicateReport:
    """Of all rows together; labelled answers and pairs have nothing to be compared by."""
    from ds_align.data.duplicates import DuplicateReport, scan_duplicates

    reports = [
        scan_duplicates(JoinedPreferences([member.preferences for member in alike]))
        for alike in (
            [member for member in members if (member.layout == "unpaired") == is_labelled]
            for is_labelled in (False, True)
        )
        if alike
    ]
    if len(reports) == 1:
        return reports[0]
    counts: Counter[str] = Counter()
    for report in reports:
        counts.update(report.counts)
    findings = tuple(finding for report in reports for finding in report.findings)
    # Rows of two reports have no common numbers.
    nothing = np.empty(0, dtype=np.int64)
    return DuplicateReport(sum(report.num_rows for report in reports), dict(counts), findings, nothing)


def _dialects(config: BaseConfig, splits: Splits) -> tuple[dict[str, float] | None, tuple[str, ...]]:
    """The shares, and what the user should know of them."""
    if splits.train_source is None:
        return None, ("no dialects are shown of a mixture; examine its parts one by one",)
    try:
        return _dialect_shares(config, *splits.train_source), ()
    except DataError as error:
        # A run that asks for no dialects does not read their column.
        return None, (f"no dialects are shown: {error}",)


def _dialect_shares(config: BaseConfig, source: DataSource, split: str | None) -> dict[str, float] | None:
    """Share of each dialect, by its column or the built-in lexicon; None where no row has a known one."""
    from ds_align.arabic.annotate import Annotator

    records = open_records(source, split)
    annotator = Annotator(config.dialect_column, columns=Columns.from_config(config))
    found = annotator.annotate(records.rows(), records.name).found()
    total = sum(found.values())
    known = total - found.get("unknown", 0)
    return {label: number / total for label, number in found.items() if number} if known else None
