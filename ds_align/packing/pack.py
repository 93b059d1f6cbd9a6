"""A pack of prompt groups as tensors: ids, positions, attention plan and the positions that are scored."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch

from ds_align.batch import Layout, PackedBatch, Segment
from ds_align.packing.table import Group, PreferenceTable


class _Rows:
    """Collects one micro-batch; packed rows are one after the other, padded rows get a width at the end."""

    def __init__(self) -> None:
        self.ids: list[np.ndarray] = []
        self.positions: list[np.ndarray] = []
        self.weights: list[np.ndarray] = []
        self.segments: list[Segment] = []
        self.sources: list[np.ndarray] = []
        self.units: list[int] = []
        self.offset = 0

    def add(self, ids: np.ndarray, first_position: int, weight: int) -> int:
        """Appends tokens with consecutive positions and one weight; returns where they start."""
        start = self.offset
        self.ids.append(ids)
        self.positions.append(np.arange(first_position, first_position + len(ids)))
        self.weights.append(np.full(len(ids), weight, dtype=np.float32))
        self.offset += len(ids)
        return start


def build_batch(
    table: PreferenceTable, groups: Sequence[Group], row_numbers: Sequence[int], layout: Layout
) -> PackedBatch:
    """The tensors of one pack.

    table, groups: of the plan; no groups: a dummy of one token that scores nothing. row_numbers: the data
    set's row of each preference of the global batch.
    """
    rows = _Rows()
    for group in groups:
        parts = [group.units] if layout is Layout.SHARED else [(unit,) for unit in group.units]
        uses = Counter(unit for number in group.preferences for unit in table.members[number])
        for units in parts:
            _lay_out(rows, table, group.prompt, {unit: uses[unit] for unit in units})
    if not rows.ids:
        # Empty packs still run forward and backward: a rank that skips one deadlocks ZeRO-3's all-gather.
        rows.add(np.zeros(1, dtype=np.int64), 0, 0)
        rows.segments.append(Segment((0, 1), ((0, 1),)))
    sources = rows.sources
    if layout is Layout.PADDED:
        inputs, sources = _pad(rows)
    else:
        inputs = _one_row(rows)
    completions = [table.completions[unit] for unit in rows.units]
    lengths = np.array([len(ids) for ids in completions], dtype=np.int64)
    place = {unit: number for number, unit in enumerate(rows.units)}
    numbers = [number for group in groups for number in group.preferences]
    width = len(table.members[0])
    members = [[place[unit] for unit in table.members[number]] for number in numbers]
    prompts = [len(table.prompts[table.prompt_of[unit]]) for unit in rows.units]
    longest = max((p + c for p, c in zip(prompts, lengths, strict=True)), default=0)
    return PackedBatch(
        **inputs,
        source_index=_tensor(sources),
        labels=_tensor(completions),
        completion_index=torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)),
        completion_lengths=torch.from_numpy(lengths),
        units=torch.tensor(rows.units, dtype=torch.long),
        members=torch.tensor(members, dtype=torch.long).reshape(-1, width),
        positions=torch.tensor(numbers, dtype=torch.long),
        desirable=None
        if table.desirable is None
        else torch.tensor([table.desirable[n] for n in numbers]).bool(),
        rows=tuple(int(row_numbers[number]) for number in numbers),
        num_tokens=rows.offset if groups else 0,
        num_unshared_tokens=int(sum(prompts) + lengths.sum()),
        num_padded_tokens=int(longest) * len(lengths),
    )


def _lay_out(rows: _Rows, table: PreferenceTable, prompt: int, uses: dict[int, int]) -> None:
    """One prompt and its completions, each of which sees the prompt and itself.

    uses: for each completion, in order, the number of times that a preference has it.
    """
    prompt_ids = table.prompts[prompt]
    length = len(prompt_ids)
    start = rows.add(prompt_ids, 0, sum(uses.values()))
    for number, (unit, count) in enumerate(uses.items()):
        ids = table.completions[unit]
        own = rows.add(ids, length, count)
        stop = own + len(ids)
        if number == 0:
            # The first completion follows its prompt directly: one causal segment serves both.
            rows.segments.append(Segment((start, stop), ((start, stop),)))
        else:
            rows.segments.append(Segment((own, stop), ((start, start + length), (own, stop))))
        # The last prompt position predicts the first token of every completion.
        rows.sources.append(np.concatenate(([start + length - 1], np.arange(own, stop - 1))))
        rows.units.append(unit)


def _one_row(rows: _Rows) -> dict:
    return {
        "input_ids": _tensor(rows.ids)[None],
        "position_ids": _tensor(rows.positions)[None],
        "attention_mask": None,
        "token_weights": torch.from_numpy(np.concatenate(rows.weights))[None],
        "segments": tuple(rows.segments),
    }


def _pad(rows: _Rows) -> tuple[dict, list[np.ndarray]]:
    """Rows of equal width, one a completion, filled at the right; sources move along with their rows."""
    spans = [segment.query for segment in rows.segments]
    width = max(stop - start for start, stop in spans)
    ids, positions = _tensor(rows.ids), _tensor(rows.positions)
    shape = (len(spans), width)
    inputs = {
        name: torch.zeros(shape, dtype=torch.long) for name in ("input_ids", "position_ids", "attention_mask")
    }
    weights = torch.from_numpy(np.concatenate(rows.weights))
    inputs["token_weights"] = torch.zeros(shape)
    for number, (start, stop) in enumerate(spans):
        inputs["token_weights"][number, : stop - start] = weights[start:stop]
        inputs["input_ids"][number, : stop - start] = ids[start:stop]
        inputs["position_ids"][number, : stop - start] = positions[start:stop]
        inputs["attention_mask"][number, : stop - start] = 1
    sources = [
        source - start + number * width
        for number, (source, (start, _)) in enumerate(zip(rows.sources, spans, strict=False))
    ]
    return {**inputs, "segments": None}, sources


def _tensor(parts: Sequence[np.ndarray]) -> torch.Tensor:
    joined = np.concatenate(parts) if parts else np.zeros(0)
    return torch.from_numpy(joined.astype(np.int64))
