"""The LM head as a function from hidden states and labels to token log-probs."""

from __future__ import annotations

import torch
from torch import nn

from ds_align.kernels import attach_gradient, linear_scores


class LogprobHead(nn.Linear):
    """An LM head whose forward, given labels, returns log-probs and never logits.

    It replaces the class of the model's own head, weights untouched. The log-probs are made inside the
    module's forward because ZeRO-3 gathers a module's weight around its forward and, again, before its
    backward: reading the weight from outside would keep it gathered for the whole pass.
    """

    softcap: float | None
    scale: float | None
    logits_budget_mb: int

    @classmethod
    def adopt(
        cls,
        head: nn.Linear,
        *,
        softcap: float | None = None,
        scale: float | None = None,
        logits_budget_mb: int = 0,
    ) -> None:
        """Turns a model's head into a LogprobHead in place. For the arguments see linear_logprob."""
        head.__class__ = cls
        head.softcap = softcap
        head.scale = scale
        head.logits_budget_mb = logits_budget_mb

    def score(
        self, hidden: torch.Tensor, labels: torch.Tensor, *, with_collision: bool = False
    ) -> tuple[torch.Tensor, ...]:
        """What forward returns with labels; a frozen head's part of the graph is outside of the module.

        ZeRO-3 gathers the weight of a module whose output has a gradient again before its backward. A frozen
        head is therefore called without a graph, and the gradient that its forward made is attached here.
        """
        is_frozen = not any(parameter.requires_grad for parameter in self.parameters())
        if not (is_frozen and hidden.requires_grad and torch.is_grad_enabled()):
            return self(hidden, labels, with_collision=with_collision)
        with torch.no_grad():
            found = self(hidden, labels, with_collision=with_collision, with_derivative=True)
        token_logps, *constants, derivative = found
        return attach_gradient(hidden, token_logps, derivative), *constants

    def forward(
        self,
        hidden: torch.Tensor,
        labels: torch.Tensor | None = None,
        *,
        with_collision: bool = False,
        with_derivative: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """With labels: (token_logps, mean logit), each float32 [tokens], the mean detached.

        hidden: [tokens, hidden_size]; labels: int64 [tokens]. Without labels: ordinary logits, so that the
        model still generates. The mean logit is that of the model's logits over the vocabulary.
        with_collision: a third vector, log sum_v p_v^2, detached. with_derivative: last comes
        d token_logps / d hidden [tokens, hidden_size], and nothing is attached to the graph.
        """
        if labels is None:
            return super().forward(hidden)
        scores = linear_scores(
            hidden,
            self.weight,
            labels,
            bias=self.bias,
            softcap=self.softcap,
            scale=self.scale,
            logits_budget_mb=self.logits_budget_mb,
            with_mean_logits=True,
            with_collision=with_collision,
            with_derivative=with_derivative,
        )
        wanted = (scores.logprobs, scores.mean_logits, scores.log_collision, scores.derivative)
        return tuple(score for score in wanted if score is not None)


def head_arguments(config: object) -> dict[str, float | None]:
    """Soft cap and logit scale of a model's head, from its transformers config."""
    scale = getattr(config, "logit_scale", None)
    divisor = getattr(config, "logits_scaling", None)
    if divisor is not None:
        scale = 1.0 / divisor
    return {"softcap": getattr(config, "final_logit_softcapping", None), "scale": scale}
