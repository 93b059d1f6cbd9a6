"""The same global batch gives the same loss and gradient however it is laid out.

Everything runs in float64 in one process: the packs of several ranks are built one after the other and their
gradients added, as an engine would, and the whole is held against rows that were run alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from ds_align.batch import GlobalBatch, Layout, PackedBatch, Pair, TokenScores, Unpaired
from ds_align.config import METHODS, BaseConfig
from ds_align.losses import Logps, PairedLogps, UnpairedLogps
from ds_align.models import PolicyModel
from ds_align.objective import Objective, load_loss, sum_by_unit, token_places
from ds_align.packing import PreferenceTable, build_batch, plan_step

TOLERANCE = 1e-10
# These two give KTO a z0 above 0, so that its clamp does not hide it.
POLICY_SEED, REFERENCE_SEED = 1, 0
# Far below what the rows need together, so that there are several packs.
PACK_TOKENS = {"pairs": 24, "unpaired": 12}

RUNS = [
    pytest.param("dpo", {"label_smoothing": 0.1}, id="dpo"),
    pytest.param("dpo", {"reference_free": True}, id="dpo-reference-free"),
    pytest.param("ipo", {}, id="ipo"),
    pytest.param("cpo", {"cpo_alpha": 0.7}, id="cpo"),
    pytest.param("simpo", {"sft_weight": 0.3}, id="simpo"),
    pytest.param("simpo", {"alpha": 0.2}, id="alphapo"),
    pytest.param("dpo", {"loss_type": "aot", "label_smoothing": 0.1}, id="aot"),
    pytest.param("dpo", {"loss_type": "aot_unpaired"}, id="aot-unpaired"),
    pytest.param("dpo", {"loss_type": "bco_pair"}, id="bco"),
    pytest.param("dpo", {"loss_type": "sigmoid_norm"}, id="sigmoid-norm"),
    pytest.param("dpo", {"ld_alpha": 0.3}, id="ld"),
    pytest.param("dpo", {"use_weighting": True}, id="wpo"),
    pytest.param(
        "dpo",
        {
            "loss_type": ["aot", "sigmoid", "bco_pair", "sft"],
            "loss_weights": [0.5, 0.8, 0.2, 0.4],
            "ld_alpha": 0.5,
            "rpo_alpha": 0.1,
        },
        id="mixture",
    ),
    pytest.param("dpo", {"rpo_alpha": 0.4, "nll_normalization": "sequence"}, id="nll-sequence"),
    pytest.param("cpo", {"cpo_alpha": 0.05, "nll_normalization": "sum"}, id="nll-sum"),
    pytest.param("kto", {"loss_type": "apo_zero_unpaired"}, id="apo-zero-unpaired"),
    pytest.param("kto", {"desirable_weight": 1.3, "undesirable_weight": 0.6}, id="kto"),
    pytest.param("kto", {"use_ref_model": False}, id="kto-reference-free"),
]


def rows_of(method: str) -> list[Pair | Unpaired]:
    """One huge row, several of one prompt, short ones: ranks and packs become uneven."""
    generator = np.random.default_rng(11)

    def ids(length: int) -> np.ndarray:
        return generator.integers(0, 61, length, dtype=np.int32)

    shared, first, second, third = ids(5), ids(3), ids(9), ids(6)
    pairs = [
        Pair(shared, first, second),
        Pair(ids(40), ids(30), ids(25)),
        Pair(shared, third, second),
        Pair(ids(1), ids(1), ids(2)),
        Pair(ids(4), ids(12), ids(1)),
        Pair(shared, first, third),
        Pair(ids(6), ids(2), ids(8)),
    ]
    if METHODS[method].inputs == "pairs":
        return pairs
    # A y' of its own for most rows, none for one.
    return [
        Unpaired(pair.prompt_ids, pair.chosen_ids, number % 3 != 0, None if number == 3 else ids(4 + number))
        for number, pair in enumerate(pairs)
    ]


def float64_model(bench, seed: int) -> torch.nn.Module:
    """A model that is float64 throughout: transformers' own norm computes in float32 whatever comes in."""
    model = bench.model("llama", seed=seed)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__ == "LlamaRMSNorm":
                norm = torch.nn.RMSNorm(child.weight.shape, eps=child.variance_epsilon)
                norm.weight = child.weight
                setattr(parent, name, norm)
    return model.double()


