"""The plan of one optimizer step: which completions stand on which rank, in which micro-batch.

A plan is a pure function of the preferences of the global batch, the world size, the layout and the model's
cost. Every rank computes the whole plan, so that the number of micro-batches, the global counts and the place
of every pair are known everywhere without communication.

The unit is a prompt group: one prompt and its completions. Pairs of one prompt share it, and a completion
that stands in several pairs is computed once, as long as the group fits into a pack.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ds_align.batch import Layout
from ds_align.packing.balance import assign_to_ranks, cost_of, pack_ranks
from ds_align.packing.cost import CostModel
from ds_align.packing.table import Group, Pack, PreferenceTable

_TOKENS = CostModel()


@dataclass(frozen=True, slots=True)
class StepPlan:
    """Packs by [rank][micro-batch], as many on every rank; an empty pack is a dummy.

    rank_tokens: tokens of each rank's training packs.
    """

    train: list[list[Pack]]
    reference: list[list[Pack]]
    kl: list[list[Pack]]
    rank_tokens: list[int]
    num_oversized: int

    @property
    def rank_costs(self) -> list[float]:
        """Cost of each rank's training packs."""
        return [sum(cost_of(pack) for pack in packs) for packs in self.train]

    @property
    def rank_imbalance(self) -> float:
        """Cost of the fullest rank over the mean of the ranks."""
        costs = self.rank_costs
        return max(costs) * len(costs) / max(1.0, sum(costs))

    @property
    def pack_imbalance(self) -> float:
        """The same where the ranks wait for each other at every pack: sum of the largest over the mean."""
        columns = zip(*self.train, strict=True)
        waited = sum(max(cost_of(pack) for pack in column) for column in columns)
        return waited * len(self.train) / max(1.0, sum(self.rank_costs))


@dataclass(frozen=True, slots=True)
class _Grouping:
    """What groups of a table are made with."""

    table: PreferenceTable
    layout: Layout
    cost: CostModel

    def group(self, prompt: int, numbers: Sequence[int]) -> Group:
        """The group that trains these preferences of a prompt."""
        return self._group(prompt, self.distinct(numbers), tuple(numbers))

    def scored(self, prompt: int, units: Sequence[int]) -> Group:
        """A group without preferences: completions that are scored and not trained."""
        return self._group(prompt, tuple(units), ())

    def distinct(self, numbers: Sequence[int]) -> tuple[int, ...]:
        """Completions of preferences, each once."""
        return tuple(dict.fromkeys(unit for number in numbers for unit in self.table.members[number]))

    def size(self, prompt: int, units: Sequence[int]) -> int:
        """What a group of these completions takes of a pack's tokens when it stands alone."""
        if self.layout is Layout.PADDED:
            return len(units) * self._longest(prompt, units)
        return self.table.num_tokens(prompt, units, self.layout)

    def halves(self, group: Group) -> tuple[Group, Group]:
        """A group of several preferences as two, cut where the larger one costs least."""

        def cut(place: int) -> tuple[Group, Group]:
            first, second = group.preferences[:place], group.preferences[place:]
            return self.group(group.prompt, first), self.group(group.prompt, second)

        cuts = (cut(place) for place in range(1, len(group.preferences)))
        return min(cuts, key=lambda parts: max(part.cost for part in parts))

    def _group(self, prompt: int, units: tuple[int, ...], numbers: tuple[int, ...]) -> Group:
        table = self.table
        lengths = [len(table.completions[unit]) for unit in units]
        return Group(
            prompt,
            units,
            numbers,
            table.num_tokens(prompt, units, self.layout),
            cost=self.cost.of(len(table.prompts[prompt]), lengths, self.layout),
            longest=self._longest(prompt, units),
        )

    def _longest(self, prompt: int, units: Sequence[int]) -> int:
        completions = self.table.completions
        return len(self.table.prompts[prompt]) + max(len(completions[unit]) for unit in units)


