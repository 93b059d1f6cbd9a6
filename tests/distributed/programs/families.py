"""Two DPO steps of a model of every family under ZeRO-3; saves log-probs and gradients of both.

usage: families.py MODELS OUT.pt
"""

from __future__ import annotations

from pathlib import Path

import torch
from deepspeed.utils import safe_get_full_grad

from ds_align import AlignEngine, DPOConfig, distributed
from tests.distributed.tiny import destroy, ds_config, pairs, program_arguments, reference_ds_config

GLOBAL_BATCH = 4
NUM_ROWS = 7
LEARNING_RATE = 0.02
WINDOW = {"sliding_window": 5}
# name -> (model type, settings beside those of the models' own tests)
FAMILIES = {
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "qwen3_moe": ("qwen3_moe", {}),
    "llama": ("llama", {}),
    "mistral": ("mistral", WINDOW),
    "gemma2": ("gemma2", WINDOW),
    "gemma3_text": ("gemma3_text", WINDOW),
    "phi3": ("phi3", {}),
    "olmo2": ("olmo2", {}),
    "cohere": ("cohere", {}),
    "granite": ("granite", {}),
}


def build_engine(models: Path, name: str) -> AlignEngine:
    config = DPOConfig(
        model_name_or_path=str(models / name),
        ref_model_name=str(models / f"{name}-reference"),
        ds_config=ds_config(3),
        ref_ds_config=reference_ds_config(),
        per_device_train_batch_size=GLOBAL_BATCH // distributed.world_size(),
        pack_max_tokens=32,
        train_sampling_strategy="sequential",
        optim="sgd",
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        dtype="float32",
    )
    return AlignEngine.from_config(config, train_dataset=pairs(NUM_ROWS))


def run_family(models: Path, name: str) -> dict:
    engine = build_engine(models, name)
    steps, mine = [], []
    for global_batch in engine.batches():
        loss = torch.zeros(1, dtype=torch.float64)
        seen: dict[tuple[int, ...], torch.Tensor] = {}
        for batch in global_batch.micro_batches:
            seen |= token_logps(engine, batch)
            output = engine.forward(batch)
            engine.backward(output.losses.sum(), global_count=global_batch.num_preferences)
            loss += output.losses.detach().sum().cpu()
        # Before the step: the update would clear them.
        gradients = {
            weight: safe_get_full_grad(parameter).detach().cpu().clone()
            for weight, parameter in engine.policy.module.model.named_parameters()
        }
        engine.step()
        total = distributed.all_reduce_sum(loss, engine.device).item() / global_batch.num_preferences
        steps.append({"loss": total, "gradients": gradients})
        mine.append({"token_logps": seen, "micro_batches": len(global_batch.micro_batches)})
    facts = {
        "layout": str(engine.layout),
        "fused": engine.policy.module.fused_head and engine.reference.module.fused_head,
        "window": getattr(engine.policy.module.model.config, "sliding_window", None),
        "visible": sum(parameter.numel() for parameter in engine.policy.module.parameters()),
    }
    destroy(engine)
    ranks = [None] * distributed.world_size()
    torch.distributed.all_gather_object(ranks, mine)
    return facts | {"steps": steps, "ranks": ranks}


def token_logps(engine: AlignEngine, batch: object) -> dict[tuple[int, ...], torch.Tensor]:
    """Log-probs of each completion of a micro-batch, by its tokens."""
    logps = engine.policy.forward(batch.to(engine.device), grad=False).logps.cpu()
    lengths = batch.completion_lengths.tolist()
    parts = zip(batch.labels.split(lengths), logps.split(lengths), strict=True)
    return {tuple(labels.tolist()): part for labels, part in parts}


def main() -> None:
    models, out = map(Path, program_arguments())
    from ds_align.engine.init import init_distributed

    init_distributed()
    results = {name: run_family(models, name) for name in FAMILIES}
    if distributed.is_main():
        torch.save(results, out)
    distributed.barrier()


if __name__ == "__main__":
    main()
