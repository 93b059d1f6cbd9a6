"""Training on two ranks under ZeRO-3 ends where a pencil says, and goes there on the way that it says.

The model is a bigram table and every completion has one token, so a completion's log-prob is a log-softmax of
one row. h = log pi(A)/ref(A) - log pi(B)/ref(B), m = log pi(A) - log pi(B), s = sigmoid, q = 3/4 the share of
pairs that say A > B.

Plain SGD on one row: d(-log pi(A) + log pi(B))/d logit is -1 at A, +1 at B and 0 elsewhere (the normaliser
cancels), so a loss L(h) moves h by -2 lr L'(h) a step.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from tests.distributed.bigram import write_bigram
from tests.distributed.launching import launch
from tests.distributed.programs.closed_forms import CASES, KTO_WEIGHTS, MIXED, PROMPT, A, B, C
from tests.distributed.tiny import VOCABULARY

pytestmark = pytest.mark.distributed

START = {A: 0.5, B: -0.3, C: 1.0}
QUALITY = 0.75
# CPO's NLL is over the whole vocabulary: e^-30 keeps the other 110 words out of the normaliser.
NEGLIGIBLE = -30.0


def start_table() -> torch.Tensor:
    """Uniform, but for the three words of the DPO optimum."""
    table = torch.zeros(VOCABULARY, VOCABULARY)
    for token, logit in START.items():
        table[PROMPT, token] = logit
    return table


def two_words_table() -> torch.Tensor:
    """After the prompt come A and B, equally likely, and next to nothing else."""
    table = torch.zeros(VOCABULARY, VOCABULARY)
    table[PROMPT] = NEGLIGIBLE
    table[PROMPT, [A, B]] = 0.0
    return table


def random_table(seed: int) -> torch.Tensor:
    return torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def tables() -> dict[str, torch.Tensor]:
    return {
        "uniform": torch.zeros(VOCABULARY, VOCABULARY),
        "start": start_table(),
        "two_words": two_words_table(),
        "policy": random_table(6),
        "reference": random_table(7),
    }


@pytest.fixture(scope="module")
def bigrams(tables, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bigrams")
    for name, table in tables.items():
        write_bigram(folder / name, table)
    return folder


@pytest.fixture(scope="module")
def results(bigrams: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """name of a case -> its losses, z0 and tables, from two ranks under ZeRO-3."""
    out = tmp_path_factory.mktemp("closed_forms") / "two.pt"
    launch("closed_forms.py", bigrams, out, timeout=500).check()
    return torch.load(out)


@pytest.fixture(scope="module")
def one_rank(bigrams: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The case of z0 in one process."""
    out = tmp_path_factory.mktemp("closed_forms") / "one.pt"
    launch("closed_forms.py", bigrams, out, "kto z0", num_ranks=1).check()
    return torch.load(out)["kto z0"]


def gap(result: dict, first: int = A, second: int = B) -> list[float]:
    """log pi(first) - log pi(second), before and after every step: a difference of logits."""
    rows = result["tables"][:, 0].double()
    return (rows[:, first] - rows[:, second]).tolist()


def sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x))


def entropy(share: float) -> float:
    return -share * math.log(share) - (1.0 - share) * math.log(1.0 - share)


def test_runs_are_padded_and_counted_as_meant(results):
    # Seven rows in global batches of six: every second step is a single row, and one rank has none of it.
    assert results["ipo path"]["counts"] == [6, 1] * 6
    assert results["dpo path"]["counts"] == [3] * 12
    assert {result["layout"] for result in results.values()} == {"padded"}


@pytest.mark.parametrize(
    ("name", "loss"),
    [
        ("dpo path", math.log(2.0)),
        ("dpo optimum", math.log(2.0)),
        ("ipo path", 1.0 / (4.0 * 0.25**2)),
        ("ipo optimum", 1.0 / (4.0 * 0.4**2)),
        ("kto step 0", 0.5),
    ],
)
def test_first_loss_where_policy_is_reference(results, name, loss):
    assert results[name]["losses"][0] == pytest.approx(loss, rel=1e-6)


