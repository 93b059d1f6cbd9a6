"""What a column of a row may hold: text, messages, token ids, labels and scores, read strictly.

Whatever is not one of these is a RowError that names the column, what was found and what was expected.
"""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import numpy as np

Message = dict[str, Any]
Content = str | list[Message] | np.ndarray

ROLES = {
    "human": "user",
    "gpt": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function": "tool",
    **{role: role for role in ("system", "developer", "user", "assistant", "tool")},
}


class RowError(ValueError):
    """Why one row cannot be used; becomes a BadRow with the row's origin."""


def require(row: Mapping[str, Any], column: str, expected: str) -> Any:
    """The value of a column that must be there."""
    if column not in row:
        found = ", ".join(map(str, row)) or "no column"
        raise RowError(f"column {column!r} is missing, found {found}{_remedy(row, column)}")
    if row[column] is None:
        raise RowError(f"column {column!r} is null, expected {expected}")
    return row[column]


def _remedy(row: Mapping[str, Any], column: str) -> str:
    """What may be meant by a column that is missing."""
    names = [str(name) for name in row]
    if any(len(name.split()) > MAX_WORDS_OF_A_NAME for name in names):
        return "; does the first row of the file name the columns?"
    if len(names) == 1 and any(sign in names[0] for sign in ",;|\t"):
        return (
            "; the first row was read as one column: quote each cell by itself, and mend or drop a sep= line"
        )
    if column == "prompt":
        other = next((name for name in _LIKE_PROMPTS if name in row), None)
        if other is not None:
            return f"; if {other!r} holds the prompts, set dataset_prompt_field={other}"
        if any(isinstance(row.get(name), str) and _DIALOGUE.match(row[name]) for name in _WHOLE_DIALOGUES):
            return "; the prompt stands inside of the answers: write the turns as messages (role, content)"
    near = get_close_matches(column, names, n=1, cutoff=0.5)
    return f"; the nearest is {near[0]!r}: rename it or set the column map (dataset_*_field)" if near else ""


# What published preference sets call the prompt.
_LIKE_PROMPTS = ("instruction", "question", "query", "input")
# A dialogue in one string, as published with "Human:" and "Assistant:".
_WHOLE_DIALOGUES = ("chosen", "completion")
_DIALOGUE = re.compile(r"\s*(human|user)\s*:", re.IGNORECASE)
# What is longer is a text, and no name of a column.
MAX_WORDS_OF_A_NAME = 3


def present(row: Mapping[str, Any], column: str, usual: str, others: Sequence[str]) -> str:
    """`column`; where it still has its usual name and is not there, the first of the other names that is."""
    if column in row or column != usual:
        return column
    return next((name for name in others if name in row), column)


def read_content(row: Mapping[str, Any], column: str) -> str | list[Message]:
    """A string, or a message list with the roles of chat templates."""
    return as_content(require(row, column, _CONTENT), column)


_CONTENT = "a string or a list of messages"


def as_content(value: Any, column: str) -> str | list[Message]:
    """A string as it is, one message or a list of them as a list; `column` is what errors name."""
    if isinstance(value, str):
        return value
    messages = [value] if isinstance(value, Mapping) else value
    if not isinstance(messages, list | tuple):
        raise RowError(f"column {column!r} holds {type(value).__name__}, expected {_CONTENT}")
    if not messages:
        raise RowError(f"column {column!r} is an empty list, expected {_CONTENT}")
    return [_message(message, column) for message in messages]


def _message(value: Any, column: str) -> Message:
    if not isinstance(value, Mapping):
        raise RowError(
            f"column {column!r} holds a list of {type(value).__name__}, expected messages with role and "
            "content"
        )
    role_key, text_key = ("from", "value") if "from" in value and "role" not in value else ("role", "content")
    role, text = value.get(role_key), value.get(text_key)
    if not isinstance(role, str) or role not in ROLES:
        known = ", ".join(ROLES)
        raise RowError(f"column {column!r} has a message with {role_key} {role!r}, expected one of {known}")
    if not isinstance(text, str) and not (text is None and value.get("tool_calls")):
        found = type(text).__name__
        raise RowError(f"column {column!r} has a message whose {text_key} is {found}, expected a string")
    # datasets fills the keys that other messages have with None; a template would print them.
    extra = {key: item for key, item in value.items() if item is not None and key not in (role_key, text_key)}
    return {**extra, "role": ROLES[role], "content": text}


