"""The order of an epoch and its cuts into global batches: functions of seed, epoch and sizes alone."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import numpy as np


def epoch_order(
    num_rows: int,
    *,
    seed: int,
    epoch: int,
    sampling: str,
    prompt_keys: np.ndarray | None = None,
    batch_size: int = 1,
) -> np.ndarray:
    """Row numbers of one epoch, int64 [num_rows]: a function of its arguments alone (never of ranks).

    prompt_keys: int64 [num_rows], equal where prompts are equal. With them, rows of one prompt stand in one
    global batch of batch_size rows, as far as it holds them; the order of the prompts is still random. Where
    no prompt returns the order is that without them.
    """
    if sampling == "sequential":
        return np.arange(num_rows)
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(num_rows)
    if prompt_keys is None:
        return order
    keys = prompt_keys[order]
    by_prompt = order[np.argsort(keys, kind="stable")]
    sizes = np.unique(keys, return_counts=True)[1]
    if len(sizes) == num_rows:
        return order
    starts = np.cumsum(sizes) - sizes
    groups = generator.permutation(len(sizes))
    pieces = _cut(starts[groups], sizes[groups], batch_size)
    placed = pieces[list(_fill_batches(pieces[:, 1].tolist(), batch_size))]
    ends = placed[:, 1].cumsum()
    first_of_piece = np.repeat(placed[:, 0] - ends + placed[:, 1], placed[:, 1])
    return by_prompt[first_of_piece + np.arange(num_rows)]


def global_batch_rows(order: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """Cuts an epoch's order into global batches; the last may be smaller, nothing is dropped."""
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def _cut(starts: np.ndarray, sizes: np.ndarray, most: int) -> np.ndarray:
    """Each range of rows in parts of `most` and what is left of it: (start, size) by part, in order."""
    counts = -(-sizes // most)
    owners = np.repeat(np.arange(len(sizes)), counts)
    skipped = (np.arange(len(owners)) - (counts.cumsum() - counts)[owners]) * most
    return np.stack([starts[owners] + skipped, np.minimum(most, sizes[owners] - skipped)], axis=1)


class _Pieces:
    """Parts of prompt groups, by their numbers in random order, each of at most a batch's rows."""

    def __init__(self, sizes: list[int]) -> None:
        self.sizes = sizes
        self.num_rows = sum(sizes)
        self._waiting: dict[int, deque[int]] = {}
        for number, size in enumerate(sizes):
            self._waiting.setdefault(size, deque()).append(number)
        self._is_taken = [False] * len(sizes)
        self._first = 0

    def first(self) -> int:
        """The first piece that waits."""
        while self._is_taken[self._first]:
            self._first += 1
        return self._first

    def take(self, size: int) -> int:
        """Takes the first piece of a size away."""
        number = self._waiting[size].popleft()
        self._is_taken[number] = True
        self.num_rows -= size
        return number

    def put_back(self, number: int) -> None:
        """Undoes the last take of this size."""
        size = self.sizes[number]
        self._waiting[size].appendleft(number)
        self._is_taken[number] = False
        self._first = min(self._first, number)
        self.num_rows += size

    def sizes_that_make(self, room: int) -> list[int] | None:
        """Sizes of waiting pieces whose sum is room; None where there are none."""
        # Bit n of a number says whether the sizes so far, as often as they are there, can make n.
        reached = [(0, 1)]
        # Large ones first: small ones fill what is left of later batches.
        for size in sorted(self._waiting, reverse=True):
            sums, left, copies = reached[-1][1], min(len(self._waiting[size]), room // size), 1
            while left:
                copies = min(copies, left)
                sums |= sums << (size * copies)
                left -= copies
                copies *= 2
            reached.append((size, sums & ((2 << room) - 1)))
            if sums >> room & 1:
                break
        if not reached[-1][1] >> room & 1:
            return None
        found = []
        for (size, _), (_, before) in zip(reached[:0:-1], reached[-2::-1], strict=True):
            while not before >> room & 1:
                found.append(size)
                room -= size
        return found


def _fill_batches(sizes: list[int], batch_size: int) -> Iterator[int]:
    """The numbers of the pieces in an order that cuts few of them at the borders of batches.

    A batch takes the first waiting pieces while they fit. What is left of it is filled exactly by others, if
    need be instead of the last ones that it took; where nothing does, the next piece lies across the border.
    """
    pieces = _Pieces(sizes)
    carried = 0
    while pieces.num_rows:
        room = min(batch_size - carried, pieces.num_rows)
        taken: list[int] = []
        while room and sizes[pieces.first()] <= room:
            taken.append(pieces.take(sizes[pieces.first()]))
            room -= sizes[taken[-1]]
        carried = 0
        if room and not _complete(pieces, taken, room):
            taken.append(pieces.take(sizes[pieces.first()]))
            carried = sizes[taken[-1]] - room
        yield from taken


def _complete(pieces: _Pieces, taken: list[int], room: int) -> bool:
    """Fills the room that taken leaves in a batch exactly, or says that no pieces do."""
    kept = list(taken)
    while (found := pieces.sizes_that_make(room)) is None and kept:
        room += pieces.sizes[kept[-1]]
        pieces.put_back(kept.pop())
    if found is None:
        for number in taken:
            pieces.take(pieces.sizes[number])
        return False
    taken[:] = kept + [pieces.take(size) for size in found]
    return True