def plan_step(
    table: PreferenceTable,
    *,
    world_size: int,
    layout: Layout,
    pack_tokens: int,
    reference_tokens: int,
    needs_reference: bool,
    cost: CostModel = _TOKENS,
    group_tokens: int | None = None,
) -> StepPlan:
    """Plans one global batch.

    pack_tokens: the most tokens of a micro-batch (a larger preference gets a pack of its own, counted); of
    padded rows with their padding. group_tokens: up to so many (default: pack_tokens) the preferences of one
    prompt stay in one pack, which computes what they share once.
    reference_tokens: the same for the packs that the reference scores without gradient.

    The fullest rank costs at most 1.03 times the mean for usual mixes of lengths with eight groups a rank or
    more; a preference is never cut, so the largest one is a bound that no plan can go below.
    """
    grouping = _Grouping(table, layout, cost)
    most = max(pack_tokens, group_tokens or 0)
    by_rank = assign_to_ranks(_split_groups(grouping, world_size, most), world_size, grouping.halves)
    kl, reference = [], []
    for rank_groups in by_rank:
        kl_units = _kl_units(table, rank_groups)
        kl.append(_score_groups(grouping, kl_units, reference_tokens))
        units = {unit for group in rank_groups for unit in group.units} | set(kl_units)
        reference.append(_score_groups(grouping, sorted(units) if needs_reference else [], reference_tokens))
    padded = layout is Layout.PADDED
    return StepPlan(
        pack_ranks(by_rank, pack_tokens, least=1, padded=padded),
        pack_ranks(reference, reference_tokens, least=0, padded=padded),
        pack_ranks(kl, reference_tokens, least=0, padded=padded),
        [sum(group.num_tokens for group in rank_groups) for rank_groups in by_rank],
        sum(
            grouping.size(group.prompt, group.units) > most
            for rank_groups in by_rank
            for group in rank_groups
        ),
    )


def plan_scoring(
    table: PreferenceTable,
    units: Sequence[int],
    *,
    world_size: int,
    layout: Layout,
    pack_tokens: int,
    cost: CostModel = _TOKENS,
) -> list[list[Pack]]:
    """Packs by [rank][number] of completions that are scored and not trained; as many on every rank."""
    grouping = _Grouping(table, layout, cost)
    groups = _score_groups(grouping, units, pack_tokens)
    padded = layout is Layout.PADDED
    return pack_ranks(assign_to_ranks(groups, world_size), pack_tokens, least=0, padded=padded)


def _kl_units(table: PreferenceTable, groups: Sequence[Group]) -> list[int]:
    units = {table.kl_units[number] for group in groups for number in group.preferences}
    return sorted(units - {-1})


def _split_groups(grouping: _Grouping, world_size: int, most_tokens: int) -> list[Group]:
    """Groups the preferences by prompt; a group that no pack or no fair share of a rank holds is split."""
    table = grouping.table
    by_prompt: dict[int, list[int]] = {}
    for number, members in enumerate(table.members):
        by_prompt.setdefault(table.prompt_of[members[0]], []).append(number)
    total = sum(grouping.size(prompt, grouping.distinct(numbers)) for prompt, numbers in by_prompt.items())
    limit = min(most_tokens, -(-total // world_size))
    groups = []
    for prompt, numbers in by_prompt.items():
        part: list[int] = []
        for number in numbers:
            if part and grouping.size(prompt, grouping.distinct([*part, number])) > limit:
                groups.append(grouping.group(prompt, part))
                part = []
            part.append(number)
        groups.append(grouping.group(prompt, part))
    return groups


def _score_groups(grouping: _Grouping, units: Sequence[int], limit: int) -> list[Group]:
    """Groups of completions that are scored and not trained, none larger than a pack if it can be cut."""
    parts: dict[int, list[list[int]]] = {}
    for unit in units:
        prompt = grouping.table.prompt_of[unit]
        prompt_parts = parts.setdefault(prompt, [[]])
        if prompt_parts[-1] and grouping.size(prompt, [*prompt_parts[-1], unit]) > limit:
            prompt_parts.append([])
        prompt_parts[-1].append(unit)
    return [grouping.scored(prompt, part) for prompt, prompt_parts in parts.items() for part in prompt_parts]
