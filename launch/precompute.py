#!/usr/bin/env python3
"""Scores a run's preferences under its reference and keeps the log-probs for it and later runs.

    deepspeed launch/precompute.py --method dpo --model_name_or_path MODEL --dataset_path FILE

Takes the flags of launch/train.py; training with --ref_logps cache then loads no reference. Always scores
all rows of the training and evaluation data, whatever max_steps and num_train_epochs say.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ds_align.command import run_command, wants_debug, with_demo
from ds_align.config import BaseConfig, parse_command_line
from ds_align.config.cli import FLAG_RULES
from ds_align.errors import ConfigError

DESCRIPTION = (
    "Score the preferences of a run under its reference model and keep the log-probs on disk, for training "
    "with --ref_logps cache. All rows of the training and evaluation data are scored that are not there yet, "
    f"whatever max_steps and num_train_epochs say; the flags are those of training. {FLAG_RULES}"
)


def main() -> None:
    """Parse, score what is missing, say what was done."""
    config = with_demo(_parse(sys.argv[1:]))
    # Imported here, after the flags have been checked: help and bad flags answer without torch.
    from ds_align.engine.load import precompute

    precompute(config)


def _parse(argv: list[str]) -> BaseConfig:
    try:
        return parse_command_line([*argv, "--ref_logps", "cache"], description=DESCRIPTION)
    except ConfigError:
        method = _method_without_reference(argv)
        if method is None:
            raise
    raise ConfigError(
        f"precompute: this {method} run has no reference model, so there is nothing to compute; train at once"
    )


def _method_without_reference(argv: list[str]) -> str | None:
    """The method of a run that is right but for the cache that it has no reference for."""
    try:
        config = parse_command_line([*argv, "--ref_logps", "live", "--ref_cache_dir", "none"])
    except ConfigError:
        return None
    return None if config.needs_reference else config.method


if __name__ == "__main__":
    sys.exit(run_command(main, debug=wants_debug(sys.argv[1:])))
