"""The envelope of a checkpoint with real files: what counts as whole, what is chosen, what is kept."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

from ds_align import DPOConfig, KTOConfig, checkpoint, same_run
from ds_align.config.cli import parse_command_line
from ds_align.data import load_preferences
from ds_align.errors import CheckpointError, ConfigError
from ds_align.records import RunRecords, check_output_dir
from tests.distributed.tiny import pairs, unpaired


def write_files(partial: Path, step: int) -> None:
    state = {"format": checkpoint.FORMAT, "global_step": step}
    (partial / checkpoint.RUN_STATE).write_text(json.dumps(state))
    (partial / "deepspeed").mkdir()
    (partial / "deepspeed" / "shard.pt").write_bytes(bytes(range(256)) * (40 + step))


def save(folder: Path, step: int) -> Path:
    partial = checkpoint.begin(folder, step)
    write_files(partial, step)
    checkpoint.publish(partial, step)
    return folder / checkpoint.step_name(step)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run's checkpoints of steps 10, 20 and 30."""
    found = tmp_path / checkpoint.FOLDER
    for step in (10, 20, 30):
        save(found, step)
    return found


def truncate(path: Path) -> None:
    shard = path / "deepspeed" / "shard.pt"
    os.truncate(shard, shard.stat().st_size - 40)


def flip(path: Path, name: str = "deepspeed/shard.pt", place: int = 5000) -> None:
    content = bytearray((path / name).read_bytes())
    content[place] ^= 1
    (path / name).write_bytes(content)


def flip_manifest(path: Path) -> None:
    text = (path / "manifest.json").read_text()
    # One bit turns a digit of the step into another: still JSON.
    (path / "manifest.json").write_text(text.replace('"step": 30', '"step": 31'))
    assert '"step": 31' in (path / "manifest.json").read_text()


DAMAGES = {
    "truncated": (truncate, "shard.pt: has"),
    "flipped": (flip, "shard.pt: the content is not what was written"),
    "flipped state": (lambda path: flip(path, checkpoint.RUN_STATE, 3), "run_state.json: the content"),
    "removed": (lambda path: (path / "deepspeed" / "shard.pt").unlink(), "shard.pt: is not there"),
    "no manifest": (lambda path: (path / "manifest.json").unlink(), "manifest.json: there is no such file"),
    "flipped manifest": (flip_manifest, "manifest.json: damaged"),
    "half a manifest": (lambda path: os.truncate(path / "manifest.json", 60), "cannot be read (not JSON)"),
}


def test_the_newest_is_chosen(folder: Path, capsys: pytest.CaptureFixture) -> None:
    found = checkpoint.choose(folder.parent, "auto")
    assert (found.step, found.path) == (30, folder / "step-00000030")
    assert found.run_directory == folder.parent.absolute()
    assert (folder / "latest").read_text() == "step-00000030\n"
    assert capsys.readouterr().out == ""
    assert checkpoint.choose(folder.parent, None) is None


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_one_is_named_and_the_one_before_is_used(
    folder: Path, damage: str, capsys: pytest.CaptureFixture
) -> None:
    act, words = DAMAGES[damage]
    act(folder / "step-00000030")
    assert checkpoint.choose(folder.parent, "auto").step == 20
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("warning:")
    assert "going on from step-00000020" in line
    assert words in line
    with pytest.raises(CheckpointError, match=re.escape(words)):
        checkpoint.choose(folder.parent, str(folder / "step-00000030"))
    assert checkpoint.choose(folder.parent, str(folder / "step-00000010")).step == 10


def test_several_bad_ones_are_one_warning(folder: Path, capsys: pytest.CaptureFixture) -> None:
    (folder / "step-00000040").mkdir()
    flip(folder / "step-00000030")
    partial = checkpoint.begin(folder, 50)  # killed between the shards and the manifest
    write_files(partial, 50)
    assert checkpoint.choose(folder.parent, "auto").step == 20
    (line,) = capsys.readouterr().out.splitlines()
    for name in ("step-00000040", "step-00000030", ".tmp-step-00000050"):
        assert name in line, name


