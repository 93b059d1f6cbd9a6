"""Prompt groups spread over ranks and packs, so that no rank waits long for another.

Ranks wait twice: at the end of a step for the rank with the most work, and under ZeRO-3 at every pack for the
rank whose pack is the largest. All of it is deterministic, so that every rank finds the same plan by itself.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from heapq import heapify, heappop, heappush, heapreplace

from ds_align.packing.table import Group, Pack

# Closer to the mean than this nothing is gained that a clock would show.
_CLOSE = 1.002
# Above this a group may be split, which computes its prompt (and what its parts share) once more.
_UNEVEN = 1.03
_MAX_ROUNDS = 8

Split = Callable[[Group], tuple[Group, Group]]


def cost_of(groups: Sequence[Group]) -> float:
    """Cost of some groups together."""
    return sum(group.cost for group in groups)


def assign_to_ranks(
    groups: Sequence[Group], world_size: int, split: Split | None = None
) -> list[list[Group]]:
    """Groups by rank, the fullest rank as near to the mean as moves and swaps bring it.

    The start is largest first, each to the emptiest rank (at most 4/3 of the best, Graham 1969); then the
    fullest rank gives to others until nothing helps. split halves a group of several preferences, which is
    done in the fullest rank as long as that is too full and gets less by it.
    """
    ranks: list[list[Group]] = [[] for _ in range(world_size)]
    loads = [(0.0, rank) for rank in range(world_size)]
    for group in _largest_first(groups):
        load, rank = loads[0]
        ranks[rank].append(group)
        heapreplace(loads, (load + group.cost, rank))
    _exchange(ranks)
    for _ in range(world_size if split is not None else 0):
        changed = _split_one(ranks, split)
        if changed is None:
            break
        ranks = changed
    return ranks


def _split_one(ranks: list[list[Group]], split: Split) -> list[list[Group]] | None:
    """The ranks with a group of the fullest one halved, where that brings it down; else None."""
    loads = [cost_of(rank) for rank in ranks]
    most = max(loads)
    if most <= _UNEVEN * sum(loads) / len(ranks):
        return None
    fullest = loads.index(most)
    for group in _largest_first(ranks[fullest]):
        if len(group.preferences) < 2:
            continue
        changed = [list(rank) for rank in ranks]
        changed[fullest].remove(group)
        changed[fullest] += split(group)
        _exchange(changed)
        if max(cost_of(rank) for rank in changed) < most:
            return changed
    return None


def _largest_first(groups: Sequence[Group]) -> list[Group]:
    return sorted(groups, key=lambda group: (-group.cost, -group.num_tokens, group.units))


def _exchange(ranks: list[list[Group]]) -> None:
    """Moves groups from the fullest rank to others, or swaps them for smaller ones, in place."""
    loads = [cost_of(rank) for rank in ranks]
    goal = _CLOSE * sum(loads) / len(ranks)
    for rank in ranks:
        rank.sort(key=_size)
    for _ in range(_MAX_ROUNDS * len(ranks)):
        fullest = loads.index(max(loads))
        if loads[fullest] <= goal:
            return
        for other in sorted(range(len(ranks)), key=loads.__getitem__):
            found = _best_exchange(ranks[fullest], ranks[other], loads[fullest] - loads[other])
            if found is None:
                continue
            given, taken = found
            _move(given, ranks[fullest], ranks[other])
            if taken is not None:
                _move(taken, ranks[other], ranks[fullest])
            loads[fullest], loads[other] = cost_of(ranks[fullest]), cost_of(ranks[other])
            break
        else:
            return


def _size(group: Group) -> tuple:
    return group.cost, group.units


def _move(group: Group, source: list[Group], target: list[Group]) -> None:
    source.remove(group)
    target.append(group)
    target.sort(key=_size)


def _best_exchange(full: list[Group], empty: list[Group], gap: float) -> tuple[Group, Group | None] | None:
    """What a rank should give to one that has gap less (and take for it) so that both come near their mean.

    Both sorted by cost. None where nothing brings them nearer.
    """
    costs = [0.0, *(group.cost for group in empty)]
    best, least = None, gap / 2 * (1 - 1e-9)
    for given in full:
        place = bisect_left(costs, given.cost - gap / 2)
        for number in (place - 1, place):
            if 0 <= number < len(costs):
                distance = abs(given.cost - costs[number] - gap / 2)
                if distance < least:
                    best, least = (given, empty[number - 1] if number else None), distance
    return best


def pack_ranks(
    ranks: Sequence[Sequence[Group]], limit: int, *, least: int, padded: bool = False
) -> list[list[Pack]]:
    """Each rank's groups in packs of at most limit tokens (more for a group alone), as many on every rank.

    The number is what the fullest rank needs, and at least `least`; a rank with fewer groups gets dummies.
    The packs that the ranks compute at the same time are of like cost. padded: each completion is a row as
    wide as the longest of its pack, so that rows of like length stand together; the limit counts the padding.
    """
    if padded:
        return _pack_padded(ranks, limit, least)
    # A rank with fewer passes would leave the others waiting in ZeRO-3's gathers.
    tight = [_first_fit(groups, limit) for groups in ranks]
    count = max([least, *(len(packs) for packs in tight)])
    if count < 2:
        return [[tuple(pack) for pack in packs] + [()] * (count - len(packs)) for packs in tight]
    ordered = [_largest_first(groups) for groups in ranks]
    goal = max(cost_of(groups) for groups in ranks) * _CLOSE
    profile = [0.0] * count
    best, least_wait = None, float("inf")
    for _ in range(_MAX_ROUNDS):
        packs = [
            _largest_packs_first(_spread(groups, profile, limit) or _with_dummies(first, count))
            for groups, first in zip(ordered, tight, strict=True)
        ]
        # What the ranks wait for at each pack: others may be as large without cost.
        profile = [max(cost_of(pack) for pack in column) for column in zip(*packs, strict=True)]
        if sum(profile) >= least_wait * (1 - 1e-3):
            break
        best, least_wait = packs, sum(profile)
        if least_wait <= goal:
            break
    used = [number for number, column in enumerate(zip(*best, strict=True)) if any(column)]
    return [[tuple(packs[number]) for number in used] for packs in best]


def _pack_padded(ranks: Sequence[Sequence[Group]], limit: int, least: int) -> list[list[Pack]]:
    ordered = [sorted(groups, key=lambda group: (-group.longest, group.units)) for groups in ranks]
    count = max([least, *(len(_rows_in_order(groups, limit)) for groups in ordered)])
    found = []
    for groups in ordered:
        # The least that as many packs can hold: then they are of like size.
        limits = range(1, limit + 1)
        place = bisect_left(limits, -count, key=lambda most: -len(_rows_in_order(groups, most)))
        packs = _with_dummies(_rows_in_order(groups, limits[min(place, limit - 1)]), count)
        found.append([tuple(pack) for pack in packs])
    return found


def _rows_in_order(groups: Sequence[Group], limit: int) -> list[list[Group]]:
    """Groups, longest first, into packs of at most limit tokens with their padding, one after the other."""
    packs: list[list[Group]] = []
    num_rows = 0
    for group in groups:
        num_rows += len(group.units)
        if not packs or num_rows * packs[-1][0].longest > limit:
            packs.append([])
            num_rows = len(group.units)
        packs[-1].append(group)
    return packs


def _with_dummies(packs: list[list[Group]], count: int) -> list[list[Group]]:
    return packs + [[]] * (count - len(packs))


def _largest_packs_first(packs: list[list[Group]]) -> list[list[Group]]:
    return sorted(packs, key=lambda pack: -cost_of(pack))


def _first_fit(groups: Sequence[Group], limit: int) -> list[list[Group]]:
    """First fit, largest first: few packs."""
    packs: list[list[Group]] = []
    room: list[int] = []
    for group in sorted(groups, key=lambda group: (-group.num_tokens, group.units)):
        place = next((number for number, left in enumerate(room) if group.num_tokens <= left), None)
        if place is None:
            packs.append([])
            room.append(limit)
            place = len(packs) - 1
        packs[place].append(group)
        room[place] -= group.num_tokens
    return packs


def _spread(groups: Sequence[Group], profile: Sequence[float], limit: int) -> list[list[Group]] | None:
    """Groups, largest first, each into the pack that is furthest below its profile; None if one fits nowhere.

    profile: a cost for each pack.
    """
    packs: list[list[Group]] = [[] for _ in profile]
    room = [limit] * len(profile)
    # The smallest entry is the pack with the most left.
    left = [(-cost, number) for number, cost in enumerate(profile)]
    heapify(left)
    for group in groups:
        full = []
        while left:
            below, number = left[0]
            if group.num_tokens <= room[number] or not packs[number]:
                break
            full.append(heappop(left))
        if not left:
            return None
        packs[number].append(group)
        room[number] -= group.num_tokens
        heapreplace(left, (below + group.cost, number))
        for entry in full:
            heappush(left, entry)
    return packs
