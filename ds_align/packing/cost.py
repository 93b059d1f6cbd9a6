"""What a prompt group costs to compute, from its lengths and the model's shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from ds_align.batch import Layout


@dataclass(frozen=True, slots=True)
class CostModel:
    """Cost in units of the floating-point operations that one token takes in the model's matrices.

    per_label: for each scored token, in the LM head. per_key: for each pair of a query and a key that it sees
    in the layers of full attention; per_window_key: the same in layers that see at most window keys.
    The default counts tokens.
    """

    per_label: float = 0.0
    per_key: float = 0.0
    per_window_key: float = 0.0
    window: int | None = None

    @classmethod
    def from_model(cls, config: object) -> Self:
        """The cost by the shape in a transformers config.

        A layer takes 2 operations a weight and token: h (q + 2 k) + q h in the attention, with q and k the
        widths of queries and keys, and 3 h i in the gated MLP (24 h^2 in all where q = k = h and i = 8/3 h).
        Scores and their sum of values take 4 q a query and key, the head 2 h a label and vocabulary entry.
        Only ratios count, so the backward, which takes twice the forward in each of them, is left out.
        """
        hidden = config.hidden_size
        heads = _number(config, "num_attention_heads", 0)
        head_dim = _number(config, "head_dim", hidden // max(1, heads))
        queries = heads * head_dim
        keys = _number(config, "num_key_value_heads", heads) * head_dim
        attention = hidden * (queries + 2 * keys) + queries * hidden
        layer = 2 * (attention + 3 * hidden * _mlp_width(config, hidden))
        num_layers = _number(config, "num_hidden_layers", 1)
        window, num_windowed = _windows(config, num_layers)
        per_key = 4 * queries / (num_layers * layer)
        return cls(
            per_label=2 * hidden * _number(config, "vocab_size", 0) / (num_layers * layer),
            per_key=per_key * (num_layers - num_windowed),
            per_window_key=per_key * num_windowed,
            window=window,
        )

    def of(self, prompt: int, completions: Sequence[int], layout: Layout) -> float:
        """Cost of a prompt with its completions, all given by their lengths in tokens."""
        num_labels = sum(completions)
        copies = 1 if layout is Layout.SHARED else len(completions)
        cost = copies * prompt + num_labels + self.per_label * num_labels
        kinds = ((self.per_key, None), (self.per_window_key, self.window))
        for weight, window in kinds:
            if weight:
                whole = sum(attended(prompt + length, window) for length in completions)
                # A shared prompt is there once; its copies are part of every whole sequence.
                repeated = (len(completions) - copies) * attended(prompt, window)
                cost += weight * (whole - repeated)
        return cost


def attended(num_tokens: int, window: int | None) -> int:
    """Pairs of a query and a key that it sees in causal attention over a sequence from its first token."""
    seen = num_tokens if window is None else min(num_tokens, window)
    return seen * (seen + 1) // 2 + (num_tokens - seen) * seen


def _number(config: object, name: str, default: int) -> int:
    """A size in the config; the default where the architecture has none, or one for each layer."""
    value = getattr(config, name, None)
    return value if isinstance(value, int) and value > 0 else default


def _mlp_width(config: object, hidden: int) -> int:
    """Width of the MLP that a token goes through; in a mixture of experts, of its experts together."""
    width = _number(config, "intermediate_size", 4 * hidden)
    chosen = _number(config, "num_experts_per_tok", 0)
    if not chosen:
        return width
    shared = _number(config, "shared_expert_intermediate_size", 0)
    return chosen * _number(config, "moe_intermediate_size", width) + shared


def _windows(config: object, num_layers: int) -> tuple[int | None, int]:
    """(the sliding window, the number of layers that have it)."""
    window = _number(config, "sliding_window", 0)
    if not window:
        return None, 0
    kinds = getattr(config, "layer_types", None)
    return window, num_layers if kinds is None else list(kinds).count("sliding_attention")
