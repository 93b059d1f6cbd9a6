"""The text of a record by which its dialect is told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ds_align.data.contents import RowError
from ds_align.data.ranked import TEXT_KEYS, list_column, read_ranked_list
from ds_align.data.rows import Record
from ds_align.data.schemas import OTHER_PROMPTS, Columns
from ds_align.errors import DataError

_OTHER_FIELDS = ("conversations", "messages", "text")
# Instructions of an operator are often in another language than the talk.
_LEFT_OUT = ("system", "developer", "tool", "observation", "function")


def fields_from_text(text: str | Sequence[str] | None) -> tuple[str, ...] | None:
    """Column names from one text with commas, or from a list of names; None stays None."""
    if text is None:
        return None
    parts = text.split(",") if isinstance(text, str) else text
    return tuple(part.strip() for part in parts)


def record_text(record: Record, fields: Sequence[str] | None, columns: Columns) -> str:
    """The text of the fields, one below the other; of messages what user and assistant say.

    fields: columns that the record must have; None: what is asked and what is to be learnt, by the column
    map. Not the rejected answer, nor those of a ranked list that another one beats: they may be in another
    dialect on purpose. Raises DataError.
    """
    row = record.columns
    if fields is None:
        parts = _default_parts(row, columns)
        if not parts:
            raise DataError(
                f"{record.origin}: no text to tell the dialect from, found the columns {_names(row)}; "
                "name the columns of the text (dialect_text_field, in the library text_field), or give a "
                "dialect column"
            )
    else:
        missing = [name for name in fields if row.get(name) is None]
        if missing:
            raise DataError(
                f"{record.origin}: the text field {missing[0]!r} is missing, found the columns "
                f"{_names(row)}; name columns that every row has"
            )
        parts = [row[name] for name in fields]
    return "\n".join(text for part in parts for text in _texts(part))


def _names(row: Mapping[str, Any]) -> str:
    return ", ".join(map(str, row)) or "none"


def _default_parts(row: Mapping[str, Any], columns: Columns) -> list[Any]:
    names = dict.fromkeys(
        (columns.prompt, *OTHER_PROMPTS, columns.chosen, columns.completion, *_OTHER_FIELDS)
    )
    parts = [row[name] for name in names if row.get(name) is not None]
    column = list_column(row, columns)
    if column is None or row.get(columns.chosen) is not None:
        return parts
    try:
        ranked = read_ranked_list(row, columns)
    except RowError:
        # Without values no answer is the best.
        return [*parts, row[column]]
    best = max(ranked.values)
    answers = zip(ranked.answers, ranked.values, strict=True)
    return parts + [answer for answer, value in answers if value == best]


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        if value.get("role", value.get("from")) in _LEFT_OUT:
            return []
        return [text for key in dict.fromkeys(("value", *TEXT_KEYS)) for text in _texts(value.get(key))]
    if isinstance(value, list | tuple):
        return [text for item in value for text in _texts(item)]
    return []
