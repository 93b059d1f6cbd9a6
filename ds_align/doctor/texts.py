"""The rows as texts, read once more: mojibake, near duplicates, prompts that are nearly the same."""

from __future__ import annotations

import re
from itertools import islice
from typing import TYPE_CHECKING

from ds_align.config import METHODS, BaseConfig
from ds_align.data.deduplicate import ParsedRecords
from ds_align.data.ranked import PairRules
from ds_align.data.readers import CHUNK_ROWS, open_records
from ds_align.data.schemas import Columns, recognise_layout, texts_of
from ds_align.doctor.facts import TextFacts
from ds_align.errors import DataError

if TYPE_CHECKING:
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


def _preferences(config: BaseConfig, source: DataSource, split: str | None) -> ParsedRecords:
    """The rows of a source that can be used."""
    records, columns = open_records(source, split), Columns.from_config(config)
    first, inputs = islice(records.rows(), CHUNK_ROWS), METHODS[config.method].inputs
    layout = recognise_layout(first, inputs, columns, records.name)
    return ParsedRecords(records, layout, columns, PairRules.from_config(config))


def read_texts(config: BaseConfig, splits: Splits) -> TextFacts:
    """What the checks need of all texts, which are read several times. Raises what reading raises."""
    from ds_align.data.duplicates import prompt_overlap, scan_duplicates

    if splits.train_source is None:
        return TextFacts(0, remarks=("the texts of a mixture were not read; examine its parts one by one",))
    train, evaluation = splits.train_source, splits.eval_source
    rows = _preferences(config, *train)
    num_rows, num_garbled = 0, 0
    garbled: list[str] = []
    num_arabic = 0
    for preference in rows:
        num_rows += 1
        if any(is_garbled(text) for text in texts_of(preference)):
            num_garbled += 1
            garbled += [preference.origin] if len(garbled) < _SHOWN else []
        num_arabic += any(not text.isascii() and _ARABIC.search(text) for text in texts_of(preference))
    overlap = None
    if evaluation is not None:
        overlap = prompt_overlap(rows, _preferences(config, *evaluation))
    dialects, remarks = None, ()
    if num_arabic > ARABIC_SHARE * num_rows:
        try:
            dialects = _dialect_shares(config, *train)
        except DataError as error:
            # A run that asks for no dialects does not read their column.
            remarks = (f"no dialects are shown: {error}",)
    return TextFacts(
        num_rows,
        num_garbled,
        tuple(garbled),
        duplicates=scan_duplicates(rows),
        overlap=overlap,
        dialects=dialects,
        remarks=remarks,
    )


def _dialect_shares(config: BaseConfig, source: DataSource, split: str | None) -> dict[str, float] | None:
    """Share of each dialect, by its column or the built-in lexicon; None where no row has a known one."""
    from ds_align.arabic.annotate import Annotator

    records = open_records(source, split)
    annotator = Annotator(config.dialect_column, columns=Columns.from_config(config))
    found = annotator.annotate(records.rows(), records.name).found()
    total = sum(found.values())
    known = total - found.get("unknown", 0)
    return {label: number / total for label, number in found.items() if number} if known else None
