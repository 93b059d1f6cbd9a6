"""Every module imports, and the light ones stay light."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in (ROOT / "ds_align").rglob("*.py")
)
HEAVY = ("torch", "transformers", "datasets", "deepspeed", "matplotlib")


@pytest.mark.parametrize("module", MODULES)
def test_module_imports(module):
    importlib.import_module(module)


@pytest.mark.parametrize("script", sorted((ROOT / "launch").glob("*.py")), ids=lambda path: path.name)
def test_launch_script_imports_without_running(script):
    spec = importlib.util.spec_from_file_location(f"launch_{script.stem}", script)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


@pytest.mark.parametrize(
    "module",
    ["ds_align", "ds_align.config", "ds_align.errors", "ds_align.demo", "ds_align.arabic.balance"],
)
def test_light_module_imports_nothing_heavy(module):
    code = f"import sys, {module}; print(*sorted(set({HEAVY}) & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout.split() == []


@pytest.mark.parametrize(
    "module", ["ds_align.losses", "ds_align.kernels", "ds_align.objective", "ds_align.data"]
)
def test_research_module_needs_no_deepspeed(module):
    code = f"import sys, {module}; print('deepspeed' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["False"]
