"""Trains with the README's own loss, in Python and from the files of a run of the command.

usage: custom_loss.py MODEL COMMAND_RUN OUT; started where my_lab/ lies. COMMAND_RUN: the output directory of
--method my_lab.losses:margin_dpo.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path

import torch

from ds_align import BaseConfig, DPOConfig, KTOConfig, Trainer, distributed, method
from ds_align.config import METHODS, parse_command_line
from ds_align.losses import LossOutput, PairedLogps, UnpairedLogps
from tests.distributed.tiny import destroy, ds_config, pairs, program_arguments, unpaired

sys.path.append(str(Path.cwd()))

NUM_ROWS = 12
SETTINGS = {
    "ds_config": ds_config(3),
    "per_device_train_batch_size": 6,
    "pack_max_tokens": 64,
    "max_steps": 3,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "dtype": "float32",
    "beta": 0.2,
}


def own_losses() -> dict[str, tuple[type[BaseConfig], type[BaseConfig], dict]]:
    """Of each a copy that a user could write, the built-in class and the settings that make it the same."""

    @method
    def kto_again(logps: UnpairedLogps, *, beta: float = 0.1) -> LossOutput:
        ratio = logps.policy.total - logps.reference.total
        gain = beta * (ratio - logps.kl)
        losses = 1 - torch.sigmoid(torch.where(logps.desirable, gain, -gain))
        return LossOutput(losses, rewards=beta * ratio.detach())

    @method(coupled=True)
    def aot_again(logps: PairedLogps, *, beta: float = 0.1) -> LossOutput:
        chosen = logps.policy_chosen.total - logps.reference_chosen.total
        rejected = logps.policy_rejected.total - logps.reference_rejected.total
        gap = chosen.sort().values - rejected.sort().values
        losses = -torch.nn.functional.logsigmoid(beta * gap)
        return LossOutput(losses, beta * chosen.detach(), beta * rejected.detach())

    @method(needs_reference=False)
    def free_again(logps: PairedLogps, *, beta: float = 0.1) -> LossOutput:
        chosen, rejected = logps.policy_chosen.total, logps.policy_rejected.total
        losses = -torch.nn.functional.logsigmoid(beta * (chosen - rejected))
        return LossOutput(losses, beta * chosen.detach(), beta * rejected.detach())

    return {
        "unpaired": (kto_again.config, KTOConfig, {}),
        "coupled": (aot_again.config, DPOConfig, {"loss_type": "aot_unpaired"}),
        "reference-free": (free_again.config, DPOConfig, {"reference_free": True}),
    }


def train(config: BaseConfig) -> dict[str, torch.Tensor]:
    trainer = Trainer(config)
    rows = unpaired(NUM_ROWS) if config.reads_unpaired else pairs(NUM_ROWS)
    trainer.train(rows, rows[:4])
    weights = dict(trainer.engine.policy.weights())
    destroy(trainer.engine)
    return weights


def main() -> None:
    model, command_run, out = program_arguments()
    command = ["--config", f"{command_run}/config.resolved.yaml", "--output_dir", f"{out}/again"]
    again = parse_command_line(command)
    from my_lab.losses import margin_dpo

    settings = {"model_name_or_path": model, **SETTINGS}
    configs = {
        "again": again,
        "margin": margin_dpo.config(**settings, margin=0.3, output_dir=f"{out}/margin"),
        "no margin": margin_dpo.config(**settings, output_dir=f"{out}/no-margin"),
        "dpo": DPOConfig(**settings, output_dir=f"{out}/dpo"),
    }
    for name, (own, built_in, others) in own_losses().items():
        configs[name] = own(**settings, output_dir=f"{out}/{name}")
        configs[f"built-in {name}"] = built_in(**settings, **others, output_dir=f"{out}/built-in-{name}")
    weights = {}
    for name, config in configs.items():
        with contextlib.redirect_stdout(io.StringIO()):
            weights[name] = train(config)
    if distributed.is_main():
        torch.save(weights, Path(out, "weights.pt"))
        facts = {"class": type(again) is margin_dpo.config, "methods": list(METHODS)}
        Path(out, "facts.json").write_text(json.dumps(facts), encoding="utf-8")
    distributed.barrier()


if __name__ == "__main__":
    main()
