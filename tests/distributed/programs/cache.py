"""Runs with a live and with a cached reference; saves what each computed and whether a reference was loaded.

usage: cache.py MODELS FOLDER
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ds_align import AlignEngine, DPOConfig, IPOConfig, KTOConfig, Trainer, distributed
from ds_align.config import BaseConfig
from ds_align.engine.load import precompute
from ds_align.engine.reference import ReferenceEngine
from ds_align.evaluate import evaluate
from tests.distributed.tiny import (
    destroy,
    ds_config,
    pairs,
    program_arguments,
    reference_ds_config,
    write_jsonl,
)

loads = []
_load = ReferenceEngine.from_config


def counted(*arguments: object, **named: object) -> ReferenceEngine:
    loads.append(1)
    return _load(*arguments, **named)


ReferenceEngine.from_config = counted


def settings(models: Path, **changes: object) -> dict:
    own_model = changes.get("use_lora") or changes.get("ref_model_name", "") is None
    return {
        "model_name_or_path": str(models / "policy"),
        "ref_model_name": None if own_model else str(models / "reference"),
        "ref_ds_config": None if changes.get("use_lora") else reference_ds_config(),
        "ds_config": ds_config(3),
        "dtype": "float32",
        "pack_max_tokens": 64,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "num_train_epochs": 1,
        "learning_rate": 1e-3,
        "learning_rate_override": True,
        **changes,
    }


def run(config: BaseConfig, data: list[dict], other: list[dict] | None = None) -> dict:
    """Trains; `other` is evaluated on at the end."""
    loads.clear()
    engine = AlignEngine.from_config(config, train_dataset=data)
    found = {"kind": engine.reference.kind, "losses": [], "messages": list(engine.messages)}
    found |= {"cache_seconds": engine.reference_cache_seconds, "step_seconds": []}
    for global_batch in engine.batches():
        loss = torch.zeros(1, dtype=torch.float64)
        for batch in global_batch.micro_batches:
            output = engine.forward(batch)
            engine.backward(output.losses.sum(), global_count=global_batch.num_preferences)
            loss += output.losses.detach().sum().cpu()
        engine.step()
        found["step_seconds"].append(global_batch.reference_seconds)
        found["losses"].append((distributed.all_reduce_sum(loss, engine.device)).item())
    found["loads"] = len(loads)
    found["weights"] = dict(engine.policy.weights(trained_only=True))
    found["evaluation"] = evaluate(engine, engine.train_data)
    found["loads_with_evaluation"] = len(loads)
    if other is not None:
        trainer = Trainer(config)
        trainer.engine = engine
        found["other"] = trainer.evaluate(other)
        found["loads_with_other"] = len(loads)
    destroy(engine)
    return found


def damage(folder: Path) -> None:
    """Flips a bit of the log-probs in every file of the cache."""
    if distributed.is_main():
        for file in folder.rglob("part-*.arrow"):
            data = bytearray(file.read_bytes())
            data[len(data) // 2] ^= 1
            file.write_bytes(data)
    distributed.barrier()


def change_weights(directory: Path) -> None:
    """Other weights under the same name."""
    if distributed.is_main():
        file = directory / "model.safetensors"
        weights = {name: weight * 1.05 for name, weight in load_file(file).items()}
        save_file(weights, file, metadata={"format": "pt"})
    distributed.barrier()


def main() -> None:
    models, folder = map(Path, program_arguments())
    own = folder / "models"
    if distributed.environment_rank() == 0:
        shutil.copytree(models, own)
    results = {}
    data, more = pairs(21), pairs(9, seed=5)

    def both(
        name: str, kind: type, rows: list[dict] = data, *, place: str = "cache", **changes: object
    ) -> None:
        """The same run with a live reference, with a cache that lacks rows, and with one that does not."""
        values = settings(own, **changes)
        results[f"{name} live"] = run(kind(**values), rows, more)
        cached = values | {"ref_logps": "cache", "ref_cache_dir": str(folder / place)}
        for round_ in ("first", "second"):
            results[f"{name} {round_}"] = run(kind(**cached), rows, more)

    from ds_align.engine.init import init_distributed

    init_distributed()
    distributed.barrier()
    both("dpo", DPOConfig)
    both("dpo lr", DPOConfig, learning_rate=2e-3, seed=7, per_device_train_batch_size=2, loss_type="hinge")
    both("ipo", IPOConfig)
    both("kto", KTOConfig)
    both("cut", DPOConfig, max_length=30)
    both("overlap", DPOConfig, data[10:] + pairs(4, seed=9))
    both("bfloat16", DPOConfig, dtype="bfloat16")
    both("lora", DPOConfig, place="own", use_lora=True, lora_dropout=0.0)
    both("own", DPOConfig, place="own", ref_model_name=None)
    both("short", DPOConfig, place="short", max_steps=1)
    both("eight bits", DPOConfig, ref_load_in_8bit=True, train_sampling_strategy="sequential")
    both("four bits", DPOConfig, ref_load_in_4bit=True, train_sampling_strategy="sequential")
    damage(folder / "cache")
    both("damaged", DPOConfig)
    change_weights(own / "reference")
    both("other weights", DPOConfig)
    values = settings(own, dataset_path=str(folder / "rows.jsonl"), ref_logps="cache")
    config = DPOConfig(**values, ref_cache_dir=str(folder / "precomputed"))
    if distributed.is_main():
        write_jsonl(folder / "rows.jsonl", data)
    distributed.barrier()
    loads.clear()
    precompute(config)
    results["precompute"] = {"loads": len(loads)}
    results["precomputed"] = run(config, data)
    if distributed.is_main():
        torch.save(results, folder / "results.pt")
    distributed.barrier()


if __name__ == "__main__":
    main()
