"""Records to preferences: the known row forms are recognised, everything else is named and refused.

Forms: pairs, unpaired answers with a label, and ranked lists; each as strings, as message lists (role/content
or ShareGPT's from/value, the prompt given or implicit) or one message object as a completion; pairs and
unpaired answers as token ids, too. Columns that no form asks for are left alone.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal, Protocol

import numpy as np

from ds_align.data.contents import (
    Content,
    RowError,
    as_turns,
    check_answer,
    check_text,
    present,
    read_content,
    read_ids,
    read_label,
    read_number,
    read_system,
    read_tools,
)
from ds_align.data.conversations import split_conversation, with_system
from ds_align.data.ranked import (
    OTHER_LISTS,
    Comparisons,
    PairRules,
    choose_pairs,
    is_at_least,
    list_column,
    read_ranked_list,
)
from ds_align.data.readers import BadRow, Record
from ds_align.errors import DataError

Layout = Literal["pairs", "unpaired"]
RowLayout = Literal["pairs", "unpaired", "ranked"]

SCHEMAS = {
    "pairs": "pairs need {prompt, chosen, rejected} (strings, message lists, or prompt_ids, chosen_ids, "
    "rejected_ids)",
    "unpaired": "unpaired data needs {prompt, completion, label} (strings, message lists, or prompt_ids, "
    "completion_ids, label)",
    "ranked": "ranked lists need {prompt, completions, scores or ranks} (completions: strings, message lists "
    "or objects with the text and its score)",
}
ID_COLUMNS = {
    "pairs": ("prompt_ids", "chosen_ids", "rejected_ids"),
    "unpaired": ("prompt_ids", "completion_ids"),
}
CONVERSATION_COLUMNS = ("conversations", "messages")
KL_COLUMNS = ("kl_completion", "kl_completion_ids")
# Names in public data sets, looked for where a column keeps its usual name and is not there.
OTHER_LABELS = ("kto_tag",)
INSTRUCTION = "instruction"
# What an instruction of the Alpaca form is about stands in a column of its own.
INSTRUCTION_INPUT = "input"
OTHER_PROMPTS = (INSTRUCTION,)
OTHER_CHOSEN_SCORES = ("score_chosen",)
OTHER_REJECTED_SCORES = ("score_rejected",)
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
    dataset_completions_field: str
    dataset_scores_field: str
    dataset_ranks_field: str
    dataset_system_field: str
    dataset_tools_field: str
    dataset_chosen_score_field: str
    dataset_rejected_score_field: str


@dataclass(frozen=True, slots=True)
class Columns:
    """Names that the columns have in this data set."""

    prompt: str = "prompt"
    chosen: str = "chosen"
    rejected: str = "rejected"
    completion: str = "completion"
    label: str = "label"
    completions: str = "completions"
    scores: str = "scores"
    ranks: str = "ranks"
    system: str = "system"
    tools: str = "tools"
    chosen_score: str = "chosen_score"
    rejected_score: str = "rejected_score"

    @classmethod
    def from_config(cls, config: ColumnFields) -> Columns:
        """Take the names from a config's `dataset_*_field` entries."""
        return cls(**{name: getattr(config, f"dataset_{name}_field") for name in cls.__dataclass_fields__})


@dataclass(frozen=True, slots=True)
class Preference:
    """One record in the common form: a prompt, its completions and what is said of them.

    completions: (chosen, rejected), (completion,) with `desirable`, or the answers of a ranked list. All
    contents of a record have one form: strings, message lists or int32 token ids. kl_completion overrides
    KTO's mismatched completion. comparisons: the pairs as (chosen, rejected) numbers of completions, none
    where the record is left out. counted: what was met in this record. form: what it was read as, in words.
    """

    origin: str
    prompt: Content
    completions: tuple[Content, ...]
    desirable: bool | None = None
    kl_completion: Content | None = None
    tools: list[Any] | None = None
    comparisons: Comparisons = ((0, 1),)
    counted: Mapping[str, int] = field(default_factory=dict, compare=False)
    form: str = field(default="", compare=False)

    @property
    def is_left_out(self) -> bool:
        """Whether nothing is trained on this record."""
        return self.desirable is None and not self.comparisons


def recognise_layout(
    rows: Iterable[Record | BadRow], inputs: Layout, columns: Columns, name: str
) -> RowLayout:
    """Whether rows hold pairs, unpaired examples or ranked lists, by the columns that most of them have.

    Raises DataError where a pair method meets unpaired data; the others serve both kinds of method.
    """
    votes = Counter(_vote(row.columns, columns) for row in rows if isinstance(row, Record))
    del votes[None]
    if not votes:
        return inputs
    layout = votes.most_common(1)[0][0]
    if inputs == "pairs" and layout == "unpaired":
        raise DataError(
            f"{name}: the rows are unpaired (a completion with a label), but this method compares two "
            f"answers to one prompt: {SCHEMAS['pairs']}; train with method kto, or give paired data"
        )
    return layout


