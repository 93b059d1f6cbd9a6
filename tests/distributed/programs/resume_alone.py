"""Runs that are stopped and continued in one process, and continuations that must be refused.

usage: resume_alone.py MODELS OUT TWO_RANKS; TWO_RANKS: a checkpoint that two ranks wrote.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from ds_align import BaseConfig, Trainer
from ds_align.config import METHODS
from ds_align.engine import AlignEngine
from ds_align.engine.init import init_distributed
from ds_align.errors import DsAlignError
from tests.distributed.tiny import (
    destroy,
    ds_config,
    pairs,
    program_arguments,
    reference_ds_config,
    unpaired,
)

STEPS, STOP, SAVE = 8, 5, 3
NUM_ROWS = 16  # in batches of 6: steps 1 to 3 are the first epoch, and its last batch holds 4
CASES = {
    # With dropout: the generators' states matter.
    "kto zero1": (
        "kto",
        {"ds_config": ds_config(1), "model_name_or_path": "dropout", "disable_dropout": False},
    ),
    "ipo zero0 sgd": ("ipo", {"ds_config": ds_config(0), "optim": "sgd", "lr_scheduler_type": "constant"}),
    "cpo zero2 bfloat16": ("cpo", {"ds_config": ds_config(2), "dtype": "bfloat16"}),
    # A loss that remembers a running mean.
    "dpo zero3 bco": ("dpo", {"ds_config": ds_config(3), "loss_type": "bco_pair"}),
    "simpo zero1 lora": ("simpo", {"ds_config": ds_config(1), "use_lora": True, "lora_dropout": 0.3}),
    "dpo zero3 lora": ("dpo", {"ds_config": ds_config(3), "use_lora": True, "lora_dropout": 0.3}),
    "dpo zero3 sync": (
        "dpo",
        {
            "ds_config": ds_config(3),
            "sync_ref_model": True,
            "ref_model_sync_steps": 2,
            "ref_model_name": None,
        },
    ),
}


class StoppedError(Exception):
    """What ends a run in the middle of this process."""


def build_config(models: Path, out: Path, name: str, **settings: object) -> BaseConfig:
    method, own = CASES[name]
    config_class = METHODS[method].config
    values = {
        "model_name_or_path": "policy",
        "output_dir": str(out / name.replace(" ", "-")),
        "per_device_train_batch_size": 6,
        "max_steps": STEPS,
        "pack_max_tokens": 64,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine",
        "logging_steps": 2,
    }
    if config_class().needs_reference and "use_lora" not in own:
        values |= {"ref_model_name": "reference", "ref_ds_config": reference_ds_config()}
    values |= own | settings
    for key in ("model_name_or_path", "ref_model_name"):
        if values.get(key) is not None:
            values[key] = str(models / values[key])
    return config_class(**values)


def rows_of(config: BaseConfig, num_rows: int = NUM_ROWS) -> list[dict]:
    return (unpaired if METHODS[config.method].inputs == "unpaired" else pairs)(num_rows)


@contextlib.contextmanager
def stopping_after(step: int) -> Iterator[None]:
    usual = AlignEngine.step

    def hooked(self: AlignEngine) -> object:
        result = usual(self)
        if self.global_step == step:
            raise StoppedError
        return result

    AlignEngine.step = hooked
    try:
        yield
    finally:
        AlignEngine.step = usual


def train(config: BaseConfig, rows: list[dict] | None = None) -> dict:
    """What the run left, and what it printed."""
    trainer = Trainer(config)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            result = trainer.train(rows or rows_of(config), pairs(4, seed=7) if config.eval_steps else None)
        directory = Path(config.resolved_output_dir)
        return {
            "weights": dict(trainer.engine.policy.weights()),
            "rows": [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()],
            "training_loss": result.training_loss,
            "metrics": result.metrics,
            "summary": json.loads((directory / "run_summary.json").read_text()),
            "checkpoints": sorted(path.name for path in (directory / "checkpoints").glob("*")),
            "printed": printed.getvalue(),
        }
    except StoppedError:
        return {}
    finally:
        if trainer.engine is not None:
            destroy(trainer.engine)


def stop(config: BaseConfig, step: int = STOP) -> None:
    with stopping_after(step):
        train(config)


def continued(models: Path, out: Path) -> dict:
    """{case: (straight, stopped and continued)} of every case."""
    found = {}
    for name in CASES:
        straight = train(build_config(models, out / "straight", name))
        stop(build_config(models, out / "stopped", name, save_steps=SAVE))
        found[name] = (
            straight,
            train(build_config(models, out / "stopped", name, save_steps=SAVE, resume="auto")),
        )
    return found


def refused(models: Path, out: Path, two_ranks: Path) -> dict[str, str]:
    """{case: error} of continuations from the stopped KTO run, or "" where there was none."""
    base = out / "mistakes"
    stop(build_config(models, base, "kto zero1", save_steps=SAVE))
    kto = str(base / "kto-zero1" / "checkpoints" / "step-00000003")
    cases = {
        "method": build_config(models, base, "ipo zero0 sgd", resume=kto),
        "world_size": build_config(
            models, base, "kto zero1", resume=str(two_ranks), per_device_train_batch_size=5
        ),
        "learning_rate": build_config(models, base, "kto zero1", resume="auto", learning_rate=5e-4),
        "seed": build_config(models, base, "kto zero1", resume="auto", seed=7),
        "batch": build_config(models, base, "kto zero1", resume="auto", per_device_train_batch_size=4),
        "max_steps": build_config(models, base, "kto zero1", resume="auto", max_steps=12),
        "stage": build_config(models, base, "kto zero1", resume="auto", ds_config=ds_config(2)),
        "model": build_config(models, base, "kto zero1", resume="auto", model_name_or_path="policy"),
        "nowhere": build_config(models, base, "kto zero1", resume=str(base / "nowhere")),
        "data": build_config(models, base, "kto zero1", resume="auto"),
        "none": build_config(models, base, "kto zero1"),
        "elsewhere": build_config(models, base, "kto zero1", resume=kto, output_dir=str(out / "used")),
    }
    (out / "used").mkdir()
    (out / "used" / "metrics.jsonl").write_text("{}\n")
    errors = {}
    for name, config in cases.items():
        rows = rows_of(config)
        if name == "data":
            rows[3]["completion_ids"][0] += 1
        try:
            train(config, rows)
            errors[name] = ""
        except DsAlignError as error:
            errors[name] = f"{type(error).__name__} {error.exit_code}: {error}"
    return errors


def allowed(models: Path, out: Path) -> dict[str, dict]:
    """Continuations with other settings, from damaged directories and into other ones."""
    name = "ipo zero0 sgd"
    folder = out / "allowed"
    kept = build_config(models, folder, name, save_steps=2, save_total_limit=2)
    stop(kept)
    root = Path(kept.resolved_output_dir)
    found = {"after_stop": {"checkpoints": sorted(path.name for path in (root / "checkpoints").glob("*"))}}
    elsewhere = build_config(
        models, folder, name, resume=str(root / "checkpoints" / "step-00000002"), output_dir=str(out / "copy")
    )
    found["elsewhere"] = train(elsewhere)
    shutil.copytree(root, out / "damaged")
    newest = out / "damaged" / "checkpoints" / "step-00000004"
    file = next(path for path in sorted(newest.rglob("*.pt")))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    (newest.parent / "step-00000009").mkdir()
    changed = {"pack_max_tokens": 48, "logging_steps": 1, "max_steps": 9, "save_steps": 4}
    settings = {"output_dir": str(out / "damaged"), "resume": "auto", **changed}
    found["changed"] = train(build_config(models, folder, name, **settings))
    found["fresh"] = train(build_config(models, folder, name, output_dir=str(out / "fresh"), resume="auto"))
    again = build_config(models, folder, name, output_dir=str(out / "fresh"), resume="auto")
    try:
        train(again)
    except DsAlignError as error:
        found["finished"] = {"error": f"{type(error).__name__}: {error}"}
    stop(build_config(models, folder, name, output_dir=str(out / "early"), save_steps=STEPS), 3)
    found["early"] = train(build_config(models, folder, name, output_dir=str(out / "early"), resume="auto"))
    return found


def main() -> None:
    models, out, two_ranks = map(Path, program_arguments())
    init_distributed()
    found = {
        "continued": continued(models, out),
        "refused": refused(models, out, two_ranks),
        "allowed": allowed(models, out),
    }
    torch.save(found, out / "alone.pt")


if __name__ == "__main__":
    main()
