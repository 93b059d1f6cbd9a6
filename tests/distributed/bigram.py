"""A bigram language model as a Hugging Face class: what follows a token depends on that token alone.

Its logits are the rows of one table, so that an optimum or a trajectory can be worked out with a pencil.
Importing this module registers the class, and from_pretrained then finds it like any other.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from tests.distributed.tiny import EOS, VOCABULARY, write_tokenizer


class BigramConfig(PreTrainedConfig):
    """A vocabulary, and nothing else; hidden_size is the width of a table row."""

    model_type = "ds_align_bigram"

    def __init__(self, vocab_size: int = VOCABULARY, **kwargs: object) -> None:
        self.vocab_size = self.hidden_size = vocab_size
        self.num_hidden_layers = 0
        super().__init__(**({"eos_token_id": EOS, "pad_token_id": EOS} | kwargs))


class BigramForCausalLM(PreTrainedModel):
    """logits[t] = table[token t]."""

    config_class = BigramConfig
    base_model_prefix = "model"

    def __init__(self, config: BigramConfig) -> None:
        super().__init__(config)
        self.table = nn.Embedding(config.vocab_size, config.vocab_size)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Embedding):
            nn.init.zeros_(module.weight)

    def get_input_embeddings(self) -> nn.Module:
        return self.table

    def forward(self, input_ids: torch.Tensor, **_ignored: object) -> CausalLMOutput:
        return CausalLMOutput(logits=self.table(input_ids))


AutoConfig.register("ds_align_bigram", BigramConfig)
AutoModelForCausalLM.register(BigramConfig, BigramForCausalLM)


def write_bigram(directory: Path, table: torch.Tensor | None = None) -> Path:
    """A model directory with a tokenizer; table: [VOCABULARY, VOCABULARY] of logits, None: all 0."""
    model = BigramForCausalLM(BigramConfig())
    if table is not None:
        with torch.no_grad():
            model.table.weight.copy_(table)
    model.save_pretrained(directory)
    write_tokenizer(directory)
    return directory
