"""Training in plain PyTorch, one sequence at a time, that shares only the loss functions with the package."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from ds_align.losses import (
    Logps,
    PairedLogps,
    UnpairedLogps,
    cpo_loss,
    dpo_loss,
    ipo_loss,
    kto_loss,
    simpo_loss,
)
from tests.distributed.programs.layouts import CASES, GLOBAL_BATCH
from tests.distributed.tiny import pairs, unpaired

LOSSES = {"dpo": dpo_loss, "ipo": ipo_loss, "cpo": cpo_loss, "simpo": simpo_loss}
LEARNING_RATE = 0.02


def completion_logps(model: torch.nn.Module, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """log p of the vocabulary at each token of a completion; the sequence stands alone in its row."""
    logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    return logits.double().log_softmax(-1)


def token_logps(model: torch.nn.Module, prompt: list[int], completion: list[int]) -> torch.Tensor:
    logps = completion_logps(model, prompt, completion)
    return logps.gather(1, torch.tensor(completion)[:, None]).squeeze(1)


def completion_logp(model: torch.nn.Module, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """log p(completion | prompt), summed."""
    return token_logps(model, prompt, completion).sum()


class PlainLoop:
    """One case of the layouts program."""

    def __init__(self, name: str, models: Path) -> None:
        self.method, settings = CASES[name]
        self.settings = dict(settings)
        self.nll_weight = self.settings.pop("cpo_alpha", 0.0) + self.settings.pop("sft_weight", 0.0)
        self.ld_alpha = self.settings.pop("ld_alpha", 1.0)
        self.weighted = self.settings.pop("use_weighting", False)
        self.mean_rewards: list[float] = []
        types, weights = self.settings.get("loss_type"), self.settings.get("loss_weights")
        if isinstance(types, list):
            self.nll_weight += weights[types.index("sft")]
            kept = [(kind, weight) for kind, weight in zip(types, weights, strict=True) if kind != "sft"]
            self.settings |= {"loss_type": [k for k, _ in kept], "loss_weights": [w for _, w in kept]}
        self.router_weight = self.settings.pop("router_aux_loss_coef", 0.0)
        names = [
            self.settings.pop("model_name_or_path", "policy"),
            self.settings.pop("ref_model_name", "reference"),
        ]
        self.policy, self.reference = (
            AutoModelForCausalLM.from_pretrained(models / name, dtype=torch.float32) for name in names
        )
        self.rows = unpaired() if self.method == "kto" else pairs()

    def run(self) -> dict:
        """Losses of each step, and the weights at the end."""
        optimizer = torch.optim.SGD(self.policy.parameters(), lr=LEARNING_RATE)
        losses = []
        for start in range(0, len(self.rows), GLOBAL_BATCH):
            numbers = range(start, min(start + GLOBAL_BATCH, len(self.rows)))
            loss = self.unpaired_step(numbers) if self.method == "kto" else self.paired_step(numbers)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return {"losses": losses, "weights": dict(self.policy.named_parameters())}

    def score(self, model: torch.nn.Module, field: str, numbers: range) -> Logps:
        totals, lengths = [], []
        for row in (self.rows[number] for number in numbers):
            values = token_logps(model, row["prompt_ids"], row[field])
            shared = min(len(row[name]) for name in ("chosen_ids", "rejected_ids"))
            totals.append(values[:shared].sum() + self.ld_alpha * values[shared:].sum())
            lengths.append(len(row[field]))
        return Logps(torch.stack(totals), torch.tensor(lengths))

    def paired_step(self, numbers: range) -> torch.Tensor:
        fields = ("chosen_ids", "rejected_ids")
        scored = [self.score(self.policy, field, numbers) for field in fields]
        if self.method in ("dpo", "ipo"):
            with torch.no_grad():
                scored += [self.score(self.reference, field, numbers) for field in fields]
        extra = {}
        if "bco_pair" in self.settings.get("loss_type", ()):
            ratios = torch.cat([scored[0].total - scored[2].total, scored[1].total - scored[3].total])
            self.mean_rewards.append(self.settings["beta"] * ratios.mean().item())
            extra["bco_delta"] = sum(self.mean_rewards) / len(self.mean_rewards)
        losses = LOSSES[self.method](PairedLogps(*scored), **self.settings, **extra).losses
        if self.weighted:
            losses = losses * torch.stack([self.wpo_weight(self.rows[number]) for number in numbers])
        loss = losses.mean()
        if self.router_weight:
            loss = loss + self.router_weight * self.router_balance(numbers)
        chosen = scored[0]
        return loss - self.nll_weight * chosen.total.sum() / chosen.length.sum()

    def router_balance(self, numbers: range) -> torch.Tensor:
        """transformers' own load-balancing loss over every prompt with each of its completions."""
        from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

        rows = [self.rows[number] for number in numbers]
        texts = [row["prompt_ids"] + row[field] for row in rows for field in ("chosen_ids", "rejected_ids")]
        runs = [self.policy.model(torch.tensor([ids]), output_router_logits=True) for ids in texts]
        layers = tuple(torch.cat(layer) for layer in zip(*(run.router_logits for run in runs), strict=True))
        config = self.policy.config
        return load_balancing_loss_func(layers, config.num_experts, config.num_experts_per_tok)

    @torch.no_grad()
    def wpo_weight(self, row: dict) -> torch.Tensor:
        gaps = 0.0
        for field in ("chosen_ids", "rejected_ids"):
            logps = completion_logps(self.policy, row["prompt_ids"], row[field])
            collision = logps.exp().square().sum(1).log()
            gaps += (token_logps(self.policy, row["prompt_ids"], row[field]) - collision).mean()
        return gaps.exp()

    def mismatched(self, number: int) -> list[int]:
        """y' of a row: the completion of the next row in file order, cyclic, whose prompt differs."""
        count, prompt = len(self.rows), self.rows[number]["prompt_ids"]
        others = (self.rows[(number + shift) % count] for shift in range(1, count))
        return next(row["completion_ids"] for row in others if row["prompt_ids"] != prompt)

    def unpaired_step(self, numbers: range) -> torch.Tensor:
        def score(model: torch.nn.Module) -> Logps:
            rows = [self.rows[number] for number in numbers]
            totals = [completion_logp(model, row["prompt_ids"], row["completion_ids"]) for row in rows]
            return Logps(torch.stack(totals), torch.tensor([len(row["completion_ids"]) for row in rows]))

        with torch.no_grad():
            gaps = [
                completion_logp(self.policy, self.rows[number]["prompt_ids"], self.mismatched(number))
                - completion_logp(self.reference, self.rows[number]["prompt_ids"], self.mismatched(number))
                for number in numbers
            ]
            kept = score(self.reference)
        labels = torch.tensor([self.rows[number]["label"] for number in numbers])
        z0 = max(0.0, torch.stack(gaps).mean().item())
        logps = UnpairedLogps(policy=score(self.policy), reference=kept, desirable=labels, kl=z0)
        return kto_loss(logps, **self.settings).losses.mean()