@dataclass(frozen=True)
class Result:
    """Loss of the step, its gradient, the mean of the packs' own means, and z0."""

    loss: float
    gradients: dict[str, Tensor]
    mean_of_packs: float
    kl: float
    rows_by_rank: tuple[int, ...]
    num_micro_batches: int
    num_dummies: int


class OneProcess:
    """Every rank of a step in turn, with real models: what the engine does, without processes."""

    def __init__(self, bench, config: BaseConfig, layout: Layout) -> None:
        self.layout = layout
        self.objective = Objective(METHODS[config.method], config)
        self.policy = PolicyModel(float64_model(bench, POLICY_SEED), layout)
        self.reference = PolicyModel(float64_model(bench, REFERENCE_SEED), layout).requires_grad_(False)

    def token_logps(self, model: PolicyModel, owner: GlobalBatch, packs: Sequence[PackedBatch]) -> Tensor:
        found = torch.full((owner.num_tokens,), math.nan, dtype=torch.float64)
        with torch.no_grad():
            for batch in packs:
                found[token_places(batch, owner.unit_lengths)] = model(batch)[0]
        return found

    def score(self, batch: PackedBatch) -> TokenScores:
        return TokenScores(*self.policy(batch, with_collision=self.objective.needs_collision))

    def step(self, rows: Sequence[Pair | Unpaired], *, world_size: int, pack_tokens: int) -> Result:
        needs_reference = self.objective.needs_reference
        table = PreferenceTable.from_preferences(rows, kl_from_own=not needs_reference)
        plan = plan_step(
            table,
            world_size=world_size,
            layout=self.layout,
            pack_tokens=pack_tokens,
            reference_tokens=2 * pack_tokens,
            needs_reference=needs_reference,
        )
        ranks = [
            self._global_batch(table, plan.train[rank], plan.reference[rank], plan.kl[rank])
            for rank in range(world_size)
        ]
        # The engine's all-reduce: every rank adds its rows, all divide by the rows of the whole batch.
        gaps = [self._kl_gaps(batch) for batch in ranks]
        kl = sum(gap.sum() for gap in gaps) / max(1, ranks[0].num_kl)
        if needs_reference:
            kl = kl.clamp(min=0)
        for owner in ranks:
            owner.kl = kl
        if self.objective.coupled:
            self._couple(ranks)
        self.policy.zero_grad()
        loss, means = 0.0, []
        for owner in ranks:
            for batch in owner.micro_batches:
                output = self.objective(batch, self.score(batch), owner)
                part = output.losses.sum() / owner.num_preferences
                part.backward()
                loss += part.item()
                means += [output.losses.mean().item()] if batch.num_preferences else []
        return Result(
            loss,
            {name: parameter.grad.clone() for name, parameter in self.policy.model.named_parameters()},
            sum(means) / len(means),
            kl.item(),
            tuple(sum(batch.num_preferences for batch in owner.micro_batches) for owner in ranks),
            len(ranks[0].micro_batches),
            sum(batch.num_preferences == 0 for owner in ranks for batch in owner.micro_batches),
        )

    def _global_batch(self, table: PreferenceTable, train, reference, kl) -> GlobalBatch:
        def build(packs) -> list[PackedBatch]:
            return [build_batch(table, pack, range(len(table.members)), self.layout) for pack in packs]

        mine = [number for pack in train for group in pack for number in group.preferences]
        batch = GlobalBatch(
            step=1,
            epoch=0.0,
            micro_batches=build(train),
            reference_batches=build(reference),
            kl_batches=build(kl),
            kl_units=torch.tensor([table.kl_units[n] for n in mine if table.kl_units[n] >= 0]).long(),
            num_preferences=len(table.members),
            num_chosen_tokens=sum(len(table.completions[members[0]]) for members in table.members),
            num_kl=sum(unit >= 0 for unit in table.kl_units),
            unit_lengths=torch.tensor([len(ids) for ids in table.completions]),
        )
        if self.objective.needs_reference:
            batch.reference_logps = self.token_logps(self.reference, batch, batch.reference_batches)
        return batch

    def _kl_gaps(self, batch: GlobalBatch) -> Tensor:
        gaps = self.token_logps(self.policy, batch, batch.kl_batches)
        if batch.reference_logps is not None:
            gaps = gaps - batch.reference_logps
        return sum_by_unit(gaps, batch.unit_lengths)[batch.kl_units]

    def _couple(self, ranks: Sequence[GlobalBatch]) -> None:
        """The table of all ranks, each of which fills in its own rows."""
        table = torch.zeros(ranks[0].num_preferences, self.objective.num_columns, dtype=torch.float64)
        with torch.no_grad():
            for owner in ranks:
                for batch in owner.micro_batches:
                    table[batch.positions] += self.objective.table(batch, self.score(batch), owner)
        terms = self.objective.couple(table, kl=ranks[0].kl, training=True)
        for owner in ranks:
            owner.coupled = terms


