"""Token sequences in flat arrays, and the pairing of rows with foreign completions."""

from __future__ import annotations

from array import array

import numpy as np


class TokenTable:
    """Many token sequences in one int32 array; `offsets` int64 [num + 1]."""

    def __init__(self, values: np.ndarray, offsets: np.ndarray) -> None:
        self.values = values
        self.offsets = offsets

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        return self.values[self.offsets[index] : self.offsets[index + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sequence, int64 [num]."""
        return np.diff(self.offsets)


class GrowingTable:
    """A TokenTable while it is written."""

    def __init__(self) -> None:
        self._values = array("i")
        self._offsets = array("q", [0])

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def append(self, ids: np.ndarray) -> None:
        """Add one sequence behind the others."""
        self._values.frombytes(np.ascontiguousarray(ids, dtype=np.intc).tobytes())
        self._offsets.append(len(self._values))

    def finish(self) -> TokenTable:
        """The table as it stands; nothing may be appended afterwards."""
        return TokenTable(
            np.frombuffer(self._values, dtype=np.intc).astype(np.int32, copy=False), as_int64(self._offsets)
        )


def as_int64(values: array) -> np.ndarray:
    """The numbers of an array of type "q", int64 [num]; a view."""
    return np.frombuffer(values, dtype=np.int64) if len(values) else np.zeros(0, dtype=np.int64)


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
