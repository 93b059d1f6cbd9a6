"""Kills a run of two ranks again and again until it is done, and holds it against an undisturbed run.

The same command is given each time, as a scheduler would: nothing is mended by hand. Kills are SIGKILL, at
random moments after the first new step, saves included: of one rank, of all ranks, or of the launcher too.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

# Python puts this folder first, and the programs are started from anywhere.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.launching import ROOT, child_environment, free_port  # noqa: E402

KINDS = ("one rank", "all ranks", "launcher and ranks")


@dataclass
class Soak:
    """What happened so far."""

    kills: Counter[str] = field(default_factory=Counter)
    during_a_save: int = 0
    launches: int = 0


def command_of(arguments: argparse.Namespace, data: Path, output: Path) -> list[str]:
    """One command for every launch."""
    deepspeed = str(Path(sys.executable).parent / "deepspeed")
    settings = {
        "method": "dpo",
        "model_name_or_path": data / "model",
        "dataset_path": data / "train.jsonl",
        "output_dir": output,
        "ds_config": arguments.ds_config,
        "max_steps": arguments.steps,
        "save_steps": arguments.save_steps,
        "save_total_limit": 2,
        "per_device_train_batch_size": 2,
        "max_length": 128,
        "logging_steps": 1,
        "doctor": "off",
    }
    flags = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    ranks = ["--num_gpus", str(arguments.ranks), "--master_port", str(free_port())]
    return [sys.executable, deepspeed, *ranks, str(ROOT / "launch" / "train.py"), *flags, "--resume"]


def children(parent: int) -> list[int]:
    """Processes that this one started and that still run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError):
            state, above = path.read_text(errors="replace").rpartition(")")[2].split()[:2]
            if int(above) == parent and state != "Z":
                found.append(int(path.parent.name))
    return found


def descendants(parent: int) -> list[int]:
    """Children, and theirs."""
    below = children(parent)
    return [*below, *(pid for child in below for pid in descendants(child))]


def ranks_of(launcher: int) -> list[int]:
    """The training processes: those that run train.py and are no launcher."""
    found = []
    for pid in descendants(launcher):
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if any(word.startswith(b"--local_rank") for word in words) and not any(
                b"launcher" in word for word in words
            ):
                found.append(pid)
    return found


def last_step(output: Path) -> int:
    """The step of the last whole line of metrics.jsonl; 0 where there is none."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        lines = (output / "metrics.jsonl").read_text().splitlines()
        for line in reversed(lines):
            with contextlib.suppress(ValueError):
                return int(json.loads(line)["step"])
    return 0


def is_completed(output: Path) -> bool:
    """What a scheduler looks at."""
    with contextlib.suppress(OSError, ValueError):
        return json.loads((output / "run_summary.json").read_text())["status"] == "completed"
    return False


@contextlib.contextmanager
def launched(command: list[str], log: Path) -> Iterator[subprocess.Popen]:
    """The command in a session of its own, of which nothing is left at the end."""
    with log.open("ab") as file:
        process = subprocess.Popen(
            command,
            env=child_environment(1, device="cpu"),
            cwd=ROOT,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            for pid in [*descendants(process.pid), process.pid]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()


def disturb(process: subprocess.Popen, output: Path, chance: random.Random, soak: Soak) -> None:
    """Waits for a new step, then a random while, then kills."""
    before = last_step(output)
    while process.poll() is None and last_step(output) == before:
        time.sleep(0.05)
    until = time.monotonic() + chance.uniform(0.0, 4.0)
    while process.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    if process.poll() is not None:
        return
    kind = chance.choice(KINDS)
    ranks = ranks_of(process.pid)
    victims = {"one rank": ranks and [chance.choice(ranks)], "all ranks": ranks}.get(kind)
    soak.during_a_save += bool(list((output / "checkpoints").glob(".tmp-*")))
    for pid in victims if victims is not None else [process.pid, *descendants(process.pid)]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    soak.kills[kind] += 1
    # The launcher notices a dead rank by itself; it must not need help.
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=90)


def weights_digest(output: Path) -> str:
    """Of the exported model."""
    files = sorted(output.glob("*.safetensors"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest() if files else ""


def run(arguments: argparse.Namespace, work: Path) -> int:
    """0 where the disturbed run ended bit for bit as the undisturbed one."""
    subprocess.run(
        [sys.executable, "-m", "ds_align.demo", "build", "--directory", str(work / "data")],
        env=child_environment(1, device="cpu"),
        cwd=ROOT,
        check=True,
    )
    straight, disturbed = work / "straight", work / "disturbed"
    with launched(command_of(arguments, work / "data", straight), work / "straight.log") as process:
        process.wait()
    if not is_completed(straight):
        print((work / "straight.log").read_text()[-3000:])
        return 1
    soak, chance, started = Soak(), random.Random(arguments.seed), time.monotonic()
    command = command_of(arguments, work / "data", disturbed)
    while not is_completed(disturbed) and soak.launches < arguments.most_launches:
        soak.launches += 1
        at = last_step(disturbed)
        with launched(command, work / "disturbed.log") as process:
            disturb(process, disturbed, chance, soak)
        print(f"launch {soak.launches}: from step {at} to {last_step(disturbed)}", flush=True)
    equal = weights_digest(straight) == weights_digest(disturbed) != ""
    rows = [
        {name: json.loads(line).get(name) for name in ("step", "loss", "grad_norm")}
        for directory in (straight, disturbed)
        for line in (directory / "metrics.jsonl").read_text().splitlines()
    ]
    half = len(rows) // 2
    kills = ", ".join(f"{kind}: {number}" for kind, number in soak.kills.items())
    print(f"{arguments.steps} steps on {arguments.ranks} ranks, {arguments.ds_config}")
    print(f"{sum(soak.kills.values())} kills ({kills}), {soak.during_a_save} of them during a save")
    print(f"{soak.launches} launches, nothing done by hand, {time.monotonic() - started:.0f} s")
    losses = rows[:half] == rows[half:]
    print(f"weights bit-equal to the undisturbed run: {equal}; logged losses equal: {losses}")
    return 0 if equal and is_completed(disturbed) else 1


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--save_steps", type=int, default=5)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--ds_config", default="zero3")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--most_launches", type=int, default=200)
    parser.add_argument("--keep", type=Path, help="a directory for data, logs and runs; else a temporary one")
    arguments = parser.parse_args()
    work = Path(arguments.keep or tempfile.mkdtemp(prefix="ds-align-soak-")).absolute()
    work.mkdir(parents=True, exist_ok=True)
    try:
        return run(arguments, work)
    finally:
        if arguments.keep is None:
            shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
