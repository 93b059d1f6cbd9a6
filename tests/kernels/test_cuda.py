"""The CUDA sources: their logic on the CPU through a shim, and that nvcc takes them; speed and races need a
GPU.
"""

from __future__ import annotations

import ctypes
import math
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ds_align.kernels import linear_logprob, logprob_gather, native, reference

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = Path(__file__).resolve().parent / "programs" / "cuda_on_cpu.cpp"
TORCH_INCLUDE = Path(torch.__file__).resolve().parent / "include"
BLOCK = 256  # threads of a row
FLOAT32, BFLOAT16, FLOAT16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = [
    (FLOAT32, FLOAT32),
    (FLOAT32, BFLOAT16),
    (FLOAT32, FLOAT16),
    (BFLOAT16, BFLOAT16),
    (FLOAT16, FLOAT16),
]


class Arguments(ctypes.Structure):
    """As in cuda_on_cpu.cpp."""

    _fields_ = [
        ("logits", ctypes.c_void_p),
        ("logits_stride", ctypes.c_int64),
        ("num_rows", ctypes.c_int64),
        ("num_columns", ctypes.c_int64),
        ("labels", ctypes.c_void_p),
        ("first", ctypes.c_int64),
        ("state", ctypes.c_void_p),
        ("state_stride", ctypes.c_int64),
        ("bias", ctypes.c_void_p),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
        ("grad", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("out_stride", ctypes.c_int64),
        ("statistics", ctypes.c_int),
    ]


class Shim:
    """The CUDA row kernels with the interface of ds_align.kernels.reference."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))

    def run(
        self,
        kernel: str,
        tile: tuple,
        logit_map: reference.LogitMap,
        out: Tensor | None,
        grad=None,
        statistics=0,
    ):
        logits, labels, first, state = tile
        bias = logit_map.bias
        arguments = Arguments(
            logits.data_ptr(),
            logits.stride(0),
            *logits.shape,
            labels.data_ptr(),
            first,
            state.data_ptr(),
            state.stride(0),
            None if bias is None else bias.data_ptr(),
            logit_map.scale,
            logit_map.softcap,
            None if grad is None else grad.data_ptr(),
            None if out is None else out.data_ptr(),
            0 if out is None else out.stride(0),
            statistics,
        )
        written = logits.dtype if out is None else out.dtype
        names = [str(dtype).removeprefix("torch.") for dtype in (logits.dtype, written)]
        getattr(self.library, f"{kernel}_{names[0]}_{names[1]}")(ctypes.byref(arguments))

    def tile_lse_(self, *tile, weights=None, statistics=0):
        *tile, logit_map = tile
        self.run("lse", tile, logit_map, weights, statistics=statistics)

    def tile_grad_(self, *tile, grad, out):
        *tile, logit_map = tile
        self.run("grad", tile, logit_map, out, grad=grad)


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Shim:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    library = tmp_path_factory.mktemp("shim") / "cuda_on_cpu.so"
    command = [compiler, "-std=c++17", "-O1", "-fPIC", "-shared", "-I", str(ROOT / "csrc"), str(PROGRAM)]
    subprocess.run([*command, "-o", str(library)], check=True, capture_output=True)
    return Shim(library)


def walked(
    kernels, logits: Tensor, labels: Tensor, logit_map: reference.LogitMap, out: torch.dtype, width: int
):
    """State, weights and gradient after tiles of `width` columns."""
    num_rows, num_columns = logits.shape
    state = reference.new_state(num_rows, torch.float32, logits.device)
    grad = torch.linspace(-1.0, 2.0, num_rows)
    weights, gradient = (torch.full(logits.shape, 7.0, dtype=out) for _ in range(2))
    spans = [slice(first, min(first + width, num_columns)) for first in range(0, num_columns, width)]
    maps = [logit_map.at(span, torch.float32) for span in spans]
    for span, its_map in zip(spans, maps, strict=True):
        tile = (logits[:, span], labels, span.start, state, its_map)
        kernels.tile_lse_(*tile, weights=weights[:, span], statistics=3)
    for span, its_map in zip(spans, maps, strict=True):
        tile = (logits[:, span], labels, span.start, state, its_map)
        kernels.tile_grad_(*tile, grad=grad, out=gradient[:, span])
    return state, weights, gradient


@pytest.mark.parametrize(("dtype", "out"), DTYPES)
@pytest.mark.parametrize(
    ("num_rows", "num_columns", "width"),
    [
        (1, 1, 1),
        (1, 3, 2),
        (3, BLOCK - 1, BLOCK - 1),
        (2, BLOCK + 1, BLOCK + 1),
        (2, 4 * BLOCK + 4, 4 * BLOCK + 4),  # packs of four in every thread, then some
        (2, 4 * BLOCK + 7, 512),  # the vocabulary is no multiple of the tile
    ],
)
@pytest.mark.parametrize("maps", [False, True])
def test_logic(shim: Shim, num_rows: int, num_columns: int, width: int, dtype, out, maps: bool) -> None:
    generator = torch.Generator().manual_seed(num_columns)
    logits = (3 * torch.randn(num_rows, num_columns, generator=generator)).to(dtype)
    labels = torch.tensor([num_columns - 1, -100, 0])[:num_rows].contiguous()
    logit_map = reference.LogitMap()
    if maps:
        logit_map = reference.LogitMap(torch.randn(num_columns, generator=generator), -0.7, 3.0)
    found = walked(shim, logits, labels, logit_map, out, width)
    expected = walked(reference, logits, labels, logit_map, out, width)
    tolerance = {FLOAT32: 2e-5, BFLOAT16: 2e-2, FLOAT16: 2e-3}[out]
    label_slope = reference.LABEL_SLOPE
    scored = labels >= 0
    torch.testing.assert_close(
        found[0][:label_slope], expected[0][:label_slope], rtol=2e-5, atol=2e-5, equal_nan=True
    )
    torch.testing.assert_close(
        found[0][label_slope, scored], expected[0][label_slope, scored], rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(
        found[0][label_slope + 1 :], expected[0][label_slope + 1 :], rtol=2e-5, atol=2e-4
    )
    torch.testing.assert_close(found[1:], expected[1:], rtol=tolerance, atol=tolerance)


def test_infinite_and_extreme_logits(shim: Shim) -> None:
    # Columns 0 to 9 in tiles of 5: the first tile of row 1 is all -inf; row 2 is certain of column 7.
    logits = torch.tensor(
        [[1e4, -1e4] * 5, [-math.inf] * 5 + [0.0] * 5, [-1e4] * 7 + [1e4] + [-math.inf] * 2]
    )
    labels = torch.tensor([1, 6, 7])
    state, weights, gradient = walked(shim, logits, labels, reference.LogitMap(), FLOAT32, 5)
    # Row 0: five winners share the probability and column 1 lies 2e4 below; row 1: one of five equal words.
    expected = torch.tensor([-2e4 - math.log(5), -math.log(5), 0.0])
    torch.testing.assert_close(reference.label_logprobs(state, labels), expected)
    assert not weights.isnan().any() and not gradient.isnan().any()
    assert torch.equal(gradient[2], torch.zeros(10))
    # grad of row 1 is 0.5: 0.5 * (onehot - 1/5).
    torch.testing.assert_close(gradient[1], torch.tensor([0.0] * 5 + [-0.1, 0.4, -0.1, -0.1, -0.1]))


def test_in_place_and_with_an_ignored_row_of_garbage(shim: Shim) -> None:
    logits = torch.randn(2, 600)
    logits[1] = math.nan
    labels = torch.tensor([555, -1])
    expected = torch.log_softmax(logits[0], dim=0)
    state = reference.new_state(2, FLOAT32, torch.device("cpu"))
    shim.tile_lse_(logits, labels, 0, state, reference.LogitMap())
    torch.testing.assert_close(
        reference.label_logprobs(state, labels), torch.stack([expected[555], torch.zeros(())])
    )
    shim.tile_grad_(logits, labels, 0, state, reference.LogitMap(), grad=torch.ones(2), out=logits)
    onehot = torch.zeros(600)
    onehot[555] = 1.0
    torch.testing.assert_close(
        logits, torch.stack([onehot - expected.exp(), torch.zeros(600)]), rtol=0, atol=1e-6
    )


def test_unaligned_rows_are_read_one_by_one(shim: Shim) -> None:
    wide = torch.randn(3, 1031)
    labels = torch.tensor([0, 5, 1029])
    aligned = walked(shim, wide[:, 1:].contiguous(), labels, reference.LogitMap(), FLOAT32, 1030)
    shifted = walked(shim, wide[:, 1:], labels, reference.LogitMap(), FLOAT32, 1030)
    torch.testing.assert_close(shifted, aligned, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_nvcc_compiles_kernels_and_glue(tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")
    known = subprocess.run(
        [nvcc, "--list-gpu-code"], check=True, capture_output=True, text=True
    ).stdout.split()
    targets = [name for name in ("80", "90", "100") if f"sm_{name}" in known]
    assert targets
    targets = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in targets]
    macros = ["-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY"]
    command = [nvcc, "-std=c++17", *macros, "-isystem", str(TORCH_INCLUDE), *targets]
    source = ROOT / "csrc" / "cuda" / "logprob_cuda.cu"
    ran = subprocess.run(
        [*command, "-Werror", "all-warnings", "-c", str(source), "-o", str(tmp_path / "cuda.o")],
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr[-4000:]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16, FLOAT16])
def test_on_a_gpu(dtype: torch.dtype) -> None:
    if not native.HAS_KERNELS["cuda"]:
        pytest.skip(f"no CUDA kernels: {native.WHY_ABSENT}")
    generator = torch.Generator("cuda").manual_seed(0)
    options = {"generator": generator, "device": "cuda"}
    hidden, weight = torch.randn(300, 64, **options).to(dtype), torch.randn(9001, 64, **options).to(dtype)
    labels = torch.randint(-1, 9001, (300,), **options)
    results = []
    for impl in ("native", "torch"):
        leaves = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
        under_head = linear_logprob(*leaves, labels, impl=impl, logits_budget_mb=5)
        given = logprob_gather(leaves[0] @ leaves[1].T, labels, impl)
        (under_head.sum() + given.sum()).backward()
        results.append((under_head.detach(), given.detach(), *(leaf.grad for leaf in leaves)))
    tolerance = 1e-4 if dtype == FLOAT32 else 3e-2
    torch.testing.assert_close(results[0], results[1], rtol=tolerance, atol=tolerance)