def test_nothing_whole_is_a_start_afresh(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert checkpoint.choose(tmp_path, "auto") is None
    assert capsys.readouterr().out == ""
    flip(save(tmp_path / checkpoint.FOLDER, 10))
    assert checkpoint.choose(tmp_path, "auto") is None
    assert "none is left" in capsys.readouterr().out


def test_latest_may_point_nowhere(folder: Path, capsys: pytest.CaptureFixture) -> None:
    (folder / "latest").write_text("step-00000099\n")
    assert checkpoint.choose(folder.parent, "auto").step == 30
    assert "'step-00000099', which is not there" in capsys.readouterr().out


def test_a_crash_while_writing_leaves_the_others(folder: Path) -> None:
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    write_files(checkpoint.begin(folder, 40), 40)
    assert {path: path.read_bytes() for path in before} == before
    # The next attempt at the same step starts from an empty directory.
    assert list(checkpoint.begin(folder, 40).iterdir()) == []


def test_a_step_that_is_written_again_replaces_the_old_one(folder: Path) -> None:
    flip(folder / "step-00000030")
    save(folder, 30)
    assert checkpoint.verify(folder / "step-00000030").step == 30
    assert (folder / "latest").read_text() == "step-00000030\n"


@pytest.mark.parametrize(
    ("step", "limit", "kept"),
    [
        (30, None, [30, 20, 10]),
        (30, 2, [30, 20]),
        (30, 1, [30]),
        (30, 9, [30, 20, 10]),
        # What is newer than the one just written is of a course that was left, or not whole.
        (20, None, [20, 10]),
        (20, 1, [20]),
    ],
)
def test_pruning(folder: Path, step: int, limit: int | None, kept: list[int]) -> None:
    write_files(checkpoint.begin(folder, 40), 40)
    (folder / "notes.txt").write_text("a file of the user")
    checkpoint.prune(folder, step, limit)
    assert [number for number, _ in checkpoint.list_steps(folder)] == kept
    assert sorted(path.name for path in folder.iterdir() if not path.name.startswith("step-")) == [
        "latest",
        "notes.txt",
    ]


def test_a_directory_that_cannot_be_written_is_a_checkpoint_error(tmp_path: Path) -> None:
    (tmp_path / checkpoint.FOLDER).write_text("a file where the directory should be")
    with pytest.raises(CheckpointError, match="cannot be written"):
        checkpoint.begin(tmp_path / checkpoint.FOLDER, 10)


def test_a_manifest_names_its_files_and_their_bytes(folder: Path) -> None:
    manifest = json.loads((folder / "step-00000010" / "manifest.json").read_text())
    assert manifest["world_size"] == 1
    assert manifest["files"]["deepspeed/shard.pt"]["size"] == 256 * 50
    assert set(manifest["files"]) == {"deepspeed/shard.pt", "run_state.json"}


FACTS = {"num_steps": 8, "train_data": "ab", "ds_config": {"train_batch_size": 6, "zero": {"stage": 3}}}


def state_of(config: DPOConfig, world_size: int = 2, **facts: object) -> dict:
    return {
        **same_run.settings_of(config, world_size),
        "facts": FACTS | facts,
        "global_step": 3,
        "versions": {"torch": "2"},
    }


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"learning_rate": 1e-6}, "learning_rate: 5e-07 -> 1e-06"),
        ({"beta": 0.2, "seed": 7}, "seed: 42 -> 7; beta: 0.1 -> 0.2"),
        ({"per_device_train_batch_size": 4}, "global_batch_size: 16 -> 8"),
        ({"max_length": 512}, "max_length: 1024 -> 512"),
    ],
)
def test_a_changed_setting_is_shown(changes: dict, words: str) -> None:
    state = state_of(DPOConfig())
    with pytest.raises(CheckpointError, match=re.escape(words)):
        same_run.check_settings(Path("x"), state, DPOConfig(**changes), 2)


