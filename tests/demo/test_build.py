"""The built demonstration: neutral at the start, whole, and reused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ds_align.config import METHODS
from ds_align.data import load_preferences
from ds_align.demo import build, demo_overrides
from ds_align.demo.__main__ import main
from ds_align.demo.build import NEUTRAL_ACCURACY
from ds_align.demo.data import preference_rows
from ds_align.demo.model import policy_accuracy, tokenize

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tokenizer(demo):
    return AutoTokenizer.from_pretrained(demo.model)


@pytest.fixture(scope="module")
def model(demo):
    return AutoModelForCausalLM.from_pretrained(demo.model, dtype=torch.float32).eval()


def test_start_prefers_neither_answer(demo, model, tokenizer):
    accuracy = policy_accuracy(model, tokenizer, preference_rows("heldout"))
    assert NEUTRAL_ACCURACY[0] <= accuracy <= NEUTRAL_ACCURACY[1]
    assert accuracy == pytest.approx(demo.accuracy, abs=1 / 256)


def test_start_is_fluent(model, tokenizer):
    # A uniform guess costs ln(vocabulary size) > 6 nats a token; the model pays less than one.
    rows = preference_rows("train")[:64]
    losses = []
    for row in rows:
        for side in ("chosen", "rejected"):
            text = tokenize(tokenizer, row, side)
            ids = torch.tensor([text.ids])
            with torch.no_grad():
                logps = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            losses.append(-logps.gather(1, ids[0, 1:, None])[text.start - 1 :].mean())
    assert torch.stack(losses).mean() < 1.0


def test_model_is_a_small_tied_qwen2_in_safetensors(demo, model, tokenizer):
    assert model.config.model_type == "qwen2"
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    assert sum(parameter.numel() for parameter in model.parameters()) < 1_000_000
    assert (demo.model / "model.safetensors").is_file()
    assert model.config.eos_token_id == tokenizer.eos_token_id != tokenizer.pad_token_id


@pytest.mark.parametrize(
    "text", ["What is 42 + 7?\n", "ما لون السماء؟\n", "مُدُنٌ ـ‌ـ\u200d naïve 你好 🙂\t\r\n  x"]
)
def test_tokenizer_round_trips_any_text(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_token_id not in ids


def test_pipeline_reads_the_rows_as_the_model_learned_them(demo, tokenizer):
    config = METHODS["dpo"].config(dataset_path=str(demo.heldout))
    dataset = load_preferences(str(demo.heldout), tokenizer=tokenizer, inputs="pairs", config=config)
    rows = preference_rows("heldout")
    assert len(dataset) == len(rows)
    for index in (0, 1, 100, 255):
        chosen, rejected = (tokenize(tokenizer, rows[index], side) for side in ("chosen", "rejected"))
        pair = dataset[index]
        assert (*pair.prompt_ids, *pair.chosen_ids) == chosen.ids
        assert (*pair.prompt_ids, *pair.rejected_ids) == rejected.ids
        assert len(pair.prompt_ids) == chosen.start == rejected.start


def test_second_build_reuses_the_first(demo):
    stamps = {path: path.stat().st_mtime_ns for path in demo.directory.rglob("*")}
    assert build(demo.directory) == demo
    assert {path: path.stat().st_mtime_ns for path in demo.directory.rglob("*")} == stamps


def test_two_processes_make_a_stale_directory_anew_once(demo, tmp_path):
    directory = tmp_path / "demo"
    shutil.copytree(demo.directory, directory)
    (directory / "manifest.json").write_text('{"version": "older", "policy_accuracy": 0.5}', encoding="utf-8")
    (directory / "train.jsonl").write_text("stale", encoding="utf-8")
    command = [sys.executable, "-m", "ds_align.demo", "build", "--directory", str(directory)]
    other = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    random_state = torch.get_rng_state()
    built = build(directory)
    assert torch.equal(torch.get_rng_state(), random_state)
    printed, messages = other.communicate(timeout=300)
    assert other.returncode == 0, messages
    assert "held-out policy_accuracy" in printed
    assert NEUTRAL_ACCURACY[0] <= built.accuracy <= NEUTRAL_ACCURACY[1]
    assert built.train.read_bytes() == demo.train.read_bytes()
    # Only the lock file stays beside it: no scratch directory of either process.
    assert {path.name for path in tmp_path.iterdir()} == {"demo", ".demo.lock"}


def test_foreign_directory_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("keep", encoding="utf-8")
    with pytest.raises(FileExistsError, match="holds other files"):
        build(tmp_path)
    assert (tmp_path / "mine.txt").read_text(encoding="utf-8") == "keep"


@pytest.mark.parametrize("method", sorted(METHODS))
def test_overrides_are_settings_of_every_method(method):
    config = METHODS[method].config(**demo_overrides(method))
    assert config.eval_on_start
    assert config.learning_rate == demo_overrides(method)["learning_rate"]
    likelihood_weight = {"dpo": "rpo_alpha", "cpo": "cpo_alpha", "simpo": "sft_weight"}.get(method)
    assert likelihood_weight is None or getattr(config, likelihood_weight) > 0


def test_report_end_to_end(demo, tmp_path, capsys):
    rows = [
        {"step": 0, "eval_loss": 0.69, "eval_policy_accuracy": 0.5, "eval_margin": 0.0},
        {"step": 2, "eval_loss": 0.60, "eval_policy_accuracy": 0.7, "eval_margin": 0.4},
    ]
    shutil.copytree(demo.model, tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    summary = {"status": "completed", "world_size": 2, "zero_stage": 3}
    (tmp_path / "run" / "run_summary.json").write_text(json.dumps(summary), encoding="utf-8")
    command = [
        "report",
        "--directory",
        str(demo.directory),
        "--output_dir",
        str(tmp_path / "run"),
        "--seconds",
        "9",
    ]
    assert main([*command, "--num_answers", "2", "--require_accuracy", "0.7"]) == 0
    assert main([*command, "--num_answers", "2", "--require_accuracy", "0.9"]) == 1
    result = json.loads((tmp_path / "run" / "result.json").read_text(encoding="utf-8"))
    assert result["accuracy_after"] == 0.7
    assert set(result) == {
        "accuracy_before", "accuracy_after", "margin_before", "margin_after",
        "loss_before", "loss_after", "world_size", "zero_stage", "seconds",
    }  # fmt: skip
    assert (tmp_path / "run" / "curves.png").is_file()
    assert capsys.readouterr().out.count("question") >= 4
