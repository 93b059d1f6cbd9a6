"""First scores of policy and reference under several settings, and what a changed policy does to them.

usage: doctor.py MODELS OUT; rank 0 writes OUT/doctor-RANKS.json.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch

from ds_align import distributed
from ds_align.config import METHODS
from ds_align.engine import AlignEngine
from ds_align.engine.init import init_distributed
from ds_align.errors import DsAlignError
from tests.distributed.tiny import destroy, ds_config, pairs, program_arguments, reference_ds_config, unpaired

CASES = {
    "dpo": ("dpo", {}),
    "dpo cached": ("dpo", {"ref_logps": "cache", "ref_cache_dir": "OUT/references"}),
    "dpo lora": ("dpo", {"use_lora": True, "lora_dropout": 0.5, "ref_ds_config": None}),
    "dpo bfloat16": ("dpo", {"dtype": "bfloat16"}),
    "dpo other": ("dpo", {"ref_model_name": "MODELS/reference"}),
    "dpo coupled": ("dpo", {"loss_type": "aot"}),
    "kto": ("kto", {}),
    "simpo": ("simpo", {}),
}


def build(method: str, models: Path, out: Path, settings: dict) -> AlignEngine:
    values = {
        "model_name_or_path": str(models / "policy"),
        "ds_config": ds_config(3),
        "per_device_train_batch_size": 6 // distributed.world_size(),
        "pack_max_tokens": 64,
        "dtype": "float32",
    }
    if METHODS[method].needs_reference(METHODS[method].config()):
        values["ref_ds_config"] = reference_ds_config()
    text = json.dumps(values | settings).replace("OUT", str(out)).replace("MODELS", str(models))
    rows = (unpaired if METHODS[method].inputs == "unpaired" else pairs)(12)
    return AlignEngine.from_config(METHODS[method].config(**json.loads(text)), rows)


def scores(engine: AlignEngine) -> dict:
    """What examine_models finds, or raises."""
    try:
        engine.examine_models()
    except DsAlignError as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {finding.id: dataclasses.asdict(finding) for finding in engine.findings}


def changed_policy(models: Path, out: Path, doctor: str) -> dict:
    """A policy with weights of its own, as a cache of another model would make it look."""
    engine = build("dpo", models, out, {"ds_config": ds_config(0), "doctor": doctor})
    with torch.no_grad():
        for weight in engine.policy.module.parameters():
            weight.mul_(1.1)
    found = scores(engine)
    destroy(engine)
    return found


def main() -> None:
    models, out = map(Path, program_arguments())
    init_distributed()
    facts = {}
    for name, (method, settings) in CASES.items():
        engine = build(method, models, out, settings)
        facts[name] = scores(engine)
        destroy(engine)
    facts |= {f"changed {doctor}": changed_policy(models, out, doctor) for doctor in ("error", "warn", "off")}
    if distributed.is_main():
        (out / f"doctor-{distributed.world_size()}.json").write_text(json.dumps(facts))
    distributed.barrier()


if __name__ == "__main__":
    main()
