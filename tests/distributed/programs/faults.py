"""Runs that meet a fault at step 3, as the command line runs them.

usage: faults.py MODELS OUT CASE
CASE: straight; signalled (rank 1 is told to end, and again while it saves); continued (the same run with
resume); thrice (three signals); hanging (rank 1 stops in step 3); alone (rank 1 raises); short (rank 1 asks
for 256 TiB); behind (rank 1 is gone, rank 0 hangs); or
STAGE-DTYPE-POLICY such as 3-float32-stop: rank 1's loss is NaN.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from ds_align import DPOConfig, Trainer, distributed
from ds_align.command import run_command
from ds_align.engine import AlignEngine, checkpoint_io
from ds_align.engine.init import init_distributed
from tests.distributed.programs.resume import build_config, write_weights
from tests.distributed.tiny import ds_config, pairs, program_arguments

STEP = 3
STEPS = 8


def train(config: DPOConfig) -> Trainer:
    trainer = Trainer(config)
    trainer.train(pairs(23), pairs(5, seed=7))
    return trainer


def in_step(action: Callable, ranks: tuple[int, ...] = (1,)) -> None:
    """Calls action on these ranks in the first backward of the step."""
    usual = AlignEngine.backward
    done = []

    def hooked(self: AlignEngine, loss: torch.Tensor, *, global_count: int) -> None:
        if self.global_step == STEP - 1 and distributed.rank() in ranks and not done:
            done.append(True)
            loss = action(self, loss)
        usual(self, loss, global_count=global_count)

    AlignEngine.backward = hooked


def signal_self(times: int) -> Callable:
    def action(_: AlignEngine, loss: torch.Tensor) -> torch.Tensor:
        for _ in range(times):
            os.kill(os.getpid(), signal.SIGTERM)
        return loss

    return action


def straight(models: Path, out: Path) -> None:
    write_weights(train(build_config(models, out / "straight", save_steps=None)), out / "straight.pt")


def signalled(models: Path, out: Path) -> None:
    in_step(signal_self(1))
    usual = checkpoint_io._save_tensors

    def save(content: dict, path: str) -> None:
        os.kill(os.getpid(), signal.SIGUSR1)
        checkpoint_io._save_tensors = usual
        usual(content, path)

    checkpoint_io._save_tensors = save
    train(build_config(models, out / "run", save_steps=None))


def continued(models: Path, out: Path) -> None:
    config = build_config(models, out / "run", save_steps=None, resume="auto")
    write_weights(train(config), out / "continued.pt")


def thrice(models: Path, out: Path) -> None:
    in_step(signal_self(3))
    train(build_config(models, out / "thrice"))


def hanging(models: Path, out: Path) -> None:
    in_step(lambda _, loss: time.sleep(600) or loss)
    train(build_config(models, out / "hanging", hang_timeout=6, eval_steps=None))


def alone(models: Path, out: Path) -> None:
    def fail(*_: object) -> torch.Tensor:
        raise RuntimeError("something that nobody foresaw")

    in_step(fail)
    train(build_config(models, out / "alone"))


def short(models: Path, out: Path) -> None:
    in_step(lambda _, loss: loss + torch.empty(2**46).sum())
    train(build_config(models, out / "short"))


def behind(models: Path, out: Path) -> None:
    """Rank 1 is gone at once, rank 0 hangs where no peer's end is noticed."""

    def leave(_: AlignEngine, loss: torch.Tensor) -> torch.Tensor:
        if distributed.rank() == 1:
            os._exit(7)
        time.sleep(600)
        return loss

    in_step(leave, ranks=(0, 1))
    train(build_config(models, out / "behind"))


def not_finite(models: Path, out: Path, case: str) -> None:
    """Weights of every step beside the run, and what the run said of its end."""
    stage, dtype, policy = case.split("-")
    in_step(lambda _, loss: loss * math.nan)
    seen: list[dict[str, torch.Tensor]] = []
    usual = AlignEngine.step

    def hooked(self: AlignEngine) -> object:
        result = usual(self)
        seen.append(dict(self.policy.weights()))
        return result

    AlignEngine.step = hooked
    config = build_config(
        models,
        out / case,
        ds_config=ds_config(int(stage)),
        dtype=dtype,
        non_finite=policy,
        save_steps=None,
        eval_steps=None,
        logging_steps=1,
        per_device_train_batch_size=3,
    )
    try:
        train(config)
    finally:
        if distributed.is_main():
            same = [
                all(torch.equal(one[name], two[name]) for name in one)
                for one, two in itertools.pairwise(seen)
            ]
            (out / f"{case}.json").write_text(json.dumps(same))


def main() -> None:
    models, out, case = program_arguments()
    init_distributed()
    named = {
        "straight": straight,
        "signalled": signalled,
        "continued": continued,
        "thrice": thrice,
        "hanging": hanging,
        "alone": alone,
        "short": short,
        "behind": behind,
    }
    if case in named:
        named[case](Path(models), Path(out))
    else:
        not_finite(Path(models), Path(out), case)


if __name__ == "__main__":
    sys.exit(run_command(main))
