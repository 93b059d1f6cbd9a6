"""Trains every case with ds_align's Trainer in one process; writes what was logged and the token ids as JSON.

usage: ours.py MODELS OUT.json
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
from pathlib import Path

from ds_align import Trainer
from ds_align.config import METHODS
from tests.distributed.tiny import destroy, ds_config, program_arguments
from tests.parity.cases import CASES, Case, rows_of


def run(name: str, case: Case, models: Path, out: Path) -> dict:
    values = {
        "model_name_or_path": str(models / "policy"),
        "output_dir": str(out.parent / "ours" / name.replace(" ", "-")),
        "ds_config": ds_config(1),
        "dtype": "float32",
        "optim": "adamw_torch",
        **case.common,
        **case.ours,
    }
    if case.reference == "reference":
        values["ref_model_name"] = str(models / "reference")
    trainer = Trainer(METHODS[case.method].config(**values))
    trainer.train(rows_of(case))
    lines = (Path(values["output_dir"]) / "metrics.jsonl").read_text().splitlines()
    result = {"steps": [json.loads(line) for line in lines], "ids": token_ids(trainer.engine.train_data)}
    destroy(trainer.engine)
    return result


def token_ids(data: object) -> list[list[list[int]]]:
    """For each row: prompt, chosen and rejected, or prompt, completion and y'."""
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    if data.inputs == "unpaired":
        names = ("prompt_ids", "completion_ids", "kl_ids")
    return [[getattr(row, name).tolist() for name in names] for row in data]


def main() -> None:
    models, out = map(Path, program_arguments())
    gc.freeze()
    found = {}
    for name, case in CASES.items():
        # The trainer's table would hide the message of a failure.
        with contextlib.redirect_stdout(io.StringIO()):
            found[name] = run(name, case, models, out)
    out.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
