"""Policy, reference and packed data as one object, for the trainer and for research loops alike."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from weakref import WeakKeyDictionary

import torch

from ds_align import distributed
from ds_align.batch import GlobalBatch, Layout, PackedBatch, TokenScores
from ds_align.batches import BatchPlanner
from ds_align.config import METHODS, BaseConfig
from ds_align.data import PreferenceDataset
from ds_align.doctor import Finding, messages, unsaid
from ds_align.engine.cached_reference import CachedReference
from ds_align.engine.examination import examine_models, examine_start
from ds_align.engine.init import init_distributed
from ds_align.engine.load import Reference, load_models
from ds_align.engine.look_ahead import LookAhead, gather
from ds_align.engine.partitions import check_can_sync
from ds_align.engine.policy import PolicyEngine, StepResult
from ds_align.engine.scoring import score_units
from ds_align.engine.setup import check_setup
from ds_align.objective import ForwardOutput, Objective, sum_by_unit
from ds_align.packing import CostModel
from ds_align.splits import DataSource, Splits, load_splits
from ds_align.watchdog import beat


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
        reference: Reference | None,
        layout: Layout,
        messages: Sequence[str] = (),
        findings: Sequence[Finding] = (),
    ) -> None:
        self.config = config
        self.findings = list(findings)
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
        self.planner = BatchPlanner(
            config,
            layout,
            world_size=distributed.world_size(),
            rank=distributed.rank(),
            device=device,
            cost=CostModel.from_model(policy.module.model.config.get_text_config()),
        )
        self.messages += self.planner.messages(self.train_data)
        self.objective = Objective(self.spec, config)
        if self.objective.coupled and self.global_batch_size == 1:
            self.messages.append(
                "a global batch of one pair: this loss compares pairs, and has nothing to compare"
            )
        self.world_size = distributed.world_size()
        self.reference_cache_seconds = 0.0
        if isinstance(reference, CachedReference):
            self.planner.read_reference = reference.token_logps
            self._note_cache()
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
        findings = examine_start(config, setup, splits, device)
        policy, reference = load_models(config, setup, splits, device)
        return cls(
            config,
            device=device,
            tokenizer=setup.tokenizer,
            splits=splits,
            policy=policy,
            reference=reference,
            layout=setup.layout,
            messages=[*setup.messages, *splits.messages, *messages(unsaid(findings))],
            findings=findings,
        )

    def examine_models(self) -> None:
        """Holds policy and reference against each other on a few preferences, before the first step.

        Collective: every rank must call this. Raises DataError where they cannot be what was meant.
        """
        found = examine_models(self)
        self.findings += found
        self.messages += messages(found)

    @property
    def global_batch_size(self) -> int:
        """Preferences an optimizer step, over all ranks."""
        return self.planner.global_batch_size

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the run."""
        return self.planner.num_steps(len(self.train_data))

    def batches(self, start: int = 0) -> Iterator[GlobalBatch]:
        """The run's global batches in order, this rank's part of each; every step of every epoch.

        start: the number of steps to leave out, for a run that goes on.
        """
        return self.planner.batches(self.train_data, start)

    def rows_of_steps(self, first: int, last: int) -> list[list[int]]:
        """The rows of the training data in each of these steps (from 1, both included); no communication."""
        planned = self.planner.rows_by_step(self.train_data, first - 1)
        return [rows.tolist() for rows in itertools.islice(planned, last - first + 1)]

    def plan_only(self) -> None:
        """From here on `batches` reads nothing of a cached reference; they can be looked at, not trained."""
        if isinstance(self.reference, CachedReference):
            self.planner.read_reference = self.reference.no_logps

    def evaluation_batches(self, data: PreferenceDataset) -> Iterator[GlobalBatch]:
        """A data set in file order, per_device_eval_batch_size preferences a rank at a time."""
        if isinstance(self.reference, CachedReference):
            self.reference.fill(data)
            self._note_cache()
            yield from self.planner.evaluation_batches(data)
            return
        # The reference never changes: what it said of these rows is kept for the next evaluation.
        scored = self._reference_memory.setdefault(data, {})
        for number, batch in enumerate(self.planner.evaluation_batches(data)):
            batch.reference_logps = scored.get(number)
            yield batch
            if batch.reference_logps is not None:
                scored[number] = batch.reference_logps

    def lay_out(
        self, data: PreferenceDataset, rows: Sequence[int], *, step: int = 0, epoch: float = 0.0
    ) -> GlobalBatch:
        """Plans one global batch and packs this rank's part. The same on every rank; no communication."""
        return self.planner.lay_out(data, rows, step=step, epoch=epoch)

    @property
    def pack_tokens(self) -> int:
        """The most tokens of a training pack; a single larger preference still gets a pack of its own."""
        return self.planner.pack_tokens

    @property
    def reference_tokens(self) -> int:
        """The most tokens of a pack that is scored without gradient."""
        return self.planner.reference_tokens

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
        if batch.reference_logps is not None:
            batch.reference_logps = batch.reference_logps.to(self.device, non_blocking=True)
        elif self.reference is not None:
            started = time.perf_counter()
            batch.reference_logps = score_units(
                batch.reference_batches, self.reference.forward, batch.unit_lengths, self.device
            )
            batch.reference_seconds = time.perf_counter() - started

    def _note_cache(self) -> None:
        """Takes over what filling the cache took and said."""
        self.reference_cache_seconds += self.reference.seconds
        self.messages += self.reference.messages
        self.reference.seconds, self.reference.messages = 0.0, []

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
            units = batch.kl_units.to(self.device, non_blocking=True)
            lengths = batch.unit_lengths.to(self.device, non_blocking=True)
            gaps = score_units(batch.kl_batches, forward, batch.unit_lengths, self.device).double()
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
        beat("a micro-batch")
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
