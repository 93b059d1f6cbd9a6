"""The LM head as a function from hidden states and labels to token log-probs."""

from __future__ import annotations

import torch
from torch import nn

from ds_align.kernels import linear_log_collision, linear_logprob


class LogprobHead(nn.Linear):
    """An LM head whose forward, given labels, returns log-probs and never logits.

    It replaces the class of the model's own head, weights untouched. The log-probs are made inside the
    module's forward because ZeRO-3 gathers a module's weight around its forward and, again, before its
    backward: reading the weight from outside would keep it gathered for the whole pass.
    """

    softcap: float | None
    scale: float | None

    @classmethod
    def adopt(cls, head: nn.Linear, *, softcap: float | None = None, scale: float | None = None) -> None:
        """Turns a model's head into a LogprobHead in place. softcap, scale: see linear_logprob."""
        head.__class__ = cls
        head.softcap = softcap
        head.scale = scale

    def forward(
        self, hidden: torch.Tensor, labels: torch.Tensor | None = None, *, with_collision: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """With labels: (token_logps, mean logit), each float32 [tokens], the mean detached.

        hidden: [tokens, hidden_size]; labels: int64 [tokens]. Without labels: ordinary logits, so that the
        model still generates. The mean logit is that over the vocabulary, hidden @ mean head row, before
        a soft cap. with_collision: a third vector, log sum_v p_v^2, detached.
        """
        if labels is None:
            return super().forward(hidden)
        token_logps = linear_logprob(
            hidden, self.weight, labels, bias=self.bias, softcap=self.softcap, scale=self.scale
        )
        with torch.no_grad():
            mean_row = self.weight.mean(dim=0, dtype=torch.float32)
            mean_logits = hidden.float() @ mean_row
            if self.bias is not None:
                mean_logits += self.bias.float().mean()
            if self.scale is not None:
                mean_logits *= self.scale
        if not with_collision:
            return token_logps, mean_logits
        collision = linear_log_collision(
            hidden, self.weight, bias=self.bias, softcap=self.softcap, scale=self.scale
        )
        return token_logps, mean_logits, collision


def head_arguments(config: object) -> dict[str, float | None]:
    """Soft cap and logit scale of a model's head, from its transformers config."""
    scale = getattr(config, "logit_scale", None)
    divisor = getattr(config, "logits_scaling", None)
    if divisor is not None:
        scale = 1.0 / divisor
    return {"softcap": getattr(config, "final_logit_softcapping", None), "scale": scale}
