"""Trains LoRA adapters for three steps at one ZeRO stage after the other; saves what was seen.

usage: lora.py MODELS ADAPTER OUT; writes OUT/lora-RANKS.pt and an exported adapter OUT/CASE for each case.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import torch

from ds_align import AlignEngine, distributed
from ds_align.config import METHODS, BaseConfig
from ds_align.engine.init import init_distributed
from ds_align.export import save_model
from tests.distributed.tiny import destroy, ds_config, pairs, program_arguments, unpaired

GLOBAL_BATCH = 6
NUM_STEPS = 3
NEW = {"use_lora": True, "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0}
HALF = {"dtype": "bfloat16"}
# name -> (method, model, ZeRO stage, settings); ADAPTER stands for the trained adapter's directory.
ONE_RANK = {
    **{
        f"{method} zero{stage}": (method, "policy", stage, NEW)
        for method in ("dpo", "kto")
        for stage in range(3)
    },
    "dpo head": ("dpo", "untied", 1, NEW | {"lora_target_modules": ["lm_head", "q_proj"]}),
    "dpo dropout": ("dpo", "policy", 1, NEW | {"lora_dropout": 0.5}),
    "dpo trained zero0": ("dpo", "ADAPTER", 0, {}),
}
TWO_RANKS = {
    "dpo zero3": ("dpo", "policy", 3, NEW),
    "kto zero3": ("kto", "policy", 3, NEW),
    "dpo zero2 two ranks": ("dpo", "policy", 2, NEW),
    "dpo checkpointing": ("dpo", "policy", 3, NEW | {"gradient_checkpointing": True}),
    "dpo trained zero3": ("dpo", "ADAPTER", 3, {}),
    "kto trained zero3": ("kto", "ADAPTER", 3, {}),
    "dpo bfloat16 zero3": ("dpo", "policy", 3, NEW | HALF),
    "dpo bfloat16 zero1": ("dpo", "policy", 1, NEW | HALF),
}


def build_config(method: str, model: Path, stage: int, settings: dict) -> BaseConfig:
    values = {
        "model_name_or_path": str(model),
        "ds_config": ds_config(stage),
        "per_device_train_batch_size": GLOBAL_BATCH // distributed.world_size(),
        "pack_max_tokens": 48,
        "ref_batch_tokens": 256,
        "train_sampling_strategy": "sequential",
        "optim": "sgd",
        "learning_rate": 0.5,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "dtype": "float32",
    }
    return METHODS[method].config(**(values | settings))


def run_case(config: BaseConfig, export: Path) -> dict:
    engine = AlignEngine.from_config(config, train_dataset=unpaired() if config.method == "kto" else pairs())
    model = engine.policy.module.model
    start = dict(engine.policy.weights())
    flags = [parameter.requires_grad for parameter in model.parameters()]
    first = next(engine.batches())
    reference_before = reference_scores(engine, first)
    losses, micro_batches = [], []
    for global_batch in itertools.islice(engine.batches(), NUM_STEPS):
        loss = torch.zeros(1, dtype=torch.float64)
        for batch in global_batch.micro_batches:
            output = engine.forward(batch)
            engine.backward(output.losses.sum(), global_count=global_batch.num_preferences)
            loss += output.losses.detach().sum().cpu()
        engine.step()
        losses.append(distributed.all_reduce_sum(loss, engine.device).item() / global_batch.num_preferences)
        micro_batches.append(len(global_batch.micro_batches))
    end = dict(engine.policy.weights())
    save_model(engine, export)
    result = {
        "losses": losses,
        "micro_batches": micro_batches,
        "adapters": {name: (start[name], end[name]) for name in start if ".lora_" in name},
        "base_unchanged": [
            torch.equal(start[name], end[name])
            for name in start
            if ".lora_" not in name and distributed.is_main()
        ],
        "reference_unchanged": torch.equal(reference_before, reference_scores(engine, first)),
        "requires_grad_unchanged": flags == [parameter.requires_grad for parameter in model.parameters()],
        "trained": [name for name, parameter in model.named_parameters() if parameter.requires_grad],
        "kind": engine.reference.kind,
        "fused_head": engine.policy.module.fused_head,
        "messages": engine.messages,
        "optimizer_elements": optimizer_elements(engine),
        "logps": final_logps(engine),
        **dropout_facts(engine, first),
    }
    destroy(engine)
    return gathered(result)


def reference_scores(engine: AlignEngine, batch: object) -> torch.Tensor:
    return torch.cat([engine.reference.forward(pack.to(engine.device)) for pack in batch.reference_batches])


def optimizer_elements(engine: AlignEngine) -> int:
    """Elements of the weights that the optimizer of this rank steps on."""
    optimizer = engine.policy.engine.basic_optimizer
    return sum(parameter.numel() for group in optimizer.param_groups for parameter in group["params"])


def final_logps(engine: AlignEngine) -> dict[int, float]:
    """row -> log-prob of its (chosen) completion under the trained policy."""
    found = {}
    for batch in next(engine.batches()).micro_batches:
        output = engine.forward(batch, grad=False)
        policy = output.logps.policy if engine.config.method == "kto" else output.logps.policy_chosen
        found |= dict(zip(batch.rows, policy.total.tolist(), strict=True))
    return found


def dropout_facts(engine: AlignEngine, batch: object) -> dict:
    """Whether two forwards of the same pack agree, without gradient and with it."""
    pack = batch.micro_batches[0].to(engine.device)

    def twice(grad: bool) -> bool:
        first, second = (engine.policy.forward(pack, grad=grad).logps.detach() for _ in range(2))
        return torch.equal(first, second)

    return {"scoring_repeats": twice(grad=False), "training_repeats": twice(grad=True)}


def gathered(result: dict) -> dict:
    """Rank 0's facts; logps of all ranks together, and every other rank's yes-or-no facts under `others`."""
    every = [None] * distributed.world_size()
    shared = ("logps", "reference_unchanged", "requires_grad_unchanged", "fused_head", "kind", "losses")
    torch.distributed.all_gather_object(every, {name: result[name] for name in shared})
    logps = {row: value for facts in every for row, value in facts["logps"].items()}
    return result | {"logps": logps, "others": every[1:]}


def main() -> None:
    models, adapter, out = map(Path, program_arguments())
    init_distributed()
    cases = ONE_RANK if distributed.world_size() == 1 else TWO_RANKS
    results = {}
    for name, (method, model, stage, settings) in cases.items():
        path = adapter if model == "ADAPTER" else models / model
        results[name] = run_case(build_config(method, path, stage, settings), out / name.replace(" ", "-"))
    if distributed.is_main():
        torch.save(results, out / f"lora-{distributed.world_size()}.pt")
    distributed.barrier()


if __name__ == "__main__":
    main()
