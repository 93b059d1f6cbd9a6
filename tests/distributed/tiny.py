"""Models, a tokenizer and preferences that are small enough to train in a moment on one core."""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

import numpy as np
import torch

VOCABULARY = 112
EOS = 0

# Every gather and release of ZeRO-3 happens here as at scale; the defaults would keep a tiny model whole.
STRICT = {
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_param_persistence_threshold": 0,
}


def ds_config(stage: int = 3, **zero: object) -> dict:
    """DeepSpeed settings of a ZeRO stage, ZeRO-3 without any slack."""
    return {"zero_optimization": {"stage": stage, **(STRICT if stage == 3 else {}), **zero}}


def reference_ds_config() -> dict:
    """The shipped settings of the reference, without any slack."""
    values = {"stage": 3, "offload_param": {"device": "cpu"}, **STRICT}
    return {"zero_optimization": values}


def program_arguments() -> list[str]:
    """What the test gave on the command line; the launcher puts its own flag in front."""
    return [text for text in sys.argv[1:] if not text.startswith("--local_rank")]


def destroy(engine: object) -> None:
    """Takes DeepSpeed's hooks off an AlignEngine's models, so that the next of the process starts lean."""
    for part in (engine.policy, engine.reference):
        # A reference that is the policy with its adapters off has no engine of its own.
        if hasattr(part, "engine"):
            part.engine.destroy()
    gc.collect()
    # Left are the libraries' objects. DeepSpeed collects at each gather: three times slower with them.
    gc.freeze()


def write_tokenizer(directory: Path) -> None:
    """A tokenizer of printable ASCII characters, the space and an EOS; fewer than VOCABULARY tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = [chr(code) for code in range(33, 127)]
    vocabulary = {"<eos>": EOS, "Ġ": 1, **{letter: number for number, letter in enumerate(characters, 2)}}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", pad_token="<eos>")
    tokenizer.save_pretrained(directory)


def write_model(
    directory: Path,
    *,
    tied: bool = True,
    kind: str = "qwen2",
    seed: int = 0,
    max_shard_size: str = "5GB",
    **sizes: int,
) -> Path:
    """A random model with its tokenizer; large enough weights that log-probs are far from uniform."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
    }
    if kind == "qwen3_moe":
        shape |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8}
    config = AutoConfig.for_model(
        kind,
        **(shape | sizes),
        tie_word_embeddings=tied,
        initializer_range=0.1,
        attention_dropout=0.0,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=EOS,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(directory, max_shard_size=max_shard_size)
    write_tokenizer(directory)
    return directory


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def pairs(num_rows: int = 23, seed: int = 0) -> list[dict]:
    """Token-id pairs of very uneven length: every fifth has 8 times the tokens, and some share a prompt.

    Rows 1 and 2, 7 and 8, 13 and 14, ... have one prompt and one rejected completion.
    """
    rng = np.random.default_rng(seed)

    def ids(low: int, high: int) -> list[int]:
        return rng.integers(2, 96, rng.integers(low, high)).tolist()

    rows: list[dict] = []
    for number in range(num_rows):
        factor = 8 if number % 5 == 3 else 1
        row = {
            "prompt_ids": ids(3, 9),
            "chosen_ids": ids(2 * factor, 7 * factor),
            "rejected_ids": ids(2 * factor, 7 * factor),
        }
        if number % 6 == 2:
            row |= {key: rows[-1][key] for key in ("prompt_ids", "rejected_ids")}
        rows.append(row)
    return rows


def unpaired(num_rows: int = 23, seed: int = 1) -> list[dict]:
    """Token-id completions with labels, as uneven as pairs()."""
    rows = []
    for number, row in enumerate(pairs(num_rows, seed)):
        good = number % 3 != 1
        completion = row["chosen_ids"] if good else row["rejected_ids"]
        rows.append({"prompt_ids": row["prompt_ids"], "completion_ids": completion, "label": good})
    return rows


def text_pairs(num_rows: int = 9) -> list[dict]:
    """Pairs as text, for the command line."""
    return [
        {
            "prompt": f"say {number} ",
            "chosen": "yes " * (1 + number % 4),
            "rejected": "no " * (2 + number % 3),
        }
        for number in range(num_rows)
    ]
