"""A source tokenized: its rows, in one process or several, into tables, and what was met on the way."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from ds_align import distributed
from ds_align.data.chunks import ChunkSettings, EncodedChunk
from ds_align.data.deduplicate import Deduplicate, without_duplicates
from ds_align.data.parallel import CannotShareError, EncodingProcesses, encode_here, num_processes
from ds_align.data.ranked import PairFields, PairRules
from ds_align.data.readers import CHUNK_ROWS, RecordSet, open_records, origin_prefix
from ds_align.data.rows import BadRow, Record
from ds_align.data.schemas import ColumnFields, Columns, Layout, parse_row, recognise_layout
from ds_align.data.spool import Spool
from ds_align.data.subset import Chosen, Subset
from ds_align.data.tables import Tables
from ds_align.data.text_keys import has_equal_answers
from ds_align.data.truncate import LengthFields, Limits
from ds_align.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ds_align.data.readers import Source

# What gives no preference, as messages say it.
LEFT_OUT = {
    "ranked_ties": "ties",
    "ranked_below_gap": "nearer than ranked_min_gap",
    "dropped_low_margin": "below min_score_margin",
    "ranked_undecided": "answers that win as often as they lose",
    "ranked_unusable_answers": "answers without a text or a value",
}
# What takes less says nothing.
_QUIET_SECONDS = 3.0


class DataFields(ColumnFields, LengthFields, PairFields, Protocol):
    """What this room reads from a config."""

    on_bad_rows: Literal["error", "skip"]
    max_bad_fraction: float
    chat_template: str | None
    dataset_num_proc: int | Literal["auto"]
    dataset_cache_dir: str | None


@dataclass(frozen=True, slots=True)
class Job:
    """What is tokenized, for whom and how. subset: chooses the rows; None: all of them."""

    source: Source
    split: str | None
    tokenizer: PreTrainedTokenizerBase | None
    inputs: Layout
    config: DataFields
    deduplicate: Deduplicate = "none"
    subset: Subset | None = None


@dataclass(frozen=True, slots=True)
class Tokenized:
    """Tables of a source, what was counted, and the first bad rows as (place in the source, reason).

    forms: what the rows were read as, in words, and how many as each.
    shown_contradictions: places of the first rows that say the opposite of each other, where that was asked.
    num_processes: how many tokenized; 0: read from `directory`, an entry of the cache. remarks: what the user
    should know of the way, which says nothing of the data. notes: what the choice of rows has to say;
    finding: the same as JSON values.
    """

    tables: Tables
    counts: dict[str, int]
    shown_bad: list[tuple[str, str]]
    num_processes: int = 0
    directory: Path | None = None
    remarks: tuple[str, ...] = ()
    forms: dict[str, int] = field(default_factory=dict)
    shown_contradictions: list[list[str]] = field(default_factory=list)
    notes: tuple[str, ...] = ()
    finding: dict[str, Any] = field(default_factory=dict)


def tokenize_source(job: Job, *, sharing_ranks: int, directory: Path | None = None) -> Tokenized:
    """Reads, recognises, tokenizes and cuts every row; `directory` takes the tokens instead of the memory.

    sharing_ranks: processes of this node that do the same at the same time. Raises DataError and ConfigError
    as load_preferences does.
    """
    columns = Columns.from_config(job.config)
    records = open_records(job.source, job.split, columns=columns)
    settings = ChunkSettings(
        job.tokenizer,
        job.config.chat_template,
        recognise_layout(islice(records.rows(), CHUNK_ROWS), job.inputs, columns, records.name),
        job.inputs,
        columns,
        Limits.from_config(job.config),
        PairRules.from_config(job.config),
    )
    read, found = records.num_rows, None
    if job.deduplicate != "none":
        found = without_duplicates(records, settings.layout, columns, settings.rules, job.deduplicate)
        records = found.records
    chosen = _choose(job, records, settings)
    num_chosen = chosen.records.num_rows
    number = num_processes(job.config.dataset_num_proc, num_chosen, sharing_ranks=max(1, sharing_ranks))
    with Spool(job.inputs, settings.limits.max_length, directory) as spool:
        number, remarks = _fill(spool, settings, chosen.records, number)
        # A choice takes every bad row along, so they are held against all rows.
        _judge_bad_rows(spool, records, job.config)
        tables = spool.finish()
    counts = {
        "rows_read": read + spool.num_swallowed,
        "rows": len(tables.prompt_index),
        "bad_rows": spool.num_bad,
        **spool.counts,
        **({} if found is None else found.counts),
        **chosen.counts,
    }
    prefix = origin_prefix(job.source)
    contradictions = [] if found is None else found.contradictions
    shown = [(row.origin.removeprefix(prefix), row.reason) for row in spool.shown_bad]
    shown_contradictions = [[origin.removeprefix(prefix) for origin in pair] for pair in contradictions]
    return Tokenized(
        *(tables, counts, shown, number),
        remarks=remarks,
        forms=dict(spool.forms),
        shown_contradictions=shown_contradictions,
        notes=chosen.notes,
        finding=chosen.finding,
    )


def _choose(job: Job, records: RecordSet, settings: ChunkSettings) -> Chosen:
    """The rows that the job's subset takes of those that can be used and whose answers differ."""
    if job.subset is None:
        return Chosen(records)

    def is_usable(record: Record) -> bool:
        row = parse_row(record, settings.layout, settings.columns, settings.rules)
        return not isinstance(row, BadRow) and not row.is_left_out and not has_equal_answers(row)

    return job.subset.choose(records, is_usable)


