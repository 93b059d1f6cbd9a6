"""Starts the real commands in processes of their own: `deepspeed` for several ranks, `python` for one."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = Path(__file__).resolve().parent / "programs"
TRAIN = ROOT / "launch" / "train.py"


@dataclass(frozen=True)
class Result:
    """How a launch ended; seconds is its wall time."""

    code: int
    stdout: str
    stderr: str
    seconds: float

    @property
    def output(self) -> str:
        return self.stdout + self.stderr

    def check(self) -> Result:
        """Returns itself, or fails with the end of the output where the code is not 0."""
        assert self.code == 0, f"exit code {self.code}\n{self.output[-6000:]}"
        return self


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch(
    script: str | Path,
    *arguments: object,
    num_ranks: int = 2,
    timeout: float = 300,
    cwd: Path | None = None,
    variables: dict[str, str] | None = None,
) -> Result:
    """Runs a program of this folder, or any script, on num_ranks ranks and waits for it.

    One rank is plain `python`: no launcher, which is the other supported way.
    """
    path = Path(script) if Path(script).is_absolute() else PROGRAMS / script
    command = [sys.executable, str(path), *map(str, arguments)]
    if num_ranks > 1:
        deepspeed = Path(sys.executable).parent / "deepspeed"
        ranks = ["--num_gpus", str(num_ranks), "--master_port", str(free_port())]
        command = [sys.executable, str(deepspeed), *ranks, *command[1:]]
    return run(command, environment() | (variables or {}), timeout=timeout, cwd=cwd or ROOT)


def environment() -> dict[str, str]:
    """The caller's environment without another launcher's variables, and the accelerator decided."""
    dropped = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    values = {name: value for name, value in os.environ.items() if name not in dropped}
    # The deepspeed command starts the ranks with the `python` of PATH.
    values["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{values.get('PATH', '')}"
    values["PYTHONPATH"] = str(ROOT)
    values["OMP_NUM_THREADS"] = "1"
    values["TOKENIZERS_PARALLELISM"] = "false"
    values["HF_HUB_OFFLINE"] = "1"
    if torch.cuda.device_count() < 2:
        # Runs on one and on two ranks are compared, so both need the same kind of device.
        values |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    return values


def run(command: Sequence[str], env: dict[str, str], *, timeout: float, cwd: Path) -> Result:
    started = time.perf_counter()
    process = subprocess.Popen(
        command,
        env=env,
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        # The launcher's children are in its session: ending the launcher alone would leave the ranks behind.
        os.killpg(process.pid, signal.SIGKILL)
        stdout, stderr = process.communicate()
        raise AssertionError(f"no end within {timeout} s\n{(stdout + stderr)[-6000:]}") from None
    return Result(process.returncode, stdout, stderr, time.perf_counter() - started)
