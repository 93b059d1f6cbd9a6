"""The plan of one optimizer step: which completions stand on which rank, in which micro-batch.

A plan is a pure function of the preferences of the global batch, the world size and the layout. Every
rank computes the whole plan, so that the number of micro-batches, the global counts and the place of
every pair are known everywhere without communication.

The unit is a prompt group: one prompt and its completions. Pairs of one prompt share it, and a completion
that stands in several pairs is computed once, as long as the group fits into a pack.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ds_align.batch import Layout, Pair, Unpaired


@dataclass(frozen=True, slots=True)
class PreferenceTable:
    """The distinct prompts and completions of one global batch; completions are numbered as units.

    members: units of each preference, [num_preferences, k]; kl_units: unit of y' or -1, one a preference.
    """

    prompts: list[np.ndarray]
    completions: list[np.ndarray]
    prompt_of: list[int]
    members: list[tuple[int, ...]]
    kl_units: list[int]
    desirable: list[bool] | None

    @classmethod
    def from_preferences(
        cls, preferences: Sequence[Pair | Unpaired], *, kl_from_own: bool = False, with_kl: bool = True
    ) -> PreferenceTable:
        """Numbers the distinct prompts, and the distinct completions under each.

        kl_from_own: z0 is taken over the completions themselves instead of the mismatched ones (KTO without
        a reference). with_kl: whether there is a z0 at all.
        """
        prompt_numbers: dict[bytes, int] = {}
        unit_numbers: dict[tuple[int, bytes], int] = {}
        table = cls([], [], [], [], [], None)

        def unit(prompt: int, ids: np.ndarray) -> int:
            key = (prompt, ids.tobytes())
            if key not in unit_numbers:
                unit_numbers[key] = len(table.completions)
                table.completions.append(ids)
                table.prompt_of.append(prompt)
            return unit_numbers[key]

        for item in preferences:
            key = item.prompt_ids.tobytes()
            if key not in prompt_numbers:
                prompt_numbers[key] = len(table.prompts)
                table.prompts.append(item.prompt_ids)
            prompt = prompt_numbers[key]
            if isinstance(item, Pair):
                table.members.append((unit(prompt, item.chosen_ids), unit(prompt, item.rejected_ids)))
                table.kl_units.append(-1)
            else:
                own = unit(prompt, item.completion_ids)
                table.members.append((own,))
                if not with_kl:
                    table.kl_units.append(-1)
                elif kl_from_own:
                    table.kl_units.append(own)
                else:
                    table.kl_units.append(-1 if item.kl_ids is None else unit(prompt, item.kl_ids))
        unpaired = bool(preferences) and isinstance(preferences[0], Unpaired)
        desirable = [bool(item.desirable) for item in preferences] if unpaired else None
        return cls(
            table.prompts, table.completions, table.prompt_of, table.members, table.kl_units, desirable
        )

    def num_tokens(self, prompt: int, units: Sequence[int], layout: Layout) -> int:
        """Tokens that a group of distinct completions of one prompt needs in a layout."""
        copies = 1 if layout is Layout.SHARED else len(units)
        return copies * len(self.prompts[prompt]) + sum(len(self.completions[unit]) for unit in units)


@dataclass(frozen=True, slots=True)
class Group:
    """One prompt, distinct completions of it, and the preferences (by position) that are trained here."""

    prompt: int
    units: tuple[int, ...]
    preferences: tuple[int, ...]
    num_tokens: int


Pack = tuple[Group, ...]


@dataclass(frozen=True, slots=True)
class StepPlan:
    """Packs by [rank][micro-batch], as many on every rank; an empty pack is a dummy."""

    train: list[list[Pack]]
    reference: list[list[Pack]]
    kl: list[list[Pack]]
    rank_tokens: list[int]
    num_oversized: int

    @property
    def rank_imbalance(self) -> float:
        """Tokens of the fullest rank over the mean of the ranks."""
        return max(self.rank_tokens) * len(self.rank_tokens) / max(1, sum(self.rank_tokens))


def epoch_order(num_rows: int, *, seed: int, epoch: int, sampling: str) -> np.ndarray:
    """Row numbers of one epoch, int64 [num_rows]: a function of seed and epoch alone (never of ranks)."""
    if sampling == "sequential":
        return np.arange(num_rows)
    return np.random.default_rng([seed, epoch]).permutation(num_rows)


def global_batch_rows(order: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """Cuts an epoch's order into global batches; the last may be smaller, nothing is dropped."""
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def plan_step(
    table: PreferenceTable,
    *,
    world_size: int,
    layout: Layout,
    pack_tokens: int,
    reference_tokens: int,
    needs_reference: bool,
) -> StepPlan:
    """Plans one global batch.

    pack_tokens: the most tokens of a micro-batch (a larger preference gets a pack of its own, counted).
    reference_tokens: the same for the packs that the reference scores without gradient.
    """
    groups = _split_groups(table, world_size, layout, pack_tokens)
    by_rank = _assign_to_ranks(groups, world_size)
    train = [_bin(rank_groups, pack_tokens) for rank_groups in by_rank]
    kl, reference = [], []
    for rank_groups in by_rank:
        kl_units = _kl_units(table, rank_groups)
        kl.append(_bin(_score_groups(table, kl_units, layout, reference_tokens), reference_tokens))
        units = {unit for group in rank_groups for unit in group.units} | set(kl_units)
        scored = sorted(units) if needs_reference else []
        reference.append(_bin(_score_groups(table, scored, layout, reference_tokens), reference_tokens))
    oversized = sum(group.num_tokens > pack_tokens for group in groups)
    rank_tokens = [sum(group.num_tokens for group in rank_groups) for rank_groups in by_rank]
    return StepPlan(_equalise(train, 1), _equalise(reference, 0), _equalise(kl, 0), rank_tokens, oversized)


