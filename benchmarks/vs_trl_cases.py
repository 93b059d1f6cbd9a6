"""What vs_trl.py compares: models, data, the settings that both sides share, and each side's own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

EOS = 0
# Word k of the tokenizer is token k, so that both sides read the same ids from the same text.
FIRST_WORD = 1
TOKENIZER = "tokenizer"
MAX_LENGTH = 1024

# Qwen2 with random weights. gpu has the shape of a model of 1.5e9 parameters.
MODELS: dict[str, dict[str, int]] = {
    "tiny": {
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "intermediate_size": 176,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
    },
    "body": {
        "num_hidden_layers": 12,
        "hidden_size": 384,
        "intermediate_size": 1024,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "vocab_size": 8192,
    },
    "head": {
        "num_hidden_layers": 4,
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 32000,
    },
    "gpu": {
        "num_hidden_layers": 28,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
    },
}


@dataclass(frozen=True, slots=True)
class Profile:
    """Lengths in tokens, uniform between both ends. completions: of one prompt; 2 make one pair."""

    prompt: tuple[int, int]
    completion: tuple[int, int]
    completions: int = 2

    @property
    def pairs_a_prompt(self) -> int:
        """Every completion against each that ranks below it."""
        return self.completions * (self.completions - 1) // 2


# Means of long: 512 + 64, of short: 16 + 256. even leaves packing the least to win: nothing is padded.
PROFILES = {
    "mixed": Profile((16, 128), (16, 256)),
    "long": Profile((384, 640), (32, 96)),
    "short": Profile((8, 24), (128, 384)),
    "even": Profile((16, 16), (256, 256)),
    "ranked": Profile((16, 128), (16, 256), completions=4),
    "tiny": Profile((4, 24), (4, 40)),
}
METHODS = ("dpo", "kto", "cpo", "simpo")
WITH_REFERENCE = ("dpo", "kto")
# TRL takes z0 and the NLL per token over a micro-batch, ds_align over the global batch.
PER_MICRO_BATCH = {"kto": "z0", "cpo": "NLL per token"}

SHARED = {
    "learning_rate": 1e-4,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "max_grad_norm": 1.0,
    "weight_decay": 0.0,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "optim": "adamw_torch",
    "train_sampling_strategy": "sequential",
    "logging_steps": 1,
    "max_length": MAX_LENGTH,
    "disable_dropout": True,
    "gradient_checkpointing": False,
    "seed": 42,
}
METHOD_SETTINGS: dict[str, dict[str, dict]] = {
    "dpo": {"shared": {"beta": 0.1}, "ours": {}, "trl": {}},
    "kto": {"shared": {"beta": 0.1}, "ours": {}, "trl": {}},
    "cpo": {"shared": {"beta": 0.1, "cpo_alpha": 1.0}, "ours": {}, "trl": {}},
    "simpo": {
        "shared": {"beta": 2.0, "cpo_alpha": 0.0},
        "ours": {"gamma_beta_ratio": 0.5},
        "trl": {"loss_type": "simpo", "simpo_gamma": 1.0},
    },
}


@dataclass(frozen=True)
class Case:
    """One comparison. prompts: of a step; reference: "live", "cache" or "none"."""

    method: str
    model: str
    profile: str
    reference: str
    steps: int
    # DeepSpeed still plans its gathers of the reference in the second step.
    warm_up: int = 2
    prompts: int = 8
    dtype: str = "float32"
    ds_config: str = "zero0"
    ours: dict = field(default_factory=dict)

    @property
    def name(self) -> str:
        """How tables and folders call it."""
        return f"{self.model} {self.method} {self.profile} {self.reference}"

    @property
    def batch(self) -> int:
        """Preferences a step: pairs, for KTO labelled completions (one a prompt)."""
        return self.prompts * (1 if self.method == "kto" else PROFILES[self.profile].pairs_a_prompt)

    @property
    def all_steps(self) -> int:
        """Those before the timed ones too."""
        return self.warm_up + self.steps

    def loss_depends_on(self, micro_batch: int) -> str:
        """What of TRL's loss is another for a micro-batch than for the whole batch; empty for nothing."""
        return PER_MICRO_BATCH.get(self.method, "") if micro_batch != self.batch else ""

    def micro_batches(self) -> list[int]:
        """Those at which TRL is tried. Its KTO needs more than one."""
        return [
            size for size in (1, 2, 4, 8) if self.batch % size == 0 and (self.method != "kto" or size > 1)
        ]

    def our_settings(self) -> dict:
        """The fields of ds_align's config, without paths."""
        given = METHOD_SETTINGS[self.method]
        cached = {"ref_logps": "cache"} if self.reference == "cache" else {}
        return {
            **SHARED,
            **given["shared"],
            **given["ours"],
            **cached,
            "learning_rate_override": True,
            "max_steps": self.all_steps,
            "per_device_train_batch_size": self.batch,
            "dtype": self.dtype,
            "ds_config": self.ds_config,
            **self.ours,
        }

    def trl_settings(self, micro_batch: int) -> dict:
        """The arguments of TRL's config, without paths."""
        given = METHOD_SETTINGS[self.method]
        cached = {"precompute_ref_log_probs": True} if self.reference == "cache" else {}
        return {
            **SHARED,
            **given["shared"],
            **given["trl"],
            **cached,
            "max_steps": self.all_steps,
            "per_device_train_batch_size": micro_batch,
            "gradient_accumulation_steps": self.batch // micro_batch,
            "bf16": self.dtype == "bfloat16",
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
        }


