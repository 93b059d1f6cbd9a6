"""The reference as rows of a cache: what is missing is scored before training, then no model is needed."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Protocol
from weakref import WeakSet

import numpy as np
import torch
from tqdm import tqdm

from ds_align import distributed
from ds_align.batch import Layout, PackedBatch, Pair, Unpaired
from ds_align.batches import BatchPlanner
from ds_align.config import BaseConfig, resolved_precision
from ds_align.data import PreferenceDataset
from ds_align.engine.scoring import score_units
from ds_align.engine.setup import Setup
from ds_align.errors import ConfigError, DataError, NonFiniteError
from ds_align.file_digests import FileDigests
from ds_align.models.attention import depends_on_other_rows
from ds_align.models.identity import adapter_digest, model_digest, tokenizer_digest
from ds_align.packing import PreferenceTable, build_batch, plan_scoring
from ds_align.reference_cache import ReferenceCache, row_key
from ds_align.watchdog import beat

# How much is planned at once: enough that the ranks' shares come out alike.
_PACKS_A_RANK = 8
# What a crash may cost: a file is written when either is reached.
_PART_BYTES = 64 << 20
_PART_SECONDS = 120.0


class Scorer(Protocol):
    """A reference that computes: see engine.reference."""

    def forward(self, batch: PackedBatch) -> torch.Tensor:
        """Token log-probs, float32 [num_scored]."""

    def close(self) -> None:
        """Gives the memory back."""


def open_cached_reference(
    config: BaseConfig, setup: Setup, device: torch.device, make_scorer: Callable[[], Scorer]
) -> CachedReference:
    """The cache of the run's reference, found by the content of its files; nothing is loaded or scored yet.

    make_scorer: loads the reference, where rows are missing.
    Collective: every rank must call this. Raises ConfigError where the reference's files cannot be read, and
    where its log-probs are no function of a row alone.
    """
    dtype = resolved_precision(setup.ds_config)
    source = setup.reference_source
    reason = depends_on_other_rows(source.config.get_text_config(), config.max_length)
    if reason is not None:
        raise ConfigError(
            f"ref_logps=cache: {source.label}: {reason}; take ref_logps=live, or a shorter max_length"
        )
    directory = Path(config.resolved_ref_cache_dir)

    def facts() -> dict[str, object] | None:
        if not distributed.is_main():
            return None
        digests = FileDigests(directory / "files.json", keep=not config.dry_run)
        starts_adapted = setup.reference_is_policy and setup.adapters.keeps_start
        return {
            "model": model_digest(source, digests),
            "adapter": adapter_digest(Path(config.model_name_or_path), digests) if starts_adapted else None,
            "tokenizer": tokenizer_digest(setup.tokenizer),
            "dtype": dtype,
            "bits": config.ref_bits,
        }

    found = distributed.broadcast_object(distributed.agree(facts))
    planner = BatchPlanner(config, setup.layout, device=device)
    return CachedReference(
        ReferenceCache(directory, found),
        make_scorer,
        layout=setup.layout,
        pack_tokens=planner.reference_tokens,
        with_kl=config.needs_reference_point,
        device=device,
        about={"path": source.path},
    )


class CachedReference:
    """Log-probs of a reference that was there once. Every rank holds the same files open.

    seconds, messages: what filling took, and what there is to say about it.
    """

    kind: ClassVar[str] = "cache"

    def __init__(
        self,
        cache: ReferenceCache,
        make_scorer: Callable[[], Scorer],
        *,
        layout: Layout,
        pack_tokens: int,
        with_kl: bool,
        device: torch.device,
        about: Mapping[str, object],
    ) -> None:
        self.cache = cache
        self.make_scorer = make_scorer
        self.about = about
        self.layout = layout
        self.pack_tokens = pack_tokens
        self.with_kl = with_kl
        self.device = device
        self.seconds = 0.0
        self.messages: list[str] = []
        self._filled: WeakSet[PreferenceDataset] = WeakSet()
        self.cache.open_parts(distributed.broadcast_object(cache.part_names()))

    def token_logps(self, table: PreferenceTable, units: Sequence[int]) -> torch.Tensor:
        """Float32 [tokens of all units of the table] on the CPU; NaN for units that are not asked for.

        Raises DataError for a row that is not there or damaged.
        """
        ends = np.cumsum([0, *(len(ids) for ids in table.completions)])
        found = np.full(ends[-1], np.nan, dtype=np.float32)
        for unit in units:
            found[ends[unit] : ends[unit + 1]] = self.cache.read(
                _key(table, unit), len(table.completions[unit])
            )
        return torch.from_numpy(found)

    def no_logps(self, table: PreferenceTable, units: Sequence[int]) -> torch.Tensor:
        """token_logps for a plan that is only looked at: all NaN."""
        del units
        return torch.full((sum(len(ids) for ids in table.completions),), math.nan)

    def fill(self, data: PreferenceDataset, rows: np.ndarray | None = None) -> None:
        """Scores what the cache lacks of a data set; loads the reference only if something is missing.

        rows: those that will be asked for; None: all. Collective: every rank must call this. Raises
        CheckpointError where the cache cannot be written.
        """
        if data in self._filled:
            return
        started = time.perf_counter()
        wanted = np.arange(len(data)) if rows is None else rows
        missing = self._find_missing(data, wanted)
        self._warn_of_damage()
        if missing:
            # Before the model loads: what it computes could not be kept.
            distributed.agree(self.cache.check_writable)
            scorer = self.make_scorer()
            tokens = self._score_missing(data, np.asarray(missing), scorer)
            scorer.close()
            del scorer
            gc.collect()
            self.messages.append(
                f"reference cache: {len(missing)} of {len(wanted)} rows were scored in "
                f"{time.perf_counter() - started:.1f} s ({tokens} tokens), kept in {self.cache.directory}"
            )
        else:
            self._say_nothing_is_missing(len(wanted))
        if rows is None:
            self._filled.add(data)
        self.seconds += time.perf_counter() - started

    def report_missing(self, data: PreferenceDataset, rows: np.ndarray | None = None) -> None:
        """Says what fill would score; loads, computes and writes nothing.

        Collective: every rank must call this. Raises CheckpointError where fill could not write.
        """
        wanted = np.arange(len(data)) if rows is None else rows
        missing = self._find_missing(data, wanted)
        self._warn_of_damage(set_aside=False)
        if missing:
            distributed.agree(self.cache.check_place)
            self.messages.append(
                f"reference cache: {len(missing)} of {len(wanted)} rows are missing in "
                f"{self.cache.directory}; they would be scored first"
            )
        else:
            self._say_nothing_is_missing(len(wanted))

    def _say_nothing_is_missing(self, num_rows: int) -> None:
        self.messages.append(
            f"reference cache: all {num_rows} rows are in {self.cache.directory}; no reference is needed"
        )

    def _find_missing(self, data: PreferenceDataset, wanted: np.ndarray) -> list[int]:
        # One rank looks, so that all agree even where another run is writing at this moment.
        return distributed.broadcast_object(
            [row for row in wanted if not self._is_whole(data[int(row)])] if distributed.is_main() else None
        )

    def _is_whole(self, row: Pair | Unpaired) -> bool:
        if isinstance(row, Pair):
            completions = (row.chosen_ids, row.rejected_ids)
        else:
            completions = (row.completion_ids, row.kl_ids if self.with_kl else None)
        return all(
            ids is None or self.cache.find(row_key(row.prompt_ids, ids), len(ids)) is not None
            for ids in completions
        )

    def _missing_units(self, table: PreferenceTable) -> list[int]:
        return [
            unit
            for unit, ids in enumerate(table.completions)
            if self.cache.find(_key(table, unit), len(ids)) is None
        ]

    def _warn_of_damage(self, *, set_aside: bool = True) -> None:
        message = distributed.broadcast_object(self.cache.damage())
        if message is not None:
            self.messages.append(f"reference cache: {message}")
        self.cache.forget_damage()
        if set_aside and distributed.is_main():
            self.cache.set_aside()

    def _score_missing(self, data: PreferenceDataset, rows: np.ndarray, scorer: Scorer) -> int:
        """Scores and writes; every rank writes what it scored. Returns the tokens of all ranks."""
        writer = _Writer(self.cache)
        tokens = 0
        with tqdm(total=len(rows), desc="reference", unit="row", disable=not distributed.is_main()) as bar:
            for chunk in self._chunks(data, rows):
                tokens += self._score_chunk([data[int(row)] for row in chunk], scorer, writer)
                bar.update(len(chunk))
                beat("rows of the reference's cache")
        distributed.agree(writer.flush)
        names = [name for rank in distributed.gather_objects(writer.names) for name in rank]
        self.cache.open_parts(names)
        distributed.agree(lambda: self._check_shared(names))
        # What was damaged before has been computed again.
        self.cache.forget_damage()
        if distributed.is_main():
            self.cache.describe(self.about)
        return tokens

    def _check_shared(self, names: Sequence[str]) -> None:
        unread = sorted(set(names) - {part.name for part in self.cache.parts})
        if unread:
            raise DataError(
                f"ref_cache_dir: {self.cache.directory / unread[0]} was just written by another rank and "
                "cannot be read here; give a directory that all nodes share"
            )

    def _chunks(self, data: PreferenceDataset, rows: np.ndarray) -> list[np.ndarray]:
        """Cuts rows into parts that fill _PACKS_A_RANK packs on every rank."""
        tokens = data.prompt_lengths[rows] + data.completion_lengths[rows].sum(axis=1)
        budget = _PACKS_A_RANK * self.pack_tokens * distributed.world_size()
        numbers = (np.cumsum(tokens) - 1) // budget
        return np.split(rows, np.flatnonzero(np.diff(numbers)) + 1)

    def _score_chunk(self, preferences: list, scorer: Scorer, writer: _Writer) -> int:
        table = PreferenceTable.from_preferences(preferences, with_kl=self.with_kl)
        units = distributed.broadcast_object(
            [unit for unit in self._missing_units(table) if not writer.has(_key(table, unit))]
            if distributed.is_main()
            else None
        )
        plan = plan_scoring(
            table,
            units,
            world_size=distributed.world_size(),
            layout=self.layout,
            pack_tokens=self.pack_tokens,
        )
        mine = plan[distributed.rank()]
        batches = [build_batch(table, pack, range(len(preferences)), self.layout) for pack in mine]
        lengths = torch.tensor([len(ids) for ids in table.completions], dtype=torch.long)
        scores = score_units(batches, scorer.forward, lengths, self.device).cpu().numpy()
        ends = np.cumsum([0, *lengths.tolist()])
        scored = [unit for pack in mine for group in pack for unit in group.units]
        # Copies: a view would keep the tokens of all ranks until the rows are written.
        rows = [(_key(table, unit), scores[ends[unit] : ends[unit + 1]].copy()) for unit in scored]
        distributed.agree(lambda: _check_finite(rows))
        distributed.agree(lambda: writer.add(rows, [_key(table, unit) for unit in units]))
        return sum(group.num_tokens for packs in plan for pack in packs for group in pack)


class _Writer:
    """Collects rows and writes them as files; remembers what was scored by any rank."""

    def __init__(self, cache: ReferenceCache) -> None:
        self.cache = cache
        self.names: list[str] = []
        self._rows: list[tuple[bytes, np.ndarray]] = []
        self._scored: set[bytes] = set()
        self._num_bytes = 0
        self._written = time.monotonic()

    def has(self, key: bytes) -> bool:
        return key in self._scored

    def add(self, rows: list[tuple[bytes, np.ndarray]], scored: list[bytes]) -> None:
        self._scored.update(scored)
        self._rows += rows
        self._num_bytes += sum(values.nbytes for _, values in rows)
        if self._num_bytes >= _PART_BYTES or time.monotonic() - self._written >= _PART_SECONDS:
            self.flush()

    def flush(self) -> None:
        if self._rows:
            self.names.append(self.cache.write_part(self._rows))
        self._rows, self._num_bytes, self._written = [], 0, time.monotonic()


def _check_finite(rows: list[tuple[bytes, np.ndarray]]) -> None:
    if not all(np.isfinite(values).all() for _, values in rows):
        raise NonFiniteError(
            "the reference gives log-probs that are not finite; take bfloat16 or float32 instead of float16, "
            "and check the reference's weights"
        )


def _key(table: PreferenceTable, unit: int) -> bytes:
    return row_key(table.prompts[table.prompt_of[unit]], table.completions[unit])
