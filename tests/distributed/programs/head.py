"""Trains models whose LM head is trained, frozen or adapted under ZeRO-3, and watches what is gathered when.

usage: head.py MODELS OUT.pt
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.utils import z3_leaf_module
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ds_align import AlignEngine, DPOConfig, distributed
from ds_align.models import ModelSource
from ds_align.objective import ForwardOutput
from tests.distributed.tiny import destroy, ds_config, pairs, program_arguments, reference_ds_config

GLOBAL_BATCH = 4
NUM_ROWS = 9  # three steps, the last with one pair for two ranks
LORA = {"use_lora": True, "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0}
WITH_HEAD = {"lora_target_modules": ["lm_head", "q_proj", "o_proj"]}
CHECKPOINTING = {"gradient_checkpointing": True}
BUDGET = {"logits_budget_mb": 64}  # every logit of these models fits
ONE_PACK = {"pack_max_tokens": 100_000}
HALF = {"dtype": "bfloat16"}


@dataclass(frozen=True)
class Case:
    """A run; freezes_head: the head's weight is taken out of the training before the engine is built."""

    model: str
    settings: dict = field(default_factory=dict)
    freezes_head: bool = False

    @property
    def head(self) -> str:
        """What becomes of the head's own weight."""
        if self.freezes_head:
            return "frozen"
        if "use_lora" not in self.settings:
            return "trained"
        return "adapted" if "lora_target_modules" in self.settings else "frozen"

    @property
    def learning_rate(self) -> float:
        return 0.5 if "use_lora" in self.settings else 0.02


CASES = {
    "tied": Case("policy"),
    "tied checkpointing": Case("policy", CHECKPOINTING | BUDGET | ONE_PACK),
    "tied lora": Case("policy", LORA),
    "untied": Case("untied", ONE_PACK),
    "untied checkpointing": Case("untied", CHECKPOINTING),
    "untied frozen": Case("untied", freezes_head=True),
    "untied frozen budget": Case("untied", ONE_PACK | BUDGET | CHECKPOINTING, freezes_head=True),
    "untied lora": Case("untied", LORA | ONE_PACK),
    "untied lora budget": Case("untied", LORA | BUDGET | CHECKPOINTING),
    "untied lora head": Case("untied", LORA | WITH_HEAD),
    "moe": Case("moe", BUDGET),
    "moe frozen": Case("moe", ONE_PACK, freezes_head=True),
    "untied bfloat16": Case("untied", HALF | BUDGET),
    "untied lora bfloat16": Case("untied", LORA | HALF | ONE_PACK),
}


class Gathers:
    """Counts, from inside DeepSpeed's own gathers, how often one parameter is put together, and when."""

    def __init__(self, parameters: list[nn.Parameter], watched: nn.Parameter) -> None:
        self.watched = watched
        self.counts = {"forward": 0, "backward": 0}
        for parameter in parameters:
            # A coalesced gather is called on the first of its parameters, whichever that is.
            for name in ("all_gather", "all_gather_coalesced"):
                setattr(parameter, name, self._counted(getattr(parameter, name), parameter))

    def _counted(self, gather: Callable, owner: nn.Parameter) -> Callable:
        def counted(*arguments: object, **options: object) -> object:
            gathered = arguments[0] if arguments else options.get("param_list")
            for parameter in [owner] if gathered is None else gathered:
                if parameter is self.watched and parameter.ds_status == ZeroParamStatus.NOT_AVAILABLE:
                    self.counts["backward" if torch._C._current_graph_task_id() != -1 else "forward"] += 1
            return gather(*arguments, **options)

        return counted

    def take(self) -> dict[str, int]:
        """The counts since the last call."""
        taken, self.counts = self.counts, {"forward": 0, "backward": 0}
        return taken


class OurOperators(TorchDispatchMode):
    """Names of the package's operators that ran, and how many logits they kept for the backward."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.num_kept = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.namespace == "ds_align":
            self.names.append(func.overloadpacket.__name__)
            if self.names[-1] == "linear_score":
                self.num_kept += result[2].numel()
        return result


@contextlib.contextmanager
def frozen_head() -> Iterator[None]:
    """While open, every model that the package loads has a head without requires_grad."""
    load = ModelSource.load

    def load_frozen(source: ModelSource, dtype: torch.dtype) -> nn.Module:
        model = load(source, dtype)
        model.get_output_embeddings().weight.requires_grad_(False)
        return model

    ModelSource.load = load_frozen
    try:
        yield
    finally:
        ModelSource.load = load


def build_engine(case: Case, models: Path) -> AlignEngine:
    reference = {} if "use_lora" in case.settings else {"ref_ds_config": reference_ds_config()}
    values = {
        "model_name_or_path": str(models / case.model),
        "ds_config": ds_config(3),
        "per_device_train_batch_size": GLOBAL_BATCH // distributed.world_size(),
        "pack_max_tokens": 16,  # a pair a pack
        "logits_budget_mb": 0,
        "train_sampling_strategy": "sequential",
        "optim": "sgd",
        "learning_rate": case.learning_rate,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "dtype": "float32",
    }
    config = DPOConfig(**(values | reference | case.settings))
    with frozen_head() if case.freezes_head else contextlib.nullcontext():
        return AlignEngine.from_config(config, train_dataset=pairs(NUM_ROWS))


def base_weight(module: nn.Module) -> nn.Parameter:
    """The model's own weight of a layer, adapted or not."""
    return getattr(module, "base_layer", module).weight


