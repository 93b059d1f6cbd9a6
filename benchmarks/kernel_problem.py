"""The work that every contender does: a made-up LM head, its log-probs and gradients, and the exact ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Of hidden [T, H], weight [V, H] and labels [T]: the log-probability of each label [T].
Logprobs = Callable[[Tensor, Tensor, Tensor], Tensor]
# The matrix products that each mode needs at least.
MODES = {
    "no gradient": ("logits",),
    "frozen head": ("logits", "hidden"),
    "trainable": ("logits", "hidden", "weight"),
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """Log-probs [T] and the gradients that the mode asks for: of hidden [T, H], of weight [V, H]."""

    logprobs: Tensor
    gradients: tuple[Tensor | None, ...]


@dataclass(frozen=True, slots=True)
class Problem:
    """hidden [T, H], weight [V, H], labels [T]; upstream [T] is the gradient that comes in."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    upstream: Tensor

    @classmethod
    def random(
        cls, num_tokens: int, width: int, vocabulary: int, *, dtype: torch.dtype, device: str
    ) -> Problem:
        """Logits of standard deviation 3, whatever the width."""
        generator = torch.Generator(device=device).manual_seed(0)
        options = {"generator": generator, "device": device}
        hidden = torch.randn(num_tokens, width, **options) * (3.0 / width**0.5)
        weight = torch.randn(vocabulary, width, **options)
        labels = torch.randint(0, vocabulary, (num_tokens,), **options)
        return cls(hidden.to(dtype), weight.to(dtype), labels, torch.randn(num_tokens, **options))

    def outcome(self, logprobs_of: Logprobs, mode: str) -> Outcome:
        """One run: log-probs and, in the two modes that train, the backward of sum(upstream * logprobs)."""
        trains = mode != "no gradient"
        hidden = self.hidden.detach().requires_grad_(trains)
        weight = self.weight.detach().requires_grad_(mode == "trainable")
        with torch.set_grad_enabled(trains):
            logprobs = logprobs_of(hidden, weight, self.labels)
            if trains:
                (logprobs * self.upstream).sum().backward()
        leaves = (leaf for leaf in (hidden, weight) if leaf.requires_grad)
        return Outcome(logprobs.detach(), tuple(leaf.grad for leaf in leaves))

    def exact(self) -> Outcome:
        """The same in float64 from the derivative's formula, some tokens at a time."""
        weight = self.weight.double()
        logprobs, of_hidden, of_weight = [], [], torch.zeros_like(weight)
        for first in range(0, len(self.labels), 128):
            rows = slice(first, first + 128)
            hidden, labels = self.hidden[rows].double(), self.labels[rows].unsqueeze(1)
            scores = torch.log_softmax(hidden @ weight.T, dim=-1)
            logprobs.append(scores.gather(1, labels).squeeze(1))
            # d logprob / d logits = onehot - softmax
            slope = scores.exp_().neg_().scatter_add_(1, labels, torch.ones_like(scores[:, :1]))
            slope *= self.upstream[rows].double().unsqueeze(1)
            of_hidden.append(slope @ weight)
            of_weight.addmm_(slope.T, hidden)
        return Outcome(torch.cat(logprobs), (torch.cat(of_hidden), of_weight))


def errors_of(outcome: Outcome, exact: Outcome) -> tuple[float, float | None]:
    """Largest error of a log-prob in nats; of a gradient, as a share of its largest entry.

    Raises ArithmeticError: a gradient is missing, or something is not finite.
    """
    if any(gradient is None for gradient in outcome.gradients):
        raise ArithmeticError("a gradient that was asked for is missing")
    logprob = (outcome.logprobs.double() - exact.logprobs).abs().max().item()
    pairs = zip(outcome.gradients, exact.gradients, strict=False)
    gradients = [((got.double() - right).abs().max() / right.abs().max()).item() for got, right in pairs]
    if not all(map(math.isfinite, [logprob, *gradients])):
        raise ArithmeticError("log-probs or gradients that are not finite")
    return logprob, max(gradients, default=None)
