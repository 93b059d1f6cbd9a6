"""The text of a record by which its dialect is told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ds_align.data.rows import Record
from ds_align.errors import DataError

# What is asked and what is to be learnt. Not the rejected answer: it may be in another dialect on purpose.
DEFAULT_FIELDS = ("prompt", "chosen", "completion", "conversations", "messages", "text")
# Instructions of an operator are often in another language than the talk.
_LEFT_OUT = ("system", "developer", "tool", "observation", "function")


def fields_from_text(text: str | Sequence[str] | None) -> tuple[str, ...] | None:
    """Column names from one text with commas, or from a list of names; None stays None."""
    if text is None:
        return None
    parts = text.split(",") if isinstance(text, str) else text
    return tuple(part.strip() for part in parts)


def record_text(record: Record, fields: Sequence[str] | None, default: Sequence[str]) -> str:
    """The text of the fields, one below the other; of messages what user and assistant say.

    fields: columns that the record must have; None: those of `default` that it has. Raises DataError.
    """
    columns = record.columns
    if fields is None:
        present = [name for name in default if columns.get(name) is not None]
        if not present:
            raise DataError(
                f"{record.origin}: no text to tell the dialect from, found the columns "
                f"{', '.join(map(str, columns)) or 'none'}; expected one of {', '.join(default)}; name the "
                "columns of the text, or give a dialect column"
            )
    else:
        present = list(fields)
        missing = [name for name in present if columns.get(name) is None]
        if missing:
            raise DataError(
                f"{record.origin}: the text field {missing[0]!r} is missing, found the columns "
                f"{', '.join(map(str, columns)) or 'none'}; name columns that every row has"
            )
    return "\n".join(part for name in present for part in _texts(columns[name]))


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        if value.get("role", value.get("from")) in _LEFT_OUT:
            return []
        return [text for key in ("content", "value", "text") for text in _texts(value.get(key))]
    if isinstance(value, list | tuple):
        return [text for item in value for text in _texts(item)]
    return []
