"""Starts measured runs, each in processes of its own with the same environment."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SIDES = "benchmarks.vs_trl_sides"
# glibc gives tensors above these sizes back to the system when they are freed, at every step anew.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(4 << 30), "MALLOC_TRIM_THRESHOLD_": str(16 << 30)}
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class RunError(Exception):
    """A measured run did not end well."""


def child_environment(threads: int, *, device: str) -> dict[str, str]:
    """The environment of every measured process: the same for all."""
    values = {name: value for name, value in os.environ.items() if name not in LAUNCHER}
    search = [str(Path(sys.executable).parent), values.get("PATH", "")]
    return values | {
        **MALLOC,
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "TQDM_DISABLE": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [values.get("PYTHONPATH")])]),
        # The deepspeed command starts the ranks with the python of PATH.
        "PATH": os.pathsep.join(search),
        **({"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}),
    }


def run_side(
    side: str, spec: Path, out: Path, *, environment: dict[str, str], timeout: float, ranks: int = 1
) -> list[dict]:
    """One run of vs_trl_sides.py: its result on each rank, with the load averages before it.

    Raises RunError with the end of its output.
    """
    load = os.getloadavg()
    command = [sys.executable, "-m", SIDES]
    if ranks > 1:
        deepspeed = str(Path(sys.executable).parent / "deepspeed")
        count = ["--num_gpus", str(ranks), "--master_port", str(free_port())]
        command = [sys.executable, deepspeed, *count, "--module", SIDES]
    try:
        done = subprocess.run(
            [*command, side, str(spec), str(out)],
            env=environment,
            cwd=out.parent,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise RunError(f"{side}: no end within {timeout:g} s") from None
    if done.returncode:
        raise RunError(f"{side}: exit code {done.returncode}\n{(done.stdout + done.stderr)[-3000:]}")
    results = [out.with_suffix(f".{rank}.json") for rank in range(ranks)]
    return [json.loads(path.read_text(encoding="utf-8")) | {"load_averages": load} for path in results]


def free_port() -> int:
    """One that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