@pytest.mark.parametrize(
    ("ranks", "settings", "batch"),
    [
        # 8 a rank on 2 ranks.
        (1, {}, {"gradient_accumulation_steps": 2}),
        (4, {}, {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}),
        (16, {}, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}),
        (1, {"per_device_train_batch_size": 16}, {}),
        (4, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}, {}),
    ],
)
def test_another_number_of_ranks_keeps_the_global_batch(ranks, settings, batch) -> None:
    config = DPOConfig(**settings)
    found, message = same_run.rescaled_batch(Path("x"), state_of(DPOConfig()), config, ranks)
    assert found == batch
    assert message.startswith(f"world_size: 2 -> {ranks}: ")
    assert message.endswith("the global batch stays 16")
    for name, value in found.items():
        setattr(config, name, value)
    assert config.per_device_train_batch_size * config.gradient_accumulation_steps * ranks == 16
    assert same_run.check_settings(Path("x"), state_of(DPOConfig()), config, ranks) == []


@pytest.mark.parametrize(
    ("ranks", "settings", "words"),
    [
        (3, {}, "the global batch was 16 and would be 24; give"),
        (1, {"per_device_train_batch_size": 4}, "the global batch was 16 and would be 4; give"),
        (
            1,
            {"optim": "sgd"},
            "a run with optim=sgd goes on with as many ranks as wrote it; continue it on 2",
        ),
        (1, {"sync_ref_model": True}, "a run with sync_ref_model goes on with"),
    ],
)
def test_ranks_that_cannot_share_the_global_batch_are_refused(ranks, settings, words) -> None:
    with pytest.raises(CheckpointError, match=words):
        same_run.rescaled_batch(Path("x"), state_of(DPOConfig()), DPOConfig(**settings), ranks)


def test_another_method_is_refused() -> None:
    state = state_of(DPOConfig())
    with pytest.raises(CheckpointError, match="method: 'dpo' -> 'kto'"):
        same_run.check_settings(Path("x"), state, KTOConfig(), 2)


def test_what_may_change() -> None:
    free = {"logging_steps": 1, "eval_steps": 5, "save_steps": 7, "output_dir": "y", "resume": "auto"}
    batch = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    state = state_of(DPOConfig())
    assert same_run.check_settings(Path("x"), state, DPOConfig(**free, **batch), 2) == []
    (message,) = same_run.check_settings(Path("x"), state, DPOConfig(pack_max_tokens=64), 2)
    assert "pack_max_tokens: 'auto' -> 64" in message
    assert same_run.changed_versions(state, {"torch": "2"}) == []
    assert "torch: '2' -> '3'" in same_run.changed_versions(state, {"torch": "3"})[0]


def test_a_changed_fact_is_shown() -> None:
    state = state_of(DPOConfig())
    same = {**FACTS, "ds_config": {"train_batch_size": 12, "zero": {"stage": 3}}}
    assert same_run.check_facts(Path("x"), state, same, DPOConfig()) == []
    other = {**FACTS, "train_data": "cd", "ds_config": {"zero": {"stage": 2}}}
    with pytest.raises(
        CheckpointError,
        match=re.escape(
            "the training data are other rows, or the same ones tokenized in another way; "
            "ds_config.zero.stage: 3 -> 2"
        ),
    ):
        same_run.check_facts(Path("x"), state, other, DPOConfig())


def test_the_number_of_steps_may_change_under_a_constant_rate_alone() -> None:
    longer, constant = {**FACTS, "num_steps": 12}, DPOConfig(lr_scheduler_type="constant")
    state = state_of(DPOConfig())
    with pytest.raises(CheckpointError, match="num_steps: 8 -> 12"):
        same_run.check_facts(Path("x"), state, longer, DPOConfig())
    assert "num_steps: 8 -> 12" in same_run.check_facts(Path("x"), state, longer, constant)[0]
    with pytest.raises(CheckpointError, match="the checkpoint is at step 3"):
        same_run.check_facts(Path("x"), state, {**FACTS, "num_steps": 2}, constant)
    rising = DPOConfig(lr_scheduler_type="constant", warmup_ratio=0.1)
    with pytest.raises(CheckpointError, match="num_steps: 8 -> 12"):
        same_run.check_facts(Path("x"), state, longer, rising)


def digest(rows: list[dict], inputs: str, config: DPOConfig | KTOConfig) -> str:
    return load_preferences(rows, tokenizer=None, inputs=inputs, config=config).digest()


