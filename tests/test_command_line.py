"""Every mistake of a user is one line with the thing, the expectation and the remedy, and an exit code.

Most mistakes are made in one process of the real command's main(), which costs one start of torch; the
launcher's own exit code is tested with real two-rank launches.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.distributed import tiny
from tests.distributed.launching import ROOT, TRAIN, Result, environment, launch

# Reads a JSON list of [arguments, source, target] and prints how each command ended; before a command its
# source is copied to its target, where they are given.
SEVERAL = """
import contextlib, importlib.util, io, json, shutil, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("train", sys.argv[1])
train = importlib.util.module_from_spec(spec)
spec.loader.exec_module(train)
results = []
for arguments, source, target in json.load(sys.stdin):
    if target:
        shutil.copy(source, target)
    sys.argv = ["launch/train.py", *arguments]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(out):
        code = train.run_command(train.main, debug=train.wants_debug(sys.argv[1:]))
    output = arguments[arguments.index("--output_dir") + 1] if "--output_dir" in arguments else ""
    record = Path(output or "nowhere", "run_summary.json")
    summary = json.loads(record.read_text()) if record.is_file() else {}
    built = any(name.endswith("modeling_qwen2") for name in sys.modules)
    torch = "torch" in sys.modules
    ending = {"code": code, "out": out.getvalue(), "err": err.getvalue(), "summary": summary}
    results.append(ending | {"built": built, "torch": torch})