def _fill(
    spool: Spool, settings: ChunkSettings, records: RecordSet, number: int
) -> tuple[int, tuple[str, ...]]:
    """Encodes all rows into the spool; returns how many processes did it, and remarks."""
    parts = (records.part(start, start + CHUNK_ROWS) for start in range(0, records.num_rows, CHUNK_ROWS))
    remarks: tuple[str, ...] = ()
    if number > 1:
        try:
            with EncodingProcesses(settings, number) as processes:
                _gather(spool, processes.encode(parts), records, number)
            return number, remarks
        except CannotShareError as error:
            reason = f"another process cannot be given the tokenizer ({error})"
            remarks = (f"{records.name}: tokenized in one process, not in {number}: {reason}",)
    _gather(spool, encode_here(settings, parts), records, 1)
    return 1, remarks


def _gather(spool: Spool, chunks: Iterable[EncodedChunk], records: RecordSet, number: int) -> None:
    for chunk in _shown(chunks, records, number):
        spool.add(chunk)


def _shown(chunks: Iterable[EncodedChunk], records: RecordSet, number: int) -> Iterator[EncodedChunk]:
    """The chunks; where they take long the main rank shows a bar in a terminal, else one line at the end."""
    from tqdm import tqdm

    started = time.perf_counter()
    in_terminal = sys.stderr.isatty()
    bar = tqdm(
        total=records.num_rows,
        desc=f"tokenizing {records.name}",
        unit="rows",
        unit_scale=True,
        delay=_QUIET_SECONDS,
        disable=not (in_terminal and distributed.is_main()),
    )
    with bar:
        for chunk in chunks:
            yield chunk
            bar.update(chunk.num_read)
    seconds = time.perf_counter() - started
    if distributed.is_main() and not in_terminal and seconds > _QUIET_SECONDS:
        print(
            f"{records.name}: {records.num_rows} rows tokenized in {seconds:.1f} s "
            f"({records.num_rows / seconds:.0f} rows/s, {number} processes)",
            file=sys.stderr,
            flush=True,
        )


def _judge_bad_rows(spool: Spool, records: RecordSet, config: DataFields) -> None:
    """Raises DataError where too many rows are bad, or none is left."""
    if spool.num_bad:
        _judge_their_number(spool, records, config)
    if not spool.num_preferences:
        parts = [
            f"{spool.num_bad} bad",
            f"{spool.counts['dropped_equal_pairs']} with the same tokens as chosen and as rejected",
        ]
        parts += [f"{spool.counts[name]} {words}" for name, words in LEFT_OUT.items() if spool.counts[name]]
        raise DataError(
            f"{records.name}: no preference is left of {records.num_rows} rows ({', '.join(parts)}); give "
            "rows that can be used"
        )


def _judge_their_number(spool: Spool, records: RecordSet, config: DataFields) -> None:
    # What a bad row took along was one row with it before.
    num_rows = records.num_rows + spool.num_swallowed
    fraction = spool.num_bad / num_rows
    if config.on_bad_rows == "skip" and fraction <= config.max_bad_fraction:
        return
    if config.on_bad_rows == "skip":
        remedy = (
            f"more than max_bad_fraction={config.max_bad_fraction:g} allows; mend them or raise the fraction"
        )
    else:
        remedy = f"mend them, or set on_bad_rows=skip (at most max_bad_fraction={config.max_bad_fraction:g})"
    shown = describe_bad_rows([(row.origin, row.reason) for row in spool.shown_bad], spool.num_bad)
    expected = "".join(dict.fromkeys(f"; {row.expected}" for row in spool.shown_bad if row.expected))
    raise DataError(
        f"{records.name}: {spool.num_bad} of {num_rows} rows cannot be used, {remedy}: {shown}{expected}"
    )


def _together(origins: list[str]) -> str:
    """Lines of one file with its name once: `file:1, 2, 5`."""
    file = origins[0].rpartition(":")[0]
    lines = [origin.removeprefix(f"{file}:") for origin in origins]
    return f"{file}:{', '.join(lines)}" if all(map(str.isdigit, lines)) else ", ".join(origins)


def describe_bad_rows(shown: list[tuple[str, str]], number: int) -> str:
    """The first bad rows as (origin, reason), each reason once, and how many more there are."""
    places: dict[str, list[str]] = {}
    for origin, reason in shown:
        places.setdefault(reason, []).append(origin)
    text = " | ".join(f"{_together(origins)}: {reason}" for reason, origins in places.items())
    more = number - len(shown)
    return f"{text} | and {more} more" if more > 0 else text
