"""Trains with a reference that follows the policy; saves losses and the reference's weights after each step.

usage: sync.py MODELS OUT.pt one_rank|two_ranks
"""

from __future__ import annotations

from pathlib import Path

import deepspeed
import torch

from ds_align import AlignEngine, DPOConfig, distributed
from ds_align.evaluate import evaluate
from tests.distributed.tiny import destroy, ds_config, pairs, program_arguments, reference_ds_config

ALPHA, EVERY, GLOBAL_BATCH = 0.6, 2, 4
CASES = {
    "one_rank": {"zero1": {"ds_config": ds_config(1)}},
    "two_ranks": {
        "zero3": {"ds_config": ds_config(3), "pack_max_tokens": 48},
        "zero2": {"ds_config": ds_config(2)},
        "bfloat16": {"ds_config": ds_config(3), "dtype": "bfloat16"},
    },
}


def whole_weights(engine: AlignEngine) -> dict[str, torch.Tensor]:
    engine.reference.engine.empty_partition_cache()
    found = {}
    for name, weight in engine.reference.module.model.named_parameters():
        with deepspeed.zero.GatheredParameters([weight]):
            found[name] = weight.detach().clone()
    return found


def run_case(models: Path, num_ranks: int, settings: dict) -> dict:
    config = DPOConfig(
        model_name_or_path=str(models / "policy"),
        ref_model_name=str(models / "reference"),
        ref_ds_config=reference_ds_config(),
        sync_ref_model=True,
        ref_model_sync_steps=EVERY,
        ref_model_mixup_alpha=ALPHA,
        per_device_train_batch_size=GLOBAL_BATCH // num_ranks,
        train_sampling_strategy="sequential",
        optim="sgd",
        learning_rate=0.02,
        learning_rate_override=True,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        **({"dtype": "float32"} | settings),
    )
    engine = AlignEngine.from_config(config, train_dataset=pairs(20))
    result = {"losses": [], "references": [], "policies": [], "evaluations": []}
    result["references"].append(whole_weights(engine))
    for global_batch in engine.batches():
        loss = torch.zeros(1, dtype=torch.float64)
        for batch in global_batch.micro_batches:
            output = engine.forward(batch)
            engine.backward(output.losses.sum(), global_count=global_batch.num_preferences)
            loss += output.losses.detach().sum().cpu()
        engine.step()
        result["losses"].append((distributed.all_reduce_sum(loss, engine.device) / GLOBAL_BATCH).item())
        result["references"].append(whole_weights(engine))
        result["policies"].append(dict(engine.policy.weights()))
        result["evaluations"].append(evaluate(engine, engine.train_data)["eval_rewards/chosen"])
    state = engine.reference.state_dict()
    engine.reference.load_state_dict({name: torch.zeros_like(part) for name, part in state.items()})
    result["zeros"] = whole_weights(engine)
    engine.reference.load_state_dict(state)
    result["restored"] = whole_weights(engine)
    destroy(engine)
    return result


def main() -> None:
    models, out, ranks = program_arguments()
    num_ranks = 1 if ranks == "one_rank" else 2
    results = {name: run_case(Path(models), num_ranks, case) for name, case in CASES[ranks].items()}
    if distributed.is_main():
        torch.save(results, out)
    distributed.barrier()


if __name__ == "__main__":
    main()
