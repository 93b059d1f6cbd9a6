"""The compiled extension as a citizen: operators, tracing, bad input, presence and absence."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ds_align.kernels import backend, linear_logprob, logprob_gather, native, operators, reference

ROOT = Path(__file__).resolve().parents[2]
needs_extension = pytest.mark.skipif(
    not native.HAS_KERNELS["cpu"], reason=f"no compiled extension: {native.WHY_ABSENT}"
)


def tile(dtype: torch.dtype = torch.float32) -> tuple:
    """(logits, labels, first, state, bias, scale, softcap) as both operators begin."""
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    state = reference.new_state(3, acc, torch.device("cpu"))
    return (
        torch.randn(3, 9).to(dtype),
        torch.tensor([10, 11, -1]),
        8,
        state,
        torch.randn(9, dtype=acc),
        0.5,
        2.0,
    )


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_opcheck_of_the_row_kernels(dtype: torch.dtype) -> None:
    arguments = tile(dtype)
    for weights in (None, torch.empty(3, 9, dtype=dtype)):
        torch.library.opcheck(torch.ops.ds_align.tile_lse_.default, (*arguments, weights, 3))
    grad, out = torch.randn(3, dtype=arguments[3].dtype), torch.empty(3, 9, dtype=dtype)
    torch.library.opcheck(torch.ops.ds_align.tile_grad_.default, (*arguments, grad, out))


@pytest.mark.parametrize("use_native", [False, pytest.param(True, marks=needs_extension)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_opcheck_of_the_operators(use_native: bool, with_bias: bool) -> None:
    hidden, weight = torch.randn(6, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    bias = torch.randn(9, requires_grad=True) if with_bias else None
    # None is ignored: its state holds a NaN, which opcheck takes for a difference.
    labels = torch.tensor([0, 8, 1, 3, 3, 4])
    for num_kept in (0, 54):
        arguments = (hidden, weight, bias, labels, 0.5, 2.0, 3, num_kept, use_native)
        torch.library.opcheck(operators.linear_score, arguments)
    frozen = [None if tensor is None else tensor.detach() for tensor in (hidden, weight, bias)]
    torch.library.opcheck(operators.linear_score_frozen, (*frozen, labels, 0.5, 2.0, 3, use_native))
    torch.library.opcheck(operators.scale_back, (hidden, torch.randn(6), torch.randn(6, 4)))
    logits = torch.randn(6, 9, requires_grad=True)
    torch.library.opcheck(operators.gather_score, (logits, labels, 3, False, use_native))


@pytest.mark.parametrize("impl", ["torch", pytest.param("native", marks=needs_extension)])
@pytest.mark.parametrize("trains_head", [False, True])
def test_a_compiled_function_has_no_break_and_gives_the_same(impl: str, trains_head: bool) -> None:
    labels = torch.tensor([0, 8, -1, 3, 3, 4])

    def function(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        under_head = linear_logprob(hidden * 2, weight, labels, impl=impl, logits_budget_mb=1)
        return under_head + logprob_gather(hidden @ weight.T, labels, impl)

    # The backend keeps to torch operations: no C++ compiler of inductor is needed.
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    inputs = torch.randn(6, 4), torch.randn(9, 4)
    gradients = []
    for run in (function, compiled):
        hidden = inputs[0].clone().requires_grad_()
        weight = inputs[1].clone().requires_grad_(trains_head)
        run(hidden, weight).sum().backward()
        gradients.append((hidden.grad, weight.grad))
    torch.testing.assert_close(gradients[0], gradients[1])


def lse(arguments: tuple, **changed: object) -> None:
    names = ("logits", "labels", "first", "state", "bias", "scale", "softcap", "weights", "statistics")
    given = dict(zip(names, (*arguments, None, 0), strict=True)) | changed
    torch.ops.ds_align.tile_lse_(*given.values())


@needs_extension
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"logits": torch.zeros(9)}, r"logits is float32 \[9\] on cpu; expected two dimensions"),
        (
            {"logits": torch.zeros(3, 9).half()},
            r"logits is float16 \[3, 9\] on cpu; the CPU kernels take float32",
        ),
        ({"logits": torch.zeros(9, 3).t()}, "logits has stride 3 between columns; expected 1"),
        (
            {"labels": torch.zeros(4, dtype=torch.long)},
            r"labels is int64 \[4\] on cpu; expected contiguous int64 \[3\]",
        ),
        ({"labels": torch.zeros(3, dtype=torch.int32)}, r"labels is int32 \[3\]"),
        (
            {"labels": torch.zeros(6, dtype=torch.long)[::2]},
            r"labels is int64 \[3\] on cpu; expected contiguous",
        ),
        ({"state": torch.zeros(6, 3)}, r"state is float32 \[6, 3\] on cpu; expected float32 \[7, 3\]"),
        ({"state": torch.zeros(7, 3).double()}, r"state is float64 \[7, 3\]"),
        ({"bias": torch.zeros(8)}, r"bias is float32 \[8\] on cpu; expected contiguous float32 \[9\]"),
        ({"weights": torch.zeros(3, 8)}, r"weights is float32 \[3, 8\] on cpu; expected float32 \[3, 9\]"),
        ({"weights": torch.zeros(3, 9).bfloat16()}, r"weights is bfloat16 \[3, 9\]"),
        ({"softcap": -1.0}, "softcap is -1; expected a positive number, or 0 for none"),
        ({"scale": math.nan}, "scale is nan"),
    ],
)
def test_a_row_kernel_names_what_it_got(changed: dict, message: str) -> None:
    with pytest.raises(RuntimeError, match=f"tile_lse_: {message}"):
        lse(tile(), **changed)


@needs_extension
def test_the_gradient_kernel_names_what_it_got() -> None:
    for grad, out, message in (
        (torch.zeros(4), torch.zeros(3, 9), r"grad is float32 \[4\]"),
        (torch.zeros(3), torch.zeros(3, 8), r"out is float32 \[3, 8\]"),
        (torch.zeros(3), torch.zeros(9, 3).t(), "out has stride 3 between columns"),
    ):
        with pytest.raises(RuntimeError, match=f"tile_grad_: {message}"):
            torch.ops.ds_align.tile_grad_(*tile(), grad, out)


@needs_extension
@pytest.mark.parametrize("shape", [(0, 9), (3, 0), (0, 0)])
def test_empty_tiles_change_nothing(shape: tuple[int, int]) -> None:
    state = reference.new_state(shape[0], torch.float32, torch.device("cpu"))
    logits, labels = torch.zeros(shape), torch.zeros(shape[0], dtype=torch.long)
    torch.ops.ds_align.tile_lse_(logits, labels, 0, state, None, 1.0, 0.0, logits, 3)
    assert (state[reference.TOTAL] == 0).all() and (state[reference.MAXIMUM] == -math.inf).all()
    torch.ops.ds_align.tile_grad_(logits, labels, 0, state, None, 1.0, 0.0, torch.zeros(shape[0]), logits)


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("num_columns", [1, 3, 15, 16, 17, 63, 64, 65, 200])
def test_the_row_kernels_agree_with_the_reference(num_columns: int, dtype: torch.dtype) -> None:
    # Two tiles one after the other, every output, with all of bias, scale and cap, on strided rows.
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    generator = torch.Generator().manual_seed(num_columns)
    wide = (3 * torch.randn(5, 2 * num_columns + 3, generator=generator)).to(dtype)
    wide[1, ::2] = -math.inf
    labels = torch.tensor([0, num_columns, 2 * num_columns - 1, -1, num_columns - 1])
    logit_map = reference.LogitMap(torch.randn(num_columns, generator=generator).to(acc), 0.7, 3.0)
    grad = torch.randn(5, generator=generator).to(acc)
    results = []
    for kernels in (reference, native):
        state = reference.new_state(5, acc, torch.device("cpu"))
        written = []
        tiles = [(wide[:, :num_columns], 0), (wide[:, num_columns : 2 * num_columns], num_columns)]
        for logits, first in tiles:
            out = torch.full_like(logits, 7.0)
            kernels.tile_lse_(logits, labels, first, state, logit_map, weights=out, statistics=3)
            written.append(out)
        for logits, first in tiles:
            out = torch.full_like(logits, 7.0)
            kernels.tile_grad_(logits, labels, first, state, logit_map, grad=grad, out=out)
            written.append(out)
        results.append([state, *written])
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(results[0], results[1], rtol=tolerance, atol=tolerance, equal_nan=True)


@needs_extension
def test_the_number_of_threads_changes_no_bit() -> None:
    logits, labels = torch.randn(300, 3001), torch.randint(0, 3001, (300,))
    before = torch.get_num_threads()
    try:
        results = []
        for num_threads in (1, 3):
            torch.set_num_threads(num_threads)
            results.append(logprob_gather(logits, labels, "native"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


def test_backend_and_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(native.ENVIRONMENT_VARIABLE, raising=False)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert backend() == (device if native.HAS_KERNELS[device] else "torch")
    monkeypatch.setenv(native.ENVIRONMENT_VARIABLE, "torch")
    assert backend() == "torch"
    monkeypatch.setenv(native.ENVIRONMENT_VARIABLE, "fast")
    with pytest.raises(ValueError, match="DS_ALIGN_KERNELS='fast'; expected one of auto, native, torch"):
        backend()


@needs_extension
def test_native_is_refused_where_it_has_no_kernels() -> None:
    logits = torch.zeros(1, 2, device="meta")
    with pytest.raises(RuntimeError, match=r"impl='native' has no kernels for torch.float32 on meta"):
        logprob_gather(logits, torch.zeros(1, dtype=torch.long, device="meta"), "native")


PROBE = """
import torch
from ds_align.kernels import backend, logprob_gather
print(backend(), logprob_gather(torch.zeros(1, 2), torch.tensor([1])).item())
try:
    logprob_gather(torch.zeros(1, 2), torch.tensor([1]), "native")
except RuntimeError as error:
    print(error)
"""


@pytest.mark.parametrize("binary", [None, b"this is no library"])
def test_a_package_without_its_extension(tmp_path: Path, binary: bytes | None) -> None:
    shutil.copytree(
        ROOT / "ds_align", tmp_path / "ds_align", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    if binary is not None:
        (tmp_path / "ds_align" / "_C.abi3.so").write_bytes(binary)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    environment.pop(native.ENVIRONMENT_VARIABLE, None)
    ran = subprocess.run(
        [sys.executable, "-c", PROBE],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    first, second = ran.stdout.splitlines()
    assert first.split()[0] == "torch" and float(first.split()[1]) == pytest.approx(math.log(0.5))
    assert second.startswith("impl='native' needs the compiled extension ds_align._C, which is not there (")
    assert ran.stderr.count("RuntimeWarning: ds_align: the PyTorch kernels are used") == (binary is not None)
