"""The kernels' benchmark on a tiny problem: every contender runs right, or says why it does not run."""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"
# Largest error of a log-prob in nats, and of a gradient as a share of its largest entry. The logits have a
# standard deviation of 3: with 1000 words the largest are near 15, and bfloat16 rounds those by up to
# 16 * 2**-9 = 0.03; the logits, their log-sum-exp and the log-prob (near -20) may each be rounded once.
TOLERANCE = {"float32": (2e-5, 2e-5), "bfloat16": (0.15, 0.02)}
MODES = ("no gradient", "frozen head", "trainable")


@pytest.fixture
def bench(monkeypatch):
    """Imports a module of the folder as its scripts do."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module
    for name in ("kernels", "kernel_peers", "kernel_problem", "machine"):
        sys.modules.pop(name, None)


def run_tiny(folder: Path, dtype: str, *more: str) -> tuple[dict, str]:
    target = folder / "nested" / "numbers.json"
    shape = ["--tokens", "24", "--hidden", "32", "--vocabulary", "1000", "--dtype", dtype, "--rounds", "2"]
    words = [sys.executable, str(BENCHMARKS / "kernels.py"), *shape, "--device", "cpu", "--json", str(target)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    ran = subprocess.run([*words, *more], env=environment, capture_output=True, text=True, cwd=folder)
    assert ran.returncode == 0, ran.stderr[-3000:]

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(target.read_text(encoding="utf-8"), parse_constant=refuse), ran.stdout


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_everybody_is_right_or_gives_a_reason(tmp_path, bench, dtype):
    numbers, printed = run_tiny(tmp_path, dtype)
    (run,) = numbers["runs"]
    by_key = {(result["name"], result["mode"]): result for result in run["results"]}
    assert len(by_key) == len(run["results"])
    for peer in bench("kernel_peers").PEERS:
        for mode in MODES:
            reason = run["skipped"].get(peer.name) or run["skipped"].get(f"{peer.name}, {mode}")
            assert bool(reason) != ((peer.name, mode) in by_key), (peer.name, mode)
    for name, reason in run["skipped"].items():
        assert f"not run: {name}: {reason}" in printed
    # These need torch alone.
    for name in ("naive", "torch.compile"):
        assert {mode for who, mode in by_key if who == name} == set(MODES)

    logprob, gradient = TOLERANCE[dtype]
    for (name, mode), result in by_key.items():
        if mode == "matrix products":
            assert result["logprob_error"] is None
            continue
        assert result["logprob_error"] <= logprob, (name, mode)
        assert (result["gradient_error"] is None) == (mode == "no gradient"), (name, mode)
        assert (result["gradient_error"] or 0.0) <= gradient, (name, mode)


def test_the_json_says_under_what_conditions(tmp_path):
    numbers, printed = run_tiny(tmp_path, "float32", "--only", "ours")
    about, (run,) = numbers["about"], numbers["runs"]
    assert about["machine"]["cpu"]
    assert about["machine"]["cores"] >= about["machine"]["usable_cores"] >= 1
    assert about["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert {"deepspeed", "trl", "liger-kernel", "cut-cross-entropy"} <= set(about["versions"])
    assert about["live_back_end"] in {"cuda", "cpu", "torch"}
    assert len(about["load_average_at_start"]) == len(about["load_average_at_end"]) == 3
    assert numbers["settings"]["dtype"] == "float32"
    assert numbers["settings"]["vocabulary"] == [1000]
    for result in run["results"]:
        assert len(result["seconds"]) == 2
        assert math.isclose(result["median"], sum(result["seconds"]) / 2)
        assert f"  {result['name']}" in printed
    names = {result["name"].partition(",")[0] for result in run["results"] if result["num_products"]}
    assert names == {"naive", "ours"}
    assert run["skipped"] == {}


def test_exact_is_what_float64_autograd_gives(bench):
    problem = bench("kernel_problem").Problem.random(150, 8, 40, dtype=torch.float64, device="cpu")
    exact = problem.exact()
    hidden, weight = problem.hidden.requires_grad_(), problem.weight.requires_grad_()
    logprobs = -torch.nn.functional.cross_entropy(hidden @ weight.T, problem.labels, reduction="none")
    gradients = torch.autograd.grad((logprobs * problem.upstream).sum(), (hidden, weight))
    torch.testing.assert_close(exact.logprobs, logprobs.detach(), rtol=0, atol=1e-12)
    for got, right in zip(exact.gradients, gradients, strict=True):
        torch.testing.assert_close(got, right, rtol=0, atol=1e-12)


def test_errors_by_hand(bench):
    problem = bench("kernel_problem")
    exact = problem.Outcome(
        torch.tensor([-1.0, -2.0], dtype=torch.float64),
        (torch.tensor([[4.0, 0.0]], dtype=torch.float64), torch.tensor([[-8.0]], dtype=torch.float64)),
    )
    # |-2.25 - -2| = 0.25 nats; |3 - 4| / 4 = 0.25 of hidden, |-4 - -8| / 8 = 0.5 of weight.
    wrong = problem.Outcome(torch.tensor([-1.0, -2.25]), (torch.tensor([[3.0, 0.0]]), torch.tensor([[-4.0]])))
    assert problem.errors_of(wrong, exact) == (0.25, 0.5)
    frozen = problem.Outcome(wrong.logprobs, wrong.gradients[:1])
    assert problem.errors_of(frozen, exact) == (0.25, 0.25)
    assert problem.errors_of(problem.Outcome(wrong.logprobs, ()), exact) == (0.25, None)


@pytest.mark.parametrize(
    ("gradient", "message"), [(None, "missing"), (torch.tensor([[math.nan, 0.0]]), "not finite")]
)
def test_a_lost_gradient_is_an_error(bench, gradient, message):
    problem = bench("kernel_problem")
    exact = problem.Outcome(torch.zeros(1).double(), (torch.ones(1, 2).double(),))
    with pytest.raises(ArithmeticError, match=message):
        problem.errors_of(problem.Outcome(torch.zeros(1), (gradient,)), exact)


def test_reasons_of_peers_that_cannot_start(bench):
    peers = bench("kernel_peers")

    def breaks():
        raise ImportError("needs a library\nthat is not there")

    assert peers.loaded(peers.Peer("a", "no_such_package", breaks), "cpu") == "not installed"
    assert peers.loaded(peers.Peer("b", "json", breaks, needs_cuda=True), "cpu") == (
        "its kernels need a CUDA device"
    )
    assert (
        peers.loaded(peers.Peer("c", "json", breaks), "cpu") == "does not load: ImportError: needs a library"
    )


def test_only_a_peer_may_fail(bench):
    kernels = bench("kernels")
    problem = bench("kernel_problem").Problem.random(4, 8, 16, dtype=torch.float32, device="cpu")

    def breaks(*_):
        raise RuntimeError("no kernel for this")

    exact = problem.exact()
    peer = kernels.in_modes("theirs", breaks, problem, is_peer=True)
    assert kernels.started(peer, exact, "cpu") == (
        {},
        {f"theirs, {mode}": "RuntimeError: no kernel for this" for mode in MODES},
    )
    with pytest.raises(RuntimeError, match="no kernel for this"):
        kernels.started(kernels.in_modes("ours", breaks, problem), exact, "cpu")


def test_products_are_counted_by_what_the_backward_does(bench):
    kernels = bench("kernels")
    problem = bench("kernel_problem").Problem.random(4, 8, 16, dtype=torch.float32, device="cpu")
    keeps = kernels.in_modes("a", lambda *_: None, problem)
    recomputes = kernels.in_modes("b", lambda *_: None, problem, recomputes=True)
    assert [len(contender.products) for contender in keeps] == [1, 2, 3]
    assert [len(contender.products) for contender in recomputes] == [1, 3, 4]


def test_the_device_sets_the_shape_and_the_place(bench):
    kernels = bench("kernels")
    cuda = kernels.arguments_of(["--device", "cuda", "--rounds", "3", "--json"])
    assert (cuda.tokens, cuda.hidden, cuda.vocabulary, cuda.dtype) == (16384, 4096, [151936], "bfloat16")
    assert cuda.json == BENCHMARKS / "results" / "kernels-cuda.json"
    cpu = kernels.arguments_of(["--device", "cpu", "--tokens", "64"])
    assert (cpu.tokens, cpu.hidden, cpu.vocabulary, cpu.dtype) == (64, 512, [32000, 151936], "float32")
    assert cpu.json is None
