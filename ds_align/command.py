"""How a command ends: errors that a user can mend are one line, and every rank leaves with the same code."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import TextIO

from ds_align import distributed
from ds_align.config import BaseConfig
from ds_align.config.cli import split_flags
from ds_align.config.load import read_yaml
from ds_align.errors import EXIT_DONE, EXIT_UNFORESEEN, ConfigError, DsAlignError


def run_command(action: Callable[[], object], *, debug: bool = False) -> int:
    """Runs action and returns the exit code: 0, or that of the DsAlignError that ended it.

    Rank 0 prints the error's message, or the rank that alone has it; the traceback only with debug. Any other
    exception is a defect: its traceback is printed and the code is 1.
    """
    try:
        action()
    except DsAlignError as error:
        if debug:
            traceback.print_exc()
        if distributed.is_main() or error.of_one_rank:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return error.exit_code if error.of_one_rank else leave(error.exit_code)
    except Exception:  # noqa: BLE001 - the last frame of the program
        traceback.print_exc()
        return EXIT_UNFORESEEN
    return leave(EXIT_DONE)


def wants_debug(argv: Sequence[str]) -> bool:
    """Whether --debug, or else `debug: true` in the --config file, asks for tracebacks.

    Read before anything is checked: the check itself may be what fails.
    """
    texts = split_flags(argv).texts
    if "debug" in texts:
        return (texts["debug"][-1] or "true").lower() == "true"
    path = texts.get("config", [None])[-1]
    return path is not None and read_yaml(path).values.get("debug") is True


def take_json_flag(argv: Sequence[str]) -> tuple[list[str], bool]:
    """The arguments without --json, and whether it was there (`--json`, `--json true`, `--json=false`)."""
    rest: list[str] = []
    wanted, follows = False, False
    for text in argv:
        if text == "--json":
            wanted, follows = True, True
        elif text.startswith("--json="):
            wanted, follows = text.removeprefix("--json=").lower() == "true", False
        elif follows and text.lower() in ("true", "false"):
            wanted, follows = text.lower() == "true", False
        else:
            rest.append(text)
            follows = False
    return rest, wanted


@contextlib.contextmanager
def stdout_alone(*, wanted: bool) -> Iterator[TextIO]:
    """Gives stdout to the caller alone while open; what anybody prints, a C library too, goes to stderr."""
    if not wanted:
        yield sys.stdout
        return
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with os.fdopen(kept, "w", encoding="utf-8", closefd=False) as stdout:
            yield stdout
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def write_json(stdout: TextIO, document: object) -> None:
    """One JSON document and the end of its line."""
    stdout.write(json.dumps(document, indent=2, ensure_ascii=False) + "\n")
    stdout.flush()


def leave(code: int) -> int:
    """Waits for every rank after its last write and returns code.

    The launcher ends the other ranks about a second after the first non-zero exit: without the wait it would
    cut off the message or the last file of a slower rank.
    """
    if distributed.is_initialized():
        import torch.distributed as dist

        distributed.barrier()
        dist.destroy_process_group()
    elif code and not distributed.is_main():
        time.sleep(2.0)
    return code


def with_demo(config: BaseConfig) -> BaseConfig:
    """The config as it is, or that of the built-in demonstration where both model and data are absent.

    The demonstration's settings take the place of defaults only, and it says so. Raises ConfigError where one
    of the two is given without the other.
    """
    data = config.dataset_path if config.mixture is None else config.mixture
    given = {"model_name_or_path": config.model_name_or_path, "dataset_path": data}
    missing = [name for name, value in given.items() if value is None]
    if not missing:
        return config
    if len(missing) == 1:
        raise ConfigError(
            f"{missing[0]} is missing; give --{missing[0]}, "
            "or leave out both model and data for the demonstration"
        )
    from ds_align.demo import build, demo_overrides

    paths = build()
    if distributed.is_main():
        print(f"no model and no data were given: training the demonstration in {paths.directory}", flush=True)
    values = demo_overrides(config.method) | {
        "model_name_or_path": str(paths.model),
        "dataset_path": str(paths.train),
        "eval_dataset_path": str(paths.heldout),
        "output_dir": f"runs/{config.method}-demo",
    }
    chosen = {name: getattr(config, name) for name in config.model_fields_set}
    return type(config)(**(values | chosen))
