"""Rows of Parquet files, decoded once from the first to the last and never all at a time."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ds_align.data.rows import BadRow, Record
from ds_align.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

_BATCH_ROWS = 1024
# Of each column's compressed bytes, so many are in memory at a time.
_BUFFER_BYTES = 2**16


class ParquetRows:
    """A Parquet file. Parts are taken by this process, in file order where that is possible, and hold their
    rows: a row group is decoded from its beginning, so that processes which each began in the middle of one
    would decode it again and again.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._starts: list[int] | None = None
        self._batches: Iterator[pa.RecordBatch] = iter(())
        # The rows from _next on: first what is left of the last batch.
        self._left: pa.RecordBatch | None = None
        self._next = -1

    def _open(self) -> pq.ParquetFile:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            return pq.ParquetFile(self._path, buffer_size=_BUFFER_BYTES, pre_buffer=False)
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: Exception) -> DataError:
        reason = " ".join(str(error).split())
        return DataError(f"{self._path}: not a whole Parquet file ({reason}); get or write the file again")

    def _find(self) -> list[int]:
        """Where each row group starts, and where the last one ends."""
        if self._starts is None:
            with self._open() as file:
                sizes = (
                    file.metadata.row_group(index).num_rows for index in range(file.metadata.num_row_groups)
                )
                self._starts = [0, *accumulate(sizes)]
        return self._starts

    @property
    def names(self) -> tuple[str, ...]:
        """The columns."""
        with self._open() as file:
            return tuple(file.schema_arrow.names)

    def __len__(self) -> int:
        return self._find()[-1]

    def __iter__(self) -> Iterator[Record | BadRow]:
        for start in range(0, len(self), _BATCH_ROWS):
            yield from self.part(start, min(start + _BATCH_ROWS, len(self)))

    def part(self, start: int, stop: int) -> ArrowRows:
        """The rows themselves. Raises DataError for a file that is damaged."""
        import pyarrow as pa

        if stop <= start:
            return ArrowRows(str(self._path), pa.table({}), start + 1)
        if start != self._next:
            self._go_to(start)
        found = []
        try:
            while self._next < stop:
                batch = self._left if self._left is not None else next(self._batches)
                wanted = min(stop - self._next, batch.num_rows)
                found.append(batch.slice(0, wanted))
                self._left = batch.slice(wanted) if wanted < batch.num_rows else None
                self._next += wanted
        except (pa.ArrowException, OSError, StopIteration) as error:
            self._next = -1
            raise self._unreadable(error) from error
        return ArrowRows(str(self._path), pa.Table.from_batches(found), start + 1)

    def _go_to(self, row: int) -> None:
        """Makes `row` the next one."""
        starts = self._find()
        group = bisect_right(starts, row, hi=len(starts) - 1) - 1
        batches = self._open().iter_batches(
            batch_size=_BATCH_ROWS, row_groups=range(group, len(starts) - 1), use_threads=False
        )
        self._batches, self._left, self._next = batches, None, row
        before = row - starts[group]
        while before:
            batch = next(self._batches)
            skipped = min(before, batch.num_rows)
            self._left = batch.slice(skipped) if skipped < batch.num_rows else None
            before -= skipped


class ArrowRows:
    """Rows of an Arrow table; `first`: number of the first row. What is null is as good as not there."""

    def __init__(self, name: str, table: pa.Table, first: int) -> None:
        self._name = name
        self._table = table
        self._first = first

    def __getstate__(self) -> tuple[str, bytes, int]:
        import pyarrow as pa

        # Pickled as it is, a slice would take along all rows that it was cut from.
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, self._table.schema) as writer:
            writer.write_table(self._table)
        return self._name, sink.getvalue().to_pybytes(), self._first

    def __setstate__(self, state: tuple[str, bytes, int]) -> None:
        import pyarrow as pa

        self._name, content, self._first = state
        self._table = pa.ipc.open_stream(content).read_all()

    def __len__(self) -> int:
        return self._table.num_rows

    def __iter__(self) -> Iterator[Record | BadRow]:
        for number, row in enumerate(self._values(), self._first):
            origin = f"{self._name}: row {number}"
            if isinstance(row, UnicodeDecodeError):
                reason = f"a text is not UTF-8 (0x{row.object[row.start]:02x}); write the file anew"
                yield BadRow(origin, reason)
            else:
                columns = {name: value for name, value in row.items() if value is not None}
                yield Record(origin, columns)

    def _values(self) -> Iterator[dict[str, Any] | UnicodeDecodeError]:
        try:
            yield from self._table.to_pylist()
        except UnicodeDecodeError:
            # Arrow does not check what a file calls text; one row at a time, to lose no other.
            for place in range(self._table.num_rows):
                try:
                    yield self._table.slice(place, 1).to_pylist()[0]
                except UnicodeDecodeError as error:
                    yield error

    def part(self, start: int, stop: int) -> ArrowRows:
        """The rows themselves."""
        return ArrowRows(self._name, self._table.slice(start, stop - start), self._first + start)
