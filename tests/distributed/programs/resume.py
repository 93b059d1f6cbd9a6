"""Runs that are stopped and continued on two ranks.

usage: resume.py MODELS OUT CASE
CASE: straight (8 steps, then a run whose disk is full on rank 1), killed (all ranks at step 5), dying (goes
on, rank 1 dies in the save of step 6), resumed (goes on to the end).
"""

from __future__ import annotations

import json
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import torch

from ds_align import DPOConfig, Trainer, distributed
from ds_align.engine import AlignEngine, checkpoint_io
from ds_align.engine.init import init_distributed
from ds_align.errors import CheckpointError
from tests.distributed.tiny import destroy, ds_config, pairs, program_arguments, reference_ds_config


def build_config(models: Path, directory: Path, **settings: object) -> DPOConfig:
    """23 rows in batches of 6: 4 steps an epoch, the last one partial; 8 steps, a window of 2."""
    values = {
        "model_name_or_path": str(models / "policy"),
        "ref_model_name": str(models / "reference"),
        "ds_config": ds_config(3),
        "ref_ds_config": reference_ds_config(),
        "output_dir": str(directory),
        "per_device_train_batch_size": 3,
        "num_train_epochs": 2.0,
        "pack_max_tokens": 64,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "weight_decay": 0.01,
        "logging_steps": 2,
        "eval_steps": 3,
        "save_steps": 3,
    }
    return DPOConfig(**(values | settings))


def train(config: DPOConfig) -> Trainer:
    trainer = Trainer(config)
    trainer.train(pairs(23), pairs(5, seed=7))
    return trainer


def after_step(step: int, action: Callable[[], None]) -> None:
    """Calls action when this optimizer step is done."""
    usual = AlignEngine.step

    def hooked(self: AlignEngine) -> object:
        result = usual(self)
        if self.global_step == step:
            action()
        return result

    AlignEngine.step = hooked


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def write_weights(trainer: Trainer, path: Path) -> None:
    weights = dict(trainer.engine.policy.weights())
    if distributed.is_main():
        torch.save(weights, path)
    destroy(trainer.engine)


def limit_file_size() -> None:
    """From now on rank 1 cannot write a file of more than 4 kB: its disk is as good as full."""
    if distributed.rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def straight(models: Path, out: Path) -> None:
    write_weights(train(build_config(models, out / "straight", save_steps=None)), out / "straight.pt")
    after_step(6, limit_file_size)
    try:
        train(build_config(models, out / "full"))
    except CheckpointError as error:
        (out / f"full-{distributed.rank()}.json").write_text(json.dumps(str(error)))


def killed(models: Path, out: Path) -> None:
    after_step(5, kill_self)
    train(build_config(models, out / "run"))


def dying(models: Path, out: Path) -> None:
    usual = checkpoint_io._save_tensors

    def save(content: dict, path: str) -> None:
        if distributed.rank() == 1 and "optim_states" in str(path):
            os._exit(9)
        usual(content, path)

    checkpoint_io._save_tensors = save
    train(build_config(models, out / "run", resume="auto"))


def resumed(models: Path, out: Path) -> None:
    write_weights(train(build_config(models, out / "run", resume="auto")), out / "resumed.pt")


def main() -> None:
    models, out, case = program_arguments()
    init_distributed()
    {"straight": straight, "killed": killed, "dying": dying, "resumed": resumed}[case](
        Path(models), Path(out)
    )
    distributed.barrier()


if __name__ == "__main__":
    main()
