"""The build of the extension by setup.py: what is built, what is refused, and what is said where it cannot
be.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "csrc", "ds_align", "ds_configs")
NO_COMPILER = {"CC": "/bin/false", "CXX": "/bin/false"}
WARNING = "ds_align._C is not built ("


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources without anything that was built from them."""
    root = tmp_path_factory.mktemp("source")
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, root / part, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy(ROOT / part, root / part)
    return root


def build(source: Path, target: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("DS_ALIGN_")}
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", str(target)]
    return subprocess.run(
        command, cwd=source, env=environment | variables, capture_output=True, text=True, timeout=300
    )


def binaries(target: Path) -> list[str]:
    return [path.name for path in target.rglob("*.so")]


@pytest.mark.slow
def test_a_compiler_gives_one_binary_for_all_pythons(source: Path, tmp_path: Path) -> None:
    if shutil.which("c++") is None and "CXX" not in os.environ:
        pytest.skip("no C++ compiler")
    ran = build(source, tmp_path, DS_ALIGN_BUILD_EXT="1", DS_ALIGN_CUDA="0")
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert binaries(tmp_path) == ["_C.abi3.so"]
    assert WARNING not in ran.stderr
    found = next(tmp_path.rglob("_C.abi3.so"))
    code = (
        f"import torch; torch.ops.load_library({str(found)!r}); print(torch.ops.ds_align.tile_lse_.default)"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "ds_align.tile_lse_.default"


def test_without_a_compiler_the_package_is_built_and_says_so_once(source: Path, tmp_path: Path) -> None:
    ran = build(source, tmp_path, **NO_COMPILER)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert ran.stderr.count(WARNING) == 1
    assert binaries(tmp_path) == [] and list(tmp_path.rglob("kernels/native.py"))


def test_without_a_compiler_a_demanded_extension_is_an_error(source: Path, tmp_path: Path) -> None:
    ran = build(source, tmp_path, DS_ALIGN_BUILD_EXT="1", **NO_COMPILER)
    assert ran.returncode != 0 and WARNING not in ran.stderr


def test_switched_off_it_is_not_built_and_nothing_is_said(source: Path, tmp_path: Path) -> None:
    ran = build(source, tmp_path, DS_ALIGN_BUILD_EXT="0", **NO_COMPILER)
    assert ran.returncode == 0 and WARNING not in ran.stderr
    assert binaries(tmp_path) == []


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_a_demanded_cuda_part_needs_a_cuda_torch(source: Path, tmp_path: Path) -> None:
    ran = build(source, tmp_path, DS_ALIGN_CUDA="1")
    assert ran.returncode != 0 and "DS_ALIGN_CUDA=1 needs a CUDA build of torch" in ran.stderr


@pytest.mark.parametrize("name", ["DS_ALIGN_BUILD_EXT", "DS_ALIGN_CUDA"])
def test_other_values_are_refused(source: Path, tmp_path: Path, name: str) -> None:
    ran = build(source, tmp_path, **{name: "yes"})
    assert ran.returncode != 0 and f"{name}='yes'; expected auto, 0 or 1" in ran.stderr


@pytest.mark.parametrize("variables", [NO_COMPILER, {"DS_ALIGN_BUILD_EXT": "0"}], ids=["auto", "0"])
def test_what_is_not_built_leaves_no_older_binary(
    source: Path, tmp_path: Path, variables: dict[str, str]
) -> None:
    """An older one would be loaded, and packed, as if it were of these sources."""
    old = source / "ds_align" / "_C.abi3.so"
    old.write_bytes(b"of other sources")
    ran = build(source, tmp_path, DS_ALIGN_CUDA="0", **variables)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert not old.exists()
    assert binaries(tmp_path) == []
    assert (WARNING in ran.stderr) is ("DS_ALIGN_BUILD_EXT" not in variables)


def test_a_binary_of_other_sources_is_not_used(source: Path, tmp_path: Path) -> None:
    """It loads, and has none of the operators that this version calls."""
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    package = shutil.copytree(source / "ds_align", tmp_path / "ds_align")
    empty = tmp_path / "empty.cpp"
    empty.write_text('extern "C" int nothing() { return 0; }\n')
    target = package / "_C.abi3.so"
    subprocess.run(["c++", "-shared", "-fPIC", "-o", str(target), str(empty)], check=True, timeout=60)
    code = "import ds_align.kernels as k; print(k.backend(), k.native.WHY_ABSENT)"
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    ran = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout.strip() == "torch _C.abi3.so is of another version of ds_align; build it again"
    assert "RuntimeWarning: ds_align: the PyTorch kernels are used" in ran.stderr
