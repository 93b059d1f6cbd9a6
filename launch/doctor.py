#!/usr/bin/env python3
"""Examines a run without training it: data, tokens, settings, models and machine.

    python launch/doctor.py --method dpo --model_name_or_path MODEL --dataset_path FILE

Takes the flags of launch/train.py, and --json: one JSON document on stdout, all else on stderr. Ends with
3 where a check found an error, with 0 where there are warnings at most.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ds_align import distributed
from ds_align.command import run_command, stdout_alone, take_json_flag, wants_debug, write_json
from ds_align.config import parse_command_line
from ds_align.errors import ConfigError, DsAlignError

_JSON = "one JSON document on stdout, all else on stderr.\n"


def main() -> None:
    """Parse, examine, show."""
    argv, as_json = take_json_flag(sys.argv[1:])
    if {"--help", "-h"} & set(argv):
        print("Examines a run and trains nothing. Takes the flags of training, and --json: " + _JSON)
    with stdout_alone(wanted=as_json) as stdout:
        try:
            config = parse_command_line(argv)
            if config.model_name_or_path is None:
                raise ConfigError("model_name_or_path is missing; give --model_name_or_path DIR")
            # Imported here, after the flags have been checked: help and bad flags answer without torch.
            from ds_align.preflight import examine_run, stop_on_errors

            report = examine_run(config)
        except DsAlignError as error:
            if as_json and distributed.is_main():
                write_json(stdout, {"status": "error", "error": f"{type(error).__name__}: {error}"})
            raise
        if distributed.is_main():
            # With JSON wanted, print goes to stderr.
            print(report.as_text(in_colour=sys.stdout.isatty() and not as_json), flush=True)
            if as_json:
                write_json(stdout, report.as_json())
    stop_on_errors(report)


if __name__ == "__main__":
    sys.exit(run_command(main, debug=wants_debug(sys.argv[1:])))