def write_model(directory: Path, sizes: dict[str, int]) -> Path:
    """A Qwen2 of these sizes with random weights, and its tokenizer in a folder of its own."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    config = Qwen2Config(
        **sizes,
        tie_word_embeddings=True,
        max_position_embeddings=2 * MAX_LENGTH,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=EOS,
    )
    Qwen2ForCausalLM(config).save_pretrained(directory)
    words = {f"w{number}": number for number in range(FIRST_WORD, sizes["vocab_size"])}
    inner = Tokenizer(models.WordLevel({"<eos>": EOS, **words}, unk_token="<eos>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", pad_token="<eos>")
    # Beside a config.json transformers would take the tokenizer that belongs to the architecture.
    tokenizer.save_pretrained(directory / TOKENIZER)
    return directory


def groups_from_seed(
    profile: Profile, count: int, vocabulary: int, seed: int = 0
) -> Iterator[tuple[list[int], list[list[int]]]]:
    """(prompt, completions from the best to the worst) as token ids, random."""
    rng = np.random.default_rng(seed)

    def ids(low: int, high: int) -> list[int]:
        return rng.integers(FIRST_WORD, vocabulary, rng.integers(low, high + 1)).tolist()

    for _ in range(count):
        yield ids(*profile.prompt), [ids(*profile.completion) for _ in range(profile.completions)]


def groups_from_file(path: Path, count: int, vocabulary: int) -> Iterator[tuple[list[int], list[list[int]]]]:
    """The same from a JSONL file of texts under prompt, chosen and rejected.

    A byte-level BPE of the model's vocabulary is trained on the file. What is longer than MAX_LENGTH is cut.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    rows = [[json.loads(line)[key] for key in ("prompt", "chosen", "rejected")] for line in lines]
    if len(rows) < count or not all(isinstance(text, str) and text for row in rows for text in row):
        raise SystemExit(f"{path}: {len(rows)} rows of texts; {count} are needed, none of them empty")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - FIRST_WORD, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator((text for row in rows for text in row), trainer)
    for row in rows[:count]:
        prompt, *completions = ([FIRST_WORD + number for number in tokenizer.encode(t).ids] for t in row)
        prompt = prompt[-MAX_LENGTH // 2 :]
        yield prompt, [ids[: MAX_LENGTH - len(prompt) - 1] for ids in completions]


def rows_of(case: Case, vocabulary: int, data: Path | None = None) -> list[dict]:
    """The preferences of all steps of a case, in order, as text."""
    count = case.prompts * case.all_steps
    if data is None:
        groups = groups_from_seed(PROFILES[case.profile], count, vocabulary)
    else:
        groups = groups_from_file(data, count, vocabulary)
    texts = [(_text(prompt) + " ", [_text(ids) for ids in completions]) for prompt, completions in groups]
    if case.method == "kto":
        return list(_labelled(texts, case.batch))
    return [
        {"prompt": prompt, "chosen": completions[better], "rejected": completions[worse]}
        for prompt, completions in texts
        for better in range(len(completions))
        for worse in range(better + 1, len(completions))
    ]


def _text(ids: list[int]) -> str:
    return " ".join(f"w{number}" for number in ids)


def _labelled(texts: list[tuple[str, list[str]]], batch: int) -> Iterator[dict]:
    """One completion a prompt, good and bad in turn, with the y' that TRL makes of a batch.

    That is the completion of the row before in the batch, and the last one's for the first row.
    """
    rows = [
        {"prompt": prompt, "completion": completions[number % 2], "label": number % 2 == 0}
        for number, (prompt, completions) in enumerate(texts)
    ]
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        for row, other in zip(part, [part[-1], *part[:-1]], strict=True):
            yield {**row, "kl_completion": other["completion"]}
