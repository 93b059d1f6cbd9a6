"""Checks 7, 8, 10, 11 and 13: settings against the method's usual values and the size of the data."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ds_align.config import METHODS
from ds_align.doctor import Facts, MachineFacts
from tests.doctor.patients import check, facts_of, labelled


def settings(method: str = "dpo", num_steps: int | None = 100, **values) -> Facts:
    return Facts(METHODS[method].config(**values), num_steps=num_steps)


@pytest.mark.parametrize(
    ("method", "values", "level"),
    [
        ("dpo", {"beta": 0.01}, "ok"),
        ("dpo", {"beta": 0.5}, "ok"),
        ("dpo", {"beta": 0.6}, "warning"),
        ("dpo", {"beta": 0.009}, "warning"),
        ("simpo", {"beta": 2.0}, "ok"),
        ("simpo", {"beta": 10.0}, "ok"),
        ("simpo", {"beta": 0.9}, "warning"),
        ("simpo", {"beta": 11.0}, "warning"),
        ("simpo", {"gamma_beta_ratio": 1.0}, "ok"),
        ("simpo", {"gamma_beta_ratio": 1.1}, "warning"),
    ],
)
def test_beta(method, values, level):
    found = check(7, settings(method, **values))
    assert found.level == level
    # One owner: what the check says is what the settings say.
    said = settings(method, **values).config.warnings()
    assert bool(said) is (level == "warning")
    assert all(text in found.message for text in said)


@pytest.mark.parametrize(
    ("values", "level", "destructive"),
    [
        ({"learning_rate": 5e-6}, "ok", False),
        ({"learning_rate": 6e-6}, "warning", False),
        ({"learning_rate": 1e-5}, "warning", True),
        ({"learning_rate": 1e-5, "learning_rate_override": True}, "ok", True),
        ({"learning_rate": 1e-4, "use_lora": True}, "ok", False),
        ({"learning_rate": 2e-4, "use_lora": True}, "warning", False),
    ],
)
def test_learning_rate(values, level, destructive):
    found = check(8, settings(**values))
    assert (found.level, found.value["destructive"]) == (level, destructive)


def test_ipo_margin():
    found = check(10, settings("ipo", beta=0.1))
    assert (found.level, found.value) == ("info", {"margin": 5.0, "unit": "nats a token"})  # 1 / 0.2
    found = check(10, settings("ipo", beta=0.25, length_normalize=False))
    assert (found.value["margin"], "summed" in found.value["unit"]) == (2.0, True)
    assert check(10, settings("dpo")).level == "ok"
    assert check(10, settings("cpo", loss_type="ipo")).level == "info"


@pytest.mark.parametrize(
    ("num_good", "num_bad", "weights", "ratio", "level"),
    [
        (3, 3, {}, 1.0, "ok"),
        (4, 3, {}, 4 / 3, "ok"),
        (3, 2, {}, 1.5, "warning"),
        (2, 3, {}, 2 / 3, "warning"),
        (2, 4, {"desirable_weight": 2.0}, 1.0, "ok"),
        (3, 1, {"undesirable_weight": 2.5}, 1.2, "ok"),
    ],
)
def test_kto_balance(num_good, num_bad, weights, ratio, level):
    found = check(11, facts_of(labelled(num_good, num_bad), method="kto", **weights))
    assert found.level == level
    assert found.value["ratio"] == pytest.approx(ratio)


def test_kto_weight_to_use():
    rows = labelled(2, 6)
    found = check(11, facts_of(rows, method="kto"))
    # w n_d = 2 w must be from 6 to 8.
    low, high = found.value["desirable_weight_to_use"]
    assert (low, high) == (pytest.approx(3.0), pytest.approx(4.0))
    assert check(11, facts_of(rows, method="kto", desirable_weight=low)).level == "ok"
    assert check(11, facts_of(rows, method="kto", desirable_weight=high)).level == "ok"


def test_kto_rows_of_the_kl_estimate_must_be_mismatched():
    rows = labelled(3, 3)
    found = check(11, facts_of(rows, method="kto"))
    assert (found.level, found.value["rows_with_kl"], found.value["matched"]) == ("ok", 6, 0)
    given = [row | {"kl_completion": row["completion"]} for row in rows]
    found = check(11, facts_of(given, method="kto"))
    assert (found.level, found.value["matched"]) == ("error", 6)
    found = check(11, facts_of([given[0], *rows[1:]], method="kto"))
    assert (found.level, found.value["matched"], found.examples) == ("warning", 1, ("row 1",))


def test_one_label_alone():
    found = check(11, facts_of(labelled(3, 0), method="kto"))
    assert (found.level, "one of the two labels" in found.message) == ("warning", True)


def test_steps_and_warmup():
    assert check(13, settings(num_steps=50, warmup_ratio=0.3)).level == "ok"
    assert check(13, settings(num_steps=49)).value["num_steps"] == 49
    assert check(13, settings(num_steps=49)).level == "warning"
    assert check(13, settings(num_steps=100, warmup_steps=30)).level == "ok"
    found = check(13, settings(num_steps=100, warmup_steps=31))
    assert (found.level, found.message) == ("warning", "the warm-up takes 31 of 100 steps")
    # The settings say this themselves.
    assert check(13, settings(num_steps=60, max_steps=60, warmup_steps=70)).level == "ok"


@pytest.mark.parametrize(("state", "level"), [(90, "ok"), (91, "warning"), (100, "warning"), (101, "error")])
def test_memory(state, level):
    machine = MachineFacts(state_bytes=state, device_bytes=100)
    found = check(13, replace(settings(), machine=machine))
    assert (found.level, found.subject) == (level, "settings")
