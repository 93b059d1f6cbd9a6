"""The paired losses one pair at a time in 50-digit arithmetic, written from the papers' formulas."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mpmath import exp, log, log1p, mp, mpf

mp.dps = 50


@dataclass(frozen=True)
class Pair:
    """One pair: summed log-probs under policy and reference, and token counts."""

    pi_c: float
    pi_r: float
    ref_c: float
    ref_r: float
    n_c: int = 1
    n_r: int = 1

    @property
    def c(self) -> mpf:
        return mpf(self.pi_c) - mpf(self.ref_c)

    @property
    def r(self) -> mpf:
        return mpf(self.pi_r) - mpf(self.ref_r)


@dataclass(frozen=True)
class Settings:
    beta: float = 0.1
    smoothing: float = 0.0
    divergence: str = "reverse_kl"
    alpha: float = 0.5
    tau: float = 0.05
    delta: float = 0.0


def ls(x: mpf) -> mpf:
    return -log1p(exp(-x))


def sg(x: mpf) -> mpf:
    return 1 / (1 + exp(-x))


def cross_entropy(x: mpf, e: mpf) -> mpf:
    return -(1 - e) * ls(x) - e * ls(-x)


def f_prime(log_u: mpf, kind: str, alpha: float) -> mpf:
    u, a = exp(log_u), mpf(alpha)
    return {
        "reverse_kl": lambda: log(u),
        "forward_kl": lambda: 1 - 1 / u,
        "js": lambda: log(2 * u / (1 + u)),
        "alpha": lambda: (1 - u ** (-a)) / a,
    }[kind]()


def rewards(name: str, pair: Pair, s: Settings) -> tuple[mpf, mpf]:
    if name in ("ipo", "sigmoid_norm"):
        return s.beta * pair.c / pair.n_c, s.beta * pair.r / pair.n_r
    return s.beta * f_prime(pair.c, s.divergence, s.alpha), s.beta * f_prime(pair.r, s.divergence, s.alpha)


def _exo(x: mpf, e: mpf) -> mpf:
    e = max(e, mpf(0.001))
    return sg(x) * (ls(x) - log(1 - e)) + sg(-x) * (ls(-x) - log(e))


def _discopop(x: mpf, tau: mpf) -> mpf:
    share = sg(x / tau)
    return -ls(x) * (1 - share) + exp(-x) * share


OF_DIFFERENCE: dict[str, Callable[[mpf, mpf, Settings], mpf]] = {
    "sigmoid": lambda x, e, _: cross_entropy(x, e),
    "hinge": lambda x, _e, _: max(mpf(0), 1 - x),
    "exo_pair": lambda x, e, _: _exo(x, e),
    "robust": lambda x, e, _: (-(1 - e) * ls(x) + e * ls(-x)) / (1 - 2 * e),
    "discopop": lambda x, _e, s: _discopop(x, mpf(s.tau)),
}
# Of beta c, beta r and delta.
OF_TWO: dict[str, Callable[[mpf, mpf, mpf], mpf]] = {
    "nca_pair": lambda c, r, _: -(ls(c) + ls(-c) / 2 + ls(-r) / 2),
    "bco_pair": lambda c, r, delta: -ls(c - delta) - ls(-(r - delta)),
    "apo_zero": lambda c, r, _: 1 - sg(c) + sg(r),
    "apo_down": lambda c, r, _: sg(c) + 1 - sg(c - r),
}


def one_pair(name: str, pair: Pair, s: Settings) -> mpf:
    """The loss of a form that looks at one pair by itself."""
    beta, e = mpf(s.beta), mpf(s.smoothing)
    if name in OF_DIFFERENCE:
        scores = f_prime(pair.c, s.divergence, s.alpha), f_prime(pair.r, s.divergence, s.alpha)
        return OF_DIFFERENCE[name](beta * (scores[0] - scores[1]), e, s)
    if name in OF_TWO:
        return OF_TWO[name](beta * pair.c, beta * pair.r, mpf(s.delta))
    target, per_token = 1 / (2 * beta), pair.c / pair.n_c - pair.r / pair.n_r
    if name == "sppo_hard":
        return (pair.c - target) ** 2 + (pair.r + target) ** 2
    if name == "ipo":
        return (1 - e) * (per_token - target) ** 2 + e * (per_token + target) ** 2
    assert name == "sigmoid_norm", name
    return cross_entropy(beta * per_token, e)


def dpo(name: str, pairs: Sequence[Pair], s: Settings) -> list[mpf]:
    """The losses of a batch; those of aot and aot_unpaired in the order of the rows."""
    if name not in ("aot", "aot_unpaired"):
        return [one_pair(name, pair, s) for pair in pairs]
    if name == "aot":
        upper = [mpf(pair.pi_c) - mpf(pair.pi_r) for pair in pairs]
        lower = sorted(mpf(pair.ref_c) - mpf(pair.ref_r) for pair in pairs)
    else:
        upper, lower = [pair.c for pair in pairs], sorted(pair.r for pair in pairs)
    order = sorted(range(len(pairs)), key=upper.__getitem__)
    ranks = [order.index(row) for row in range(len(pairs))]
    return [
        cross_entropy(s.beta * (value - lower[rank]), mpf(s.smoothing))
        for value, rank in zip(upper, ranks, strict=True)
    ]


def alphapo_reward(total: float, length: int, beta: float, alpha: float) -> mpf:
    mean_probability = exp(mpf(total) / length)
    return beta * (
        log(mean_probability) if alpha == 0 else (1 - mean_probability ** mpf(-alpha)) / mpf(alpha)
    )


def simpo(pair: Pair, beta: float, gamma: float, smoothing: float, alpha: float) -> mpf:
    chosen = alphapo_reward(pair.pi_c, pair.n_c, beta, alpha)
    return cross_entropy(chosen - alphapo_reward(pair.pi_r, pair.n_r, beta, alpha) - gamma, mpf(smoothing))
