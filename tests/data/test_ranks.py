"""Several ranks: one of a node tokenizes, all see the same data and the same errors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.distributed.launching import launch

pytestmark = pytest.mark.distributed
PROGRAM = Path(__file__).resolve().parent / "programs" / "shared_cache.py"


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> dict:
    work = tmp_path_factory.mktemp("ranks")
    rng = np.random.default_rng(0)
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    # Enough rows that the ranks meet while one of them works.
    lines = [
        json.dumps(dict(zip(names, rng.integers(2, 90, (3, 8)).tolist(), strict=True))) for _ in range(20_000)
    ]
    (work / "good.jsonl").write_text("\n".join(lines))
    (work / "bad.jsonl").write_text("\n".join([*lines, "{"]))
    (work / "file").write_text("")
    launch(PROGRAM, work, num_ranks=2, timeout=200).check()
    return json.loads((work / "facts.json").read_text())


def test_one_rank_tokenizes_and_the_other_maps(facts):
    assert sorted(rank["processes"] for rank in facts["cold"]) == [0, 1]
    assert [rank["processes"] for rank in facts["warm"]] == [0, 0]
    assert all(rank["mapped"] for name in ("cold", "warm") for rank in facts[name])


def test_without_a_cache_each_rank_does_it(facts):
    for name in ("none", "unusable", "in memory"):
        assert [(rank["processes"], rank["mapped"]) for rank in facts[name]] == [(1, False)] * 2, name
    assert all("cannot be used" in rank["notes"][0] for rank in facts["unusable"])
    assert facts["none"][0]["notes"] == []


def test_all_ranks_have_the_same_data(facts):
    assert len({rank["digest"] for name in ("cold", "warm", "none", "unusable") for rank in facts[name]}) == 1
    assert len({rank["digest"] for rank in facts["in memory"]}) == 1


def test_all_ranks_have_the_same_mixture(facts):
    first, second = facts["mixture"]
    assert first["digest"] == second["digest"] != facts["cold"][0]["digest"]
    assert sorted(rank["processes"] for rank in facts["mixture"]) == [0, 1]
    assert "mixture part 'train[:9000]'" in first["notes"][0]
    assert "3750 rows, 75.00% of all, of 9000 that are there" in second["notes"][0]


def test_an_error_reaches_every_rank(facts):
    first, second = facts["bad"]
    assert first["error"] == second["error"]
    assert "1 of 20001 rows cannot be used" in first["error"]
    first, second = facts["missing"]
    assert "nowhere.jsonl: no such file" in first["error"]
    assert second["error"] == first["error"].replace("DataError: ", "DataError: rank 0: ")
