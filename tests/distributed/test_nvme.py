"""A reference on NVMe says bit for bit what one in host memory says, and leaves nothing behind.

Runs where DeepSpeed's async_io operator is compiled already, or where DS_BUILD_AIO=1 asks for it.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests.distributed import tiny
from tests.distributed.launching import ROOT, TRAIN, environment, launch

pytestmark = pytest.mark.distributed

CASES = ("large", "untied", "bfloat16", "8 bits", "ahead", "experts", "tiny")
ON_ONE_RANK = ("large", "ahead", "8 bits")
# Partitions below 1 MiB stay in memory: at a width of 1040 those of the linear layers are larger.
LARGE = {"vocab_size": 2200, "hidden_size": 1040, "intermediate_size": 2040}
EXPERTS = {"vocab_size": 2200, "hidden_size": 512, "moe_intermediate_size": 520}
CAN_BUILD = (
    "from deepspeed.ops.op_builder import AsyncIOBuilder as B; raise SystemExit(not B().is_compatible())"
)

# 1 MiB may be locked, two may not.
LIMITED = """
import resource

resource.setrlimit(resource.RLIMIT_MEMLOCK, (1 << 20, 1 << 20))
from ds_align.engine.nvme import _check_direct_writes, _check_lockable
from ds_align.errors import ConfigError

_check_lockable(1 << 20, "allowed")
_check_direct_writes(".", "allowed")
for check, given in ((_check_lockable, 2 << 20), (_check_direct_writes, "/proc")):
    try:
        check(given, repr(given))
    except ConfigError as error:
        print("refused:", error)
"""


def is_of_this_environment(library: Path) -> bool:
    """Whether a compiled operator is taken as it is: one of another environment's sources is built anew."""
    recipe = library.with_name("build.ninja")
    if not recipe.is_file() or recipe.stat().st_mtime > library.stat().st_mtime:
        return False
    text = recipe.read_text(encoding="utf-8")
    return all(str(folder_of(package)) in text for package in ("deepspeed", "torch"))


def folder_of(package: str) -> Path:
    return Path(find_spec(package).origin).parent


def why_no_operator() -> str | None:
    """A build takes minutes, so that nobody gets one who did not ask for it."""
    cache = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions")
    built = any(is_of_this_environment(found) for found in cache.rglob("async_io/async_io.so"))
    if os.environ.get("DS_BUILD_AIO") != "1" and not built:
        return "DeepSpeed's async_io is not compiled here; DS_BUILD_AIO=1 lets this test do it (minutes)"
    built = subprocess.run([sys.executable, "-c", CAN_BUILD], env=environment(), capture_output=True)
    return "no libaio with headers, or no compiler, for DeepSpeed's async_io" if built.returncode else None


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if reason := why_no_operator():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("nvme")
    tiny.write_model(folder / "models" / "policy", vocab_size=2200, seed=0)
    tiny.write_model(folder / "models" / "tiny", vocab_size=2200, seed=1)
    tiny.write_model(folder / "models" / "large", seed=2, **LARGE)
    tiny.write_model(folder / "models" / "untied", kind="llama", tied=False, seed=3, **LARGE)
    tiny.write_model(folder / "models" / "moe", kind="qwen3_moe", tied=False, seed=4, **EXPERTS)
    return folder


@pytest.fixture(scope="module")
def two_ranks(place: Path) -> Iterator[list[dict]]:
    """What each rank found; beside it are what a dead run, a live one and somebody else left on the disk."""
    folder = place / "two"
    for name in ("ds_align-rank0-dead", "ds_align-rank0-live", "other"):
        (folder / "disk" / name).mkdir(parents=True)
        (folder / "disk" / name / "7_param.tensor.swp").write_bytes(b"1234")
    (folder / "file").write_text("")
    live = os.open(folder / "disk" / "ds_align-rank0-live", os.O_RDONLY)
    fcntl.flock(live, fcntl.LOCK_EX)
    launch("nvme.py", place / "models", folder, num_ranks=2, timeout=500).check()
    yield [torch.load(folder / f"results-{rank}.pt") for rank in range(2)]
    os.close(live)


@pytest.fixture(scope="module")
def one_rank(place: Path) -> dict:
    (place / "one" / "disk").mkdir(parents=True)
    launch("nvme.py", place / "models", place / "one", num_ranks=1).check()
    return torch.load(place / "one" / "results-0.pt")


