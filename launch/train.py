#!/usr/bin/env python3
"""Trains a language model from preferences: deepspeed launch/train.py --method dpo --ds_config zero3 ..."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ds_align.command import run_command, wants_debug, with_demo
from ds_align.config import parse_command_line


def main() -> None:
    """Parse, train, save."""
    config = with_demo(parse_command_line(sys.argv[1:]))
    # Imported here, after the flags have been checked: help and bad flags answer without torch.
    from ds_align.trainer import Trainer

    Trainer(config).train()


if __name__ == "__main__":
    sys.exit(run_command(main, debug=wants_debug(sys.argv[1:])))
