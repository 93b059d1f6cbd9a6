"""A run that goes on with another number of ranks than wrote its checkpoint.

usage: ranks.py MODELS OUT CASE NAME STOP
CASE: one of CASES; NAME: the run's directory, "straight" is never stopped; STOP: the step after which all
ranks end, 0 for none.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from ds_align import Trainer, distributed
from ds_align.command import run_command
from ds_align.engine.init import init_distributed
from tests.distributed.programs.resume import after_step, build_config, write_weights
from tests.distributed.tiny import ds_config, pairs, program_arguments

LORA = {"use_lora": True, "lora_dropout": 0.0, "ref_model_name": None, "ref_ds_config": None}
CASES = {
    "zero3": {},
    "zero1": {"ds_config": ds_config(1)},
    "zero3 lora": LORA,
}


def leave() -> None:
    """Ends this rank when all ranks are so far."""
    distributed.barrier()
    os._exit(0)


def main() -> None:
    models, out, case, name, stop = program_arguments()
    init_distributed()
    if int(stop):
        after_step(int(stop), leave)
    settings = {"eval_steps": None, "logging_steps": 4, "save_steps": 1, "resume": "auto", **CASES[case]}
    directory = Path(out) / case.replace(" ", "-") / name
    trainer = Trainer(build_config(Path(models), directory, **settings))
    trainer.train(pairs(23))
    write_weights(trainer, directory.with_suffix(".pt"))


if __name__ == "__main__":
    sys.exit(run_command(main))
