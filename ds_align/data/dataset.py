"""A whole preference data set as flat token arrays, and the way there from a source.

A million preferences are three arrays here, not a million objects; rows are built as views when asked for.
Equal prompts are stored once.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import islice
from typing import TYPE_CHECKING, Literal, Protocol, overload

import numpy as np

from ds_align.batch import Pair, Unpaired
from ds_align.data.readers import BadRow, Record, RecordSet, open_records
from ds_align.data.schemas import (
    ColumnFields,
    Columns,
    Layout,
    Preference,
    count_text_hazards,
    parse_row,
    recognise_layout,
)
from ds_align.data.tables import GrowingTable, TokenTable, as_int64, mismatched_rows
from ds_align.data.tokenize import EncodedPreference, PreferenceTokenizer, needs_tokenizer, take_token_ids
from ds_align.data.truncate import LengthFields, Limits, cut_completion, cut_prompt
from ds_align.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ds_align.data.readers import Source

_CHUNK_ROWS = 1024
_SHOWN_BAD_ROWS = 5


class DataFields(ColumnFields, LengthFields, Protocol):
    """What this room reads from a config."""

    on_bad_rows: Literal["error", "skip"]
    max_bad_fraction: float
    chat_template: str | None


class PreferenceDataset(Sequence):
    """Tokenized preferences in file order: Pair rows (inputs "pairs") or Unpaired rows (inputs "unpaired").

    counts: rows_read, rows, and every cut, drop and oddity that was met. notes: sentences for the user about
    what was decided for him. The arrays that the planner uses:
    prompt_lengths int64 [n]; completion_lengths int64 [n, 2] (chosen, rejected) or [n, 1]; kl_lengths int64
    [n] (0 where a row has no y'); prompt_keys int64 [n], equal exactly where the (cut) prompts are equal, in
    order of first appearance, from 0.
    """

    def __init__(
        self,
        name: str,
        inputs: Layout,
        tables: _Tables,
        *,
        counts: dict[str, int],
        notes: tuple[str, ...] = (),
        rows: np.ndarray | None = None,
    ) -> None:
        self._rows = np.arange(len(tables.prompt_index)) if rows is None else rows
        self.name = name
        self.inputs = inputs
        self.counts = counts
        self.notes = notes
        self._tables = tables
        self.prompt_keys = tables.prompt_index[self._rows]
        self.prompt_lengths = tables.prompts.lengths[self.prompt_keys]
        num_completions = 2 if inputs == "pairs" else 1
        lengths = tables.completions.lengths
        stored = num_completions * len(tables.prompt_index)
        self.completion_lengths = lengths[:stored].reshape(-1, num_completions)[self._rows]
        self.kl_lengths = self._kl_lengths(lengths)

    def select(self, rows: np.ndarray) -> PreferenceDataset:
        """The rows with these numbers, in their order, over the same storage.

        A KTO row keeps the y' that it has in the whole data set, even where that row is not selected.
        """
        kept = self._rows[np.asarray(rows, dtype=np.int64)]
        return PreferenceDataset(
            self.name, self.inputs, self._tables, counts=self.counts, notes=self.notes, rows=kept
        )

    def digest(self) -> str:
        """A hash of all tokens, labels and y' in row order; equal for equal data, wherever they came from."""
        tables = self._tables
        parts = [self._rows, tables.prompt_index, tables.desirable, tables.kl_index]
        for table in (tables.prompts, tables.completions):
            parts += [table.offsets, table.values]
        found = blake2b(f"{self.inputs} {tables.max_length}".encode(), digest_size=16)
        for part in parts:
            found.update(b"-" if part is None else f"{part.dtype}{part.shape}".encode())
            found.update(b"" if part is None else np.ascontiguousarray(part).data)
        return found.hexdigest()

    def _kl_lengths(self, lengths: np.ndarray) -> np.ndarray:
        if self._tables.kl_index is None or not len(self._tables.kl_index):
            return np.zeros(len(self), dtype=np.int64)
        index = self._tables.kl_index[self._rows]
        wanted = np.where(index >= 0, lengths[index], 0)
        limit = self._tables.max_length
        return wanted if limit is None else np.minimum(wanted, limit - self.prompt_lengths)

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Pair | Unpaired: ...
    @overload
    def __getitem__(self, index: slice) -> list[Pair | Unpaired]: ...
    def __getitem__(self, index: int | slice) -> Pair | Unpaired | list[Pair | Unpaired]:
        """One preference (views, nothing is copied), or a list for a slice; raises IndexError outside."""
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        position = self._rows[number]
        tables = self._tables
        prompt_ids = tables.prompts[tables.prompt_index[position]]
        if self.inputs == "pairs":
            return Pair(prompt_ids, tables.completions[2 * position], tables.completions[2 * position + 1])
        assert tables.desirable is not None
        assert tables.kl_index is not None
        kl_index, kl_length = tables.kl_index[position], self.kl_lengths[number]
        kl_ids = None if kl_index < 0 else tables.completions[kl_index][:kl_length]
        return Unpaired(prompt_ids, tables.completions[position], bool(tables.desirable[position]), kl_ids)


@dataclass(frozen=True, slots=True)
class _Tables:
    """Storage of a data set; completions go row by row (chosen, rejected), then the given y' of KTO rows.

    kl_index int64 [n]: where in `completions` the y' of a row stands, -1 for none.
    """

    prompts: TokenTable
    prompt_index: np.ndarray
    completions: TokenTable
    desirable: np.ndarray | None = None
    kl_index: np.ndarray | None = None
    max_length: int | None = None


def load_preferences(
    source: Source,
    *,
    tokenizer: PreTrainedTokenizerBase | None,
    inputs: Layout,
    config: DataFields,
    split: str | None = None,
) -> PreferenceDataset:
    """Read, recognise, tokenize and cut the preferences of `source` for a method with these `inputs`.

    source: a path (.jsonl, .ndjson, .json, a save_to_disk directory), a list of dicts, a datasets.Dataset or
    DatasetDict. tokenizer may be None for rows that are token ids already. Unpaired methods given pairs get
    one desirable and one undesirable example of each, in file order. Pairs with equal answers are dropped and
    counted.

    Raises DataError, naming the first bad rows and their number, unless on_bad_rows is "skip" and at most
    max_bad_fraction of the rows are bad; ConfigError for lengths or a chat template that cannot be used.
    """
    records = open_records(source, split)
    columns = Columns.from_config(config)
    layout = recognise_layout(islice(records.rows(), _CHUNK_ROWS), inputs, columns, records.name)
    rows = _Rows(inputs, Limits.from_config(config), None if tokenizer is None else tokenizer.bos_token_id)
    encoder = _Encoder(tokenizer, config.chat_template, rows.counts)
    bad: list[BadRow] = []
    stream = records.rows()
    while chunk := list(islice(stream, _CHUNK_ROWS)):
        parsed = [parse_row(row, layout, columns) if isinstance(row, Record) else row for row in chunk]
        for item in encoder.encode(parsed):
            if isinstance(item, BadRow):
                bad.append(item)
            else:
                rows.add(item)
    _judge_bad_rows(bad, records, config)
    if not rows.prompt_index:
        raise DataError(
            f"{records.name}: no preference is left of {records.num_rows} rows ({len(bad)} bad, "
            f"{rows.counts['dropped_equal_pairs']} with chosen equal to rejected); give rows that can be used"
        )
    tables = rows.finish()
    counts = {
        "rows_read": records.num_rows,
        "rows": len(rows.prompt_index),
        "bad_rows": len(bad),
        **rows.counts,
    }
    notes = _notes(counts, bad, records.name)
    return PreferenceDataset(records.name, inputs, tables, counts=counts, notes=notes)


def _judge_bad_rows(bad: list[BadRow], records: RecordSet, config: DataFields) -> None:
    if not bad:
        return
    fraction = len(bad) / records.num_rows
    if config.on_bad_rows == "skip" and fraction <= config.max_bad_fraction:
        return
    if config.on_bad_rows == "skip":
        remedy = (
            f"more than max_bad_fraction={config.max_bad_fraction:g} allows; mend them or raise the fraction"
        )
    else:
        remedy = f"mend them, or set on_bad_rows=skip (at most max_bad_fraction={config.max_bad_fraction:g})"
    raise DataError(
        f"{records.name}: {len(bad)} of {records.num_rows} rows cannot be used, {remedy}: {_describe(bad)}"
    )


def _describe(bad: list[BadRow]) -> str:
    shown = " | ".join(f"{row.origin}: {row.reason}" for row in bad[:_SHOWN_BAD_ROWS])
    more = len(bad) - _SHOWN_BAD_ROWS
    return f"{shown} | and {more} more" if more > 0 else shown


def _notes(counts: dict[str, int], bad: list[BadRow], name: str) -> tuple[str, ...]:
    notes = []
    if bad:
        notes.append(f"{name}: {len(bad)} of {counts['rows_read']} rows were left out: {_describe(bad)}")
    if counts["builtin_template_rows"]:
        notes.append(
            f"{name}: the tokenizer has no chat template; {counts['builtin_template_rows']} conversations "
            "were written with the built-in one (role headers such as 'User:'); give --chat_template to "
            "choose another"
        )
    if counts["prompts_not_prefix"]:
        notes.append(
            f"{name}: in {counts['prompts_not_prefix']} conversations the chat template's generation prompt "
            "is not the beginning of the whole; the prompt was taken from the whole conversation"
        )
    if counts["pairs_equal_after_cut"]:
        notes.append(
            f"{name}: {counts['pairs_equal_after_cut']} pairs differ only in what was cut off, so they teach "
            "nothing; raise max_length or max_completion_length, or lower max_prompt_length"
        )
    if counts["rows_without_kl_completion"]:
        notes.append(
            f"{name}: {counts['rows_without_kl_completion']} of {counts['rows']} rows have no y' for KTO's "
            "z0 (no row has another prompt); they are left out of its mean, and with no row left it is 0"
        )
    return tuple(notes)


class _Encoder:
    """Token ids of parsed rows: ids as they are, text through the tokenizer, prepared at first use."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase | None, chat_template: str | None, counts: Counter[str]
    ) -> None:
        self._tokenizer = tokenizer
        self._chat_template = chat_template
        self._counts = counts
        self._text_encoder: PreferenceTokenizer | None = None
        self._vocabulary_size = None if tokenizer is None else len(tokenizer)

    def encode(self, parsed: list[Preference | BadRow]) -> Iterator[EncodedPreference | BadRow]:
        good = [row for row in parsed if isinstance(row, Preference)]
        texts = [row for row in good if needs_tokenizer(row.prompt)]
        encoded_texts = iter(self._encode_texts(texts) if texts else [])
        for row in good:
            count_text_hazards(row, self._counts)
        for row in parsed:
            if isinstance(row, BadRow):
                yield row
            elif needs_tokenizer(row.prompt):
                yield next(encoded_texts)
            else:
                yield take_token_ids(row, self._vocabulary_size)

    def _encode_texts(self, texts: list[Preference]) -> list[EncodedPreference | BadRow]:
        if self._tokenizer is None:
            raise DataError(
                f"{texts[0].origin}: the row is text and no tokenizer was given; give one, or token ids"
            )
        if self._text_encoder is None:
            self._text_encoder = PreferenceTokenizer.from_config(self._tokenizer, self._chat_template)
            self._text_encoder.counts = self._counts
        return self._text_encoder.encode(texts)


@dataclass(slots=True)
class _Rows:
    """Rows as they arrive: cut, counted and stored; equal pairs are dropped here."""

    inputs: Layout
    limits: Limits
    bos_id: int | None
    counts: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(_COUNTED, 0)))
    prompts: GrowingTable = field(default_factory=GrowingTable)
    prompt_index: array = field(default_factory=lambda: array("q"))
    completions: GrowingTable = field(default_factory=GrowingTable)
    desirable: list[bool] = field(default_factory=list)
    given_kl: dict[int, np.ndarray] = field(default_factory=dict)
    _prompt_numbers: dict[bytes, int] = field(default_factory=dict)
    _seen: set[bytes] = field(default_factory=set)

    def add(self, row: EncodedPreference) -> None:
        is_pair = len(row.completion_ids) == 2
        if is_pair and np.array_equal(*row.completion_ids):
            self.counts["dropped_equal_pairs"] += 1
            return
        self._count_repeats(row)
        prompt_ids = cut_prompt(row.prompt_ids, self.limits, self.bos_id)
        completions = [cut_completion(ids, len(prompt_ids), self.limits) for ids in row.completion_ids]
        was_cut = len(prompt_ids) < len(row.prompt_ids)
        self.counts["prompts_cut"] += was_cut
        self.counts["completions_cut"] += sum(
            len(ids) < len(whole) for ids, whole in zip(completions, row.completion_ids, strict=True)
        )
        self.counts["pairs_equal_after_cut"] += is_pair and np.array_equal(*completions)
        number = self._prompt_number(prompt_ids)
        if self.inputs == "pairs":
            self.prompt_index.append(number)
            for ids in completions:
                self.completions.append(ids)
            return
        labels = (True, False) if is_pair else (bool(row.desirable),)
        for ids, label in zip(completions, labels, strict=True):
            if row.kl_ids is not None:
                self.given_kl[len(self.prompt_index)] = cut_completion(
                    row.kl_ids, len(prompt_ids), self.limits
                )
            self.prompt_index.append(number)
            self.completions.append(ids)
            self.desirable.append(label)

    def _prompt_number(self, ids: np.ndarray) -> int:
        key = ids.tobytes()
        number = self._prompt_numbers.get(key)
        if number is None:
            number = self._prompt_numbers[key] = len(self.prompts)
            self.prompts.append(ids)
        return number

    def _count_repeats(self, row: EncodedPreference) -> None:
        """Count a preference met before, and one that says the opposite of an earlier one; both stay."""
        prompt, *answers = (_digest(ids) for ids in (row.prompt_ids, *row.completion_ids))
        label = b"" if row.desirable is None else bytes([row.desirable])
        opposite = b"" if row.desirable is None else bytes([not row.desirable])
        key = b"".join((prompt, *answers, label))
        self.counts["duplicate_rows"] += key in self._seen
        self.counts["contradictory_rows"] += b"".join((prompt, *reversed(answers), opposite)) in self._seen
        self._seen.add(key)

    def finish(self) -> _Tables:
        prompt_index = as_int64(self.prompt_index)
        if self.inputs == "pairs":
            return _Tables(self.prompts.finish(), prompt_index, self.completions.finish())
        kl_index = mismatched_rows(prompt_index)
        for row, ids in self.given_kl.items():
            kl_index[row] = len(self.completions)
            self.completions.append(ids)
        self.counts["rows_without_kl_completion"] += int((kl_index < 0).sum())
        return _Tables(
            self.prompts.finish(),
            prompt_index,
            self.completions.finish(),
            np.asarray(self.desirable, dtype=bool),
            kl_index,
            self.limits.max_length,
        )


_COUNTED = (
    "prompts_cut",
    "completions_cut",
    "dropped_equal_pairs",
    "pairs_equal_after_cut",
    "duplicate_rows",
    "contradictory_rows",
    "rows_without_kl_completion",
    "rows_with_bidi_controls",
    "rows_with_nul",
    "builtin_template_rows",
    "prompts_not_prefix",
)


def _digest(ids: np.ndarray) -> bytes:
    return blake2b(ids.tobytes(), digest_size=16).digest()