def _kl_units(table: PreferenceTable, groups: Sequence[Group]) -> list[int]:
    units = {table.kl_units[number] for group in groups for number in group.preferences}
    return sorted(units - {-1})


def _split_groups(table: PreferenceTable, world_size: int, layout: Layout, pack_tokens: int) -> list[Group]:
    """Groups the preferences by prompt; a group that no pack or no fair share of a rank holds is split."""
    by_prompt: dict[int, list[int]] = {}
    for number, members in enumerate(table.members):
        by_prompt.setdefault(table.prompt_of[members[0]], []).append(number)
    total = sum(
        table.num_tokens(prompt, _distinct(table, numbers), layout) for prompt, numbers in by_prompt.items()
    )
    limit = min(pack_tokens, -(-total // world_size))
    groups = []
    for prompt, numbers in by_prompt.items():
        part: list[int] = []
        for number in numbers:
            if part and table.num_tokens(prompt, _distinct(table, [*part, number]), layout) > limit:
                groups.append(_group(table, prompt, part, layout))
                part = []
            part.append(number)
        groups.append(_group(table, prompt, part, layout))
    return groups


def _distinct(table: PreferenceTable, numbers: Sequence[int]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(unit for number in numbers for unit in table.members[number]))


def _group(table: PreferenceTable, prompt: int, numbers: Sequence[int], layout: Layout) -> Group:
    units = _distinct(table, numbers)
    return Group(prompt, units, tuple(numbers), table.num_tokens(prompt, units, layout))


def _score_groups(table: PreferenceTable, units: Sequence[int], layout: Layout, limit: int) -> list[Group]:
    """Groups without preferences: completions that are scored and not trained."""
    parts: dict[int, list[list[int]]] = {}
    for unit in units:
        prompt = table.prompt_of[unit]
        prompt_parts = parts.setdefault(prompt, [[]])
        if prompt_parts[-1] and table.num_tokens(prompt, [*prompt_parts[-1], unit], layout) > limit:
            prompt_parts.append([])
        prompt_parts[-1].append(unit)
    return [
        Group(prompt, tuple(part), (), table.num_tokens(prompt, part, layout))
        for prompt, prompt_parts in parts.items()
        for part in prompt_parts
    ]


def _largest_first(groups: Sequence[Group]) -> list[Group]:
    return sorted(groups, key=lambda group: (-group.num_tokens, group.units))


def _assign_to_ranks(groups: Sequence[Group], world_size: int) -> list[list[Group]]:
    """Largest first, each to the rank with the fewest tokens: deterministic, and at most 4/3 of the best."""
    ranks: list[list[Group]] = [[] for _ in range(world_size)]
    tokens = [0] * world_size
    for group in _largest_first(groups):
        target = tokens.index(min(tokens))
        ranks[target].append(group)
        tokens[target] += group.num_tokens
    return ranks


def _bin(groups: Sequence[Group], limit: int) -> list[Pack]:
    """First fit, largest first, into packs of at most limit tokens (one group alone may exceed it)."""
    packs: list[list[Group]] = []
    room: list[int] = []
    for group in _largest_first(groups):
        place = next((number for number, left in enumerate(room) if group.num_tokens <= left), None)
        if place is None:
            packs.append([])
            room.append(limit)
            place = len(packs) - 1
        packs[place].append(group)
        room[place] -= group.num_tokens
    return [tuple(pack) for pack in packs]


def _equalise(ranks: list[list[Pack]], least: int) -> list[list[Pack]]:
    """Appends dummies up to the fullest rank's number of packs."""
    # A rank with fewer passes would leave the others waiting in ZeRO-3's gathers.
    most = max([least, *(len(packs) for packs in ranks)])
    return [packs + [()] * (most - len(packs)) for packs in ranks]
