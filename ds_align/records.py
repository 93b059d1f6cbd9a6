"""What a run leaves beside its weights: metrics.jsonl, run_summary.json, the metadata and the config."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import resource
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch

from ds_align import checkpoint, distributed
from ds_align.checkpoint import Checkpoint
from ds_align.config import BaseConfig
from ds_align.data import PreferenceDataset
from ds_align.engine import AlignEngine
from ds_align.engine.checkpoint_io import Saved
from ds_align.errors import CheckpointError, ConfigError, Preempted
from ds_align.kernels import backend
from ds_align.versions import versions


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory of this rank in GB: of the accelerator, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes * 1024 / 1e9


class RunRecords:
    """Writer of a run's records; only rank 0 writes, every rank may call."""

    def __init__(self, directory: Path, config: BaseConfig) -> None:
        self.directory = directory
        self.config = config
        self.summary: dict = {}
        self.last: dict[str, float] = {}
        self._file = None

    @classmethod
    def open(cls, directory: Path, config: BaseConfig, found: Checkpoint | None = None) -> RunRecords:
        """Claims the output directory; found: the checkpoint that the run goes on from.

        Raises ConfigError where it already holds another run and overwrite_output_dir is not set, and
        CheckpointError where it cannot be written.
        """
        records = cls(directory, config)
        if not distributed.is_main():
            return records
        check_output_dir(directory, config, found)
        try:
            directory.mkdir(parents=True, exist_ok=True)
            records.summary = {
                "status": "running",
                "method": config.method,
                "run_name": config.run_name,
                "started_at": _now(),
            }
            records._write_summary()
        except OSError as error:
            raise CheckpointError(
                f"output_dir={str(directory)!r} cannot be written ({error.strerror}); give another directory"
            ) from error
        return records

    def start(self, engine: AlignEngine, found: Checkpoint | None = None) -> None:
        """Writes what is known once the models are loaded; found: the checkpoint that the run goes on from.

        Collective: every rank must call this.
        """
        if found is not None:
            self.last = distributed.broadcast_object(self._keep_metrics(found))
        if not distributed.is_main():
            return
        # Only now: a run that fails before it has loaded its data takes no earlier run's figures with it.
        if found is None:
            (self.directory / "metrics.jsonl").unlink(missing_ok=True)
        else:
            self.summary |= {"resumed_from": str(found.path), "resumed_step": found.step}
        if self.config.resume != "auto" and not _is_continued(self.directory, found):
            checkpoint.forget(self.directory / checkpoint.FOLDER)
        self.config.to_yaml(self.directory / "config.resolved.yaml")
        self.summary |= {
            "world_size": engine.world_size,
            "zero_stage": engine.policy.zero_stage,
            "backend": backend(),
            "device": str(engine.device),
            "layout": str(engine.layout),
            "reference": "none" if engine.reference is None else engine.reference.kind,
            "num_steps": engine.num_steps,
            "global_batch_size": engine.global_batch_size,
            "train_rows": len(engine.train_data),
            "data_counts": {name: int(value) for name, value in engine.train_data.counts.items()},
            **_mixture(engine.train_data),
            "dialects": engine.train_data.finding or None,
            "eval_set": engine.eval_set,
            "versions": versions(),
            "doctor": [finding.as_json() for finding in engine.findings],
        }
        self._write_summary()

    def _keep_metrics(self, found: Checkpoint) -> dict[str, float]:
        """Keeps the lines of metrics.jsonl up to the checkpoint; returns the last value of each figure."""
        last: dict[str, float] = {}
        source = found.run_directory / "metrics.jsonl"
        if not distributed.is_main() or not source.is_file():
            return last
        kept = []
        for line in source.read_text(encoding="utf-8").splitlines():
            # A killed run may leave half a line.
            with contextlib.suppress(ValueError):
                row = json.loads(line)
                if row["step"] <= found.step:
                    kept.append(line)
                    last |= {name: value for name, value in row.items() if name not in ("step", "epoch")}
        partial = self.directory / "metrics.jsonl.partial"
        checkpoint.write_durably(partial, "".join(f"{line}\n" for line in kept))
        partial.replace(self.directory / "metrics.jsonl")
        return last

    def sync(self) -> None:
        """Puts the metrics so far on the disk. Raises OSError."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())

    def note_checkpoint(self, saved: Saved) -> None:
        """Writes into the summary what the checkpoints have cost; save_seconds is that of all of them."""
        if not distributed.is_main():
            return
        self.summary |= {
            "last_checkpoint": str(saved.path),
            "checkpoint_bytes": saved.num_bytes,
            "save_seconds": self.summary.get("save_seconds", 0.0) + saved.seconds,
        }
        self._write_summary()

    def note_remark(self, step: int, text: str) -> None:
        """Keeps a remark about the figures of a step for the summary."""
        self.summary.setdefault("remarks", []).append({"step": step, "text": text})

    def write_rows(self, kind: str, step: int, rows: list[list[int]]) -> str:
        """Writes which rows the steps up to `step` had; says what became of it. No communication."""
        path = self.directory / f"{kind}_step_{step}.json"
        if distributed.is_main():
            first = step - len(rows) + 1
            content = {"steps": dict(zip(range(first, step + 1), rows, strict=True))}
            try:
                path.write_text(json.dumps(content) + "\n", encoding="utf-8")
            except OSError as error:
                return f"{path.name} cannot be written ({error.strerror})"
        return f"{path.name} has the rows"

    def log(self, step: int, epoch: float, metrics: dict[str, float]) -> None:
        """Appends one line to metrics.jsonl."""
        self.last |= metrics
        if not distributed.is_main():
            return
        if self._file is None:
            self._file = (self.directory / "metrics.jsonl").open("a", encoding="utf-8")
        self._file.write(json.dumps({"step": step, "epoch": round(epoch, 6), **metrics}) + "\n")
        self._file.flush()

    def final_metrics(self, training_loss: float, seconds: float) -> dict[str, float]:
        """The last value of each logged metric, under the logged names and the usual summary names."""
        summary_names = {
            "preference_accuracy": "rewards/accuracies",
            "chosen_rewards": "rewards/chosen",
            "rejected_rewards": "rewards/rejected",
            "reward_margin": "rewards/margins",
        }
        metrics = {"train_loss": training_loss, "train_runtime": seconds, **self.last}
        metrics |= {name: self.last[key] for name, key in summary_names.items() if key in self.last}
        return metrics

    def finish(self, status: str, metrics: dict[str, float], **fields: object) -> None:
        """Writes the last summary and the method's metadata."""
        if not distributed.is_main():
            return
        if self._file is not None:
            self._file.close()
        self.summary |= {**fields, "metrics": metrics, "finished_at": _now(), "status": status}
        if status == "completed":
            self._write_metadata()
        self._write_summary()

    def fail(self, error: BaseException) -> None:
        """Writes that the run ended early, and why; never hides the error that it reports."""
        if not distributed.is_main():
            return
        if self._file is not None:
            self._file.close()
        reason = f"{type(error).__name__}: {error}"
        status = "preempted" if isinstance(error, Preempted) else "failed"
        self.summary |= {"status": status, "error": reason, "finished_at": _now()}
        with contextlib.suppress(OSError):
            self._write_summary()

    def _write_metadata(self) -> None:
        """`{method}_metadata.json`: the method and the settings that shaped the model."""
        config = self.config
        reference = config.ref_model_name or config.model_name_or_path
        metadata = {
            "training_method": config.method,
            **{name: getattr(config, name) for name in _method_fields(config)},
            "max_prompt_length": config.max_prompt_length,
            "max_length": config.max_length,
            "model_name": config.model_name_or_path,
            "ref_model_name": reference if config.needs_reference else None,
            "training_completed_at": _now(),
        }
        path = self.directory / f"{config.method}_metadata.json"
        path.write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")

    def _write_summary(self) -> None:
        # Replaced as a whole: a scheduler that reads it must never see half a file.
        path = self.directory / "run_summary.json"
        partial = path.with_suffix(".json.partial")
        partial.write_text(json.dumps(self.summary, indent=2) + "\n", encoding="utf-8")
        partial.replace(path)


