"""Looks into real engines on two ranks, before, during and after training; rank 0 writes what it saw as JSON.

usage: engines.py MODELS OUT
"""

from __future__ import annotations

import contextlib
import io
import json
import re
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from ds_align import AlignEngine, Trainer, distributed
from ds_align.config import METHODS, BaseConfig
from tests.distributed.launching import ROOT
from tests.distributed.tiny import destroy, ds_config, pairs, program_arguments, reference_ds_config, unpaired


def build_config(method: str, model: Path, output_dir: Path, **settings: object) -> BaseConfig:
    config_class = METHODS[method].config
    values = {
        "model_name_or_path": str(model),
        "output_dir": str(output_dir),
        "ds_config": ds_config(3),
        "per_device_train_batch_size": 3,
        "pack_max_tokens": 48,
        "learning_rate": 1e-3,
        "dtype": "float32",
        "logging_steps": 1,
    }
    if METHODS[method].needs_reference(config_class()):
        values["ref_ds_config"] = reference_ds_config()
    return config_class(**(values | settings))


def rows_of(method: str, num_rows: int = 23) -> list[dict]:
    return unpaired(num_rows) if METHODS[method].inputs == "unpaired" else pairs(num_rows)


def parameters_of(engine: object) -> dict[str, torch.nn.Parameter]:
    return dict(engine.module.model.named_parameters())


def step_zero(models: Path, out: Path) -> dict:
    """Loss of the first global batch, policy = reference, through the real engine; by method and beta."""
    losses = {}
    for method, beta in (("dpo", 0.1), ("ipo", 0.1), ("ipo", 0.5), ("kto", 0.1)):
        config = build_config(method, models / "policy", out / "unused", beta=beta)
        engine = AlignEngine.from_config(config, train_dataset=rows_of(method))
        total, global_batch = torch.zeros(1, dtype=torch.float64), next(engine.batches())
        for batch in global_batch.micro_batches:
            total += engine.forward(batch, grad=False).losses.sum().cpu()
        total = distributed.all_reduce_sum(total, engine.device)
        losses[f"{method} {beta}"] = total.item() / global_batch.num_preferences
        destroy(engine)
    return losses


def reference_facts(models: Path, out: Path) -> dict:
    """Where the reference's partitions are and whether training touches them."""
    config = build_config("dpo", models / "policy", out / "unused", optim="sgd", learning_rate=0.05)
    engine = AlignEngine.from_config(config, train_dataset=rows_of("dpo"))
    reference = parameters_of(engine.reference)
    policy = parameters_of(engine.policy)
    before = {name: parameter.ds_tensor.clone() for name, parameter in reference.items()}
    policy_before = {name: parameter.ds_tensor.clone() for name, parameter in policy.items()}
    inside: list[int] = []
    first = engine.policy.module.model.model.layers[0].mlp.up_proj
    hook = first.register_forward_hook(lambda module, *_: inside.append(module.weight.numel()))
    sizes_after_step = []
    for number, global_batch in zip(range(2), engine.batches(), strict=False):
        for batch in global_batch.micro_batches:
            output = engine.forward(batch)
            engine.backward(output.losses.sum(), global_count=global_batch.num_preferences)
        engine.step()
        sizes_after_step.append((number, sum(parameter.numel() for parameter in policy.values())))
    hook.remove()
    facts = {
        "stage": engine.reference.engine.zero_optimization_stage(),
        "offload": str(engine.reference.engine.zero_offload_param().device),
        "devices": sorted({str(parameter.ds_tensor.device) for parameter in reference.values()}),
        "status": sorted({parameter.ds_status.name for parameter in reference.values()}),
        "partition_elements": sum(parameter.ds_tensor.numel() for parameter in reference.values()),
        "whole_elements": sum(parameter.ds_numel for parameter in reference.values()),
        "visible_elements": sum(parameter.numel() for parameter in reference.values()),
        "requires_grad": any(parameter.requires_grad for parameter in reference.values()),
        "has_grad": any(parameter.grad is not None for parameter in reference.values()),
        "unchanged": all(torch.equal(before[name], p.ds_tensor) for name, p in reference.items()),
        "training": engine.reference.module.training,
        "optimizer": type(engine.reference.engine.optimizer).__name__,
        "policy_stage": engine.policy.engine.zero_optimization_stage(),
        "policy_changed": any(
            not torch.equal(policy_before[name], p.ds_tensor) for name, p in policy.items()
        ),
        "policy_visible": max(size for _, size in sizes_after_step),
        "policy_inside_forward": min(inside),
        "policy_layer_whole": 48 * 32,
    }
    destroy(engine)
    return facts


def loop_and_trainer(models: Path, out: Path) -> dict:
    """The README's loop beside Trainer.train(): whether the weights are equal bit for bit."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    loop = re.search(r"^for global_batch in engine\.batches\(\):\n(?:    .*\n)+", text, re.MULTILINE)[0]
    equal = {}
    for method in ("dpo", "kto"):
        config = build_config(method, models / "policy", out / f"bitwise-{method}", max_steps=3)
        trainer = Trainer(config)
        trainer.train(rows_of(method))
        trained = dict(trainer.engine.policy.weights())
        engine = AlignEngine.from_config(config, train_dataset=rows_of(method))
        start = dict(engine.policy.weights())
        exec(loop, {"engine": engine})
        looped = dict(engine.policy.weights())
        if distributed.is_main():
            equal[method] = {
                "equal": all(torch.equal(trained[name], looped[name]) for name in trained),
                "moved": max((start[name] - looped[name]).abs().max().item() for name in start),
            }
        destroy(engine)
        destroy(trainer.engine)
    return equal


def after_training(models: Path, out: Path) -> dict:
    """What a process can do once train() has returned: load a model the plain way, and train again."""
    trainer = Trainer(build_config("dpo", models / "policy", out / "first", max_steps=2))
    trainer.train(rows_of("dpo"))
    plain = AutoModelForCausalLM.from_pretrained(out / "first")
    weights = dict(trainer.engine.policy.weights())
    facts = {
        "plain_elements": sum(parameter.numel() for parameter in plain.parameters()),
        "plain_is_partitioned": any(hasattr(parameter, "ds_id") for parameter in plain.parameters()),
    }
    if distributed.is_main():
        loaded = dict(plain.named_parameters())
        facts["saved_equals_trained"] = all(torch.equal(loaded[name], weights[name]) for name in weights)
    second = Trainer(build_config("simpo", models / "untied", out / "second", max_steps=2))
    facts["second_steps"] = second.train(rows_of("simpo")).global_step
    destroy(second.engine)
    destroy(trainer.engine)
    return facts


def main() -> None:
    models, out = map(Path, program_arguments())
    facts = {}
    for part in (step_zero, reference_facts, loop_and_trainer, after_training):
        # The trainer's table would hide the message of a failure.
        with contextlib.redirect_stdout(io.StringIO()):
            facts[part.__name__] = part(models, out)
    every = [None] * distributed.world_size()
    torch.distributed.all_gather_object(every, facts)
    if distributed.is_main():
        (out / "engines.json").write_text(json.dumps(every), encoding="utf-8")
    distributed.barrier()


if __name__ == "__main__":
    main()