def as_turns(content: str | list[Message], role: str) -> list[Message]:
    """A content as messages: a string is one of this role."""
    return [{"role": role, "content": content}] if isinstance(content, str) else list(content)


LABEL_TEXTS = {"true": True, "false": False, "1": True, "0": False}


def read_label(row: Mapping[str, Any], column: str) -> bool:
    """True or false, also as 1 or 0, and as the text of these."""
    value = require(row, column, "true or false")
    if isinstance(value, str):
        value = LABEL_TEXTS.get(value.strip().lower(), value)
    if not isinstance(value, bool | np.bool_) and not (isinstance(value, int) and value in (0, 1)):
        raise RowError(f"column {column!r} holds {value!r}, expected true or false (or 1 or 0)")
    return bool(value)


_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE | re.ASCII)


def read_number(row: Mapping[str, Any], column: str) -> float:
    """A finite number."""
    return as_number(require(row, column, "a number"), column)


def as_number(value: Any, column: str) -> float:
    """The value, or what its text says ("7.5"), as a finite float; `column` is what errors name."""
    is_number = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    is_number = is_number or (isinstance(value, str) and _NUMBER.fullmatch(value.strip()) is not None)
    try:
        number = float(value) if is_number else math.nan
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise RowError(f"column {column!r} holds {reprlib.repr(value)}, expected a finite number")
    return number


def read_ids(row: Mapping[str, Any], column: str) -> np.ndarray:
    """Token ids, int32 [num_tokens], at least one."""
    value = require(row, column, "a list of token ids")
    try:
        ids = np.asarray(value if isinstance(value, list | tuple | np.ndarray) else None)
    except ValueError as error:
        raise RowError(
            f"column {column!r} is nested unevenly, expected a flat list of integer token ids"
        ) from error
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise RowError(
            f"column {column!r} holds {type(value).__name__}, expected a flat list of integer token ids"
        )
    if ids.size == 0:
        raise RowError(f"column {column!r} is empty, expected at least one token id")
    if ids.min() < 0 or ids.max() > np.iinfo(np.int32).max:
        raise RowError(
            f"column {column!r} holds ids from {ids.min()} to {ids.max()}, expected 0 or more, below 2^31"
        )
    return ids.astype(np.int32)


def read_system(row: Mapping[str, Any], column: str) -> str | None:
    """The system prompt of a row's own column; None where it says nothing."""
    value = row.get(column)
    if value is not None and not isinstance(value, str):
        raise RowError(
            f"column {column!r} holds {type(value).__name__}, expected the text of a system message; if it "
            "is something else, set dataset_system_field to another name"
        )
    return value if value and value.strip() else None


def read_tools(row: Mapping[str, Any], column: str) -> list[Any] | None:
    """Descriptions of tools, as a list or as JSON text; None where there are none."""
    value = row.get(column)
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except ValueError as error:
            raise RowError(
                f"column {column!r} is not JSON ({error}), expected a list of tool descriptions"
            ) from error
    if isinstance(value, str) and not value.strip():
        value = None
    if value is not None and not isinstance(value, list):
        raise RowError(
            f"column {column!r} holds {type(value).__name__}, expected a list of tool descriptions"
        )
    for tool in value or ():
        if not isinstance(tool, Mapping):
            raise RowError(
                f"column {column!r} is a list with {type(tool).__name__}, expected descriptions of tools as "
                "JSON objects"
            )
    return value or None


def check_answer(content: str | list[Message], column: str) -> None:
    """Raises RowError where an answer says nothing."""
    last = content[-1] if isinstance(content, list) else {"content": content}
    if not (last["content"] or "").strip() and not last.get("tool_calls"):
        raise RowError(
            f"column {column!r} is empty or white space, expected an answer with at least one character"
        )


def check_text(text: str) -> None:
    """Raises RowError for text that no UTF-8 file can hold."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        found = f"\\u{ord(text[error.start]):04x} at character {error.start}"
        raise RowError(
            f"the text holds a lone surrogate ({found}), which no UTF-8 text has; mend it"
        ) from error
