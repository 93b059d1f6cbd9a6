"""The shape of the house: entries, lengths and words."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("ds_align", "ds_configs", "launch", "tests", "csrc", "benchmarks", ".ci")
ENTRIES = (
    "setup.py",
    "pyproject.toml",
    "requirements.txt",
    "requirements-dev.txt",
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "LICENSE",
    ".gitignore",
    ".ci/run",
    "ds_align/__init__.py",
    "ds_configs/README.md",
    "launch/quickstart.sh",
    "launch/setup_env.sh",
    "launch/train.py",
    "launch/hostfile.example",
    "tests/run.sh",
    "csrc/README.md",
    "csrc/ops.cpp",
    "csrc/logprob.h",
    "csrc/logprob_cpu.cpp",
    "csrc/cuda/logprob_kernels.cuh",
    "csrc/cuda/logprob_cuda.cu",
    "csrc/cuda/cpu_shim.h",
    "benchmarks/kernels.py",
)
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_NATIVE_LINE_LENGTH = 100
NATIVE_SUFFIXES = {".cpp", ".h", ".cu", ".cuh", ".inl"}
TEXT_SUFFIXES = {
    ".py",
    ".sh",
    ".md",
    ".toml",
    ".txt",
    ".json",
    ".yaml",
    ".example",
    ".cpp",
    ".h",
    ".cu",
    ".cuh",
    ".inl",
}
# Written in pieces, so that this file does not find itself.
UNFINISHED = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X)\b")
FOREIGN_WORDS = re.compile(
    r"/wo" + r"rk/|/tm" + r"p/venv|\b(SP" + r"EC|STY" + r"LE|KERN" + r"ELS|RELIA" + r"BILITY)\.md"
)


def project_files() -> list[Path]:
    """Every text file that belongs to the project."""
    nested = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()]
    top = [path for path in ROOT.iterdir() if path.is_file()]
    return sorted(
        path
        for path in nested + top
        if (path.suffix in TEXT_SUFFIXES or path.name == "run") and "__pycache__" not in path.parts
    )


def code_files() -> list[Path]:
    """The Python and shell files of the project."""
    return [path for path in project_files() if path.suffix in {".py", ".sh"} or path.name == "run"]


def python_function_lengths(text: str) -> list[tuple[str, int]]:
    functions = (
        node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    return [(node.name, node.end_lineno - node.lineno + 1) for node in functions]


def shell_function_lengths(text: str) -> list[tuple[str, int]]:
    found, start, name = [], 0, ""
    for number, line in enumerate(text.splitlines(), start=1):
        opening = re.match(r"(?:function )?(\w+) ?\(\) ?\{", line)
        if opening:
            start, name = number, opening[1]
        if line == "}" and name:
            found.append((name, number - start + 1))
            name = ""
    return found


@pytest.mark.parametrize("entry", ENTRIES)
def test_entry_exists(entry):
    assert (ROOT / entry).is_file()


def test_the_length_rules_see_what_they_measure():
    assert python_function_lengths("def f():\n    x = 1\n    return x\n") == [("f", 3)]
    assert shell_function_lengths("f() {\n  true\n}\n") == [("f", 3)]
    assert len(code_files()) > 20


@pytest.mark.parametrize("path", code_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_file_and_its_functions_are_short(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_FILE_LINES
    lengths = python_function_lengths(text) if path.suffix == ".py" else shell_function_lengths(text)
    assert {name: length for name, length in lengths if length > MAX_FUNCTION_LINES} == {}


NATIVE_FILES = [path for path in project_files() if path.suffix in NATIVE_SUFFIXES]


@pytest.mark.parametrize("path", NATIVE_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_native_file_and_its_lines_are_short(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= MAX_FILE_LINES
    assert [number for number, line in enumerate(lines, 1) if len(line) > MAX_NATIVE_LINE_LENGTH] == []


@pytest.mark.parametrize("path", project_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_file_is_finished_and_speaks_of_the_project_alone(path):
    text = path.read_text(encoding="utf-8")
    assert UNFINISHED.findall(text) == []
    assert FOREIGN_WORDS.findall(text) == []


@pytest.mark.parametrize(
    "path", sorted((ROOT / "ds_align").rglob("*")), ids=lambda path: str(path.relative_to(ROOT))
)
def test_names_say_what_is_inside(path):
    assert path.name not in {"utils.py", "helpers.py", "common.py", "utils", "helpers", "common"}
