"""One trainer for all methods: the loop of AlignEngine with logging, evaluation and saving around it."""

from __future__ import annotations

import dataclasses
import math
import time
from pathlib import Path
from typing import ClassVar

from ds_align import checkpoint, distributed
from ds_align.batch import GlobalBatch
from ds_align.checkpoint import Checkpoint
from ds_align.config import (
    METHODS,
    BaseConfig,
    CPOConfig,
    DPOConfig,
    IPOConfig,
    KTOConfig,
    SimPOConfig,
)
from ds_align.doctor import Watch
from ds_align.engine import AlignEngine, StepResult, checkpoint_io
from ds_align.errors import NonFiniteError, Preempted
from ds_align.evaluate import evaluate
from ds_align.export import save_model
from ds_align.interruption import Interruption
from ds_align.non_finite import NonFiniteSteps
from ds_align.progress import Progress
from ds_align.records import RunRecords, check_output_dir, peak_memory_gb
from ds_align.resume import find_checkpoint
from ds_align.same_run import check_facts, settings_of
from ds_align.shortage import explained
from ds_align.splits import DataSource, load
from ds_align.tally import Tally
from ds_align.versions import versions
from ds_align.watchdog import Watchdog

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


class Trainer:
    """Trains a policy by the method of its config.

    Usage: `Trainer(DPOConfig(...)).train()`, in one process or under the deepspeed launcher.
    """

    # Empty: those of every method that is there when a trainer is made, a user's own among them.
    config_types: ClassVar[tuple[type[BaseConfig], ...]] = ()

    def __init__(self, config: BaseConfig) -> None:
        kinds = self.config_types or tuple(spec.config for spec in METHODS.values())
        if not isinstance(config, kinds):
            expected = " or ".join(kind.__name__ for kind in kinds)
            raise TypeError(f"{type(self).__name__} takes a {expected}, not {type(config).__name__}")
        self.config = config
        self.output_dir = Path(config.resolved_output_dir)
        self.engine: AlignEngine | None = None
        self.global_step = 0
        self._messages: list[str] = []

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
        found = self._find_checkpoint()
        records = distributed.agree(lambda: RunRecords.open(self.output_dir, self.config, found))
        try:
            if self.engine is None or train_dataset is not None or eval_dataset is not None:
                self.setup(train_dataset, eval_dataset)
            return self._train(records, started, found)
        except BaseException as error:
            records.fail(error)
            raise

    def _dry_run(self, train_dataset: DataSource | None, eval_dataset: DataSource | None) -> TrainOutput:
        """Everything up to the first step, shown instead of trained; writes nothing."""
        found = self._find_checkpoint()
        distributed.agree(lambda: check_output_dir(self.output_dir, self.config, found))
        engine = self.engine or self.setup(train_dataset, eval_dataset)
        start = 0
        if found is not None:
            start = found.step
            self._check_facts(found)
        elif engine.reference is None or engine.reference.kind != "cache":
            engine.examine_models()
        engine.plan_only()
        progress = Progress(engine, self.config)
        for batch in engine.batches(start):
            progress.show_plan(batch)
            break
        return TrainOutput(0, math.nan, {})

    def _find_checkpoint(self) -> Checkpoint | None:
        """The verified checkpoint that config.resume asks for; None to start afresh. Collective."""
        found, self._messages = find_checkpoint(
            self.config, self.output_dir, has_engine=self.engine is not None
        )
        return found

    def _check_facts(self, found: Checkpoint) -> None:
        """Holds the loaded run against the checkpoint's. Collective; raises CheckpointError."""
        facts = checkpoint_io.run_facts(self.engine)
        self.engine.messages += distributed.agree(
            lambda: check_facts(found.path, found.state, facts, self.config)
        )

    def _train(self, records: RunRecords, started: float, found: Checkpoint | None) -> TrainOutput:
        engine = self.engine
        engine.messages += self._messages
        tally = Tally(engine.spec.inputs, engine.device)
        if found is not None:
            self._check_facts(found)
            tally.load(found.state["tally"], checkpoint_io.load(engine, found))
            started -= found.state["seconds"]
            engine.reference_cache_seconds += found.state["reference_cache_seconds"]
        else:
            engine.examine_models()
        self.global_step = engine.global_step if found is not None else 0
        records.start(engine, found)
        progress = Progress(engine, self.config)
        progress.advance(self.global_step)
        if self.config.eval_on_start and found is None:
            self._evaluate_and_record(records, progress, 0.0)
        elif found is not None and found.state.get("evaluation_due"):
            self._evaluate_and_record(records, progress, found.state["epoch"])
        self._run_steps(records, progress, tally, started)
        progress.close()
        save_model(engine, self.output_dir)
        training_loss = tally.loss_sum / max(1, self.global_step - engine.num_skipped_steps)
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
            reference_time_fraction=tally.reference_time_fraction,
            reference_cache_seconds=engine.reference_cache_seconds,
            tokens_forward=tally.totals.get("tokens", 0.0),
            tokens_padded_equivalent=tally.totals.get("padded_tokens", 0.0),
            peak_memory_gb=memory,
        )
        progress.show_end(self.output_dir, metrics)
        return TrainOutput(self.global_step, training_loss, metrics)

    def _run_steps(self, records: RunRecords, progress: Progress, tally: Tally, started: float) -> None:
        """All optimizer steps from self.global_step on."""
        engine, config = self.engine, self.config
        facts = checkpoint_io.run_facts(engine)
        watch = Watch(engine.num_steps, has_reference=engine.reference is not None)
        steps = NonFiniteSteps(config, self.output_dir, scales_losses=engine.policy.scales_losses)
        with Watchdog(config.hang_timeout) as watchdog, Interruption() as interruption:
            for global_batch in engine.batches(start=self.global_step):
                result = self._train_step(global_batch, tally, steps, progress)
                step = self.global_step
                watchdog.beat(f"step {step}")
                if step % config.logging_steps == 0 or step == engine.num_steps or step == 1:
                    self._log_window(tally, result, global_batch, watch, records, progress)
                paused = time.perf_counter()
                asked = interruption.agreed() if step < engine.num_steps else None
                if asked is None and self._is_evaluation_step(step):
                    self._evaluate_and_record(records, progress, global_batch.epoch)
                if asked is not None or (config.save_steps is not None and step % config.save_steps == 0):
                    # After the evaluation: what a checkpoint's step has recorded is not computed again.
                    due = asked is not None and self._is_evaluation_step(step)
                    seconds = time.perf_counter() - started
                    epoch = global_batch.epoch
                    self._save_checkpoint(records, tally, facts, seconds, epoch, evaluation_due=due)
                if asked is not None:
                    raise Preempted(
                        f"{asked}: the run was saved after step {step} of {engine.num_steps}; the same "
                        "command with --resume goes on"
                    )
                tally.window.started += time.perf_counter() - paused

    def _train_step(
        self, global_batch: GlobalBatch, tally: Tally, steps: NonFiniteSteps, progress: Progress
    ) -> StepResult:
        """One optimizer step. Raises NonFiniteError where its gradient ends the run."""
        engine = self.engine
        with explained(engine, global_batch):
            for batch in global_batch.micro_batches:
                output = engine.forward(batch)
                engine.backward(output.losses.sum(), global_count=global_batch.num_preferences)
                steps.add(batch, output.losses)
                tally.add(output, batch)
            result = engine.step()
        self.global_step = global_batch.step
        if result.skipped:
            tally.drop_step()
        else:
            tally.end_step(global_batch)
        said = steps.judge(result, global_batch)
        if said is not None:
            progress.note(f"warning: step {self.global_step}: {said}")
        progress.advance()
        return result

    def _log_window(
        self,
        tally: Tally,
        result: StepResult,
        global_batch: GlobalBatch,
        watch: Watch,
        records: RunRecords,
        progress: Progress,
    ) -> None:
        """Logs the steps since the last logged one, where any of them counts."""
        means, counts = self._log(tally, result)
        if means:
            records.log(self.global_step, global_batch.epoch, means)
            progress.show(self.global_step, means)
            self._watch(watch, records, progress, tally, means, counts)
            tally.close_window(means, counts)

    def _watch(
        self,
        watch: Watch,
        records: RunRecords,
        progress: Progress,
        tally: Tally,
        means: dict[str, float],
        counts: dict,
    ) -> None:
        """Says and keeps what a logged row shows."""
        if self.config.doctor == "off":
            return
        step, texts = self.global_step, watch.look(self.global_step, means, counts["preferences"])
        leap = watch.spike(means["loss"])
        if leap is not None:
            first = step - tally.window.steps + 1
            texts.append(
                f"{leap}; {records.write_rows('spike', step, self.engine.rows_of_steps(first, step))}"
            )
        for text in texts:
            progress.note(f"step {step}: {text}")
            records.note_remark(step, text)

    def _save_checkpoint(
        self,
        records: RunRecords,
        tally: Tally,
        facts: dict,
        seconds: float,
        epoch: float,
        *,
        evaluation_due: bool,
    ) -> None:
        """Writes the checkpoint of this step. Collective; raises CheckpointError.

        evaluation_due: the run that goes on from it begins with the evaluation of this step.
        """
        engine, folder = self.engine, self.output_dir / checkpoint.FOLDER
        checkpoint.with_disk_errors(records.sync, self.output_dir)
        state = {
            **settings_of(self.config, engine.world_size),
            "facts": facts,
            "tally": tally.state(),
            "seconds": seconds,
            "reference_cache_seconds": engine.reference_cache_seconds,
            "evaluation_due": evaluation_due,
            "epoch": epoch,
            "versions": versions(),
        }
        saved = checkpoint_io.save(engine, folder, state, tally.rank_state())
        records.note_checkpoint(saved)
        checkpoint.prune(folder, self.global_step, self.config.save_total_limit)

    def _log(self, tally: Tally, result: StepResult) -> tuple[dict[str, float], dict[str, float]]:
        """The window's metrics, none where no step counts. Collective, once a logged step."""
        window = tally.window
        means, counts = tally.reduce()
        if not counts["preferences"]:
            # Every step of the window was left out.
            return {}, counts
        if not math.isfinite(means["loss"]):
            raise NonFiniteError(
                f"step {self.global_step}: loss={means['loss']} is not finite; lower learning_rate "
                f"(now {self.config.learning_rate:g}), check the data, or use bfloat16 instead of float16"
            )
        seconds = window.seconds
        means |= {alias: means[name] for alias, name in self.config.metric_aliases.items()}
        means |= {
            "grad_norm": float(result.grad_norm),
            "learning_rate": result.learning_rate,
            "pairs_per_second": counts["preferences"] / seconds,
            "tokens_per_second": counts["tokens"] / seconds,
            "step_time": seconds / window.steps,
            "reference_time_fraction": window.reference_seconds / seconds,
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