def test_the_digest_of_the_data_sees_every_token_label_and_order() -> None:
    rows = pairs(6)
    usual = digest(rows, "pairs", DPOConfig())
    assert usual == digest(pairs(6), "pairs", DPOConfig())
    assert usual != digest(rows[::-1], "pairs", DPOConfig())
    assert usual != digest(rows[:5], "pairs", DPOConfig())
    for key in ("prompt_ids", "chosen_ids", "rejected_ids"):
        changed = [*rows[:4], rows[4] | {key: [*rows[4][key][:-1], 97]}, rows[5]]
        assert usual != digest(changed, "pairs", DPOConfig()), key
    singles = unpaired(6)
    flipped = [singles[0] | {"label": not singles[0]["label"]}, *singles[1:]]
    assert digest(singles, "unpaired", KTOConfig()) != digest(flipped, "unpaired", KTOConfig())
    whole = load_preferences(rows, tokenizer=None, inputs="pairs", config=DPOConfig())
    assert whole.select(np.array([0, 1, 2])).digest() != whole.select(np.array([0, 2, 1])).digest()


@pytest.mark.parametrize(
    ("flags", "value"),
    [
        (("--resume",), "auto"),
        (("--resume", "--seed", "3"), "auto"),
        (("--resume_from_checkpoint",), "auto"),
        (("--resume", "auto"), "auto"),
        (("--resume", "none"), None),
        (("--resume=out/checkpoints/step-00000010",), "out/checkpoints/step-00000010"),
        ((), None),
    ],
)
def test_the_flag_alone_means_auto(flags: tuple[str, ...], value: str | None) -> None:
    assert parse_command_line(["--method", "dpo", *flags]).resume == value


def test_an_output_dir_with_checkpoints_is_protected(folder: Path) -> None:
    output_dir = folder.parent
    with pytest.raises(ConfigError, match="3 checkpoints"):
        check_output_dir(output_dir, DPOConfig())
    check_output_dir(output_dir, DPOConfig(overwrite_output_dir=True))
    check_output_dir(output_dir, DPOConfig(resume="auto"), checkpoint.choose(output_dir, "auto"))
    other = save(output_dir / "other" / checkpoint.FOLDER, 10)
    with pytest.raises(ConfigError, match="already holds a run"):
        check_output_dir(output_dir, DPOConfig(resume=str(other)), checkpoint.verify(other))


def test_a_finished_run_without_checkpoints_is_not_started_again(tmp_path: Path) -> None:
    config = DPOConfig(resume="auto")
    records = RunRecords.open(tmp_path, config)
    records.log(1, 0.1, {"loss": 1.0})
    # Killed before its first checkpoint: the same command starts afresh.
    check_output_dir(tmp_path, config)
    records.finish("completed", {})
    with pytest.raises(ConfigError, match="completed, without a whole checkpoint"):
        check_output_dir(tmp_path, config)


OWN_LOSS = """
from ds_align import method
from ds_align.losses import LossOutput, PairedLogps


@method
def resumed_loss(logps: PairedLogps) -> LossOutput:
    gap = logps.policy_chosen.total - logps.policy_rejected.total
    return LossOutput({factor} * gap, gap.detach(), gap.detach())
"""


def test_an_own_loss_whose_code_has_changed_is_shown(tmp_path: Path) -> None:
    from ds_align.config import METHODS
    from ds_align.config.custom import find_method

    def settings_with(factor: str, comment: str = "") -> tuple[dict, object]:
        (tmp_path / "own.py").write_text(OWN_LOSS.format(factor=factor) + comment)
        name = find_method(f"{tmp_path / 'own.py'}:resumed_loss")
        config = METHODS[name].config()
        return state_of(config), config

    before = dict(METHODS)
    try:
        state, _ = settings_with("-1.0")
        _, same = settings_with("-1.0", "# a comment\n")
        assert same_run.check_settings(Path("x"), state, same, 2) == []
        _, other = settings_with("-2.0")
        with pytest.raises(CheckpointError, match="the code beside the loss .* has changed"):
            same_run.check_settings(Path("x"), state, other, 2)
    finally:
        METHODS.clear()
        METHODS.update(before)
