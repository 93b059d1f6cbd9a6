"""One trainer for all methods: the loop of AlignEngine with logging, evaluation and saving around it."""

from __future__ import annotations

import dataclasses
import math
import time
from pathlib import Path
from typing import ClassVar

from ds_align import distributed
from ds_align.batch import PackedBatch
from ds_align.config import (
    METHODS,
    BaseConfig,
    CPOConfig,
    DPOConfig,
    IPOConfig,
    KTOConfig,
    SimPOConfig,
)
from ds_align.engine import AlignEngine, StepResult
from ds_align.errors import NonFiniteError
from ds_align.evaluate import evaluate
from ds_align.export import save_model
from ds_align.metrics import MetricSums
from ds_align.progress import Progress
from ds_align.records import RunRecords, check_output_dir, peak_memory_gb
from ds_align.splits import DataSource, load

_PLAIN_NAMES = (
    "preference_accuracy",
    "policy_accuracy",
    "margin",
    "confidence",
    "desirable_accuracy",
    "undesirable_accuracy",
    "overall_accuracy",
)


@dataclasses.dataclass(frozen=True, slots=True)
class TrainOutput:
    """What train() returns. training_loss: mean over all steps; metrics: the run's last figures."""

    global_step: int
    training_loss: float
    metrics: dict[str, float]


@dataclasses.dataclass(slots=True)
class _Window:
    """Counts of this rank since the last logged step, and the time that they took."""

    started: float
    preferences: int = 0
    tokens: int = 0
    unshared_tokens: int = 0
    padded_tokens: int = 0
    slots: int = 0
    steps: int = 0
    imbalance: float = 1.0
    oversized: int = 0