print("RESULTS" + json.dumps(results))
"""


@dataclass(frozen=True)
class Mistake:
    """Flags beside the good ones (None takes a flag away), the exit code, and what the one line must say.

    stage: "settings" is found before torch is imported, "setup" before a model is built, "weights" as it
    loads.
    """

    flags: dict[str, str | None]
    code: int
    says: tuple[str, ...]
    stage: str = "setup"


def setting(flags: dict[str, str | None], *says: str) -> Mistake:
    return Mistake(flags, 2, says, "settings")


def data(name: str, *says: str) -> Mistake:
    return Mistake({"dataset_path": name}, 3, (name, *says))


def model(name: str, *says: str) -> Mistake:
    return Mistake({"model_name_or_path": name}, 2, (name, *says))


def ds(name: str, *says: str, **flags: str) -> Mistake:
    return Mistake({"ds_config": name, **flags}, 2, (name, *says))


# Values of flags that name a file of `place` are turned into its path; see `command`.
MISTAKES = {
    "unknown flag": setting({"max_step": "3"}, "--max_step", "did you mean max_steps"),
    "flag of another method": setting({"gamma_beta_ratio": "1"}, "a setting of simpo, not of dpo"),
    "value of the wrong type": setting({"learning_rate": "fast"}, "learning_rate='fast'", "a number >= 0"),
    "value out of range": setting({"beta": "-1"}, "beta=-1.0", "a number > 0"),
    "value that is no choice": setting({"optim": "adam"}, "optim='adam'", "adamw_torch"),
    "no step": setting({"max_steps": "0"}, "max_steps=0", "an integer >= 1"),
    "no room": setting({"max_length": "1"}, "max_length=1", "an integer >= 2"),
    "unknown method": setting({"method": "dpoo"}, "'dpoo'", "did you mean dpo?"),
    "no method": setting({"method": None}, "no method", "--method"),
    "no model": setting({"model_name_or_path": None}, "model_name_or_path is missing", "demonstration"),
    "no data": setting({"dataset_path": None}, "dataset_path is missing", "demonstration"),
    "empty path": setting({"output_dir": ""}, "output_dir=''", "not empty"),
    "missing YAML": setting({"config": "missing.yaml"}, "missing.yaml", "cannot be read"),
    "broken YAML": setting({"config": "broken.yaml"}, "broken.yaml:3", "not valid YAML"),
    "unknown YAML key": setting({"config": "unknown.yaml"}, "unknown.yaml:2", "did you mean beta?"),
    "missing data": data("missing.jsonl", "no such file", "check the path"),
    "empty data": data("empty.jsonl", "the file is empty", "expected one JSON object"),
    "empty list": data("empty.json", "is empty", "at least one preference"),
    "blank lines": data("blank.jsonl", "is empty", "at least one preference"),
    "wrong column": data("chosne.jsonl", "'chosen' is missing", "the nearest is 'chosne'"),
    "bad JSON line": data("badline.jsonl", "badline.jsonl:4:12", "malformed JSON"),
    "null": data("null.jsonl", "null.jsonl:4", "column 'chosen' is null"),
    "no prompt": data("noprompt.jsonl", "noprompt.jsonl:4", "prompt has no token", "at least one character"),
    "unpaired": data("unpaired.jsonl", "unpaired", "method kto"),
    "other ending": data("notes.txt", "'.txt' is not read", ".jsonl"),
    "another tokenizer's ids": data("ids.jsonl", "ids.jsonl:1", "5000", "vocabulary of 97"),
    "missing evaluation data": Mistake(
        {"eval_dataset_path": "gone.jsonl"}, 3, ("gone.jsonl", "no such file")
    ),
    "nothing left to train on": Mistake(
        {"eval_fraction": "0.99"}, 3, ("eval_fraction=0.99", "give more data")
    ),
    "missing model": model("nowhere", "no such directory"),
    "a file as model": model("good.jsonl", "a file, not a directory"),
    "no config": model("no-config", "no config.json"),
    "broken config": model("broken-config", "not a valid JSON file"),
    "wrong type in config": model("odd-config", "hidden_size", "expected int"),
    "no weights": model("no-weights", "no weights", "model.safetensors"),
    "truncated weights": model("truncated", "model.safetensors", "not a whole", "download it again"),
    "missing shard": model("missing-shard", "1 of 2 shards are missing", "second.safetensors"),
    "broken index": model("broken-index", "index.json", "not an index", "copy it again"),
    "no tokenizer": model("no-tokenizer", "no tokenizer in it", "--tokenizer_name"),
    "tokenizer too large": model("small-vocabulary", "knows 97 tokens", "embeds 64"),
    "missing tokenizer": Mistake({"tokenizer_name": "./gone"}, 2, ("./gone", "no such directory")),
    "other vocabulary": Mistake({"ref_model_name": "reference"}, 2, ("ref_model_name", "128", "112")),
    "weightless reference": Mistake({"ref_model_name": "no-weights"}, 2, ("ref_model_name=", "no weights")),
    "missing DeepSpeed JSON": ds("gone.json", "no such file", "zero3"),
    "broken DeepSpeed JSON": ds("broken.json", "broken.json:1", "not valid JSON"),
    "other batch": ds("batch.json", "train_micro_batch_size_per_gpu=99", "per_device_train_batch_size=2"),
    "other precision": ds("bf16.json", "bf16.enabled=true", "dtype=float32", dtype="float32"),
    "unknown top-level key": ds("key.json", "'zero_optimisation'", "did you mean zero_optimization?"),
    "unknown stage": ds("stage.json", "zero_optimization.stage=5", "expected 0, 1, 2 or 3"),
    "null section": ds("null.json", "zero_optimization=null", "expected an object"),
    "value that DeepSpeed refuses": ds("device.json", "offload_param.device", "'none', 'cpu' or 'nvme'"),
    "unknown accumulation type": ds("types.json", "grad_accum_dtype", "fp32, bf16 or fp16"),
    "missing reference JSON": Mistake({"ref_ds_config": "gone.json"}, 2, ("ref_ds_config", "no such file")),
    "output is a file": Mistake({"output_dir": "good.jsonl"}, 4, ("output_dir", "is not a directory")),
    "output below a file": Mistake({"output_dir": "good.jsonl/x"}, 4, ("output_dir", "is not a directory")),
    "output is the model": Mistake({"output_dir": "model/."}, 2, ("directory of model_name_or_path",)),
    "output is the reference": Mistake(
        {"output_dir": "twin", "ref_model_name": "twin"}, 2, ("directory of ref_model_name",)
    ),
    "output holds a run": Mistake(
        {"output_dir": "run"}, 2, ("already holds a run", "--overwrite_output_dir")
    ),
    "dry run into a file": Mistake(
        {"output_dir": "good.jsonl", "dry_run": "true"}, 4, ("is not a directory",)
    ),
    "weights of other layers": Mistake(
        {"model_name_or_path": "more-layers"}, 2, ("12 weights of the model are not in its files",), "weights"
    ),
    "weights of another width": Mistake(
        {"model_name_or_path": "wide"}, 2, ("do not fit config.json", "size mismatch"), "weights"
    ),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a good model, good data, and everything that is wrong with others."""
    folder = tmp_path_factory.mktemp("place")
    tiny.write_model(folder / "model")
    tiny.write_model(folder / "reference", vocab_size=128)
    _write_bad_models(folder)
    rows = tiny.text_pairs(3)
    tiny.write_jsonl(folder / "good.jsonl", rows)
    good = (folder / "good.jsonl").read_text()
    tiny.write_jsonl(folder / "one.jsonl", rows[:1])
    renamed = [{key.replace("chosen", "chosne"): value for key, value in row.items()} for row in rows]
    tiny.write_jsonl(folder / "chosne.jsonl", renamed)
    tiny.write_jsonl(folder / "null.jsonl", [*rows, {**rows[0], "chosen": None}])
    tiny.write_jsonl(folder / "noprompt.jsonl", [*rows, {**rows[0], "prompt": ""}])
    tiny.write_jsonl(folder / "unpaired.jsonl", [{"prompt": "a", "completion": "b", "label": True}] * 3)
    ids = {"prompt_ids": [3], "chosen_ids": [5000], "rejected_ids": [4]}
    tiny.write_jsonl(folder / "ids.jsonl", [ids] * 3)
    zero3 = {"zero_optimization": {"stage": 3}}
    texts = {
        "empty.jsonl": "",
        "empty.json": "[]",
        "blank.jsonl": "\n\n  \n",
        "badline.jsonl": good + '{"prompt": ,}\n',
        "notes.txt": "words",
        "broken.yaml": "method: dpo\nbeta: [1,\n",
        "unknown.yaml": "method: dpo\nbetta: 1\n",
        "debug.yaml": "debug: true\n",
        "broken.json": '{"zero_optimization": {"stage": 3},}',
        "batch.json": json.dumps(zero3 | {"train_micro_batch_size_per_gpu": 99}),
        "bf16.json": json.dumps(zero3 | {"bf16": {"enabled": True}}),
        "key.json": json.dumps({"zero_optimisation": {"stage": 3}}),
        "stage.json": json.dumps({"zero_optimization": {"stage": 5}}),
        "null.json": json.dumps({"zero_optimization": None}),
        "device.json": json.dumps({"zero_optimization": {"stage": 3, "offload_param": {"device": "disk"}}}),
        "types.json": json.dumps(zero3 | {"data_types": {"grad_accum_dtype": "fp99"}}),
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    (folder / "run").mkdir()
    (folder / "run" / "metrics.jsonl").write_text('{"step": 1}\n')
    return folder


def _write_bad_models(folder: Path) -> None:
    def copy(name: str, **settings: object) -> Path:
        target = shutil.copytree(folder / "model", folder / name)
        if settings:
            values = json.loads((target / "config.json").read_text()) | settings
            (target / "config.json").write_text(json.dumps(values))
        return target

    copy("twin")
    (copy("no-config") / "config.json").unlink()
    (copy("broken-config") / "config.json").write_text('{"model_type": ')
    copy("odd-config", hidden_size="wide")
    (copy("no-weights") / "model.safetensors").unlink()
    weights = copy("truncated") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    index = copy("missing-shard")
    (index / "model.safetensors").rename(index / "first.safetensors")
    shards = {"weight_map": {"a": "first.safetensors", "b": "second.safetensors"}}
    (index / "model.safetensors.index.json").write_text(json.dumps(shards))
    broken = copy("broken-index")
    (broken / "model.safetensors").unlink()
    (broken / "model.safetensors.index.json").write_text('{"weight_map"')
    for file in copy("no-tokenizer").glob("tokenizer*"):
        file.unlink()
    copy("small-vocabulary", vocab_size=64)
    copy("more-layers", num_hidden_layers=3, layer_types=["full_attention"] * 3)
    copy("wide", hidden_size=64)


def command(place: Path, output: str, flags: dict[str, str | None]) -> list[str]:
    """The arguments of a small good run with `flags` over them; names inside `place` become paths."""
    values: dict[str, str | None] = {
        "method": "dpo",
        "ds_config": "zero3",
        "model_name_or_path": "model",
        "dataset_path": "good.jsonl",
        "output_dir": output,
        "max_steps": "1",
        "per_device_train_batch_size": "2",
        **flags,
    }
    paths = (
        "model_name_or_path",
        "ref_model_name",
        "dataset_path",
        "eval_dataset_path",
        "output_dir",
        "ref_cache_dir",
        "config",
    )
    arguments = []
    for name, value in values.items():
        is_path = name in paths or (value or "").endswith(".json")
        if value is not None:
            arguments += [f"--{name}", str(place / value) if is_path and value else value]
    return arguments


def run_several(commands: list[tuple[list[str], Path | None, Path | None]]) -> list[dict]:
    """Runs commands one after the other in one process; before each, a file may be copied."""
    finished = subprocess.run(
        [sys.executable, "-c", SEVERAL, str(TRAIN)],
        input=json.dumps([[arguments, str(a or ""), str(b or "")] for arguments, a, b in commands]),
        env=environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    return json.loads(finished.stdout.split("RESULTS")[-1])


def error_lines(text: str) -> list[str]:
    """The lines that report an error of ours."""
    kinds = ("ConfigError: ", "DataError: ", "CheckpointError: ", "NonFiniteError: ")
    return [line for line in text.splitlines() if line.startswith(kinds)]


@pytest.fixture(scope="module")
def endings(place: Path) -> dict[str, dict]:
    """How each of MISTAKES ended, and after them a dry run without a mistake."""
    commands = [
        (command(place, f"out-{number}", mistake.flags), None, None)
        for number, mistake in enumerate(MISTAKES.values())
    ]
    commands.append((command(place, "out-dry", {"dry_run": "true"}), None, None))
    return dict(zip([*MISTAKES, "dry run"], run_several(commands), strict=True))


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(name: str, endings: dict[str, dict]) -> None:
    mistake, ending = MISTAKES[name], endings[name]
    assert ending["code"] == mistake.code, ending["err"]
    lines = [line for line in ending["err"].splitlines() if line.strip()]
    assert lines == error_lines(ending["err"])
    assert len(lines) == 1
    kind = {2: "ConfigError: ", 3: "DataError: ", 4: "CheckpointError: "}[mistake.code]
    assert lines[0].startswith(kind)
    for part in mistake.says:
        assert part in lines[0]
    assert ending["torch"] == (mistake.stage != "settings")
    if mistake.stage != "weights":
        assert not ending["built"], (
            "the model's code was imported, so the error came after its building began"
        )


def test_a_dry_run_shows_the_plan_and_writes_nothing(place: Path, endings: dict[str, dict]) -> None:
    ending = endings["dry run"]
    assert ending["code"] == 0, ending["err"]
    assert not (place / "out-dry").exists()
    assert "3 training rows, 1 steps of 2 preferences on 1 rank(s)" in ending["out"]
    assert "first step: 2 preferences" in ending["out"]
    # A preference as it reaches the model, with the EOS that it is scored up to.
    assert "chosen_ids: 'yes" in ending["out"]
    assert "<eos>'" in ending["out"]


def test_a_failed_run_can_be_mended_and_a_finished_one_is_kept(place: Path) -> None:
    again = command(place, "life", {"dataset_path": "late.jsonl"})
    gone = command(place, "life", {"dataset_path": "missing.jsonl"})
    failed, mended, refused, replaced = run_several(
        [
            (again, None, None),
            (again, place / "good.jsonl", place / "late.jsonl"),
            (again, None, None),
            ([*gone, "--overwrite_output_dir"], None, None),
        ]
    )
    assert failed["code"] == 3
    assert failed["summary"]["status"] == "failed"
    assert "late.jsonl: no such file" in failed["summary"]["error"]
    assert mended["code"] == 0, mended["err"]
    assert mended["summary"]["status"] == "completed"
    assert (mended["summary"]["global_step"], mended["summary"]["method"]) == (1, "dpo")
    assert refused["code"] == 2
    assert "already holds a run" in refused["err"]
    assert refused["summary"] == mended["summary"]
    # With the flag the directory is taken, and what stops the run is the next mistake.
    assert replaced["code"] == 3
    assert replaced["summary"]["status"] == "failed"


@pytest.mark.parametrize(
    ("flags", "shown"),
    [
        ([], False),
        (["--debug"], True),
        (["--debug=true"], True),
        (["--debug", "false"], False),
        (["--config", "debug.yaml"], True),
    ],
)
def test_debug_adds_the_traceback(place: Path, flags: list[str], *, shown: bool) -> None:
    arguments = [str(place / text) if text.endswith(".yaml") else text for text in flags]
    result = subprocess.run(
        [sys.executable, str(TRAIN), "--method", "dpoo", *arguments],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 2
    assert ("Traceback" in result.stderr) == shown
    # A traceback ends with the error too; its last line is under the package's full name.
    assert len(error_lines(result.stderr)) == 1


@dataclass(frozen=True)
class Launch:
    """Flags of a two-rank launch, the exit code of the deepspeed command, and what its one line must say."""

    flags: dict[str, str | None]
    code: int
    says: tuple[str, ...]
    debug: bool = False


@pytest.mark.distributed
@pytest.mark.parametrize(
    "case",
    [
        Launch({"dataset_path": "missing.jsonl"}, 3, ("missing.jsonl", "no such file"), debug=True),
        Launch({"dataset_path": "one.jsonl"}, 3, ("1 usable rows for 2 ranks", "start fewer processes")),
        Launch({"ds_config": "batch.json"}, 2, ("train_micro_batch_size_per_gpu=99", "set 2")),
    ],
    ids=["missing data", "fewer rows than ranks", "other batch"],
)
def test_the_launcher_ends_with_the_code_and_one_line(place: Path, case: Launch) -> None:
    extra = ["--debug"] if case.debug else []
    result: Result = launch(TRAIN, *command(place, f"launch-{case.code}", case.flags), *extra)
    assert result.code == case.code, result.output[-4000:]
    lines = error_lines(result.output)
    assert len(lines) == 1
    for part in case.says:
        assert part in lines[0]
    assert ("Traceback" in result.output) == case.debug
