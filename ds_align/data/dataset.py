"""A whole preference data set as flat token arrays, and the way there from a source.

A million preferences are three arrays here, not a million objects; rows are built as views when asked for.
Equal prompts are stored once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from ds_align.batch import Pair, Unpaired
from ds_align.data.build import DataFields, Job
from ds_align.data.cache import obtain
from ds_align.data.deduplicate import Deduplicate
from ds_align.data.notes import describe_decisions, summarise
from ds_align.data.readers import display_name
from ds_align.data.schemas import Layout
from ds_align.data.subset import Subset
from ds_align.data.tables import Tables

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ds_align.data.readers import Source


@dataclass(frozen=True, slots=True)
class Part:
    """What a mixture took of one of its sources.

    rows, available: rows taken, and rows that are there (preferences that can be used); share: of all rows of
    the mixture. repeated: how many of the rows were taken before.
    """

    name: str
    source: str
    weight: float
    available: int
    rows: int
    share: float
    repeated: int


class PreferenceDataset(Sequence):
    """Tokenized preferences in file order: Pair rows (inputs "pairs") or Unpaired rows (inputs "unpaired").

    counts: rows_read, rows, and every cut, drop and oddity that was met. notes: sentences for the user about
    what was decided for him. The arrays that the planner uses:
    prompt_lengths int64 [n]; completion_lengths int64 [n, 2] (chosen, rejected) or [n, 1]; kl_lengths int64
    [n] (0 where a row has no y'); prompt_keys int64 [n], equal exactly where the (cut) prompts are equal, in
    order of first appearance, from 0.
    num_processes: how many tokenized the rows; 0: they come from the cache. directory: the entry of the cache
    whose file the rows are views of; None: they are in memory, or of several entries. parts: those of a
    mixture, else (); `sources` int64 [n] is the part of each row. finding: what the choice of the rows found,
    as JSON values; empty where all rows were taken.
    """

    def __init__(
        self,
        name: str,
        inputs: Layout,
        tables: Tables,
        *,
        counts: dict[str, int],
        notes: tuple[str, ...] = (),
        summary: str = "",
        rows: np.ndarray | None = None,
        num_processes: int = 0,
        directory: Path | None = None,
        parts: tuple[Part, ...] = (),
        finding: dict[str, Any] | None = None,
    ) -> None:
        self.parts = parts
        self._rows = np.arange(len(tables.prompt_index)) if rows is None else rows
        self.name = name
        self.inputs = inputs
        self.counts = counts
        self.notes = notes
        self.summary = summary
        self.num_processes = num_processes
        self.directory = directory
        self.finding = finding or {}
        self._tables = tables
        self.prompt_keys = tables.prompt_index[self._rows]
        self.prompt_lengths = tables.prompts.lengths[self.prompt_keys]
        num_completions = 2 if inputs == "pairs" else 1
        lengths = tables.completions.lengths
        if tables.completion_index is not None:
            self.completion_lengths = lengths[tables.completion_index[self._rows]]
        else:
            stored = num_completions * len(tables.prompt_index)
            self.completion_lengths = lengths[:stored].reshape(-1, num_completions)[self._rows]
        self.kl_lengths = self._kl_lengths(lengths)

    @property
    def tables(self) -> Tables:
        """The storage, which a data set shares with all selections of it."""
        return self._tables

    @property
    def completion_index(self) -> np.ndarray:
        """Where the completions of each row stand in `tables.completions`; int64, like completion_lengths."""
        if self._tables.completion_index is not None:
            return self._tables.completion_index[self._rows]
        num_completions = self.completion_lengths.shape[1]
        return self._rows[:, None] * num_completions + np.arange(num_completions)

    @property
    def kl_index(self) -> np.ndarray | None:
        """Where the y' of each row stands in `tables.completions`, -1 for none; None for pairs."""
        return None if self._tables.kl_index is None else self._tables.kl_index[self._rows]

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
            summary=self.summary,
            rows=kept,
            num_processes=self.num_processes,
            directory=self.directory,
            parts=self.parts,
            finding=self.finding,
        )

    @property
    def sources(self) -> np.ndarray:
        """The number of the part that each row is from, int64 [n]; 0 for all where there are no parts."""
        ends = np.cumsum([part.available for part in self.parts])
        return np.searchsorted(ends, self._rows, side="right") if self.parts else np.zeros_like(self._rows)

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
            index = tables.completion_index
            chosen, rejected = (2 * position, 2 * position + 1) if index is None else index[position]
            return Pair(prompt_ids, tables.completions[chosen], tables.completions[rejected])
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
    deduplicate: Deduplicate = "none",
    subset: Subset | None = None,
) -> PreferenceDataset:
    """Read, recognise, tokenize and cut the preferences of `source` for a method with these `inputs`.

    source: a path of what readers.SUPPORTED lists, an id on the Hub, a list of dicts, a datasets.Dataset or
    DatasetDict. tokenizer may be None for rows that are token ids already. Unpaired methods given pairs get
    one desirable and one undesirable example of each, in file order; given ranked lists, each answer once: as
    desirable where it wins more of the list's pairs than it loses. Pairs with equal answers are dropped and
    counted. deduplicate: which rows that repeat an earlier one are dropped, too (scan_duplicates). subset:
    chooses the rows before they are tokenized; None: all of them.

    Raises DataError, naming the first bad rows and their number, unless on_bad_rows is "skip" and at most
    max_bad_fraction of the rows are bad; ConfigError for lengths or a chat template that cannot be used.
    """
    found = obtain(Job(source, split, tokenizer, inputs, config, deduplicate, subset))
    name = display_name(source, split)
    return PreferenceDataset(
        name,
        inputs,
        found.tables,
        counts=found.counts,
        notes=(*found.remarks, *found.notes, *describe_decisions(found, name, source, config)),
        summary=summarise(found, name, inputs, config),
        num_processes=found.num_processes,
        directory=found.directory,
        finding=found.finding,
    )
