"""Every setting has an effect or is an error; flags_table.py says which, flags_program.py makes the runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ds_align.config import METHODS, BaseConfig, DPOConfig, resolve_policy_config
from tests import flags_table
from tests.distributed.launching import ROOT, environment
from tests.flags_entries import Effect, Refused, settings_of, unchanged
from tests.flags_table import every_entry

PROGRAM = Path(__file__).resolve().parent / "flags_program.py"
TRAIN = ROOT / "launch" / "train.py"
ENTRIES = every_entry()
LABELS = [f"{name}-{number}" for number, (name, _) in enumerate(ENTRIES)]


def key(case: tuple[str, dict]) -> str:
    return json.dumps(case, sort_keys=True)


def run_program(work: Path, cases: list[tuple[str, dict]]) -> dict[str, dict]:
    """Fingerprint or error of each distinct case, from one process."""
    distinct = {key(case): {"key": key(case), "method": case[0], "settings": case[1]} for case in cases}
    files = (work / "cases.json", work / "results.json")
    files[0].write_text(json.dumps(list(distinct.values())))
    directory = work / "runs"
    directory.mkdir()
    process = subprocess.run(
        [sys.executable, str(PROGRAM), str(directory), *map(str, files)],
        env=environment()
        | {"HF_MODULES_CACHE": str(work / "modules"), "HF_DATASETS_CACHE": str(work / "datasets")},
        capture_output=True,
        text=True,
        cwd=work,
        timeout=300,
    )
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-6000:]
    return json.loads(files[1].read_text())


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    cases = [settings_of(entry) for _, entry in ENTRIES]
    cases += [unchanged(entry) for _, entry in ENTRIES if isinstance(entry, Effect)]
    cases.append(FLOAT16)
    return run_program(tmp_path_factory.mktemp("flags"), cases)


FLOAT16 = settings_of(Effect({"dtype": "float16"}))


def test_every_field_of_every_method_has_an_entry() -> None:
    assert set(flags_table.SHARED_FIELDS) == set(BaseConfig.model_fields)
    own = {
        (method, name)
        for method, spec in METHODS.items()
        for name in spec.config.model_fields
        if name not in BaseConfig.model_fields
    }
    assert set(flags_table.OWN) == own
    empty = {name for name, entries in flags_table.SHARED_FIELDS.items() if not entries}
    assert empty == {"debug"}  # it shows in a command alone: test_debug_shows_the_traceback
    changed = {name for name, entry in ENTRIES if name.rpartition(".")[2] in entry.changes}
    assert changed == {name for name, _ in ENTRIES}


def test_the_columns_of_unpaired_data_belong_to_the_methods_that_take_them() -> None:
    for spec in METHODS.values():
        assert spec.config.reads_unpaired is (spec.inputs == "unpaired")


@pytest.mark.parametrize(("name", "entry"), ENTRIES, ids=LABELS)
def test_setting_has_its_effect(name: str, entry: Effect | Refused, runs: dict[str, dict]) -> None:
    after = runs[key(settings_of(entry))]
    assert "crash" not in after, after["crash"]
    if isinstance(entry, Refused):
        assert "error" in after, f"{name}: {entry.changes} was accepted"
        assert entry.words in after["error"]
        return
    before = runs[key(unchanged(entry))]
    assert "error" not in after, after.get("error")
    assert "error" not in before, before.get("error")
    for part in entry.differs.split():
        assert after[part] != before[part], f"{name}: {part} is {before[part]} with and without"
    for part in entry.same.split():
        wanted = before[part]
        is_number = isinstance(wanted, float) or (isinstance(wanted, list) and isinstance(wanted[0], float))
        assert after[part] == (pytest.approx(wanted, rel=1e-5, abs=1e-7) if is_number else wanted), part
    assert entry.holds is None or entry.holds(after), {
        name: str(value)[:300] for name, value in after.items()
    }


def test_float16_works_or_is_refused(runs: dict[str, dict]) -> None:
    """Few CPUs compute in float16; where this one does not, that is a ConfigError before a model loads."""
    run = runs[key(FLOAT16)]
    if "error" in run:
        assert run["error"].startswith("ConfigError: dtype=float16")
    else:
        assert run["weights_dtype"] == ["torch.float16"]


def test_the_runs_repeat_exactly(runs: dict[str, dict], tmp_path: Path) -> None:
    """A run's numbers depend on its settings alone, else a difference would prove nothing."""
    case = settings_of(Effect({}))
    again = run_program(tmp_path, [case])[key(case)]
    for part in ("losses", "grad_norms", "weights", "order", "tokens", "files"):
        assert again[part] == runs[key(case)][part], part


def test_deepspeed_cpu_adam_is_another_optimizer() -> None:
    """Its kernel takes minutes to compile, so what DeepSpeed is told is what is seen."""

    def optimizer(optim: str) -> dict:
        config = DPOConfig(ds_config="zero3_offload", optim=optim)
        return resolve_policy_config(config, world_size=1, hidden_size=16, device="cpu")["optimizer"]

    assert optimizer("adamw_torch")["params"]["torch_adam"] is True
    assert "torch_adam" not in optimizer("deepspeed_cpu_adam")["params"]


@pytest.mark.parametrize(
    ("flags", "shown"),
    [
        ((), False),
        (("--debug",), True),
        (("--debug=true",), True),
        (("--debug", "false"), False),
        (("--config", "debug.yaml"), True),
    ],
    ids=str,
)
def test_debug_shows_the_traceback(flags: tuple[str, ...], shown: bool, tmp_path: Path) -> None:
    (tmp_path / "debug.yaml").write_text("debug: true\n")
    # A model without data is refused before torch is imported.
    command = [sys.executable, str(TRAIN), "--method", "dpo", "--model_name_or_path", "x", *flags]
    done = subprocess.run(
        command, env=environment(), capture_output=True, text=True, cwd=tmp_path, timeout=60
    )
    assert done.returncode == 2
    assert "ConfigError: dataset_path is missing" in done.stderr
    assert ("Traceback" in done.stderr) is shown