def run_case(case: Case, models: Path) -> dict:
    engine = build_engine(case, models)
    start = dict(engine.policy.weights(trained_only=True))
    mine = {**facts_of(engine), **first_scores(engine), "steps": []}
    gathers = watch(engine)
    losses = []
    for global_batch in engine.batches():
        loss, log_ratios = torch.zeros(1, dtype=torch.float64), []
        for batch in global_batch.micro_batches:
            output = engine.forward(batch)
            engine.backward(output.losses.sum(), global_count=global_batch.num_preferences)
            loss += output.losses.detach().sum().cpu()
            log_ratios += log_ratios_of(output)
        mine["steps"].append(
            {
                "micro_batches": len(global_batch.micro_batches),
                "reference_passes": len(global_batch.reference_batches),
                "scored": [batch.labels.numel() for batch in global_batch.micro_batches],
                "gathers": {name: each.take() for name, each in gathers.items()},
                "log_ratios": log_ratios,
            }
        )
        engine.step()
        for each in gathers.values():
            each.take()
        losses.append(distributed.all_reduce_sum(loss, engine.device).item() / global_batch.num_preferences)
    end = dict(engine.policy.weights(trained_only=True))
    destroy(engine)
    ranks = [None] * distributed.world_size()
    torch.distributed.all_gather_object(ranks, mine)
    return {"losses": losses, "start": start, "end": end, "ranks": ranks}


def watch(engine: AlignEngine) -> dict[str, Gathers]:
    """Counters of the head's own weight and of one that every backward needs, to compare."""
    model = engine.policy.module.model
    parameters = list(model.parameters())
    head, last = model.get_output_embeddings(), model.model.layers[-1].self_attn.o_proj
    return {
        "head": Gathers(parameters, base_weight(head)),
        "layer": Gathers(parameters, base_weight(last)),
    }


def log_ratios_of(output: ForwardOutput) -> list[float]:
    """log p_policy - log p_reference of each completion of a micro-batch."""
    logps = output.logps
    pairs_of = (
        (logps.policy_chosen, logps.reference_chosen),
        (logps.policy_rejected, logps.reference_rejected),
    )
    return torch.cat([ours.total - kept.total for ours, kept in pairs_of]).tolist()


def facts_of(engine: AlignEngine) -> dict:
    """Which modules are leaves of ZeRO-3, and where the reference's partitions are."""
    policy = engine.policy.module
    facts = {
        "leaves": sorted(type(module).__name__ for module in policy.modules() if z3_leaf_module(module)),
        "head_trains": base_weight(policy.model.get_output_embeddings()).requires_grad,
        "fused": policy.fused_head,
        "reference": engine.reference.kind,
    }
    if engine.reference.kind == "model":
        weights = list(engine.reference.module.parameters())
        facts |= {
            "reference_device": {str(weight.ds_tensor.device) for weight in weights},
            "reference_offload": str(engine.reference.engine.zero_offload_param().device),
            "reference_whole": sum(weight.numel() for weight in weights),
            "reference_fused": engine.reference.module.fused_head,
        }
    return facts


def first_scores(engine: AlignEngine) -> dict:
    """Policy, with and without a graph, and reference on the very same pack: operators, and whether equal."""
    pack = next(engine.batches()).micro_batches[0].to(engine.device)
    with OurOperators() as trained:
        ours = engine.policy.forward(pack).logps
    with OurOperators() as scored:
        alone = engine.policy.forward(pack, grad=False).logps
    with OurOperators() as kept:
        reference = engine.reference.forward(pack)
    # ZeRO-3 counts on a backward for each forward with a graph; a gradient of 0 leaves the weights.
    engine.backward(ours.sum() * 0.0, global_count=1)
    engine.policy.step()
    return {
        "operators": {"trained": trained.names, "scored": scored.names, "reference": kept.names},
        "num_kept": {"trained": trained.num_kept, "scored": scored.num_kept, "reference": kept.num_kept},
        "num_scored": pack.labels.numel(),
        "same_bits": torch.equal(ours.detach(), alone) and torch.equal(alone, reference),
        "spread": float(alone.max() - alone.min()),
    }


def main() -> None:
    models, out = map(Path, program_arguments())
    from ds_align.engine.init import init_distributed

    init_distributed()
    results = {name: run_case(case, models) for name, case in CASES.items()}
    if distributed.is_main():
        torch.save(results, out)
    distributed.barrier()


if __name__ == "__main__":
    main()
