"""Tokenizers made on the spot, and the settings that the data room reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from ds_align.data import load_preferences
from ds_align.data.schemas import Columns
from tests.data import messy

CORPUS = [
    "the cat sat on the mat and the dog barked at the cat",
    "What is the capital of Egypt? The capital of Egypt is Cairo.",
    "ما عاصمة مصر؟ عاصمة مصر هي القاهرة",
    "helloworld hello world assistant user system",
] * 3


@pytest.fixture(scope="session")
def bpe() -> Callable[..., PreTrainedTokenizerFast]:
    """Byte-level BPE in the manner of Qwen2: EOS <|im_end|>, no BOS; with a chat template if one is given."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        show_progress=False,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    core.train_from_iterator(CORPUS, trainer)

    def build(chat_template: str | None = None, **special: str | None) -> PreTrainedTokenizerFast:
        tokens = {"eos_token": "<|im_end|>", **special}
        return PreTrainedTokenizerFast(tokenizer_object=core, chat_template=chat_template, **tokens)

    return build


@pytest.fixture(scope="session", params=["first", "always", "prepend"])
def metaspace(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    """SentencePiece style in the manner of Llama: adds <s> by itself, spaces are U+2581, with byte fallback.

    "first" and "always" are Metaspace's ways to put a space before a text, "prepend" the older normalizer's.
    """
    pieces = ["<s>", "</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    letters = [*sorted(set("".join(CORPUS)) - {" "}), "▁", "▁a", "answer", "▁answer", "▁cat", "▁the"]
    vocabulary = [(piece, 0.0) for piece in pieces] + [(piece, -float(9 - len(piece))) for piece in letters]
    core = Tokenizer(models.Unigram(vocabulary, unk_id=2, byte_fallback=True))
    if request.param == "prepend":
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=request.param, split=False)
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture
def settings(tmp_path: Path) -> Callable[..., Any]:
    """A config as this room sees it, with single entries changed."""

    def build(**changes: Any) -> SimpleNamespace:
        fields = {
            **{f"dataset_{name}_field": name for name in Columns.__dataclass_fields__},
            "ranked_pairs": "best_worst",
            "ranked_min_gap": None,
            "min_score_margin": None,
            "seed": 42,
            "max_length": 1024,
            "max_prompt_length": None,
            "max_completion_length": None,
            "truncation_side": "left",
            "on_bad_rows": "error",
            "max_bad_fraction": 0.01,
            "chat_template": None,
            "dataset_num_proc": "auto",
            "dataset_cache_dir": str(tmp_path / "tokens"),
        }
        assert changes.keys() <= fields.keys()
        return SimpleNamespace(**{**fields, **changes})

    return build


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., Path]:
    """Write rows (objects, or lines as they are) to a file and return its path."""

    def write(rows: list[Any], name: str = "data.jsonl") -> Path:
        lines = (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows)
        path = tmp_path / name
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    return write


@pytest.fixture
def load(bpe, settings, write_jsonl):
    """Loads a small file into a cache; by keyword: tokenizer, inputs, split, path, and settings."""
    path = write_jsonl([messy.row(number) for number in range(20)])

    def call(**changes):
        given = {"path": path, "tokenizer": None, "inputs": "pairs", "split": None}
        given |= {name: changes.pop(name) for name in given.keys() & changes.keys()}
        return load_preferences(
            given["path"],
            tokenizer=given["tokenizer"] or bpe(),
            inputs=given["inputs"],
            split=given["split"],
            config=settings(**changes),
        )

    call.path = path
    return call