def _vote(row: Mapping[str, Any], columns: Columns) -> RowLayout | None:
    """What the columns of one row say it is; None where they say nothing."""
    has_list = list_column(row, columns) is not None
    # Who names the column of the lists means them, whatever else the rows hold.
    if has_list and columns.completions not in ("completions", *OTHER_LISTS):
        return "ranked"
    if any(key in row for key in (columns.chosen, columns.rejected, "chosen_ids", "rejected_ids")):
        return "pairs"
    if columns.completion in row or "completion_ids" in row:
        return "unpaired"
    if has_list:
        return "ranked"
    if present(row, columns.label, "label", OTHER_LABELS) in row:
        return "unpaired"
    # A list of answers under a name that is not known: the error can tell which column is missing.
    return "ranked" if isinstance(row.get(columns.scores, row.get(columns.ranks)), list) else None


def parse_row(
    record: Record, layout: RowLayout, columns: Columns, rules: PairRules | None = None
) -> Preference | BadRow:
    """One record as a Preference, or a BadRow that names the column, what was found and what was expected."""
    try:
        return _parse(record, layout, columns, rules or PairRules())
    except RowError as error:
        return BadRow(record.origin, str(error), SCHEMAS[layout])


def count_text_hazards(preference: Preference, counts: Counter[str], eos: str | None = None) -> None:
    """Count a row that holds bidirectional controls, NUL characters or, before its end, the text of the EOS.

    Such text is kept as it is.
    """
    texts = list(texts_of(preference))
    if eos:
        counts["rows_with_eos_inside"] += any(
            eos in text and eos in text.rstrip().removesuffix(eos) for text in texts
        )
    counts["rows_with_bidi_controls"] += any(not t.isascii() and _BIDI_CONTROLS.search(t) for t in texts)
    counts["rows_with_nul"] += any("\0" in text for text in texts)


def texts_of(preference: Preference) -> Iterator[str]:
    """Prompt, completions and KTO's y' as strings, a message at a time; token ids have none."""
    for content in (preference.prompt, *preference.completions, preference.kl_completion):
        if isinstance(content, str):
            yield content
        elif isinstance(content, list):
            yield from (message["content"] for message in content if message["content"])


@dataclass(slots=True)
class _Reading:
    """What a row was found to hold; places name the completions in messages."""

    kind: str
    completions: list[Content]
    places: list[str]
    used: list[str]
    desirable: bool | None = None
    comparisons: Comparisons = ((0, 1),)
    counted: dict[str, int] = field(default_factory=dict)
    prompt_column: str = "prompt"


def _parse(record: Record, layout: RowLayout, columns: Columns, rules: PairRules) -> Preference:
    row = record.columns
    reading = _read_ranked(row, columns, rules) if layout == "ranked" else _read_answers(row, layout, columns)
    if layout == "pairs":
        _judge_scores(reading, row, columns, rules)
    kl_column = KL_COLUMNS[0]
    if isinstance(reading.completions[0], np.ndarray):
        kl_column = KL_COLUMNS[1]
        prompt, tools = read_ids(row, ID_COLUMNS[layout][0]), None
        kl = read_ids(row, kl_column) if row.get(kl_column) is not None else None
        reading.used.insert(0, ID_COLUMNS[layout][0])
        reading.counted["rows_of_token_ids"] = 1
    else:
        kl = read_content(row, kl_column) if row.get(kl_column) is not None else None
        prompt, kl, tools = _read_prompt(row, reading, kl, columns)
    if kl is not None:
        reading.used.append(kl_column)
    preference = Preference(
        record.origin,
        prompt,
        tuple(reading.completions),
        reading.desirable,
        kl,
        tools,
        reading.comparisons,
        reading.counted,
        _form(reading.kind, tuple(reading.used)),
    )
    if not isinstance(prompt, np.ndarray):
        for place, content in zip(reading.places, reading.completions, strict=True):
            check_answer(content, place)
        if kl is not None:
            check_answer(kl, kl_column)
        for text in texts_of(preference):
            check_text(text)
    return preference


@lru_cache
def _form(kind: str, used: tuple[str, ...]) -> str:
    return f"{kind} ({', '.join(dict.fromkeys(used))})"