class Trainer:
    """Trains a policy by the method of its config.

    Usage: `Trainer(DPOConfig(...)).train()`, in one process or under the deepspeed launcher.
    """

    config_types: ClassVar[tuple[type[BaseConfig], ...]] = tuple(spec.config for spec in METHODS.values())

    def __init__(self, config: BaseConfig) -> None:
        if not isinstance(config, self.config_types):
            expected = " or ".join(kind.__name__ for kind in self.config_types)
            raise TypeError(f"{type(self).__name__} takes a {expected}, not {type(config).__name__}")
        self.config = config
        self.output_dir = Path(config.resolved_output_dir)
        self.engine: AlignEngine | None = None
        self.global_step = 0

    def setup(
        self, train_dataset: DataSource | None = None, eval_dataset: DataSource | None = None
    ) -> AlignEngine:
        """Loads data and models; train() and evaluate() call it where it has not been called.

        Collective: every rank must call this. Raises ConfigError and DataError before a model loads.
        """
        self.engine = AlignEngine.from_config(self.config, train_dataset, eval_dataset)
        return self.engine

    def train(
        self, train_dataset: DataSource | None = None, eval_dataset: DataSource | None = None
    ) -> TrainOutput:
        """Trains to the end and saves the model, the metrics and the summary in output_dir.

        Collective: every rank must call this. Raises NonFiniteError when the loss is not finite.
        """
        started = time.perf_counter()
        if self.config.dry_run:
            return self._dry_run(train_dataset, eval_dataset)
        records = distributed.agree(lambda: RunRecords.open(self.output_dir, self.config))
        try:
            if self.engine is None or train_dataset is not None or eval_dataset is not None:
                self.setup(train_dataset, eval_dataset)
            return self._train(records, started)
        except BaseException as error:
            records.fail(error)
            raise

    def _dry_run(self, train_dataset: DataSource | None, eval_dataset: DataSource | None) -> TrainOutput:
        """Everything up to the first step, shown instead of trained; writes nothing."""
        distributed.agree(lambda: check_output_dir(self.output_dir, self.config))
        engine = self.engine or self.setup(train_dataset, eval_dataset)
        Progress(engine, self.config).show_plan(next(engine.batches()))
        return TrainOutput(0, math.nan, {})

    def _train(self, records: RunRecords, started: float) -> TrainOutput:
        engine = self.engine
        progress = Progress(engine, self.config)
        records.start(engine)
        if self.config.eval_on_start:
            self._evaluate_and_record(records, progress, 0.0)
        loss_sum, totals = self._run_steps(records, progress)
        progress.close()
        save_model(engine, self.output_dir)
        training_loss = loss_sum / max(1, self.global_step)
        seconds = time.perf_counter() - started
        metrics = records.final_metrics(training_loss, seconds)
        memory = distributed.all_reduce_max(peak_memory_gb(engine.device), engine.device)
        records.finish(
            "completed",
            metrics,
            global_step=self.global_step,
            training_loss=training_loss,
            seconds=seconds,
            skipped_steps=engine.num_skipped_steps,
            reference_time_fraction=engine.reference_seconds / seconds,
            tokens_forward=totals.get("tokens", 0.0),
            tokens_padded_equivalent=totals.get("padded_tokens", 0.0),
            peak_memory_gb=memory,
        )
        progress.show_end(self.output_dir, metrics)
        return TrainOutput(self.global_step, training_loss, metrics)

    def _run_steps(self, records: RunRecords, progress: Progress) -> tuple[float, dict[str, float]]:
        """All optimizer steps; returns the sum of the steps' losses and the run's token counts."""
        engine = self.engine
        sums = MetricSums(engine.spec.inputs, engine.device)
        window = _Window(time.perf_counter())
        loss_sum, totals = 0.0, {}
        for global_batch in engine.batches():
            for batch in global_batch.micro_batches:
                output = engine.forward(batch)
                engine.backward(output.losses.sum(), global_count=global_batch.num_preferences)
                sums.add(output, batch)
                _count(window, batch)
            result = engine.step()
            window.steps += 1
            window.imbalance = max(window.imbalance, global_batch.rank_imbalance)
            window.oversized += global_batch.num_oversized
            self.global_step = step = global_batch.step
            progress.advance()
            if step % self.config.logging_steps == 0 or step == engine.num_steps or step == 1:
                means, counts = self._log(sums, window, result)
                records.log(step, global_batch.epoch, means)
                progress.show(step, means)
                loss_sum += means["loss"] * window.steps
                totals = {name: totals.get(name, 0.0) + value for name, value in counts.items()}
                sums.reset()
                window = _Window(time.perf_counter())
            if self._is_evaluation_step(step):
                paused = time.perf_counter()
                self._evaluate_and_record(records, progress, global_batch.epoch)
                window.started += time.perf_counter() - paused
        return loss_sum, totals

    def _log(
        self, sums: MetricSums, window: _Window, result: StepResult
    ) -> tuple[dict[str, float], dict[str, float]]:
        """The window's metrics. Collective, once a logged step: every rank must call this."""
        counters = ("preferences", "tokens", "unshared_tokens", "padded_tokens", "slots")
        means, counts = sums.reduce(**{name: getattr(window, name) for name in counters})
        if not math.isfinite(means["loss"]):
            raise NonFiniteError(
                f"step {self.global_step}: loss={means['loss']} is not finite; lower learning_rate "
                f"(now {self.config.learning_rate:g}), check the data, or use bfloat16 instead of float16"
            )
        seconds = time.perf_counter() - window.started
        means |= {
            "grad_norm": float(result.grad_norm),
            "learning_rate": result.learning_rate,
            "pairs_per_second": counts["preferences"] / seconds,
            "tokens_per_second": counts["tokens"] / seconds,
            "step_time": seconds / window.steps,
            "padding_fraction": 1.0 - counts["tokens"] / max(1.0, counts["slots"]),
            "prompt_tokens_shared": counts["unshared_tokens"] - counts["tokens"],
            "rank_imbalance": window.imbalance,
            "oversized_packs": window.oversized,
            "peak_memory_gb": peak_memory_gb(self.engine.device),
        }
        return means, counts

    def _is_evaluation_step(self, step: int) -> bool:
        """After every eval_steps, and after the last step."""
        if self.engine.eval_data is None:
            return False
        return step == self.engine.num_steps or (
            self.config.eval_steps is not None and step % self.config.eval_steps == 0
        )

    def _evaluate_and_record(self, records: RunRecords, progress: Progress, epoch: float) -> None:
        if self.engine.eval_data is not None:
            result = evaluate(self.engine, self.engine.eval_data)
            records.log(self.global_step, epoch, result)
            progress.show_evaluation(self.global_step, result)

    def evaluate(self, eval_dataset: DataSource | None = None) -> dict[str, float]:
        """Metrics of a data set (default: the run's own evaluation data), prefixed with "eval_".

        The accuracies, margin and confidence are there without the prefix too. Collective: every rank must
        call this. Without any evaluation data the training rows are used; "eval_set" says what was.
        """
        engine = self.engine or self.setup()
        eval_set = engine.eval_set or "train"
        if eval_dataset is not None:
            data = distributed.agree(lambda: load(self.config, engine.tokenizer, eval_dataset))
            eval_set = "given"
        else:
            data = engine.eval_data or engine.train_data
        if eval_set == "train" and distributed.is_main():
            print("warning: no evaluation data was given; evaluating on the training rows", flush=True)
        result = evaluate(engine, data)
        plain = {name: result[f"eval_{name}"] for name in _PLAIN_NAMES if f"eval_{name}" in result}
        return {**result, **plain, "eval_set": eval_set}


class DPOTrainer(Trainer):
    """Trainer for DPOConfig."""

    config_types = (DPOConfig,)


class SimPOTrainer(Trainer):
    """Trainer for SimPOConfig."""

    config_types = (SimPOConfig,)


class PreferenceTrainer(Trainer):
    """Trainer for KTOConfig, IPOConfig and CPOConfig."""

    config_types = (KTOConfig, IPOConfig, CPOConfig)


def _count(window: _Window, batch: PackedBatch) -> None:
    window.preferences += batch.num_preferences
    window.tokens += batch.num_tokens
    window.unshared_tokens += batch.num_unshared_tokens
    window.padded_tokens += batch.num_padded_tokens
    window.slots += batch.input_ids.numel() if batch.num_tokens else 0
