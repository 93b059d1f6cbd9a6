"""The demonstration's tokenizer and starting model, made from nothing in well under a minute on a CPU.

The model is fine-tuned on chosen and rejected answers alike, so it is fluent in both languages and
prefers neither: what a later run shows is learned from the preferences alone.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ds_align.demo.data import PreferenceRow

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EOS_TOKEN = "<|endoftext|>"
PAD_TOKEN = "<|pad|>"
VOCABULARY_SIZE = 640
_IGNORED_LABEL = -100
_EVALUATION_BATCH = 64


@dataclass(frozen=True, slots=True)
class FineTuning:
    """How the starting model is fine-tuned: number of epochs, sequences a batch, peak learning rate."""

    num_epochs: int = 5
    batch_size: int = 32
    learning_rate: float = 3e-3
    warmup_steps: int = 20
    max_grad_norm: float = 1.0


@dataclass(frozen=True, slots=True)
class TokenizedText:
    """Token ids of prompt and completion (closed by the end token); the completion starts at `start`."""

    ids: tuple[int, ...]
    start: int


def train_tokenizer(rows: Sequence[PreferenceRow]) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE tokenizer on the rows: like Qwen2's without a beginning token; lossless."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    # Qwen2's split: single digits, and line breaks that never join the text after them.
    split = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[EOS_TOKEN, PAD_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [text for row in rows for text in row.values()]
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS_TOKEN,
        pad_token=PAD_TOKEN,
        clean_up_tokenization_spaces=False,
        padding_side="right",
    )


def make_model(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Return a randomly initialised Qwen2 (grouped queries, tied embeddings, float32)."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    return Qwen2ForCausalLM(config)


def fine_tune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    epochs: Sequence[Sequence[PreferenceRow]],
    settings: FineTuning,
    *,
    seed: int = 0,
) -> float:
    """Train `model` in place on the rows of each epoch; return the last batch's loss (nats a token).

    Every row contributes its chosen and its rejected answer, so neither side is seen more often.
    """
    import torch

    batches = []
    for epoch, rows in enumerate(epochs):
        texts = [tokenize(tokenizer, row, side) for row in rows for side in ("chosen", "rejected")]
        batches += _epoch_batches(texts, settings.batch_size, random.Random(f"{seed}-{epoch}"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / settings.warmup_steps, 1.0) * (1.0 - step / len(batches)),
    )
    model.train()
    for batch in batches:
        token_logps, scored = _token_logps(model, batch, tokenizer.pad_token_id)
        loss = -(token_logps * scored).sum() / scored.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()
    return float(loss.detach())


def policy_accuracy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[PreferenceRow]
) -> float:
    """Return the share of rows whose chosen answer has the higher mean log-probability; a tie is one half."""
    import torch

    means = {}
    for side in ("chosen", "rejected"):
        texts = [tokenize(tokenizer, row, side) for row in rows]
        with torch.no_grad():
            batches = [texts[i : i + _EVALUATION_BATCH] for i in range(0, len(texts), _EVALUATION_BATCH)]
            scores = []
            for batch in batches:
                token_logps, scored = _token_logps(model, batch, tokenizer.pad_token_id, completion_only=True)
                scores.append((token_logps * scored).sum(1) / scored.sum(1))
        means[side] = torch.cat(scores)
    wins = (means["chosen"] > means["rejected"]).double() + 0.5 * (
        means["chosen"] == means["rejected"]
    ).double()
    return float(wins.mean())


def tokenize(tokenizer: PreTrainedTokenizerBase, row: PreferenceRow, side: str) -> TokenizedText:
    """Return the token ids of a row's prompt, its `side` ("chosen" or "rejected") and the end token."""
    prompt = tokenizer.encode(row["prompt"], add_special_tokens=False)
    completion = tokenizer.encode(row[side], add_special_tokens=False)
    return TokenizedText(ids=(*prompt, *completion, tokenizer.eos_token_id), start=len(prompt))


def _epoch_batches(
    texts: Sequence[TokenizedText], batch_size: int, generator: random.Random
) -> list[list[TokenizedText]]:
    """Cut shuffled texts into batches of similar length, so that little of a batch is padding."""
    order = list(texts)
    generator.shuffle(order)
    order.sort(key=lambda text: len(text.ids) // 8)
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    generator.shuffle(batches)
    return batches


def _token_logps(
    model: PreTrainedModel,
    batch: Sequence[TokenizedText],
    pad_token_id: int,
    *,
    completion_only: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return log-probabilities [rows, tokens - 1] of each next token and the mask of those that count."""
    import torch

    longest = max(len(text.ids) for text in batch)
    ids = torch.full((len(batch), longest), pad_token_id)
    labels = torch.full((len(batch), longest), _IGNORED_LABEL)
    for index, text in enumerate(batch):
        row = torch.tensor(text.ids)
        ids[index, : len(row)] = row
        first = text.start if completion_only else 0
        labels[index, first : len(row)] = row[first:]
    # Right padding under a causal mask: no real token sees a padded one, and no padded one is scored.
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    targets = labels[:, 1:]
    losses = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), targets, ignore_index=_IGNORED_LABEL, reduction="none"
    )
    return -losses, (targets != _IGNORED_LABEL).float()
