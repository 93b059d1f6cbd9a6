"""Hugging Face causal language models as functions from a packed batch to token log-probs."""

from ds_align.models.load import ModelSource, load_tokenizer
from ds_align.models.policy_model import PolicyModel, choose_layout

__all__ = ["ModelSource", "PolicyModel", "choose_layout", "load_tokenizer"]