def _mixture(data: PreferenceDataset) -> dict[str, list[dict]]:
    """The parts of a mixture; train_rows: those of the part that train, some may be held out."""
    if not data.parts:
        return {}
    train_rows = np.bincount(data.sources, minlength=len(data.parts))
    return {
        "mixture": [
            dataclasses.asdict(part) | {"train_rows": int(number)}
            for part, number in zip(data.parts, train_rows, strict=True)
        ]
    }


def _method_fields(config: BaseConfig) -> list[str]:
    return [name for name in type(config).model_fields if name not in BaseConfig.model_fields]


def check_output_dir(directory: Path, config: BaseConfig, found: Checkpoint | None = None) -> None:
    """Raises what a run in this directory would raise; writes nothing.

    ConfigError where it holds a run that is neither continued (found: the checkpoint) nor given up by
    overwrite_output_dir, or a model that the run reads; CheckpointError where it cannot be written.
    """
    for setting in ("model_name_or_path", "ref_model_name"):
        model = getattr(config, setting)
        if model is not None and _same_directory(directory, model):
            raise ConfigError(
                f"output_dir={str(directory)!r} is the directory of {setting}; give another output_dir, "
                "or its weights would be overwritten"
            )
    what = _run_in_the_way(directory, config, found)
    if what is not None:
        raise ConfigError(
            f"output_dir={str(directory)!r} already holds a run ({what}); give another output_dir, "
            "--resume to continue from its checkpoints, or --overwrite_output_dir to replace it"
        )
    there = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        fault = "is not a directory" if not there.is_dir() else "does not let you write"
        raise CheckpointError(
            f"output_dir={str(directory)!r} cannot be written ({there} {fault}); give another directory"
        )


def _run_in_the_way(directory: Path, config: BaseConfig, found: Checkpoint | None) -> str | None:
    """What shows that the directory holds a run which this one would replace; None where nothing does."""
    if config.overwrite_output_dir or _is_continued(directory, found):
        return None
    steps = checkpoint.list_steps(directory / checkpoint.FOLDER)
    if config.resume == "auto":
        # A run that was killed before its first checkpoint starts afresh; a finished one is worth protecting.
        return "completed, without a whole checkpoint" if _status(directory) == "completed" else None
    # A run that ended before its first figure left nothing that is worth protecting.
    if (directory / "metrics.jsonl").exists():
        return "metrics.jsonl"
    return f"{len(steps)} checkpoints" if steps else None


def _is_continued(directory: Path, found: Checkpoint | None) -> bool:
    return found is not None and _same_directory(directory, str(found.run_directory))


def _status(directory: Path) -> str | None:
    try:
        return json.loads((directory / "run_summary.json").read_text(encoding="utf-8")).get("status")
    except (OSError, ValueError):
        return None


def _same_directory(directory: Path, model: str) -> bool:
    return directory.exists() and Path(model).exists() and directory.samefile(model)


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