def _read_answers(row: Mapping[str, Any], layout: Layout, columns: Columns) -> _Reading:
    """The completions of a pair or of an unpaired row, as ids where they are given as ids."""
    answers = [columns.chosen, columns.rejected] if layout == "pairs" else [columns.completion]
    kind = "pairs" if layout == "pairs" else "labelled answers"
    label = present(row, columns.label, "label", OTHER_LABELS)
    desirable = read_label(row, label) if layout == "unpaired" else None
    more = [] if desirable is None else [label]
    has_ids = [row.get(column) is not None for column in ID_COLUMNS[layout]]
    has_text = any(row.get(column) is not None for column in answers)
    if all(has_ids) or (any(has_ids) and not has_text):
        names = list(ID_COLUMNS[layout][1:])
        kind = f"{kind} of token ids" if layout == "pairs" else "labelled token ids"
        return _Reading(kind, [read_ids(row, name) for name in names], names, [*names, *more], desirable)
    if layout == "unpaired" and columns.completion not in row and columns.prompt not in row:
        # With a label alone, `messages` is a conversation that ends with its completion.
        answers = [next((name for name in CONVERSATION_COLUMNS if name in row), columns.completion)]
    contents = [read_content(row, name) for name in answers]
    return _Reading(kind, contents, answers, [*answers, *more], desirable, prompt_column=columns.prompt)


def _read_ranked(row: Mapping[str, Any], columns: Columns, rules: PairRules) -> _Reading:
    """The answers of a ranked list and the pairs that are made of them."""
    ranked = read_ranked_list(row, columns)
    prompt_column = present(row, columns.prompt, "prompt", OTHER_PROMPTS)
    comparisons, left_out = choose_pairs(ranked, row.get(prompt_column), rules)
    if ranked.num_unusable:
        left_out["ranked_unusable_answers"] = ranked.num_unusable
    return _Reading(
        "ranked lists",
        ranked.answers,
        list(ranked.places),
        list(ranked.columns),
        comparisons=comparisons,
        counted=dict(left_out),
        prompt_column=prompt_column,
    )


def _judge_scores(reading: _Reading, row: Mapping[str, Any], columns: Columns, rules: PairRules) -> None:
    """Leaves a pair out whose scores are nearer than min_score_margin; counts what else it says of itself."""
    names = (
        present(row, columns.chosen_score, "chosen_score", OTHER_CHOSEN_SCORES),
        present(row, columns.rejected_score, "rejected_score", OTHER_REJECTED_SCORES),
    )
    if row.get(columns.completion) is not None and row.get(columns.label) is not None:
        reading.counted["pairs_with_unused_label"] = 1
    if rules.min_score_margin is None:
        scores = [row.get(name) for name in names]
        if all(type(score) in (int, float) for score in scores) and scores[0] < scores[1]:
            reading.counted["pairs_scored_the_other_way"] = 1
        return
    missing = [name for name in names if name not in row]
    if missing:
        raise RowError(
            f"min_score_margin={rules.min_score_margin:g} needs the columns {names[0]!r} and {names[1]!r}, "
            f"found {', '.join(map(str, row))}; leave min_score_margin out, or name them with "
            "dataset_chosen_score_field and dataset_rejected_score_field"
        )
    chosen, rejected = (read_number(row, name) for name in names)
    reading.used += names
    if not is_at_least(chosen - rejected, rules.min_score_margin):
        reading.comparisons = ()
        reading.counted["dropped_low_margin"] = 1


def _read_prompt(
    row: Mapping[str, Any], reading: _Reading, kl: Content | None, columns: Columns
) -> tuple[Content, Content | None, list[Any] | None]:
    """(prompt, y', tools); what the completions repeat of the prompt is taken off them."""
    prompt = _prompt(row, reading)
    extra = [name for name in (columns.system, columns.tools) if row.get(name) not in (None, "", [])]
    if reading.prompt_column == INSTRUCTION and row.get(INSTRUCTION_INPUT) not in (None, ""):
        reading.counted["instructions_with_unused_input"] = 1
    if all(isinstance(part, str) for part in (prompt, *reading.completions)):
        if isinstance(kl, list):
            raise RowError("column 'kl_completion' holds messages, the other columns strings; give one form")
        if extra:
            reading.counted["strings_with_system_or_tools"] = 1
        return prompt, kl, None
    reading.kind = f"{reading.kind} as messages"
    reading.counted["rows_as_messages"] = 1
    reading.used += extra
    turns = [as_turns(part, "assistant") for part in reading.completions]
    prompt, reading.completions = split_conversation(prompt, turns)
    prompt = with_system(prompt, read_system(row, columns.system), columns.system)
    tools = read_tools(row, columns.tools)
    return prompt, None if kl is None else as_turns(kl, "assistant"), tools


def _prompt(row: Mapping[str, Any], reading: _Reading) -> Content | None:
    """The prompt column, or ShareGPT's conversations; None where the completions carry the prompt."""
    column = reading.prompt_column
    carried = all(isinstance(part, list) and len(part) > 1 for part in reading.completions)
    if column not in row and carried:
        return None
    if column not in row:
        column = next((name for name in CONVERSATION_COLUMNS if name in row), column)
    reading.used.insert(0, column)
    return read_content(row, column)
