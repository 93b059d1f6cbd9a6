"""Short runs of the trainer; rank 0 writes what they gave as JSON.

usage: runs.py MODELS OUT; on two ranks all parts, on one rank the evaluation alone.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
from pathlib import Path

import torch

from ds_align import BaseConfig, Trainer, distributed
from ds_align.config import METHODS
from ds_align.config.deepspeed_files import read_ds_config
from tests.distributed.tiny import (
    STRICT,
    destroy,
    ds_config,
    pairs,
    program_arguments,
    reference_ds_config,
    unpaired,
)

GLOBAL_BATCH = 6


def build_config(method: str, model: Path, **settings: object) -> BaseConfig:
    config_class = METHODS[method].config
    values = {
        "model_name_or_path": str(model),
        "ds_config": ds_config(3),
        "per_device_train_batch_size": GLOBAL_BATCH // distributed.world_size(),
        "per_device_eval_batch_size": 3,  # another batch on two ranks than on one: no figure may depend on it
        "pack_max_tokens": 64,
        "dtype": "float32",
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
    }
    if METHODS[method].needs_reference(config_class()):
        values["ref_ds_config"] = reference_ds_config()
    return config_class(**(values | settings))


def rows_of(method: str, num_rows: int, seed: int = 0) -> list[dict]:
    return (unpaired if METHODS[method].inputs == "unpaired" else pairs)(num_rows, seed)


def evaluations(models: Path, out: Path) -> dict:
    """Metrics of 13 uneven rows, with a reference that differs, so that no figure is 0; by method."""
    found = {}
    for method in METHODS:
        settings = {"output_dir": str(out / "unused")}
        if METHODS[method].needs_reference(METHODS[method].config()):
            settings["ref_model_name"] = str(models / "reference")
        trainer = Trainer(build_config(method, models / "policy", **settings))
        trainer.setup(rows_of(method, 6))
        found[method] = trainer.evaluate(rows_of(method, 13, seed=7))
        destroy(trainer.engine)
    return found


def recorded(models: Path, out: Path) -> dict:
    """A run of each method with evaluations; its records lie in out/METHOD."""
    found = {}
    for method in METHODS:
        config = build_config(
            method,
            models / "policy",
            output_dir=str(out / method),
            max_steps=5,
            logging_steps=2,
            eval_steps=2,
            eval_on_start=True,
        )
        trainer = Trainer(config)
        result = trainer.train(rows_of(method, 23), rows_of(method, 5, seed=7))
        found[method] = {"training_loss": result.training_loss, "global_step": result.global_step}
        weights = dict(trainer.engine.policy.weights())
        if distributed.is_main():
            torch.save(weights, out / f"{method}.pt")
        destroy(trainer.engine)
    return found


def variants(models: Path, out: Path) -> dict:
    """Losses of two steps in other ways to run the same thing."""
    source, offload = read_ds_config("zero3_offload")
    assert source.endswith("zero3_offload.json")
    offload["zero_optimization"] |= STRICT
    cases = {
        "tied": ("policy", {}),
        "tied checkpointing": ("policy", {"gradient_checkpointing": True}),
        "tied offload": ("policy", {"ds_config": offload}),
        "tied bfloat16": ("policy", {"dtype": "bfloat16"}),
        "tied bfloat16 zero0": ("policy", {"dtype": "bfloat16", "ds_config": ds_config(0)}),
        "untied": ("untied", {}),
        "untied checkpointing": ("untied", {"gradient_checkpointing": True}),
        "untied offload": ("untied", {"ds_config": offload}),
        "untied bfloat16": ("untied", {"dtype": "bfloat16"}),
    }
    found = {}
    for name, (model, settings) in cases.items():
        directory = out / name.replace(" ", "-")
        config = build_config(
            "dpo", models / model, output_dir=str(directory), max_steps=3, beta=0.5, **settings
        )
        trainer = Trainer(config)
        trainer.train(rows_of("dpo", 18))
        lines = []
        if distributed.is_main():
            lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
        weights = dict(trainer.engine.policy.weights())
        if distributed.is_main():
            found[name] = {
                "loss": [line["loss"] for line in lines],
                "grad_norm": [line["grad_norm"] for line in lines],
                "finite": all(bool(torch.isfinite(weight).all()) for weight in weights.values()),
                "norm": math.sqrt(sum(weight.double().pow(2).sum().item() for weight in weights.values())),
                "dtype": str(next(iter(weights.values())).dtype),
                "files": sorted(path.name for path in directory.iterdir()),
            }
        destroy(trainer.engine)
    return found


def main() -> None:
    models, out = map(Path, program_arguments())
    from ds_align.engine.init import init_distributed

    init_distributed()
    parts = (evaluations, recorded, variants) if distributed.world_size() == 2 else (evaluations,)
    facts = {}
    for part in parts:
        with contextlib.redirect_stdout(io.StringIO()):
            facts[part.__name__] = part(models, out)
    if distributed.is_main():
        (out / f"runs-{distributed.world_size()}.json").write_text(json.dumps(facts), encoding="utf-8")
    distributed.barrier()


if __name__ == "__main__":
    main()
