"""Trains every case for four steps in one layout after the other; saves losses, log-probs and weights.

usage: layouts.py MODELS OUT.pt one_rank|two_ranks
"""

from __future__ import annotations

from pathlib import Path

import torch

from ds_align import AlignEngine, distributed
from ds_align.config import METHODS, BaseConfig
from tests.distributed.tiny import destroy, ds_config, pairs, program_arguments, reference_ds_config, unpaired

GLOBAL_BATCH = 6
# name -> (method, settings). The first five run in every layout, the others in those of FEWER.
CASES = {
    "dpo": ("dpo", {}),
    "ipo": ("ipo", {}),
    "kto": ("kto", {}),
    "cpo": ("cpo", {"cpo_alpha": 1.0}),
    "simpo": ("simpo", {"sft_weight": 0.5}),
    "aot": ("dpo", {"loss_type": "aot", "beta": 0.05}),
    "aot_unpaired": ("dpo", {"loss_type": "aot_unpaired", "label_smoothing": 0.1, "beta": 0.05}),
    "bco": ("dpo", {"loss_type": "bco_pair", "beta": 0.05}),
    "mixture": (
        "dpo",
        {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 0.5], "beta": 0.05},
    ),
    "ld_wpo": ("dpo", {"ld_alpha": 0.4, "use_weighting": True}),
    "moe": (
        "dpo",
        {
            "model_name_or_path": "moe",
            "ref_model_name": "moe_reference",
            "router_aux_loss_coef": 0.3,
        },
    ),
    "apo": ("kto", {"loss_type": "apo_zero_unpaired"}),
}
MODEL_KEYS = ("model_name_or_path", "ref_model_name")
FEWER = ("one_pack", "micro_batches", "zero3")
EVERYWHERE = ("dpo", "ipo", "kto", "cpo", "simpo")


def accumulated(num_ranks: int) -> dict[str, int]:
    """The same global batch, said as three accumulation steps."""
    steps = 3
    return {
        "per_device_train_batch_size": GLOBAL_BATCH // (steps * num_ranks),
        "gradient_accumulation_steps": steps,
    }


# Preferences have 12 to 120 tokens. A pack holds at least one, whatever the limit.
ONE_RANK = {
    "one_pack": {"pack_max_tokens": 100_000},
    "micro_batches": {"pack_max_tokens": 16, "ref_batch_tokens": 64, **accumulated(1)},
    "not_shared": {"pack_max_tokens": 64, "prefix_sharing": False},
    "padded": {"pack_max_tokens": 100_000, "attn_implementation": "sdpa"},
}
TWO_RANKS = {
    f"zero{stage}": {"ds_config": ds_config(stage), "pack_max_tokens": 48, **accumulated(2)}
    for stage in range(4)
}


def build_config(name: str, models: Path, num_ranks: int, **settings: object) -> BaseConfig:
    method, own = CASES[name]
    own = {key: str(models / value) if key.endswith(MODEL_KEYS) else value for key, value in own.items()}
    config_class = METHODS[method].config
    # Sums over long completions are large: a small beta keeps the sigmoid away from its flat ends.
    values = {
        "model_name_or_path": str(models / "policy"),
        "ds_config": ds_config(1),
        "per_device_train_batch_size": GLOBAL_BATCH // num_ranks,
        "train_sampling_strategy": "sequential",
        "optim": "sgd",
        "learning_rate": 0.02,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "dtype": "float32",
        **own,
    }
    if METHODS[method].needs_reference(config_class()):
        values["ref_ds_config"] = reference_ds_config()
        values.setdefault("ref_model_name", str(models / "reference"))
        # A batch of the reference is set apart from the policy's packs where a layout does not say otherwise.
        settings.setdefault("ref_batch_tokens", 256)
    else:
        settings.pop("ref_batch_tokens", None)
    return config_class(**(values | settings))


def run_case(config: BaseConfig) -> dict:
    rows = unpaired() if config.method == "kto" else pairs()
    engine = AlignEngine.from_config(config, train_dataset=rows)
    start = dict(engine.policy.weights())
    forwards: list[int] = []
    engine.policy.module.register_forward_pre_hook(lambda *_: forwards.append(engine.global_step))
    losses, micro_batches, kl, counts = [], [], [], []
    logps: dict[int, float] = {}
    for global_batch in engine.batches():
        loss, mine = torch.zeros(1, dtype=torch.float64), 0
        for batch in global_batch.micro_batches:
            output = engine.forward(batch)
            engine.backward(output.losses.sum(), global_count=global_batch.num_preferences)
            loss += output.losses.detach().sum().cpu()
            mine += batch.num_preferences
            if global_batch.step == 1:
                policy = output.logps.policy if config.method == "kto" else output.logps.policy_chosen
                logps |= dict(zip(batch.rows, policy.total.tolist(), strict=True))
        engine.step()
        total = distributed.all_reduce_sum(loss, engine.device)
        losses.append(total.item() / global_batch.num_preferences)
        micro_batches.append(len(global_batch.micro_batches))
        kl.append(0.0 if global_batch.kl is None else float(global_batch.kl))
        every = distributed.all_reduce_sum(
            torch.eye(engine.world_size, dtype=torch.float64)[distributed.rank()] * mine, engine.device
        )
        counts.append(every.int().tolist())
    result = {
        "losses": losses,
        "logps": logps,
        "kl": kl,
        "forwards": [forwards.count(step) for step in range(len(losses))],
        "state": engine.state_dict()["objective"],
        "micro_batches": micro_batches,
        "preferences_by_rank": counts,
        "zero_stage": engine.policy.zero_stage,
        "layout": str(engine.layout),
        "start": start,
        "weights": dict(engine.policy.weights()),
    }
    destroy(engine)
    return result


def main() -> None:
    models, out, ranks = program_arguments()
    layouts, num_ranks = (ONE_RANK, 1) if ranks == "one_rank" else (TWO_RANKS, 2)
    results = {}
    for name in CASES:
        for layout, settings in layouts.items():
            if name in EVERYWHERE or layout in FEWER:
                results[name, layout] = run_case(build_config(name, Path(models), num_ranks, **settings))
    if distributed.is_main():
        torch.save(results, out)
    distributed.barrier()


if __name__ == "__main__":
    main()
