"""Policy, reference and packed data as one object, for the trainer and for research loops alike."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from weakref import WeakKeyDictionary

import torch

from ds_align import distributed
from ds_align.batch import GlobalBatch, Layout, PackedBatch, TokenScores
from ds_align.config import METHODS, BaseConfig, resolved_precision
from ds_align.data import PreferenceDataset
from ds_align.engine.init import init_distributed
from ds_align.engine.look_ahead import LookAhead, gather
from ds_align.engine.partitions import check_can_sync
from ds_align.engine.policy import PolicyEngine, StepResult
from ds_align.engine.reference import AdaptersOffReference, ReferenceEngine
from ds_align.engine.setup import check_setup
from ds_align.objective import ForwardOutput, Objective, sum_by_unit, token_places
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
        reference: ReferenceEngine | AdaptersOffReference | None,
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
        if self.objective.coupled and self.global_batch_size == 1:
            self.messages.append(
                "a global batch of one pair: this loss compares pairs, and has nothing to compare"
            )
        self.world_size = distributed.world_size()
        self.reference_seconds = 0.0
        self._reference_memory: WeakKeyDictionary[PreferenceDataset, dict[int, torch.Tensor]] = (
            WeakKeyDictionary()
        )
        self.num_skipped_steps = 0
        self.global_step = 0

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
        if config.sync_ref_model:
            distributed.agree(lambda: check_can_sync(setup))
        dtype = resolved_precision(setup.ds_config)
        policy = PolicyEngine.from_config(
            config,
            setup.ds_config,
            setup.source,
            layout=setup.layout,
            dtype=dtype,
            device=device,
            schedule=learning_rate_schedule(config, num_steps(config, len(splits.train))),
            adapters=setup.adapters,
        )
        reference = AdaptersOffReference(policy) if setup.reference_is_policy else None
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

    def batches(self, start: int = 0) -> Iterator[GlobalBatch]:
        """The run's global batches in order, this rank's part of each; every step of every epoch.

        start: the number of steps to leave out, for a run that goes on.
        """
        steps_per_epoch = math.ceil(len(self.train_data) / self.global_batch_size)
        for step in range(start, self.num_steps):
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
            [data[int(row)] for row in rows],
            kl_from_own=not self.objective.needs_reference,
            with_kl=self.config.needs_reference_point,
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
            unit_lengths=torch.tensor([len(ids) for ids in table.completions], dtype=torch.long),
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

    def prepare(self, batch: GlobalBatch, *, training: bool = True) -> None:
        """Scores what the losses of a whole global batch need.

        That is the reference's log-probs, KTO's z0 and, for losses that look at all micro-batches together,
        a forward of each without gradient. forward calls it by itself, once a global batch.
        Collective: every rank must call this.
        """
        self._score_reference(batch)
        if self.spec.inputs == "unpaired" and batch.kl is None:
            batch.kl = self.reference_point([batch])
        # With a single micro-batch its own forward says it: see forward.
        if self.objective.looks_ahead and not batch.was_looked_at and len(batch.micro_batches) > 1:
            self.look_ahead([batch], training=training).hand_to(batch)
        batch.prepared = True

    def _score_reference(self, batch: GlobalBatch) -> None:
        if self.reference is None or batch.reference_logps is not None:
            return
        started = time.perf_counter()
        batch.reference_logps = self._score(batch, batch.reference_batches, self.reference.forward)
        self.reference_seconds += time.perf_counter() - started

    def _score(
        self,
        owner: GlobalBatch,
        batches: Sequence[PackedBatch],
        forward: Callable[[PackedBatch], torch.Tensor],
    ) -> torch.Tensor:
        """Token log-probs of unit after unit, float32; NaN for units of other ranks, so a mix-up shows."""
        lengths = owner.unit_lengths.to(self.device)
        found = torch.full((owner.num_tokens,), math.nan, device=self.device)
        for batch in batches:
            moved = batch.to(self.device)
            found[token_places(moved, lengths)] = forward(moved)
        return found

    def look_ahead(self, batches: Iterable[GlobalBatch], *, training: bool) -> LookAhead:
        """What the losses need of these global batches together, by one forward without gradient of each.

        training: a running mean that belongs to the loss moves on. Collective: every rank must call this.
        """
        parts = []
        for owner in batches:
            self._score_reference(owner)
            moved = [batch.to(self.device) for batch in owner.micro_batches]
            parts.append((owner, [(batch, self._score_policy(batch, grad=False)) for batch in moved]))
        return gather(self.objective, parts, device=self.device, training=training)

    def _score_policy(self, batch: PackedBatch, *, grad: bool) -> TokenScores:
        return self.policy.forward(
            batch,
            grad=grad,
            with_collision=self.objective.needs_collision,
            with_router=self.objective.router_weight > 0,
        )

    def reference_point(self, batches: Iterable[GlobalBatch]) -> torch.Tensor:
        """KTO's z0 over global batches, a float64 scalar on the device (one batch in a training step).

        Collective: every rank must call this.
        """

        def forward(packed: PackedBatch) -> torch.Tensor:
            return self.policy.forward(packed, grad=False).logps

        total = torch.zeros((), dtype=torch.float64, device=self.device)
        count = 0
        if not self.config.needs_reference_point:
            return total
        for batch in batches:
            self._score_reference(batch)
            units, lengths = batch.kl_units.to(self.device), batch.unit_lengths.to(self.device)
            gaps = self._score(batch, batch.kl_batches, forward).double()
            if batch.reference_logps is not None:
                gaps = gaps - batch.reference_logps
            total += sum_by_unit(gaps, lengths)[units].sum()
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
            self.prepare(owner, training=grad)
        moved = batch.to(self.device)
        scores = self._score_policy(moved, grad=grad)
        if self.objective.looks_ahead and not owner.was_looked_at:
            parts = [(owner, [(moved, scores)])]
            gather(self.objective, parts, device=self.device, training=grad).hand_to(owner)
        return self.objective(moved, scores, owner)

    def backward(self, loss_sum: torch.Tensor, *, global_count: int) -> None:
        """Gradient of the mean over the global batch; see PolicyEngine.backward."""
        self.policy.backward(loss_sum, global_count=global_count)

    def step(self) -> StepResult:
        """Clips and updates; moves the learning rate on. Collective: every rank must call this."""
        result = self.policy.step()
        self.num_skipped_steps += result.skipped
        self.global_step += 1
        if self.config.sync_ref_model and self.global_step % self.config.ref_model_sync_steps == 0:
            self.reference.mix(self.policy.engine, self.config.ref_model_mixup_alpha)
            # What the old reference said of the evaluation rows is no longer true.
            self._reference_memory.clear()
        return result

    def state_dict(self) -> dict:
        """Where the run is and what its loss remembers, as plain values; the same on every rank."""
        return {
            "global_step": self.global_step,
            "num_skipped_steps": self.num_skipped_steps,
            "objective": self.objective.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Takes over what state_dict() gave."""
        self.global_step = state["global_step"]
        self.num_skipped_steps = state["num_skipped_steps"]
        self.objective.load_state_dict(state["objective"])


def global_batch_size(config: BaseConfig) -> int:
    """per_device_train_batch_size x gradient_accumulation_steps x world size, in preferences."""
    return config.per_device_train_batch_size * config.gradient_accumulation_steps * distributed.world_size()


def num_steps(config: BaseConfig, num_rows: int) -> int:
    """Optimizer steps of a run: max_steps, else the epochs' steps; an epoch's last batch may be partial."""
    if config.max_steps is not None:
        return config.max_steps
    return math.ceil(config.num_train_epochs * math.ceil(num_rows / global_batch_size(config)))
