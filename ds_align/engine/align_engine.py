"""Policy, reference and packed data as one object, for the trainer and for research loops alike."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from weakref import WeakKeyDictionary

import torch

from ds_align import distributed
from ds_align.batch import GlobalBatch, Layout, PackedBatch
from ds_align.config import METHODS, BaseConfig, resolved_precision
from ds_align.data import PreferenceDataset
from ds_align.engine.init import init_distributed
from ds_align.engine.policy import PolicyEngine, StepResult
from ds_align.engine.reference import ReferenceEngine
from ds_align.engine.setup import check_setup
from ds_align.objective import ForwardOutput, Objective, sum_by_completion
from ds_align.packing import PreferenceTable, build_batch, epoch_order, global_batch_rows, plan_step
from ds_align.schedule import learning_rate_schedule
from ds_align.splits import DataSource, Splits, load_splits

# Packs of this size keep the matrix products efficient; larger ones cost memory and gain little.
_PACK_TOKENS = {"cpu": 2048, "cuda": 16384}
# The reference keeps no activations, and its cost under offload is one gather a pass: larger packs.
_REFERENCE_FACTOR = 8


class AlignEngine:
    """The policy under ZeRO, the reference under ZeRO-Inference, and the planned batches of a run.

    A training loop is::

        engine = AlignEngine.from_config(config)
        for global_batch in engine.batches():
            for batch in global_batch.micro_batches:
                output = engine.forward(batch)
                engine.backward(output.losses.sum(), global_count=global_batch.num_preferences)
            engine.step()
    """

    def __init__(
        self,
        config: BaseConfig,
        *,
        device: torch.device,
        tokenizer: object,
        splits: Splits,
        policy: PolicyEngine,
        reference: ReferenceEngine | None,
        layout: Layout,
        messages: Sequence[str] = (),
    ) -> None:
        self.config = config
        self.spec = METHODS[config.method]
        self.device = device
        self.tokenizer = tokenizer
        self.train_data = splits.train
        self.eval_data = splits.evaluation
        self.eval_set = splits.eval_set
        self.policy = policy
        self.reference = reference
        self.layout = layout
        self.messages = list(messages)
        self.objective = Objective(self.spec, config)
        self.world_size = distributed.world_size()
        self.reference_seconds = 0.0
        self._reference_memory: WeakKeyDictionary[PreferenceDataset, dict[int, torch.Tensor]] = (
            WeakKeyDictionary()
        )
        self.num_skipped_steps = 0

    @classmethod
    def from_config(
        cls,
        config: BaseConfig,
        train_dataset: DataSource | None = None,
        eval_dataset: DataSource | None = None,
    ) -> AlignEngine:
        """Builds everything that config describes; data and settings are checked before a model loads.

        train_dataset, eval_dataset: replace config's paths; a path, a list of dicts or a datasets.Dataset.
        Collective: every rank must call this. Raises ConfigError or DataError, on every rank alike.
        """
        device = init_distributed()
        torch.manual_seed(config.seed)
        setup = distributed.agree(lambda: check_setup(config, device))
        splits = distributed.agree(lambda: load_splits(config, setup.tokenizer, train_dataset, eval_dataset))
        dtype = resolved_precision(setup.ds_config)
        policy = PolicyEngine.from_config(
            config,
            setup.ds_config,
            setup.source,
            layout=setup.layout,
            dtype=dtype,
            device=device,
            schedule=learning_rate_schedule(config, num_steps(config, len(splits.train))),
        )
        reference = None
        if setup.reference_ds_config is not None:
            reference = ReferenceEngine.from_config(
                setup.reference_ds_config,
                setup.reference_source,
                layout=setup.layout,
                dtype=dtype,
                attn_implementation=config.attn_implementation,
            )
        return cls(
            config,
            device=device,
            tokenizer=setup.tokenizer,
            splits=splits,
            policy=policy,
            reference=reference,
            layout=setup.layout,
            messages=[*setup.messages, *splits.messages],
        )

    @property
    def global_batch_size(self) -> int:
        """Preferences an optimizer step, over all ranks."""
        return global_batch_size(self.config)

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the run."""
        return num_steps(self.config, len(self.train_data))

    def batches(self) -> Iterator[GlobalBatch]:
        """The run's global batches in order, this rank's part of each; every step of every epoch."""
        steps_per_epoch = math.ceil(len(self.train_data) / self.global_batch_size)
        for step in range(self.num_steps):
            epoch, place = divmod(step, steps_per_epoch)
            order = epoch_order(
                len(self.train_data),
                seed=self.config.seed,
                epoch=epoch,
                sampling=self.config.train_sampling_strategy,
            )
            rows = global_batch_rows(order, self.global_batch_size)[place]
            yield self.lay_out(self.train_data, rows, step=step + 1, epoch=(step + 1) / steps_per_epoch)

    def evaluation_batches(self, data: PreferenceDataset) -> Iterator[GlobalBatch]:
        """A data set in file order, per_device_eval_batch_size preferences a rank at a time."""
        size = self.config.per_device_eval_batch_size * self.world_size
        order = epoch_order(len(data), seed=0, epoch=0, sampling="sequential")
        # The reference never changes: what it said of these rows is kept for the next evaluation.
        scored = self._reference_memory.setdefault(data, {})
        for number, rows in enumerate(global_batch_rows(order, size)):
            batch = self.lay_out(data, rows)
            batch.reference_logps = scored.get(number)
            yield batch
            if batch.reference_logps is not None:
                scored[number] = batch.reference_logps

    def lay_out(
        self, data: PreferenceDataset, rows: Sequence[int], *, step: int = 0, epoch: float = 0.0
    ) -> GlobalBatch:
        """Plans one global batch and packs this rank's part. The same on every rank; no communication."""
        table = PreferenceTable.from_preferences(
            [data[int(row)] for row in rows], kl_from_own=not self.objective.needs_reference
        )
        pack_tokens = self.pack_tokens
        plan = plan_step(
            table,
            world_size=self.world_size,
            layout=self.layout,
            pack_tokens=pack_tokens,
            reference_tokens=self.reference_tokens,
            needs_reference=self.objective.needs_reference,
        )
        rank = distributed.rank()

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
            num_units=len(table.completions),
            rank_imbalance=plan.rank_imbalance,
            num_oversized=plan.num_oversized,
        )
        batch.micro_batches = [replace(micro, owner=batch) for micro in build(plan.train[rank])]
        return batch

    @property
    def pack_tokens(self) -> int:
        """The most tokens of a training pack; a single larger preference still gets a pack of its own."""
        chosen = self.config.pack_max_tokens
        return _PACK_TOKENS[self.device.type] if chosen == "auto" else chosen

    @property
    def reference_tokens(self) -> int:
        """The most tokens of a pack that is scored without gradient."""
        chosen = self.config.ref_batch_tokens
        return _REFERENCE_FACTOR * self.pack_tokens if chosen == "auto" else chosen

    def prepare(self, batch: GlobalBatch) -> None:
        """Scores what the losses of a whole global batch need: the reference's log-probs, and KTO's z0.

        forward calls it by itself, once a global batch. Collective: every rank must call this.
        """
        self._score_reference(batch)
        if self.spec.inputs == "unpaired" and batch.kl is None:
            batch.kl = self.reference_point([batch])
        batch.prepared = True

    def _score_reference(self, batch: GlobalBatch) -> None:
        if self.reference is None or batch.reference_logps is not None:
            return
        started = time.perf_counter()
        batch.reference_logps = self._score(batch.reference_batches, batch.num_units, self.reference.forward)
        self.reference_seconds += time.perf_counter() - started

    def _score(
        self,
        batches: Sequence[PackedBatch],
        num_units: int,
        forward: Callable[[PackedBatch], torch.Tensor],
    ) -> torch.Tensor:
        """Summed log-probs by unit, float64 [num_units]; NaN for units of other ranks, so a mix-up shows."""
        totals = torch.full((num_units,), math.nan, dtype=torch.float64, device=self.device)
        for batch in batches:
            moved = batch.to(self.device)
            totals[moved.units] = sum_by_completion(forward(moved), moved)
        return totals

    def reference_point(self, batches: Iterable[GlobalBatch]) -> torch.Tensor:
        """KTO's z0 over global batches, a float64 scalar on the device (one batch in a training step).

        Collective: every rank must call this.
        """

        def forward(packed: PackedBatch) -> torch.Tensor:
            return self.policy.forward(packed, grad=False)[0]

        total = torch.zeros((), dtype=torch.float64, device=self.device)
        count = 0
        for batch in batches:
            self._score_reference(batch)
            units = batch.kl_units.to(self.device)
            gaps = self._score(batch.kl_batches, batch.num_units, forward)[units]
            if batch.reference_logps is not None:
                gaps = gaps - batch.reference_logps[units]
            total += gaps.sum()
            count += batch.num_kl
        z0 = distributed.all_reduce_sum(total, self.device) / max(1, count)
        # Clamped only as an estimate of a KL divergence; a mean log-prob without a reference is negative.
        return z0.clamp(min=0) if self.reference is not None else z0

    def forward(self, batch: PackedBatch, *, grad: bool = True) -> ForwardOutput:
        """Losses, rewards and log-probs of one micro-batch, one entry a preference.

        The first micro-batch of a global batch also scores the reference (and z0) for all of it.
        Collective: every rank must call this, once a micro-batch.
        """
        owner = batch.owner
        assert owner is not None, "forward takes the micro-batches of a global batch"
        if not owner.prepared:
            self.prepare(owner)
        moved = batch.to(self.device)
        token_logps, mean_logits = self.policy.forward(moved, grad=grad)
        return self.objective(moved, token_logps, owner, mean_logits)

    def backward(self, loss_sum: torch.Tensor, *, global_count: int) -> None:
        """Gradient of the mean over the global batch; see PolicyEngine.backward."""
        self.policy.backward(loss_sum, global_count=global_count)

    def step(self) -> StepResult:
        """Clips and updates; moves the learning rate on. Collective: every rank must call this."""
        result = self.policy.step()
        self.num_skipped_steps += result.skipped
        return result


def global_batch_size(config: BaseConfig) -> int:
    """per_device_train_batch_size x gradient_accumulation_steps x world size, in preferences."""
    return config.per_device_train_batch_size * config.gradient_accumulation_steps * distributed.world_size()


def num_steps(config: BaseConfig, num_rows: int) -> int:
    """Optimizer steps of a run: max_steps, else the epochs' steps; an epoch's last batch may be partial."""
    if config.max_steps is not None:
        return config.max_steps
    return math.ceil(config.num_train_epochs * math.ceil(num_rows / global_batch_size(config)))
