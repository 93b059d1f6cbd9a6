"""Records to preferences: the known row forms are recognised, everything else is named and refused.

Forms: strings, message lists (role/content or ShareGPT's from/value, the prompt given or implicit), one
message object as a completion, and token ids. Columns that no form asks for are left alone.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal, Protocol

import numpy as np

from ds_align.data.readers import BadRow, Record
from ds_align.errors import DataError

Layout = Literal["pairs", "unpaired"]
Message = dict[str, Any]
Content = str | list[Message] | np.ndarray

SCHEMAS = {
    "pairs": "pairs need {prompt, chosen, rejected} (strings, message lists, or prompt_ids, chosen_ids, "
    "rejected_ids)",
    "unpaired": "unpaired data needs {prompt, completion, label} (strings, message lists, or prompt_ids, "
    "completion_ids, label)",
}
ID_COLUMNS = {
    "pairs": ("prompt_ids", "chosen_ids", "rejected_ids"),
    "unpaired": ("prompt_ids", "completion_ids"),
}
CONVERSATION_COLUMNS = ("conversations", "messages")
KL_COLUMNS = ("kl_completion", "kl_completion_ids")
ROLES = {
    "human": "user",
    "gpt": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function": "tool",
    **{role: role for role in ("system", "developer", "user", "assistant", "tool")},
}
# Embeddings, overrides and isolates reorder what a reader sees; the marks U+200E, U+200F and U+061C are
# ordinary in Arabic text and are not counted.
_BIDI_CONTROLS = re.compile("[\u202a-\u202e\u2066-\u2069]")


class ColumnFields(Protocol):
    """The column map of a config: which column holds what."""

    dataset_prompt_field: str
    dataset_chosen_field: str
    dataset_rejected_field: str
    dataset_completion_field: str
    dataset_label_field: str


@dataclass(frozen=True, slots=True)
class Columns:
    """Names that the columns have in this data set."""

    prompt: str = "prompt"
    chosen: str = "chosen"
    rejected: str = "rejected"
    completion: str = "completion"
    label: str = "label"

    @classmethod
    def from_config(cls, config: ColumnFields) -> Columns:
        """Take the names from a config's `dataset_*_field` entries."""
        return cls(
            prompt=config.dataset_prompt_field,
            chosen=config.dataset_chosen_field,
            rejected=config.dataset_rejected_field,
            completion=config.dataset_completion_field,
            label=config.dataset_label_field,
        )


@dataclass(frozen=True, slots=True)
class Preference:
    """One record in the common form: a prompt, its completions and, for unpaired data, the label.

    completions: (chosen, rejected) or (completion,). All contents of a record have one form: strings, message
    lists or int32 token ids. kl_completion overrides KTO's mismatched completion.
    """

    origin: str
    prompt: Content
    completions: tuple[Content, ...]
    desirable: bool | None = None
    kl_completion: Content | None = None
    tools: list[Any] | None = None


class _RowError(ValueError):
    """Why one row cannot be used; becomes a BadRow with the row's origin."""


def recognise_layout(rows: Iterable[Record | BadRow], inputs: Layout, columns: Columns, name: str) -> Layout:
    """Whether rows hold pairs or unpaired examples, by the columns that most of them have.

    Raises DataError where a pair method meets unpaired data; pairs serve both kinds of method.
    """
    votes: Counter[Layout] = Counter()
    for row in rows:
        if not isinstance(row, Record):
            continue
        if any(
            key in row.columns for key in (columns.chosen, columns.rejected, "chosen_ids", "rejected_ids")
        ):
            votes["pairs"] += 1
        elif any(key in row.columns for key in (columns.completion, columns.label, "completion_ids")):
            votes["unpaired"] += 1
    if not votes:
        return inputs
    layout = votes.most_common(1)[0][0]
    if inputs == "pairs" and layout == "unpaired":
        raise DataError(
            f"{name}: the rows are unpaired (a completion with a label), but this method compares two "
            f"answers to one prompt: {SCHEMAS['pairs']}; train with method kto, or give paired data"
        )
    return layout


def parse_row(record: Record, layout: Layout, columns: Columns) -> Preference | BadRow:
    """One record as a Preference, or a BadRow that names the column, what was found and what was expected."""
    try:
        return _parse(record, layout, columns)
    except _RowError as error:
        return BadRow(record.origin, f"{error}; {SCHEMAS[layout]}")


def count_text_hazards(preference: Preference, counts: Counter[str]) -> None:
    """Count a row that holds bidirectional controls or NUL characters; such text is kept as it is."""
    texts = list(_texts(preference))
    counts["rows_with_bidi_controls"] += any(not t.isascii() and _BIDI_CONTROLS.search(t) for t in texts)
    counts["rows_with_nul"] += any("\0" in text for text in texts)


