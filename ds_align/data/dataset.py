"""A whole preference data set as flat token arrays, and the way there from a source.

A million preferences are three arrays here, not a million objects; rows are built as views when asked for.
Equal prompts are stored once.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, overload

import numpy as np

from ds_align.batch import Pair, Unpaired
from ds_align.data.build import DataFields, Job, Tokenized, describe_bad_rows
from ds_align.data.cache import obtain
from ds_align.data.readers import display_name, origin_prefix
from ds_align.data.schemas import Layout
from ds_align.data.tables import Tables

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ds_align.data.readers import Source


class PreferenceDataset(Sequence):
    """Tokenized preferences in file order: Pair rows (inputs "pairs") or Unpaired rows (inputs "unpaired").

    counts: rows_read, rows, and every cut, drop and oddity that was met. notes: sentences for the user about
    what was decided for him. The arrays that the planner uses:
    prompt_lengths int64 [n]; completion_lengths int64 [n, 2] (chosen, rejected) or [n, 1]; kl_lengths int64
    [n] (0 where a row has no y'); prompt_keys int64 [n], equal exactly where the (cut) prompts are equal, in
    order of first appearance, from 0.
    num_processes: how many tokenized the rows; 0: they come from the cache. directory: the entry of the cache
    whose file the rows are views of; None: they are in memory.
    """

    def __init__(
        self,
        name: str,
        inputs: Layout,
        tables: Tables,
        *,
        counts: dict[str, int],
        notes: tuple[str, ...] = (),
        rows: np.ndarray | None = None,
        num_processes: int = 0,
        directory: Path | None = None,
    ) -> None:
        self._rows = np.arange(len(tables.prompt_index)) if rows is None else rows
        self.name = name
        self.inputs = inputs
        self.counts = counts
        self.notes = notes
        self.num_processes = num_processes
        self.directory = directory
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
            self.name,
            self.inputs,
            self._tables,
            counts=self.counts,
            notes=self.notes,
            rows=kept,
            num_processes=self.num_processes,
            directory=self.directory,
        )

    def digest(self) -> str:
        """A hash of all tokens, labels and y' in row order; equal for equal data, wherever they came from."""
        found = sha256(f"{self.inputs} {self._tables.digest} {len(self)} ".encode())
        found.update(np.ascontiguousarray(self._rows).data)
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
    found = obtain(Job(source, split, tokenizer, inputs, config))
    name = display_name(source, split)
    return PreferenceDataset(
        name,
        inputs,
        found.tables,
        counts=found.counts,
        notes=(*found.remarks, *_notes(found, name, source)),
        num_processes=found.num_processes,
        directory=found.directory,
    )


def _notes(found: Tokenized, name: str, source: Source) -> tuple[str, ...]:
    notes, counts = [], found.counts
    if counts["bad_rows"]:
        prefix = origin_prefix(source)
        shown = [(f"{prefix}{place}", reason) for place, reason in found.shown_bad]
        notes.append(
            f"{name}: {counts['bad_rows']} of {counts['rows_read']} rows were left out: "
            f"{describe_bad_rows(shown, counts['bad_rows'])}"
        )
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
