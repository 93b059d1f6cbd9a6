"""The distinct prompts and completions of a global batch, and the prompt groups that are made of them."""

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
    """One prompt, distinct completions of it, and the preferences (by position) that are trained here.

    cost: see CostModel. longest: tokens of the prompt with its longest completion.
    """

    prompt: int
    units: tuple[int, ...]
    preferences: tuple[int, ...]
    num_tokens: int
    cost: float = 0.0
    longest: int = 0


Pack = tuple[Group, ...]
