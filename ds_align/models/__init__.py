"""Hugging Face causal language models as functions from a packed batch to token log-probs."""

from ds_align.models.adapter_files import AdapterDirectory, is_adapter_directory
from ds_align.models.adapters import AdapterPlan
from ds_align.models.load import ModelSource, load_tokenizer
from ds_align.models.policy_model import PolicyModel, choose_layout
from ds_align.models.router import num_experts

__all__ = [
    "AdapterDirectory",
    "AdapterPlan",
    "ModelSource",
    "PolicyModel",
    "choose_layout",
    "is_adapter_directory",
    "load_tokenizer",
    "num_experts",
]
