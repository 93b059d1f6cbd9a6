"""Token sequences in flat arrays, and what is asked of all rows at once."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b, sha256
from itertools import accumulate, pairwise

import numpy as np

_BLOCK_ROWS = 65536


class TokenTable:
    """Many token sequences in one int32 array; `offsets` int64 [num + 1]."""

    def __init__(self, values: np.ndarray, offsets: np.ndarray) -> None:
        self.values = values
        self.offsets = offsets

    @classmethod
    def from_lengths(cls, values: np.ndarray, lengths: np.ndarray) -> TokenTable:
        """Sequences of these lengths, one behind the other."""
        return cls(values, np.concatenate(([0], np.cumsum(lengths, dtype=np.int64))))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        return self.values[self.offsets[index] : self.offsets[index + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sequence, int64 [num]."""
        return np.diff(self.offsets)

    @property
    def pieces(self) -> list[TokenTable]:
        """The sequences in order as tables whose values are theirs alone; for work on all tokens at once."""
        start, stop = int(self.offsets[0]), int(self.offsets[-1])
        return [TokenTable(self.values[start:stop], self.offsets - start)]


class JoinedTable:
    """Several tables one behind the other, without a copy."""

    def __init__(self, tables: Sequence[TokenTable]) -> None:
        self._tables = tables
        self._starts = [0, *accumulate(map(len, tables))]

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> np.ndarray:
        number = bisect_right(self._starts, index, hi=len(self._tables)) - 1
        return self._tables[number][index - self._starts[number]]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sequence, int64 [num]."""
        return np.concatenate([table.lengths for table in self._tables])

    @property
    def pieces(self) -> list[TokenTable]:
        """As those of a TokenTable."""
        return [piece for table in self._tables for piece in table.pieces if len(piece)]


@dataclass(frozen=True)
class Tables:
    """Storage of a data set; completions go row by row (chosen, rejected), then the given y' of KTO rows.

    completion_index int64 [n, 2]: where (chosen, rejected) of a row stand, where completions that several
    pairs share are stored once; None: row by row.
    kl_index int64 [n]: where in `completions` the y' of a row stands, -1 for none. max_length: what a prompt
    and its y' may have together. known_digest: what `digest` is, where that is known.
    """

    prompts: TokenTable | JoinedTable
    prompt_index: np.ndarray
    completions: TokenTable | JoinedTable
    desirable: np.ndarray | None = None
    kl_index: np.ndarray | None = None
    max_length: int | None = None
    known_digest: str | None = None
    completion_index: np.ndarray | None = None

    def columns(self) -> dict[str, np.ndarray]:
        """Every array that is there, by name, in a fixed order."""
        found = {
            "prompt_values": self.prompts.values,
            "prompt_offsets": self.prompts.offsets,
            "prompt_index": self.prompt_index,
            "completion_values": self.completions.values,
            "completion_offsets": self.completions.offsets,
            "desirable": self.desirable,
            "kl_index": self.kl_index,
            "completion_index": None if self.completion_index is None else self.completion_index.reshape(-1),
        }
        return {name: column for name, column in found.items() if column is not None}

    @cached_property
    def digest(self) -> str:
        """A hash of all arrays; equal for equal data, wherever they came from."""
        if self.known_digest is not None:
            return self.known_digest
        found = sha256(f"{self.max_length}".encode())
        for name, column in self.columns().items():
            found.update(f" {name} {column.dtype}{column.shape} ".encode())
            found.update(np.ascontiguousarray(column).data)
        return found.hexdigest()


def first_appearances(keys: np.ndarray) -> np.ndarray:
    """The first row with the same key, for each row; int64 [n] from uint64 [n, 2]."""
    # lexsort keeps equal keys in their order, so that each group begins with its first row.
    order = np.lexsort((keys[:, 1], keys[:, 0]))
    ordered = keys[order]
    starts = np.ones(len(keys), dtype=bool)
    starts[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    first = np.empty(len(keys), dtype=np.int64)
    first[order] = order[starts][np.cumsum(starts) - 1]
    return first


def mismatched_rows(prompt_keys: np.ndarray) -> np.ndarray:
    """The next row in file order (cyclic) whose prompt differs, for each row; int64 [n], -1 for none.

    The y' of KTO's z0 (arXiv:2402.01306) is that row's completion: fixed for a data set,
    whatever the seed, the batch or the number of ranks. O(n log n) at most, vectorised.
    """
    num_rows = len(prompt_keys)
    # Row i changes if its successor has another prompt; the answer for a row is the successor of the next
    # change.
    changes = np.flatnonzero(prompt_keys != np.roll(prompt_keys, -1))
    if not len(changes):
        return np.full(num_rows, -1, dtype=np.int64)
    following = np.searchsorted(changes, np.arange(num_rows))
    return (changes[following % len(changes)] + 1) % num_rows


def join_tables(members: Sequence[Tables]) -> Tables:
    """The rows of all members, one behind the other, over their own storage; equal prompts become one.

    A row keeps the y' that it has among its member's rows. Reads every prompt once.
    """
    unpaired = members[0].desirable is not None
    shares_completions = any(tables.completion_index is not None for tables in members)
    parts, extras, kl_index, completion_index = [], [], [], []
    total = sum(len(tables.prompt_index) for tables in members)
    start, extra_start = 0, total
    for tables in members:
        rows = len(tables.prompt_index)
        values, offsets = tables.completions.values, tables.completions.offsets
        # Pairs have no y' behind their completions.
        parts.append(TokenTable(values, offsets[: rows + 1]) if unpaired else tables.completions)
        if shares_completions:
            own = tables.completion_index
            own = np.arange(2 * rows).reshape(-1, 2) if own is None else own
            completion_index.append(own + sum(map(len, parts[:-1])))
        if unpaired:
            extras.append(TokenTable(values, offsets[rows:]))
            index = tables.kl_index
            moved = np.where(index < rows, index + start, index - rows + extra_start)
            kl_index.append(np.where(index < 0, -1, moved))
            start, extra_start = start + rows, extra_start + len(extras[-1])
    starts = np.concatenate(([0], np.cumsum([len(tables.prompts) for tables in members])))
    firsts = first_appearances(np.concatenate([_content_keys(tables.prompts) for tables in members]))
    prompt_index = [
        firsts[tables.prompt_index + first] for tables, first in zip(members, starts[:-1], strict=True)
    ]
    return Tables(
        JoinedTable([tables.prompts for tables in members]),
        np.concatenate(prompt_index),
        JoinedTable([*parts, *extras]),
        np.concatenate([tables.desirable for tables in members]) if unpaired else None,
        np.concatenate(kl_index) if unpaired else None,
        members[0].max_length,
        sha256(" ".join(tables.digest for tables in members).encode()).hexdigest(),
        np.concatenate(completion_index) if shares_completions else None,
    )


def _content_keys(table: TokenTable) -> np.ndarray:
    """uint64 [num, 2]: equal where the sequences are equal."""
    content, found = table.values.data, bytearray()
    for row in range(0, len(table), _BLOCK_ROWS):
        # Plain integers: an array's own take several times as long to slice with.
        bounds = table.offsets[row : row + _BLOCK_ROWS + 1].tolist()
        for start, stop in pairwise(bounds):
            found += blake2b(content[start:stop], digest_size=16).digest()
    return np.frombuffer(found, dtype="<u8").reshape(-1, 2)