def test_dpo_ends_at_the_tilted_reference(results):
    # The pairs follow Bradley-Terry with R = (2 ln 3, ln 3, 0): s(ln 3) = 3/4 and s(2 ln 3) = 9/10. So
    # beta h = R_i - R_j is stationary for every pair at once and pi(i) ~ ref(i) exp(R_i / beta), whatever the
    # number of comparisons of each two words.
    beta, reward = 0.8, {A: 2.0 * math.log(3.0), B: math.log(3.0), C: 0.0}
    for first, second in ((A, B), (B, C), (A, C)):
        expected = START[first] - START[second] + (reward[first] - reward[second]) / beta
        assert gap(results["dpo optimum"], first, second)[-1] == pytest.approx(expected, abs=1e-5)
    # There the loss is the mean entropy: of 18 pairs 8 have odds 3 : 1, 10 have 9 : 1.
    expected = (8 * entropy(0.75) + 10 * entropy(0.9)) / 18
    assert results["dpo optimum"]["losses"][-1] == pytest.approx(expected, rel=1e-6)


def test_dpo_with_label_smoothing(results):
    # beta h* = ln((1 - e)/e) = ln 4 at e = 0.2; loss* = entropy(e).
    assert 0.5 * gap(results["dpo smoothing"])[-1] == pytest.approx(math.log(4.0), abs=1e-5)
    assert results["dpo smoothing"]["losses"][-1] == pytest.approx(entropy(0.2), rel=1e-6)


def test_dpo_goes_the_way_of_its_recurrence(results):
    # L'(h) = -beta s(-beta h), so h <- h + 2 lr beta s(-beta h).
    beta, learning_rate, h, expected = 0.5, 0.7, 0.0, [0.0]
    for _ in range(CASES["dpo path"].steps):
        h += 2.0 * learning_rate * beta * sigmoid(-beta * h)
        expected.append(h)
    assert gap(results["dpo path"]) == pytest.approx(expected, rel=1e-5, abs=1e-7)
    losses = [math.log1p(math.exp(-beta * h)) for h in expected[:-1]]
    assert results["dpo path"]["losses"] == pytest.approx(losses, rel=1e-5)


def test_ipo_with_a_share_of_correct_labels(results):
    # E L = p (h - t)^2 + (1 - p)(h + t)^2 with t = 1/(2 beta): h* = (2p - 1) t, E L* = 4 p (1 - p) t^2, which
    # is p (1 - p)/beta^2.
    beta = 0.4
    assert gap(results["ipo optimum"])[-1] == pytest.approx((2 * QUALITY - 1) / (2 * beta), abs=1e-5)
    expected = QUALITY * (1 - QUALITY) / beta**2
    assert results["ipo optimum"]["losses"][-1] == pytest.approx(expected, rel=1e-6)


def cosine_with_warmup(num_steps: int, warmup: int) -> list[float]:
    """The factor of the learning rate of each step: from 0 in equal steps, then half a cosine."""
    rise = [step / warmup for step in range(warmup)]
    rest = num_steps - warmup
    return rise + [(1.0 + math.cos(math.pi * step / rest)) / 2.0 for step in range(rest)]


def test_ipo_goes_the_way_of_its_product(results):
    # L'(h) = 2 (h - t): a step moves h by 4 lr_s (t - h), so t - h_k = t prod(1 - 4 lr_s). Every row is the
    # same pair, so neither the partial batches nor the split over ranks and accumulation steps may show.
    case = CASES["ipo path"]
    target, rest, expected = 1.0 / (2.0 * 0.25), 1.0, [0.0]
    for factor in cosine_with_warmup(case.steps, warmup=3):
        rest *= 1.0 - 4.0 * 0.1 * factor
        expected.append(target * (1.0 - rest))
    assert expected[1] == 0.0  # the warm-up starts at a learning rate of 0
    assert 0.9 * target < expected[-1] < 0.99 * target  # neither the start nor the end of the way
    assert gap(results["ipo path"]) == pytest.approx(expected, rel=1e-5, abs=1e-7)
    losses = [(target - h) ** 2 for h in expected[:-1]]
    assert results["ipo path"]["losses"] == pytest.approx(losses, rel=1e-5)


@pytest.mark.parametrize(
    ("beta", "alpha", "expected"), [(0.1, 0.0, 10.98612), (0.1, 1.0, 1.21938504), (1.0, 1.0, math.log(3.0))]
)
def test_cpo_with_label_noise(results, beta, alpha, expected):
    # The NLL is that of the chosen word over the whole vocabulary, a mean per token. With two words alone
    # -log pi(A) = -ls(m), so E L = -q ls(beta m) - (1 - q) ls(-beta m) - alpha (q ls(m) + (1 - q) ls(-m)) and
    # beta (q - s(beta m)) + alpha (q - s(m)) = 0 at the optimum.
    pull = beta * (QUALITY - sigmoid(beta * expected)) + alpha * (QUALITY - sigmoid(expected))
    assert abs(pull) < 1e-8
    result = results[f"cpo {beta:g} {alpha:g}"]
    assert gap(result)[-1] == pytest.approx(expected, rel=1e-5)
    assert result["tables"][-1, 0].double().softmax(-1)[[A, B]].sum().item() == pytest.approx(1.0, abs=1e-9)