def row_distribution(model: torch.nn.Module, prompt: np.ndarray, completion: np.ndarray) -> Tensor:
    """log p of the whole vocabulary at each token of the completion."""
    ids = torch.tensor([*prompt, *completion])
    return torch.log_softmax(model(input_ids=ids[None]).logits[0].double(), dim=-1)[len(prompt) - 1 : -1]


def row_logp(
    model: torch.nn.Module, prompt: np.ndarray, completion: np.ndarray, ld: tuple[float, int] | None = None
) -> Tensor:
    """log p(completion | prompt); ld = (alpha, count): tokens after the first count weigh alpha."""
    logps = row_distribution(model, prompt, completion)[
        torch.arange(len(completion)), torch.tensor(completion.tolist())
    ]
    if ld is None:
        return logps.sum()
    alpha, count = ld
    return logps[:count].sum() + alpha * logps[count:].sum()


def wpo_weight(model: torch.nn.Module, row: Pair) -> Tensor:
    """Product over both completions of the geometric mean of p(token) / sum_v p(v)^2."""
    weight = 1.0
    for completion in (row.chosen_ids, row.rejected_ids):
        probabilities = row_distribution(model, row.prompt_ids, completion).detach().exp()
        picked = probabilities[torch.arange(len(completion)), torch.tensor(completion.tolist())]
        ratios = picked / probabilities.square().sum(dim=1)
        weight = weight * ratios.log().mean().exp()
    return weight


def nll_term(config: BaseConfig, model: torch.nn.Module, rows: Sequence[Pair]) -> Tensor:
    """The weighted NLL of the chosen completions, by each of its three normalisations."""
    nll = -torch.stack([row_logp(model, row.prompt_ids, row.chosen_ids) for row in rows])
    lengths = torch.tensor([len(row.chosen_ids) for row in rows])
    term = {"token": nll.sum() / lengths.sum(), "sequence": (nll / lengths).mean(), "sum": nll.mean()}
    return config.nll_weight * term[config.nll_normalization]


