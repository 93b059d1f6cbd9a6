"""Token log-probs to one loss a preference: sums by completion, the method's loss, the NLL term.

Nothing here communicates or reduces over preferences. The counts that belong to the global batch travel with
it, so that sum(losses) over all ranks, divided by the number of preferences, is the loss of the step.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ds_align.batch import GlobalBatch, PackedBatch
from ds_align.config import BaseConfig, MethodSpec
from ds_align.losses import Logps, LossOutput, PairedLogps, UnpairedLogps


@dataclass(frozen=True)
class ForwardOutput(LossOutput):
    """A LossOutput with what it was made from.

    losses: [num_preferences], the NLL term included. logps: what the loss saw. nll: [num_pairs] summed
    negative log-probs of the chosen completions in nats, or None for unpaired data. mean_logits: float64
    [num_completions], the mean logit over scored tokens and vocabulary.
    """

    logps: PairedLogps | UnpairedLogps | None = None
    nll: torch.Tensor | None = None
    mean_logits: torch.Tensor | None = None


def load_loss(path: str) -> Callable[..., LossOutput]:
    """The function behind 'package.module:function'."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def sum_by_completion(token_values: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
    """Sums token values [num_scored] over each completion: float64 [num_completions].

    float64, because a sequential float32 sum over a long completion loses digits that the losses need.
    """
    totals = torch.zeros(batch.num_completions, dtype=torch.float64, device=token_values.device)
    return totals.index_add(0, batch.completion_index, token_values.double())


class Objective:
    """A method on log-probs: holds the loss function and its parameters, and no tensors."""

    def __init__(self, spec: MethodSpec, config: BaseConfig) -> None:
        self.spec = spec
        self.needs_reference = spec.needs_reference(config)
        self.parameters = {name: getattr(config, name) for name in spec.loss_parameters}
        self.nll_weight = getattr(config, spec.nll_weight) if spec.nll_weight else 0.0
        self._loss = load_loss(spec.loss)

    def __call__(
        self,
        batch: PackedBatch,
        token_logps: torch.Tensor,
        owner: GlobalBatch,
        mean_logits: torch.Tensor | None = None,
    ) -> ForwardOutput:
        """Losses of one micro-batch.

        token_logps: [num_scored] of the policy, with gradient. owner: the prepared global batch, for the
        reference's log-probs, z0 and the global counts.
        """
        totals = sum_by_completion(token_logps, batch)
        reference = None
        if self.needs_reference:
            assert owner.reference_logps is not None, "the global batch was not prepared"
            reference = owner.reference_logps[batch.units]
        if self.spec.inputs == "pairs":
            logps = self._paired(batch, totals, reference)
        else:
            logps = self._unpaired(batch, totals, reference, owner)
        output = self._loss(logps, **self.parameters)
        losses, nll = output.losses, None
        if isinstance(logps, PairedLogps):
            nll = -logps.policy_chosen.total
            if self.nll_weight:
                # A mean per token of the global batch; the engine divides by preferences, hence the factor.
                share = owner.num_preferences / max(1, owner.num_chosen_tokens)
                losses = losses + self.nll_weight * share * nll
        means = None
        if mean_logits is not None:
            means = sum_by_completion(mean_logits, batch) / batch.completion_lengths
        return ForwardOutput(
            losses=losses,
            chosen_rewards=output.chosen_rewards,
            rejected_rewards=output.rejected_rewards,
            rewards=output.rewards,
            logps=logps,
            nll=None if nll is None else nll.detach(),
            mean_logits=means,
        )

    def _paired(
        self, batch: PackedBatch, totals: torch.Tensor, reference: torch.Tensor | None
    ) -> PairedLogps:
        chosen, rejected = batch.members.unbind(1)

        def pick(values: torch.Tensor | None, members: torch.Tensor) -> Logps | None:
            if values is None:
                return None
            return Logps(values[members], batch.completion_lengths[members])

        return PairedLogps(
            policy_chosen=pick(totals, chosen),
            policy_rejected=pick(totals, rejected),
            reference_chosen=pick(reference, chosen),
            reference_rejected=pick(reference, rejected),
        )

    def _unpaired(
        self,
        batch: PackedBatch,
        totals: torch.Tensor,
        reference: torch.Tensor | None,
        owner: GlobalBatch,
    ) -> UnpairedLogps:
        members = batch.members[:, 0]
        lengths = batch.completion_lengths[members]
        assert owner.kl is not None, "the global batch was not prepared"
        return UnpairedLogps(
            policy=Logps(totals[members], lengths),
            reference=None if reference is None else Logps(reference[members], lengths),
            desirable=batch.desirable,
            kl=owner.kl,
        )