def test_simpo_with_label_noise(results):
    # E L' = 0 is q s(g - u) = (1 - q) s(g + u). With x = e^u and G = e^g, s(g - u) = G/(G + x) and
    # s(g + u) = G x/(1 + G x), so q (1 + G x) = (1 - q) x (G + x), i.e. (1 - q) x^2 - (2q - 1) G x - q = 0.
    growth = math.e
    root = (0.5 * growth + math.sqrt(0.25 * growth**2 + 0.75)) / 0.5
    assert math.log(root) == pytest.approx(1.78195956, abs=1e-8)
    assert 2.0 * gap(results["simpo"])[-1] == pytest.approx(math.log(root), abs=1e-5)


@pytest.mark.parametrize("weight", KTO_WEIGHTS)
def test_kto_turns_where_the_weighted_shares_meet(results, weight):
    # One completion, desirable in q = 1/4 of its four rows, one prompt alone, hence z0 = 0: E L' is
    # -beta s'(beta rho) (q w_d - (1 - q) w_u), 0 at w_d = 3 for w_u = 1 whatever rho; the first loss is
    # (q w_d + (1 - q) w_u)/2.
    result = results[f"kto weight {weight}"]
    assert result["losses"][0] == pytest.approx((0.25 * weight + 0.75) / 2.0, rel=1e-6)
    assert result["kl"] == [0.0] * 3
    way = gap(result)[-1]
    if weight == 3.0:
        assert abs(way) < 1e-8
    else:
        assert math.copysign(1.0, way) == math.copysign(1.0, weight - 3.0)
        assert abs(way) > 1e-3


def mismatched(number: int) -> int:
    """y' of a row: the completion of the next row, cyclic, with another prompt."""
    others = (MIXED[(number + shift) % len(MIXED)] for shift in range(1, len(MIXED)))
    return next(completion for prompt, completion, _ in others if prompt != MIXED[number][0])


def plain_kto(tables: dict[str, torch.Tensor], *, constant: bool = True) -> dict:
    """The case of z0 in float64, without an engine; constant=False lets the gradient through z0."""
    case = CASES["kto z0"]
    beta, learning_rate = case.settings["beta"], case.settings["learning_rate"]
    table = tables["policy"].double().requires_grad_()
    reference = tables["reference"].double().log_softmax(-1)
    losses, kl = [], []
    for step in range(case.steps):
        rows = range(4) if step % 2 == 0 else range(4, 5)
        ratios = table.log_softmax(-1) - reference
        prompts = torch.tensor([MIXED[row][0] for row in rows])
        rho = ratios[prompts, torch.tensor([MIXED[row][1] for row in rows])]
        z0 = ratios[prompts, torch.tensor([mismatched(row) for row in rows])].mean().clamp(min=0.0)
        z0 = z0.detach() if constant else z0
        sign = torch.tensor([1.0 if MIXED[row][2] else -1.0 for row in rows], dtype=torch.float64)
        loss = (1.0 - torch.sigmoid(sign * beta * (rho - z0))).mean()
        (gradient,) = torch.autograd.grad(loss, table)
        with torch.no_grad():
            table -= learning_rate * gradient
        losses.append(loss.item())
        kl.append(z0.item())
    return {"losses": losses, "kl": kl, "table": table.detach()[PROMPT : PROMPT + 4]}


def test_kto_takes_z0_as_a_constant(tables, results):
    expected, through = plain_kto(tables), plain_kto(tables, constant=False)
    assert max(expected["kl"]) > 0.1  # z0 took part
    found = results["kto z0"]
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert found["kl"] == pytest.approx(expected["kl"], rel=1e-5, abs=1e-6)
    end = found["tables"][-1].double()
    assert (end - expected["table"]).abs().max().item() < 1e-5
    assert (end - through["table"]).abs().max().item() > 1e-2


def test_kto_has_one_z0_for_any_number_of_ranks(results, one_rank):
    assert results["kto z0"]["kl"] == pytest.approx(one_rank["kl"], rel=1e-6, abs=1e-7)
    assert results["kto z0"]["losses"] == pytest.approx(one_rank["losses"], rel=1e-6)
    difference = (results["kto z0"]["tables"][-1] - one_rank["tables"][-1]).abs().max().item()
    assert difference < 1e-6
