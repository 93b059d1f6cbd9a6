"""Trains tiny models under many settings in one process and writes down all that a setting could change.

usage: flags_program.py WORK_DIRECTORY CASES.json RESULTS.json
CASES: [{"key", "method", "settings"}]; RESULTS: key to the parts of fingerprint(), {"error": "Class: text"}
or {"crash": traceback}.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import io
import json
import shutil
import sys
import traceback
from pathlib import Path
from unittest import mock

import torch

from ds_align.batch import Unpaired
from ds_align.config import METHODS
from ds_align.errors import DsAlignError
from ds_align.trainer import Trainer
from ds_align.watchdog import Watchdog
from tests.distributed import tiny
from tests.flags_rows import write_rows

SIZES = {"hidden_size": 16, "intermediate_size": 24}
NUM_ROWS = 12
REMOTE_CODE = """
from transformers import Qwen2Config, Qwen2ForCausalLM


class RemoteConfig(Qwen2Config):
    model_type = "tiny_remote"


class RemoteModel(Qwen2ForCausalLM):
    config_class = RemoteConfig
"""


HUB_README = """---
configs:
- config_name: many
  data_files: many/*.jsonl
- config_name: few
  data_files: few/*.jsonl
---
"""


def write_models(work: Path) -> None:
    """policy, reference, other (weights), wide, experts, dropout, swapped (tokenizer), remote (code)."""
    for seed, name in enumerate(("policy", "reference", "other")):
        tiny.write_model(work / name, seed=seed, **SIZES)
    tiny.write_model(work / "wide", **(SIZES | {"intermediate_size": 32}))
    tiny.write_model(work / "experts", kind="qwen3_moe", **SIZES)
    for name in ("dropout", "swapped", "remote"):
        shutil.copytree(work / "policy", work / name)
    edit_json(work / "dropout" / "config.json", attention_dropout=0.5)
    tokenizer = json.loads((work / "swapped" / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["y"], vocabulary["n"] = vocabulary["n"], vocabulary["y"]
    edit_json(work / "swapped" / "tokenizer.json", model=tokenizer["model"])
    classes = {"AutoConfig": "remote.RemoteConfig", "AutoModelForCausalLM": "remote.RemoteModel"}
    edit_json(work / "remote" / "config.json", model_type="tiny_remote", auto_map=classes)
    (work / "remote" / "remote.py").write_text(REMOTE_CODE)


def write_classifier(directory: Path) -> None:
    """Of texts, with random weights and the policy's tokenizer; knows Egyptian and the standard language."""
    from transformers import Qwen2Config, Qwen2ForSequenceClassification

    torch.manual_seed(5)
    shape = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, **SIZES}
    names = {"id2label": {0: "egy", 1: "msa"}, "label2id": {"egy": 0, "msa": 1}}
    config = Qwen2Config(vocab_size=tiny.VOCABULARY, initializer_range=1.0, pad_token_id=0, **shape, **names)
    Qwen2ForSequenceClassification(config).save_pretrained(directory)
    tiny.write_tokenizer(directory)


def edit_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def write_data(work: Path) -> None:
    pairs = tiny.text_pairs(NUM_ROWS)
    singles = [
        {
            "prompt": row["prompt"],
            "completion": row["chosen" if number % 3 else "rejected"],
            "label": number % 3 > 0,
        }
        for number, row in enumerate(pairs)
    ]
    tiny.write_jsonl(work / "pairs.jsonl", pairs)
    tiny.write_jsonl(work / "unpaired.jsonl", singles)
    tiny.write_jsonl(work / "heldout.jsonl", tiny.text_pairs(5))
    tiny.write_jsonl(work / "bad.jsonl", [*pairs, {"prompt": "a row without answers"}])
    doubled = [row | {"chosen": f"yes <eos> {row['chosen']}"} for row in pairs]
    tiny.write_jsonl(work / "several_eos.jsonl", doubled)
    for field in ("prompt", "chosen", "rejected"):
        tiny.write_jsonl(work / f"renamed_{field}.jsonl", [rename(row, field) for row in pairs])
    for field in ("completion", "label"):
        tiny.write_jsonl(work / f"renamed_{field}.jsonl", [rename(row, field) for row in singles])
    chats = [{name: as_messages(name, text) for name, text in row.items()} for row in pairs]
    tiny.write_jsonl(work / "chats.jsonl", chats)
    write_rows(work, pairs, chats)
    ranked = [row | {"prompt": pairs[number % 3]["prompt"]} for number, row in enumerate(pairs)]
    tiny.write_jsonl(work / "ranked.jsonl", ranked)
    near = pairs[1] | {"chosen": pairs[1]["chosen"].upper()}
    turned = pairs[2] | {"chosen": pairs[2]["rejected"], "rejected": pairs[2]["chosen"]}
    tiny.write_jsonl(work / "repeated.jsonl", [*pairs, pairs[0], near, turned])
    tiny.write_jsonl(work / "dialects.jsonl", [row | spoken(number) for number, row in enumerate(pairs)])
    # More rows than one process takes at a time.
    tiny.write_jsonl(work / "many.jsonl", tiny.text_pairs(1100))
    (work / "split.json").write_text(json.dumps({"train": pairs, "validation": tiny.text_pairs(5)}))
    for name, rows in (("many", pairs), ("few", pairs[:4])):
        (work / "copied_hub" / name).mkdir(parents=True)
        tiny.write_jsonl(work / "copied_hub" / name / "train.jsonl", rows)
    (work / "copied_hub" / "README.md").write_text(HUB_README)
    (work / "used").mkdir()
    (work / "used" / "metrics.jsonl").write_text("{}\n")


def spoken(number: int) -> dict:
    """Columns that say the dialect of a row in several ways; `dialect`: a third is Egyptian."""
    is_egyptian = number % 3 == 0
    return {
        "dialect": "egy" if is_egyptian else "msa",
        "region": "msa" if number % 4 else "egy",
        "place": "Cairo" if is_egyptian else "books",
        "dialect_free": None,
        "heard": "ازيك دلوقتي" if number % 2 else "هذا هو الكتاب الذي ليس هنا",
    }


def rename(row: dict, field: str) -> dict:
    return {f"my_{name}" if name == field else name: value for name, value in row.items()}


def as_messages(name: str, text: str) -> list[dict]:
    return [{"role": "user" if name == "prompt" else "assistant", "content": text}]


def run_case(method: str, settings: dict, number: int, work: Path) -> dict:
    """The fingerprint of one training run, or the error that refused it."""
    printed = io.StringIO()
    watched: list[float | None] = []
    usual_beat = Watchdog.beat

    def beat(self: Watchdog, what: str) -> None:
        watched.append(self.seconds)
        usual_beat(self, what)

    trainer = None
    try:
        config = METHODS[method].config(**({"output_dir": str(work / f"run_{number}")} | settings))
        trainer = Trainer(config)
        with contextlib.redirect_stdout(printed):
            engine = trainer.setup()
            calls = count_layer_calls(engine)
            kept = note_kept_logits(engine)
            with mock.patch.object(Watchdog, "beat", beat):
                trainer.train()
            notes = {"kept_logits": sum(kept), "printed": printed.getvalue()}
            notes["watched"] = list(dict.fromkeys(watched))
            return fingerprint(trainer, len(calls)) | notes
    except DsAlignError as error:
        return {"error": f"{type(error).__name__}: {error}"}
    except Exception:  # noqa: BLE001 - one crash must not hide the other runs
        return {"crash": traceback.format_exc()}
    finally:
        if trainer is not None and trainer.engine is not None:
            tiny.destroy(trainer.engine)


def count_layer_calls(engine: object) -> list[int]:
    """Grows by one whenever the first layer's attention runs with gradients on, recomputation included."""
    calls: list[int] = []

    def note(*_: object) -> None:
        if torch.is_grad_enabled():
            calls.append(1)

    engine.policy.module.model.model.layers[0].self_attn.register_forward_pre_hook(note)
    return calls


def note_kept_logits(engine: object) -> list[int]:
    """Grows by the size of what the head keeps for its backward that is neither input, label nor state."""
    kept: list[int] = []
    head = engine.policy.module.model.get_output_embeddings()

    def note(_module: object, _inputs: object, output: object) -> None:
        saved = getattr(output[0].grad_fn, "saved_tensors", ()) if isinstance(output, tuple) else ()
        # Of all that is saved only the kept logits are floating and flat.
        kept.extend(len(tensor) for tensor in saved if tensor is not None and is_flat(tensor))

    def is_flat(tensor: torch.Tensor) -> bool:
        return tensor.dim() == 1 and tensor.is_floating_point()

    head.register_forward_hook(note)
    return kept


def fingerprint(trainer: Trainer, layer_calls: int) -> dict:
    engine, directory = trainer.engine, trainer.output_dir
    deepspeed_engine = engine.policy.engine
    optimizer = deepspeed_engine.basic_optimizer
    weights = dict(engine.policy.weights())
    own_engine = getattr(engine.reference, "engine", None)
    result = {
        "output_dir": directory.name,
        "files": sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()),
        "weights": hash_weights(weights),
        "weights_dtype": sorted({str(weight.dtype) for weight in weights.values()}),
        "tokens": [row_tokens(row) for row in engine.train_data],
        "train_rows": len(engine.train_data),
        "tokenizing_processes": engine.train_data.num_processes,
        "token_directory": engine.train_data.directory and engine.train_data.directory.parents[1].name,
        "eval_set": engine.eval_set,
        "global_batch": engine.global_batch_size,
        "layout": str(engine.layout),
        "attention": engine.policy.module.model.config._attn_implementation,
        "zero_stage": deepspeed_engine.zero_optimization_stage(),
        "policy_ds": deepspeed_engine._config._param_dict,
        "optimizer": [type(optimizer).__name__, {name: str(v) for name, v in optimizer.defaults.items()}],
        "reference_ds": own_engine._config._param_dict if own_engine else None,
        "layer_calls": layer_calls,
        "cache_directory": None,
        "num_cached": 0,
    }
    if engine.reference is not None and engine.reference.kind == "cache":
        cache = engine.reference.cache
        result |= {"cache_directory": cache.directory.parent.name, "num_cached": len(cache)}
    return result | describe_plan(engine) | read_records(directory)


def hash_weights(weights: dict) -> str:
    digest = hashlib.sha256()
    for name, weight in weights.items():
        digest.update(name.encode() + weight.float().numpy().tobytes())
    return digest.hexdigest()


def row_tokens(row: object) -> list:
    if isinstance(row, Unpaired):
        return [row.prompt_ids.tolist(), row.completion_ids.tolist(), row.desirable]
    return [row.prompt_ids.tolist(), row.chosen_ids.tolist(), row.rejected_ids.tolist()]


def describe_plan(engine: object) -> dict:
    """The planned steps; planning is a function of the settings, so it can be asked again."""
    steps = list(engine.batches())
    evaluation = [] if engine.eval_data is None else list(engine.evaluation_batches(engine.eval_data))
    return {
        "micro_batches": [len(step.micro_batches) for step in steps],
        "reference_packs": [len(step.reference_batches) for step in steps],
        "step_tokens": [sum(micro.num_tokens for micro in step.micro_batches) for step in steps],
        "order": [[row for micro in step.micro_batches for row in sorted(micro.rows)] for step in steps],
        "eval_batches": len(evaluation),
    }


def read_records(directory: Path) -> dict:
    """What metrics.jsonl and run_summary.json say, without anything that depends on the clock."""
    if not (directory / "metrics.jsonl").is_file():
        return {"status": None, "losses": [], "evaluations": []}
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    logged = [row for row in rows if "loss" in row]
    evaluated = [row for row in rows if "eval_loss" in row]
    summary = json.loads((directory / "run_summary.json").read_text())
    return {
        "logged_steps": [row["step"] for row in logged],
        "epochs": [row["epoch"] for row in logged],
        "losses": [row["loss"] for row in logged],
        "grad_norms": [row["grad_norm"] for row in logged],
        "first_loss": logged[0]["loss"],
        "first_grad_norm": logged[0]["grad_norm"],
        "learning_rates": [row["learning_rate"] for row in logged],
        "evaluations": [row["step"] for row in evaluated],
        "eval_losses": [row["eval_loss"] for row in evaluated],
        "status": summary["status"],
        "mixture": summary.get("mixture"),
        "run_name": summary["run_name"],
        "reference": summary["reference"],
        "num_steps": summary["num_steps"],
        "dialects": summary["dialects"] and summary["dialects"]["quotas"],
    }


def main() -> None:
    work, cases, results = map(Path, tiny.program_arguments())
    write_models(work)
    write_classifier(work / "classifier")
    write_data(work)
    # The libraries' objects stay: without them each collection is several times as fast.
    gc.collect()
    gc.freeze()
    found = {}
    for number, case in enumerate(json.loads(cases.read_text())):
        text = json.dumps(case["settings"]).replace("WORK", str(work))
        found[case["key"]] = run_case(case["method"], json.loads(text), number, work)
    results.write_text(json.dumps(found, default=str))


if __name__ == "__main__":
    sys.exit(main())
