"""Global batches at the edges: one class only, one row for two ranks, fewer rows than ranks in the last step.

usage: edges.py MODELS OUT.pt
"""

from __future__ import annotations

from pathlib import Path

import torch

from ds_align import AlignEngine, distributed
from ds_align.config import METHODS
from tests.distributed.tiny import destroy, ds_config, pairs, program_arguments, reference_ds_config, unpaired


def labelled(count: int, *labels: bool) -> list[dict]:
    return [row | {"label": labels[number % len(labels)]} for number, row in enumerate(unpaired(count))]


# name -> (method, rows, settings); three rows in batches of two: the last batch leaves one rank without any.
CASES = {
    "kto_all_desirable": ("kto", labelled(3, True), {}),
    "kto_all_undesirable": ("kto", labelled(3, False), {}),
    "kto_a_class_a_rank": ("kto", labelled(4, True, False), {}),
    "kto_one_row": ("kto", labelled(1, True), {}),
    "kto_no_reference": ("kto", labelled(3, False), {"use_ref_model": False}),
    "apo_zero_unpaired": ("kto", labelled(3, True), {"loss_type": "apo_zero_unpaired"}),
    "aot": ("dpo", pairs(3), {"loss_type": "aot"}),
    "bco": ("dpo", pairs(3), {"loss_type": "bco_pair"}),
    "wpo": ("dpo", pairs(3), {"use_weighting": True, "ld_alpha": 0.5, "rpo_alpha": 0.1}),
    "simpo": ("simpo", pairs(3), {"sft_weight": 0.1}),
    "cpo": ("cpo", pairs(3), {"nll_normalization": "sum"}),
    "ipo": ("ipo", pairs(3), {}),
}


def run_case(models: Path, method: str, rows: list[dict], settings: dict) -> dict:
    spec, world_size = METHODS[method], distributed.world_size()
    values = {
        "model_name_or_path": str(models / "policy"),
        "ds_config": ds_config(3),
        "per_device_train_batch_size": 2 // world_size,
        "train_sampling_strategy": "sequential",
        "optim": "sgd",
        "learning_rate": 0.01,
        "lr_scheduler_type": "constant",
        "pack_max_tokens": 16,
        "dtype": "float32",
        **settings,
    }
    if spec.needs_reference(spec.config(**settings)):
        values |= {"ref_model_name": str(models / "reference"), "ref_ds_config": reference_ds_config()}
    engine = AlignEngine.from_config(spec.config(**values), train_dataset=rows)
    losses, kl = [], []
    for global_batch in engine.batches():
        loss = torch.zeros(1, dtype=torch.float64)
        for batch in global_batch.micro_batches:
            output = engine.forward(batch)
            engine.backward(output.losses.sum(), global_count=global_batch.num_preferences)
            loss += output.losses.detach().sum().cpu()
        engine.step()
        losses.append((distributed.all_reduce_sum(loss, engine.device) / global_batch.num_preferences).item())
        kl.append(None if global_batch.kl is None else float(global_batch.kl))
    result = {"losses": losses, "kl": kl, "weights": dict(engine.policy.weights())}
    destroy(engine)
    return result


def main() -> None:
    models, out = program_arguments()
    from ds_align.engine.init import init_distributed

    init_distributed()
    # Fewer rows than ranks are refused, so the single row is for one rank.
    cases = {name: case for name, case in CASES.items() if len(case[1]) >= distributed.world_size()}
    results = {name: run_case(Path(models), *case) for name, case in cases.items()}
    if distributed.is_main():
        torch.save(results, out)
    distributed.barrier()


if __name__ == "__main__":
    main()