def _texts(preference: Preference) -> Iterable[str]:
    for content in (preference.prompt, *preference.completions, preference.kl_completion):
        if isinstance(content, str):
            yield content
        elif isinstance(content, list):
            yield from (message["content"] for message in content if message["content"])


def _parse(record: Record, layout: Layout, columns: Columns) -> Preference:
    row = record.columns
    answers = (columns.chosen, columns.rejected) if layout == "pairs" else (columns.completion,)
    id_columns = ID_COLUMNS[layout]
    has_ids = [row.get(column) is not None for column in id_columns]
    has_text = any(row.get(column) is not None for column in answers)
    desirable = _label(row, columns.label) if layout == "unpaired" else None
    if all(has_ids) or (any(has_ids) and not has_text):
        prompt, *completions = (_ids(row, column) for column in id_columns)
        kl = _ids(row, KL_COLUMNS[1]) if row.get(KL_COLUMNS[1]) is not None else None
        return Preference(record.origin, prompt, tuple(completions), desirable, kl)
    kl_text = _content(row, KL_COLUMNS[0]) if row.get(KL_COLUMNS[0]) is not None else None
    completions = [_content(row, column) for column in _present_answers(row, answers, columns)]
    prompt = _prompt(row, columns.prompt, completions)
    if all(isinstance(part, str) for part in (prompt, *completions)):
        if isinstance(kl_text, list):
            raise _RowError("column 'kl_completion' holds messages, the other columns strings; give one form")
        preference = Preference(record.origin, prompt, tuple(completions), desirable, kl_text)
    else:
        turns = [_turns(part, "assistant") for part in completions]
        prompt, turns = _conversation(prompt, turns)
        kl_turns = None if kl_text is None else _turns(kl_text, "assistant")
        preference = Preference(record.origin, prompt, tuple(turns), desirable, kl_turns, _tools(row))
    _check_texts(preference, (*answers, KL_COLUMNS[0]))
    return preference


def _present_answers(row: Mapping[str, Any], answers: Sequence[str], columns: Columns) -> list[str]:
    """The answer columns; with a label alone, `messages` is a conversation that ends with its completion."""
    if answers == (columns.completion,) and columns.completion not in row and columns.prompt not in row:
        return [next((name for name in CONVERSATION_COLUMNS if name in row), columns.completion)]
    return list(answers)


def _require(row: Mapping[str, Any], column: str, expected: str) -> Any:
    if column not in row:
        near = get_close_matches(column, list(row), n=1, cutoff=0.5)
        hint = (
            f", the nearest is {near[0]!r}: rename it or set the column map (dataset_*_field)" if near else ""
        )
        raise _RowError(
            f"column {column!r} is missing, found {', '.join(map(str, row)) or 'no column'}{hint}"
        )
    if row[column] is None:
        raise _RowError(f"column {column!r} is null, expected {expected}")
    return row[column]


def _content(row: Mapping[str, Any], column: str) -> Content:
    """A string, or a message list with the roles of chat templates."""
    expected = "a string or a list of messages"
    value = _require(row, column, expected)
    if isinstance(value, str):
        return value
    messages = [value] if isinstance(value, Mapping) else value
    if not isinstance(messages, list | tuple):
        raise _RowError(f"column {column!r} holds {type(value).__name__}, expected {expected}")
    if not messages:
        raise _RowError(f"column {column!r} is an empty list, expected {expected}")
    return [_message(message, column) for message in messages]


def _message(value: Any, column: str) -> Message:
    if not isinstance(value, Mapping):
        raise _RowError(
            f"column {column!r} holds a list of {type(value).__name__}, expected messages with role and "
            "content"
        )
    role_key, text_key = ("from", "value") if "from" in value and "role" not in value else ("role", "content")
    role, text = value.get(role_key), value.get(text_key)
    if not isinstance(role, str) or role not in ROLES:
        known = ", ".join(ROLES)
        raise _RowError(f"column {column!r} has a message with {role_key} {role!r}, expected one of {known}")
    if not isinstance(text, str) and not (text is None and value.get("tool_calls")):
        found = type(text).__name__
        raise _RowError(f"column {column!r} has a message whose {text_key} is {found}, expected a string")
    # datasets fills the keys that other messages have with None; a template would print them.
    extra = {key: item for key, item in value.items() if item is not None and key not in (role_key, text_key)}
    return {**extra, "role": ROLES[role], "content": text}