def check_equal(in_memory: dict, on_nvme: dict) -> None:
    assert on_nvme["losses"] == in_memory["losses"]
    assert sum(scores.numel() for scores in in_memory["scores"]) > 100
    for first, second in zip(in_memory["scores"], on_nvme["scores"], strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("case", CASES)
def test_losses_and_log_probs_are_bit_equal(two_ranks: list[dict], case: str) -> None:
    for rank in two_ranks:
        check_equal(rank[case, "cpu"], rank[case, "nvme"])


@pytest.mark.parametrize("case", ON_ONE_RANK)
def test_one_rank_says_the_same(one_rank: dict, case: str) -> None:
    check_equal(one_rank[case, "cpu"], one_rank[case, "nvme"])


def test_the_weights_are_on_the_disk_and_not_in_memory(two_ranks: list[dict]) -> None:
    # Embedding 2200 * 1040; a layer has 2 * 1040 * 1040 (q, o), 2 * 520 * 1040 (k, v), 3 * 1040 * 2040 (MLP):
    # 15 matrices, 2_288_000 + 2 * 9_609_600 = 21_507_200 elements, 10_753_600 a rank, 4 bytes each.
    # Norms and biases: 2 * (2 * 1040 + 1040 + 2 * 520) + 1040 = 9360, 4680 a rank; a matrix leaves 1 element.
    for rank in two_ranks:
        found = rank["large", "nvme"]
        assert found["whole"] == 10_753_600 + 4680
        assert found["in_memory"] == 4680 + 15
        assert sum(found["files"].values()) >= 4 * 10_753_600
        assert rank["large", "cpu"]["in_memory"] == found["whole"]
        assert not rank["large", "cpu"]["files"]


def test_weights_that_were_quantised_leave_the_disk(two_ranks: list[dict]) -> None:
    for rank in two_ranks:
        whole, quantised = (rank[case, "nvme"]["files"] for case in ("large", "8 bits"))
        assert 0 < sum(quantised.values()) < 0.5 * sum(whole.values())


def test_a_model_of_small_weights_stays_in_memory_and_says_so(two_ranks: list[dict]) -> None:
    for rank in two_ranks:
        found = rank["tiny", "nvme"]
        assert not found["files"]
        assert found["in_memory"] == found["whole"]
        assert any("every weight stays in host memory" in text for text in found["messages"])
        assert not any("host memory" in text for text in rank["large", "nvme"]["messages"])


def test_a_closed_reference_leaves_no_file_and_no_locked_memory(two_ranks: list[dict]) -> None:
    # Five buffers for the largest weight: 5 * 2200 * 1040 / 2 elements of 4 bytes.
    assert two_ranks[0]["large", "nvme"]["locked"] >= 5 * 1_144_000 * 4
    for case in CASES:
        for rank in two_ranks:
            assert rank[case, "nvme"]["locked_after"] == rank[case, "cpu"]["locked"] == 0
            assert rank[case, "left"] == ["ds_align-rank0-live", "other"]


def test_two_references_on_one_path_do_not_meet(two_ranks: list[dict]) -> None:
    for rank in two_ranks:
        for scores in rank["both"]:
            for name in ("large", "untied"):
                assert torch.equal(scores[name], rank[name, "cpu"]["scores"][0])


def test_the_end_of_a_run_leaves_the_directories_of_others(two_ranks: list[dict], place: Path) -> None:
    """The last references were never closed."""
    assert len(two_ranks) == 2
    left = sorted(
        str(path.relative_to(place / "two" / "disk")) for path in (place / "two" / "disk").rglob("*")
    )
    assert left == sorted(
        f"{folder}{file}"
        for folder in ("ds_align-rank0-live", "other")
        for file in ("", "/7_param.tensor.swp")
    )


@pytest.mark.parametrize(
    ("mistake", "parts"),
    {
        # The experts of a layer: 4 * 2 * 520 * 512 = 2_129_920 elements, half of them on a rank.
        "small buffers": ("buffer_size=5000", "experts.gate_up_proj has 1064960 elements", 'set "auto"'),
        "few buffers": ("buffer_count=1", "model.layers.0.mlp.experts needs 2 at once"),
        "a file": ("is no directory that can be written",),
    }.items(),
)
def test_what_cannot_work_is_refused_on_every_rank(
    two_ranks: list[dict], mistake: str, parts: tuple[str, ...]
) -> None:
    for rank in two_ranks:
        assert len(set(rank["refusals"][mistake])) == 1
        assert all(part in rank["refusals"][mistake][0] for part in ("ref_ds_config", *parts))


def test_buffers_beyond_what_may_be_locked_and_a_path_without_files_are_refused() -> None:
    command = [sys.executable, "-c", LIMITED]
    if os.geteuid() == 0:
        # The limit does not bind a process with this capability.
        if shutil.which("setpriv") is None:
            pytest.skip("root without setpriv can lock what it likes")
        command = ["setpriv", "--bounding-set=-ipc_lock", "--inh-caps=-ipc_lock", *command]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    locked, direct = (line for line in result.stdout.splitlines() if line.startswith("refused: "))
    assert "the buffers lock 2 MB in memory and this process may lock 1 MB; raise `ulimit -l`" in locked
    assert "'/proc': a direct write fails there" in direct


def test_without_a_compiler_there_is_one_line_before_a_model_loads(tmp_path: Path) -> None:
    tiny.write_model(tmp_path / "model")
    tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.text_pairs(3))
    given = json.loads((ROOT / "ds_configs" / "zero_inference_nvme.json").read_text(encoding="utf-8"))
    given["zero_optimization"]["offload_param"]["nvme_path"] = str(tmp_path)
    (tmp_path / "nvme.json").write_text(json.dumps(given), encoding="utf-8")
    settings = {
        "method": "dpo",
        "model_name_or_path": tmp_path / "model",
        "dataset_path": tmp_path / "rows.jsonl",
        "ref_ds_config": tmp_path / "nvme.json",
        "per_device_train_batch_size": 1,
        "output_dir": tmp_path / "run",
    }
    flags = [text for name, value in settings.items() for text in (f"--{name}", value)]
    # The operator that this machine may have is not to be found.
    variables = {"CC": "false", "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions")}
    result = launch(TRAIN, *flags, num_ranks=2, variables=variables)
    assert result.code != 0
    lines = [line for line in result.output.splitlines() if "async_io" in line]
    assert len(lines) == 1, result.output[-3000:]
    assert "ref_ds_config: device=nvme" in lines[0]
    assert "libaio-dev" in lines[0]
    assert "Traceback" not in result.output
    assert not (tmp_path / "run").exists() or not any((tmp_path / "run").glob("*.safetensors"))
