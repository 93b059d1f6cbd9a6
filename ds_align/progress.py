"""What a person sees during a run: one progress bar, a table at logged steps, the plan of a dry run."""

from __future__ import annotations

import sys
from pathlib import Path

from tqdm import tqdm

from ds_align import distributed
from ds_align.batch import GlobalBatch
from ds_align.config import BaseConfig
from ds_align.engine import AlignEngine

_COLUMNS = (
    ("step", "step", "{:d}"),
    ("loss", "loss", "{:.4f}"),
    ("accuracy", "rewards/accuracies", "{:.3f}"),
    ("margin", "rewards/margins", "{:.4f}"),
    ("grad norm", "grad_norm", "{:.3f}"),
    ("lr", "learning_rate", "{:.2e}"),
    ("pairs/s", "pairs_per_second", "{:.1f}"),
    ("tokens/s", "tokens_per_second", "{:.0f}"),
)
_WIDTH = 10
_REFERENCES = {
    None: "none",
    "model": "ZeRO-Inference",
    "adapters_off": "the policy before its adapters' training",
    "cache": "log-probs from the cache",
}


class Progress:
    """Prints on rank 0 only; the other ranks hold a silent one."""

    def __init__(self, engine: AlignEngine, config: BaseConfig) -> None:
        self.main = distributed.is_main()
        self.engine = engine
        self._header_shown = False
        self._bar = None
        if not self.main:
            return
        for message in [*config.warnings(), *engine.messages]:
            self._print(f"note: {message}")
        self._print(
            f"{config.method}: {len(engine.train_data)} training rows, {engine.num_steps} steps of "
            f"{engine.global_batch_size} preferences on {engine.world_size} rank(s) ({engine.device.type}), "
            f"ZeRO stage {engine.policy.zero_stage}, "
            f"reference: {_REFERENCES[engine.reference and engine.reference.kind]}, "
            f"{engine.layout} packs of {engine.pack_tokens} tokens"
        )
        if not config.dry_run:
            self._bar = tqdm(total=engine.num_steps, desc=config.method, unit="step", file=sys.stderr)

    def _print(self, text: str) -> None:
        if self.main:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def advance(self, steps: int = 1) -> None:
        """So many optimizer steps are done."""
        if self._bar is not None:
            self._bar.update(steps)

    def show(self, step: int, metrics: dict[str, float]) -> None:
        """A row of the table, and the rates beside the bar."""
        if not self.main:
            return
        if not self._header_shown:
            self._print(" ".join(f"{title:>{_WIDTH}}" for title, _, _ in _COLUMNS))
            self._header_shown = True
        values = {"step": step, **metrics}
        cells = (form.format(values[key]) if key in values else "-" for _, key, form in _COLUMNS)
        self._print(" ".join(f"{cell:>{_WIDTH}}" for cell in cells))
        self._bar.set_postfix_str(
            f"{metrics['pairs_per_second']:.1f} pairs/s, {metrics['tokens_per_second']:.0f} tokens/s"
        )

    def show_evaluation(self, step: int, result: dict[str, float]) -> None:
        """One line for an evaluation."""
        accuracy = result.get("eval_preference_accuracy", result.get("eval_overall_accuracy"))
        parts = [f"evaluation at step {step}: loss {result['eval_loss']:.4f}", f"accuracy {accuracy:.3f}"]
        if "eval_policy_accuracy" in result:
            parts.append(f"policy accuracy {result['eval_policy_accuracy']:.3f}")
        if "eval_margin" in result:
            parts.append(f"margin {result['eval_margin']:.4f}")
        self._print(", ".join(parts))

    def note(self, text: str) -> None:
        """One line between the rows."""
        self._print(f"note: {text}")

    def show_plan(self, batch: GlobalBatch) -> None:
        """What a dry run shows: the first global batch as it would be trained, and one decoded preference."""
        tokens = [micro.num_tokens for micro in batch.micro_batches]
        unshared = sum(micro.num_unshared_tokens for micro in batch.micro_batches)
        self._print(
            f"first step: {batch.num_preferences} preferences, on rank 0 {len(tokens)} pack(s) of {tokens} "
            f"tokens ({unshared} without prompt sharing), {len(batch.reference_batches)} reference pack(s); "
            f"fullest rank {batch.rank_imbalance:.3f} x the mean"
        )
        micro = next((micro for micro in batch.micro_batches if micro.num_preferences), None)
        if micro is not None:
            item = self.engine.train_data[micro.rows[0]]
            for field in type(item).__slots__:
                value = getattr(item, field)
                text = self.engine.tokenizer.decode(value) if hasattr(value, "dtype") else value
                self._print(f"  {field}: {text!r}")

    def show_end(self, directory: Path, metrics: dict[str, float]) -> None:
        """The last line."""
        self._print(f"done: train loss {metrics['train_loss']:.4f}, saved in {directory}")

    def close(self) -> None:
        """Ends the bar."""
        if self._bar is not None:
            self._bar.close()
