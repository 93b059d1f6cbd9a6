"""`python -m ds_align.demo build | report`: make the demonstration, and show what a run learned from it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ds_align.demo.build import DEFAULT_DIRECTORY, build
from ds_align.demo.report import write_report
from ds_align.errors import EXIT_DONE, EXIT_UNFORESEEN, DsAlignError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 done, 1 below --require_accuracy, 3 no whole run."""
    arguments = _parser().parse_args(argv)
    try:
        return _build(arguments) if arguments.command == "build" else _report(arguments)
    except DsAlignError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m ds_align.demo", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    building = commands.add_parser(
        "build", help="make the preference files, the tokenizer and the starting model"
    )
    reporting = commands.add_parser(
        "report", help="write result.json and curves.png, print table and answers"
    )
    for command in (building, reporting):
        command.add_argument("--directory", type=Path, default=DEFAULT_DIRECTORY, help="default: %(default)s")
    reporting.add_argument("--output_dir", type=Path, required=True, help="the output directory of the run")
    reporting.add_argument("--seconds", type=float, required=True, help="wall-clock time of the run")
    reporting.add_argument("--num_answers", type=int, default=6, help="answers to show, default: %(default)s")
    reporting.add_argument(
        "--require_accuracy",
        type=float,
        default=0.0,
        help="leave with code 1 when the trained model's held-out accuracy is lower, default: %(default)s",
    )
    return parser


def _build(arguments: argparse.Namespace) -> int:
    paths = build(arguments.directory)
    print(f"demonstration in {paths.directory}: held-out policy_accuracy of the start {paths.accuracy:.3f}")
    return EXIT_DONE


def _report(arguments: argparse.Namespace) -> int:
    paths = build(arguments.directory)
    result = write_report(
        arguments.output_dir, paths, seconds=arguments.seconds, num_answers=arguments.num_answers
    )
    if result.accuracy_after < arguments.require_accuracy:
        print(
            f"held-out accuracy {result.accuracy_after:.3f} is below {arguments.require_accuracy}",
            file=sys.stderr,
        )
        return EXIT_UNFORESEEN
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