def _prompt(row: Mapping[str, Any], column: str, completions: list[Content]) -> Content | None:
    """The prompt column, or ShareGPT's conversations; None where the completions carry the prompt."""
    if column in row:
        return _content(row, column)
    carried = all(isinstance(part, list) and len(part) > 1 for part in completions)
    if carried:
        return None
    conversation = next((name for name in CONVERSATION_COLUMNS if name in row), column)
    return _content(row, conversation)


def _turns(content: Content, role: str) -> list[Message]:
    return [{"role": role, "content": content}] if isinstance(content, str) else list(content)


def _conversation(
    prompt: Content | None, completions: list[list[Message]]
) -> tuple[list[Message], list[list[Message]]]:
    """Part a conversation into its prompt and what each completion adds.

    A completion may repeat the prompt; without a prompt column the prompt is the common beginning of chosen
    and rejected, or everything before the last message of a single completion.
    """
    repeats = all(turns[0]["role"] not in ("assistant", "tool") for turns in completions)
    if prompt is None or (isinstance(prompt, str) and repeats):
        num_prompt = _num_common_turns(completions)
        beginning = completions[0][:num_prompt]
        if prompt is not None and not any(turn["content"] == prompt for turn in beginning):
            raise _RowError(
                "the conversations do not begin with the text of the prompt column; drop the column or "
                "mend it"
            )
    else:
        beginning = _turns(prompt, "user")
        if all(turns[: len(beginning)] == beginning for turns in completions):
            num_prompt = len(beginning)
        else:
            num_prompt = 0
    answers = [turns[num_prompt:] for turns in completions]
    if not beginning:
        raise _RowError("the conversations have no common beginning to serve as the prompt")
    if beginning[-1]["role"] == "assistant":
        raise _RowError(
            "the prompt ends with an assistant message, expected a user, system or tool message last"
        )
    for turns in answers:
        roles = [turn["role"] for turn in turns]
        if not roles or roles[-1] != "assistant" or not {"assistant", "tool"}.issuperset(roles):
            raise _RowError(
                f"a completion has the roles {roles}, expected assistant messages after a shared prompt"
            )
    return list(beginning), answers


def _num_common_turns(completions: list[list[Message]]) -> int:
    """Leading messages that all completions share, always leaving the last message of each."""
    limit = min(map(len, completions)) - 1
    first = completions[0]
    shared = (all(turns[index] == first[index] for turns in completions) for index in range(limit))
    return next((index for index, same in enumerate(shared) if not same), limit)


def _label(row: Mapping[str, Any], column: str) -> bool:
    value = _require(row, column, "true or false")
    if not isinstance(value, bool | np.bool_) and not (isinstance(value, int) and value in (0, 1)):
        raise _RowError(f"column {column!r} holds {value!r}, expected true or false (or 1 or 0)")
    return bool(value)


def _ids(row: Mapping[str, Any], column: str) -> np.ndarray:
    value = _require(row, column, "a list of token ids")
    try:
        ids = np.asarray(value if isinstance(value, list | tuple | np.ndarray) else None)
    except ValueError as error:
        raise _RowError(
            f"column {column!r} is nested unevenly, expected a flat list of integer token ids"
        ) from error
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise _RowError(
            f"column {column!r} holds {type(value).__name__}, expected a flat list of integer token ids"
        )
    if ids.size == 0:
        raise _RowError(f"column {column!r} is empty, expected at least one token id")
    if ids.min() < 0 or ids.max() > np.iinfo(np.int32).max:
        raise _RowError(
            f"column {column!r} holds ids from {ids.min()} to {ids.max()}, expected 0 or more, below 2^31"
        )
    return ids.astype(np.int32)


def _tools(row: Mapping[str, Any]) -> list[Any] | None:
    value = row.get("tools")
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except ValueError as error:
            raise _RowError(
                f"column 'tools' is not JSON ({error}), expected a list of tool descriptions"
            ) from error
    if value is not None and value != "" and not isinstance(value, list):
        raise _RowError(f"column 'tools' holds {type(value).__name__}, expected a list of tool descriptions")
    return value or None


def _check_texts(preference: Preference, columns: Sequence[str]) -> None:
    answers = (
        *preference.completions,
        *([] if preference.kl_completion is None else [preference.kl_completion]),
    )
    for column, content in zip((*columns[: len(preference.completions)], columns[-1]), answers, strict=False):
        last = content[-1] if isinstance(content, list) else {"content": content}
        if not (last["content"] or "").strip() and not last.get("tool_calls"):
            raise _RowError(
                f"column {column!r} is empty or white space, expected an answer with at least one character"
            )
    for text in _texts(preference):
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            found = f"\\u{ord(text[error.start]):04x} at character {error.start}"
            raise _RowError(
                f"the text holds a lone surrogate ({found}), which no UTF-8 text has; mend it"
            ) from error