def alone(bench, config: BaseConfig, rows: Sequence[Pair | Unpaired]) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean loss of the rows, each completion run alone through plain models, and its gradient."""
    policy, reference = (float64_model(bench, seed) for seed in (POLICY_SEED, REFERENCE_SEED))
    spec = METHODS[config.method]

    def score(model: torch.nn.Module, name: str) -> Logps:
        alpha = getattr(config, "ld_alpha", None)
        totals = [
            row_logp(
                model,
                row.prompt_ids,
                getattr(row, name),
                None if alpha is None else (alpha, min(len(row.chosen_ids), len(row.rejected_ids))),
            )
            for row in rows
        ]
        return Logps(torch.stack(totals), torch.tensor([len(getattr(row, name)) for row in rows]))

    parameters = {name: getattr(config, source) for name, source in spec.loss_parameters.items()}
    weights: float | Tensor = 1.0
    if spec.inputs == "pairs":
        names = ("chosen_ids", "rejected_ids")
        scored = [score(model, name) for model in (policy, reference) for name in names]
        logps = PairedLogps(*scored)
        if config.coupled and config.needs_running_delta:
            # The first step's delta is its own mean reward.
            ratios = [logps.policy_chosen.total - logps.reference_chosen.total]
            ratios.append(logps.policy_rejected.total - logps.reference_rejected.total)
            parameters["bco_delta"] = config.beta * torch.cat(ratios).detach().mean()
        if getattr(config, "use_weighting", False):
            weights = torch.stack([wpo_weight(policy, row) for row in rows])
    else:
        logps = UnpairedLogps(
            policy=score(policy, "completion_ids"),
            reference=score(reference, "completion_ids") if config.use_ref_model else None,
            desirable=torch.tensor([row.desirable for row in rows]),
        )
        logps = replace(logps, kl=reference_point(policy, reference, rows, logps))
    loss = (load_loss(spec.loss)(logps, **parameters).losses * weights).mean()
    if config.nll_weight:
        loss = loss + nll_term(config, policy, rows)
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in policy.named_parameters()}


def reference_point(policy, reference, rows: Sequence[Unpaired], logps: UnpairedLogps) -> Tensor:
    if logps.reference is None:
        return logps.policy.total.detach().mean()
    with torch.no_grad():
        gaps = [
            row_logp(policy, row.prompt_ids, row.kl_ids) - row_logp(reference, row.prompt_ids, row.kl_ids)
            for row in rows
            if row.kl_ids is not None
        ]
    return torch.stack(gaps).mean().clamp(min=0)


def assert_close(found: Result, loss: Tensor, gradients: dict[str, Tensor]) -> None:
    assert found.loss == pytest.approx(loss.item(), rel=TOLERANCE)
    assert found.gradients.keys() == gradients.keys()
    for name, expected in gradients.items():
        assert (found.gradients[name] - expected).norm() <= TOLERANCE * expected.norm(), name


@pytest.mark.parametrize(("method", "settings"), RUNS)
def test_loss_and_gradient_do_not_depend_on_packs_and_ranks(bench, method: str, settings: dict) -> None:
    config = METHODS[method].config(**settings)
    rows, pack_tokens = rows_of(method), PACK_TOKENS[METHODS[method].inputs]
    loss, gradients = alone(bench, config, rows)
    process = OneProcess(bench, config, Layout.SHARED)

    one_pack = process.step(rows, world_size=1, pack_tokens=100_000)
    assert one_pack.num_micro_batches == 1
    assert_close(one_pack, loss, gradients)

    packs = process.step(rows, world_size=1, pack_tokens=pack_tokens)
    assert packs.num_micro_batches >= 4
    assert_close(packs, loss, gradients)
    # What a loss that averages over each pack would have given: a million tolerances away.
    assert abs(packs.mean_of_packs / loss.item() - 1) > 1e6 * TOLERANCE

    ranks = process.step(rows, world_size=2, pack_tokens=pack_tokens)
    assert len(set(ranks.rows_by_rank)) == 2 and ranks.num_dummies > 0
    assert_close(ranks, loss, gradients)

    if method == "kto" and config.needs_reference_point:
        assert one_pack.kl != 0 and ranks.kl == pytest.approx(one_pack.kl, rel=TOLERANCE)


@pytest.mark.parametrize("layout", [Layout.PLAIN, Layout.PADDED])
@pytest.mark.parametrize(("method", "settings"), RUNS)
def test_other_layouts_agree(bench, method: str, settings: dict, layout: Layout) -> None:
    config = METHODS[method].config(**settings)
    rows, pack_tokens = rows_of(method), PACK_TOKENS[METHODS[method].inputs]
    process = OneProcess(bench, config, layout)
    found = process.step(rows, world_size=3, pack_tokens=pack_tokens)
    assert len(found.rows_by_rank) == 3 and found.num_micro_batches > 1
    assert_close(found, *alone(bench, config, rows))


def test_the_order_of_rows_does_not_matter(bench) -> None:
    config = METHODS["cpo"].config()
    rows = rows_of("cpo")
    process = OneProcess(bench, config, Layout.SHARED)
    first = process.step(rows, world_size=2, pack_tokens=60)
    second = process.step(rows[::-1], world_size=2, pack_tokens=60)
    assert_close(first, torch.tensor(second.loss, dtype=torch.float64), second.gradients)
