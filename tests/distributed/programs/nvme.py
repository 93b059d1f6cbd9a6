"""Scores and trains with the reference in host memory and on NVMe; saves what each said and left behind.

usage: nvme.py MODELS FOLDER; MODELS holds policy, large and tiny, FOLDER is on a disk
"""

from __future__ import annotations

import gc
from pathlib import Path

import torch

from ds_align import AlignEngine, DPOConfig, distributed
from ds_align.config import read_ds_config
from ds_align.errors import ConfigError
from tests.distributed.tiny import STRICT, destroy, ds_config, pairs, program_arguments

LIVE = {"stage3_max_live_parameters": 10**9, "stage3_prefetch_bucket_size": 3 * 10**6}
CASES = {
    "large": {"reference": "large"},
    "untied": {"reference": "untied", "aio": {"intra_op_parallelism": 2, "single_submit": True}},
    "bfloat16": {"reference": "large", "dtype": "bfloat16", "zero": LIVE},
    "8 bits": {"reference": "large", "ref_load_in_8bit": True},
    # Read ahead of their use, in as few buffers as there may be.
    "ahead": {"reference": "large", "zero": LIVE, "offload": {"buffer_count": 1}},
    "experts": {"reference": "moe", "zero": LIVE, "offload": {"buffer_count": 2}},
    "tiny": {"reference": "tiny"},
}
ON_ONE_RANK = ("large", "ahead", "8 bits")
MISTAKES = {
    "small buffers": {"buffer_size": 5000},
    "few buffers": {"buffer_count": 1},
    "a file": {"nvme_path": "FILE"},
}


def reference_config(folder: Path, device: str, *, zero: dict, aio: dict, **offload: object) -> dict:
    """The shipped file for the device, without slack."""
    _, values = read_ds_config("zero_inference_nvme" if device == "nvme" else "zero_inference")
    values["zero_optimization"] |= STRICT | zero
    if device == "nvme":
        values["zero_optimization"]["offload_param"] |= {"nvme_path": str(folder / "disk")} | offload
        values["aio"] |= aio
    return values


def build(models: Path, folder: Path, device: str, reference: str, **changes: object) -> AlignEngine:
    values = {
        "model_name_or_path": str(models / "policy"),
        "ref_model_name": str(models / reference),
        "ds_config": ds_config(3),
        "dtype": "float32",
        "pack_max_tokens": 64,
        "ref_batch_tokens": 128,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-3,
        "max_steps": 2,
    }
    offload = changes.pop("offload", {})
    parts = {name: changes.pop(name, {}) for name in ("zero", "aio")}
    ref_ds_config = reference_config(folder, device, **parts, **offload)
    return AlignEngine.from_config(
        DPOConfig(**values | changes, ref_ds_config=ref_ds_config), train_dataset=pairs(16)
    )


def train(engine: AlignEngine) -> dict:
    """Losses of two steps, and the token log-probs of this rank's packs at each."""
    losses, scores = [], []
    for global_batch in engine.batches():
        loss = torch.zeros(1, dtype=torch.float64)
        for batch in global_batch.micro_batches:
            scores.append(engine.reference.forward(batch.to(engine.device)).cpu())
            output = engine.forward(batch)
            engine.backward(output.losses.sum(), global_count=global_batch.num_preferences)
            loss += output.losses.detach().sum().cpu()
        engine.step()
        losses.append(distributed.all_reduce_sum(loss, engine.device).item())
    return {"losses": losses, "scores": scores}


def files(engine: AlignEngine) -> dict[str, int]:
    """Bytes of this rank's files, by name; the other rank may be removing its own."""
    own = engine.reference.directories.ds_config["zero_optimization"]["offload_param"].get("nvme_path")
    return {} if own is None else {path.name: path.stat().st_size for path in Path(own).rglob("*.swp")}


def locked_bytes() -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmLck"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmLck in /proc/self/status")


def run(models: Path, folder: Path, device: str, settings: dict) -> dict:
    engine = build(models, folder, device, **settings)
    found = train(engine) | {"files": files(engine), "messages": list(engine.messages)}
    weights = list(engine.reference.module.parameters())
    found["in_memory"] = sum(weight.ds_tensor.numel() for weight in weights)
    found["whole"] = sum(weight.ds_tensor.ds_numel for weight in weights)
    found["locked"] = locked_bytes()
    del weights
    engine.policy.engine.destroy()
    engine.reference.close()
    found["locked_after"] = locked_bytes()
    return found


def both_at_once(models: Path, folder: Path) -> list[dict]:
    """Two references below one nvme_path, alive together and asked in turn."""
    engines = {name: build(models, folder, "nvme", name) for name in ("large", "untied")}
    batch = next(engines["large"].batches()).micro_batches[0].to(engines["large"].device)
    found = [{name: engine.reference.forward(batch) for name, engine in engines.items()} for _ in range(2)]
    for engine in engines.values():
        destroy(engine)
    return found


def refusals(models: Path, folder: Path) -> dict:
    found = {}
    for name, offload in MISTAKES.items():
        if "nvme_path" in offload:
            offload = {"nvme_path": str(folder / "file")}
        try:
            build(models, folder, "nvme", "moe", offload=offload)
        except ConfigError as error:
            found[name] = distributed.gather_objects(str(error))
    return found


def main() -> None:
    models, folder = map(Path, program_arguments())
    from ds_align.engine.init import init_distributed

    init_distributed()
    several = distributed.world_size() > 1
    results = {}
    for name in CASES if several else ON_ONE_RANK:
        for device in ("cpu", "nvme"):
            results[name, device] = run(models, folder, device, dict(CASES[name]))
            gc.collect()
        distributed.barrier()
        results[name, "left"] = sorted(path.name for path in (folder / "disk").iterdir())
        distributed.barrier()
    if several:
        results["both"] = both_at_once(models, folder)
        results["refusals"] = refusals(models, folder)
    torch.save(results, folder / f"results-{distributed.rank()}.pt")
    distributed.barrier()


if __name__ == "__main__":
    main()
