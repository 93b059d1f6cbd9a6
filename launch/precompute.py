#!/usr/bin/env python3
"""Scores a run's preferences under its reference and keeps the log-probs for it and later runs.

    deepspeed launch/precompute.py --method dpo --model_name_or_path MODEL --dataset_path FILE

Takes the flags of launch/train.py; training with --ref_logps cache then loads no reference.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ds_align.command import run_command, wants_debug, with_demo
from ds_align.config import parse_command_line


def main() -> None:
    """Parse, score what is missing, say what was done."""
    config = with_demo(parse_command_line([*sys.argv[1:], "--ref_logps", "cache"]))
    # Imported here, after the flags have been checked: help and bad flags answer without torch.
    from ds_align.engine.load import precompute

    precompute(config)


if __name__ == "__main__":
    sys.exit(run_command(main, debug=wants_debug(sys.argv[1:])))
