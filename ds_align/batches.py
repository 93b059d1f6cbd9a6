"""A data set as the global batches of a run: order, plan and packs, without an engine.

Everything here is a function of settings, data, layout, number of ranks and rank. Nothing communicates and
nothing touches the device, so tools may plan a run that they do not train.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch

from ds_align.batch import GlobalBatch, Layout, PackedBatch
from ds_align.config import METHODS, BaseConfig
from ds_align.data import PreferenceDataset
from ds_align.packing import (
    CostModel,
    PreferenceTable,
    build_batch,
    epoch_order,
    global_batch_rows,
    make_ahead,
    plan_step,
)

# Packs of this size keep the matrix products efficient; larger ones cost memory and gain little.
# Measured on one core: from 512 tokens on a pack's size changes its memory, not its speed.
_PACK_TOKENS = {"cpu": 512, "cuda": 16384}
# A prompt with many answers would be cut into several small packs and computed in each, as would answers that
# stand in several pairs. Who names the size of a pack knows his memory: it is kept then.
_GROUP_FACTOR = {"cpu": 2, "cuda": 1}
# The reference keeps no activations, and its cost under offload is one gather a pass: larger packs.
_REFERENCE_FACTOR = 8


class BatchPlanner:
    """Turns preferences into the global batches of a run, one rank's part of each.

    cost: what the model takes for a token, see CostModel; by default tokens are counted. device: where the
    batches will be used; what is made for a GPU is pinned. It may be shared by threads.
    read_reference: gives the reference's token log-probs of some of a table's units where they are kept
    already (laid out as GlobalBatch.reference_logps); it is called on the thread that makes batches ahead.
    """

    def __init__(
        self,
        config: BaseConfig,
        layout: Layout,
        *,
        world_size: int = 1,
        rank: int = 0,
        device: torch.device | str = "cpu",
        cost: CostModel | None = None,
    ) -> None:
        self.config = config
        self.layout = layout
        self.world_size = world_size
        self.rank = rank
        self.device = torch.device(device)
        self.cost = cost or CostModel()
        self.needs_reference = METHODS[config.method].needs_reference(config)
        self.read_reference: Callable[[PreferenceTable, Sequence[int]], torch.Tensor] | None = None

    @property
    def global_batch_size(self) -> int:
        """Preferences an optimizer step, over all ranks."""
        return global_batch_size(self.config, self.world_size)

    def num_steps(self, num_rows: int) -> int:
        """Optimizer steps of a run over so many rows."""
        return num_steps(self.config, num_rows, self.world_size)

    @property
    def pack_tokens(self) -> int:
        """The most tokens of a training pack; a single larger preference still gets a pack of its own."""
        chosen = self.config.pack_max_tokens
        return _PACK_TOKENS[self.device.type] if chosen == "auto" else chosen

    @property
    def group_tokens(self) -> int:
        """The most tokens of a pack that holds the preferences of one prompt alone."""
        factor = _GROUP_FACTOR[self.device.type] if self.config.pack_max_tokens == "auto" else 1
        return factor * self.pack_tokens

    @property
    def reference_tokens(self) -> int:
        """The most tokens of a pack that is scored without gradient."""
        chosen = self.config.ref_batch_tokens
        return _REFERENCE_FACTOR * self.pack_tokens if chosen == "auto" else chosen

    def messages(self, data: PreferenceDataset) -> list[str]:
        """What the user should know about his settings and these rows."""
        if self.config.group_by_prompt and len(np.unique(data.prompt_keys)) == len(data):
            return [f"group_by_prompt changes nothing: no two of the {len(data)} rows have the same prompt"]
        return []

    def rows_by_step(self, data: PreferenceDataset, start: int = 0) -> Iterator[np.ndarray]:
        """The rows of each global batch of the run, the same for every rank.

        start: the number of steps to leave out.
        """
        steps_per_epoch = math.ceil(len(data) / self.global_batch_size)
        planned, batches = -1, []
        for step in range(start, self.num_steps(len(data))):
            epoch, place = divmod(step, steps_per_epoch)
            if epoch != planned:
                order = epoch_order(
                    len(data),
                    seed=self.config.seed,
                    epoch=epoch,
                    sampling=self.config.train_sampling_strategy,
                    prompt_keys=data.prompt_keys if self.config.group_by_prompt else None,
                    batch_size=self.global_batch_size,
                )
                planned, batches = epoch, global_batch_rows(order, self.global_batch_size)
            yield batches[place]

    def batches(self, data: PreferenceDataset, start: int = 0) -> Iterator[GlobalBatch]:
        """The run's global batches in order, this rank's part of each; every step of every epoch.

        start: the number of steps to leave out, for a run that goes on. A thread of its own plans and packs
        the next steps while one is computed.
        """
        return self._ahead(self._batches(data, start))

    def _batches(self, data: PreferenceDataset, start: int) -> Iterator[GlobalBatch]:
        steps_per_epoch = math.ceil(len(data) / self.global_batch_size)
        for step, rows in enumerate(self.rows_by_step(data, start), start + 1):
            yield self.lay_out(data, rows, step=step, epoch=step / steps_per_epoch)

    def evaluation_batches(self, data: PreferenceDataset) -> Iterator[GlobalBatch]:
        """A data set in file order, per_device_eval_batch_size preferences a rank at a time; made ahead."""
        size = self.config.per_device_eval_batch_size * self.world_size
        order = epoch_order(len(data), seed=0, epoch=0, sampling="sequential")
        return self._ahead(self.lay_out(data, rows) for rows in global_batch_rows(order, size))

    def _ahead(self, batches: Iterable[GlobalBatch]) -> Iterator[GlobalBatch]:
        """Planned ahead by a thread, in pinned memory where a GPU will read them."""
        if self.device.type != "cuda":
            return make_ahead(batches)
        return make_ahead(
            (batch.pin_memory() for batch in batches),
            # Pinning on a thread without a device would open a context on the first GPU.
            prepare=lambda: torch.cuda.set_device(self.device),
        )

    def lay_out(
        self, data: PreferenceDataset, rows: Sequence[int], *, step: int = 0, epoch: float = 0.0
    ) -> GlobalBatch:
        """Plans one global batch and packs this rank's part; the plan is the same on every rank."""
        table = PreferenceTable.from_preferences(
            [data[int(row)] for row in rows],
            kl_from_own=not self.needs_reference,
            with_kl=self.config.needs_reference_point,
        )
        plan = plan_step(
            table,
            world_size=self.world_size,
            layout=self.layout,
            pack_tokens=self.pack_tokens,
            group_tokens=self.group_tokens,
            reference_tokens=self.reference_tokens,
            needs_reference=self.needs_reference and self.read_reference is None,
            cost=self.cost,
        )
        rank = self.rank

        def build(packs: Sequence) -> list[PackedBatch]:
            return [build_batch(table, pack, rows, self.layout) for pack in packs]

        mine = [number for pack in plan.train[rank] for group in pack for number in group.preferences]
        kl_units = [table.kl_units[number] for number in mine if table.kl_units[number] >= 0]
        batch = GlobalBatch(
            step=step,
            epoch=epoch,
            micro_batches=[],
            reference_batches=build(plan.reference[rank]),
            kl_batches=build(plan.kl[rank]),
            kl_units=torch.tensor(kl_units, dtype=torch.long),
            num_preferences=len(rows),
            num_chosen_tokens=sum(len(table.completions[members[0]]) for members in table.members),
            num_kl=sum(unit >= 0 for unit in table.kl_units),
            unit_lengths=torch.tensor([len(ids) for ids in table.completions], dtype=torch.long),
            rank_imbalance=plan.rank_imbalance,
            num_oversized=plan.num_oversized,
        )
        batch.micro_batches = [replace(micro, owner=batch) for micro in build(plan.train[rank])]
        if self.read_reference is not None:
            units = {unit for pack in plan.train[rank] for group in pack for unit in group.units}
            batch.reference_logps = self.read_reference(table, sorted(units | set(kl_units)))
        return batch


def global_batch_size(config: BaseConfig, world_size: int) -> int:
    """per_device_train_batch_size x gradient_accumulation_steps x world size, in preferences."""
    return config.per_device_train_batch_size * config.gradient_accumulation_steps * world_size


def num_steps(config: BaseConfig, num_rows: int, world_size: int) -> int:
    """Optimizer steps of a run: max_steps, else the epochs' steps; an epoch's last batch may be partial."""
    if config.max_steps is not None:
        return config.max_steps
    return math.ceil(config.num_train_epochs * math.ceil(num_rows / global_batch_size(config, world_size)))
