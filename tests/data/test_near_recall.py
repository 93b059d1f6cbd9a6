"""How many planted near-duplicates are found, and that nothing else is."""

from __future__ import annotations

import random

import pytest

from ds_align.data.duplicates import prompt_overlap, scan_duplicates
from ds_align.data.minhash import NUM_BANDS, band_keys
from ds_align.data.schemas import Preference
from ds_align.data.text_keys import edit_similarity, normalise
from tests.data import preference_texts

# Every planted row has 0.9 to 0.93 of its original in the field that differs most.
WINDOW = (0.9, 0.93)


def planted(rng: random.Random, script: str, length: int, number: int) -> tuple[list[Preference], int]:
    """Originals among rows that differ from one of them in every field, and how many those are."""
    fields = [
        [preference_texts.text(rng, script, max(5, round(length * part))) for part in (0.5, 1.0, 1.0)]
        for _ in range(number)
    ]
    copies = []
    for old in fields:
        new = [changed_to(rng, text) for text in old]
        if None not in new:
            copies.append(new)
    rows = fields + copies
    order = list(range(len(rows)))
    rng.shuffle(order)
    made = [Preference(f"{index}", rows[index][0], tuple(rows[index][1:])) for index in order]
    return made, len(copies)


def changed_to(rng: random.Random, text: str) -> str | None:
    """The text with words changed until it is within the window; None where no attempt ends there."""
    for _ in range(30):
        new = text
        while similarity(text, new) > WINDOW[1]:
            new = preference_texts.changed(rng, new, 1)
        if similarity(text, new) >= WINDOW[0]:
            return new
    return None


def similarity(one: str, other: str) -> float:
    return edit_similarity(normalise(one), normalise(other), 0.0)


@pytest.mark.parametrize("script", preference_texts.SCRIPTS)
@pytest.mark.parametrize("length", [12, 40, 150])
def test_planted_rows_are_found_and_no_others(script: str, length: int) -> None:
    rows, num_copies = planted(random.Random(f"{script}{length}"), script, length, 120)
    assert num_copies > 60
    report = scan_duplicates(rows, max_examples=1000)
    found = [finding for finding in report.findings if finding.kind == "near_duplicate"]
    assert report.counts["duplicate"] == report.counts["contradictory"] == 0
    assert report.counts["near_duplicate"] >= 0.95 * num_copies
    by_origin = {row.origin: row for row in rows}
    for finding in found:
        one, other = (by_origin[origin] for origin in finding.origins)
        pairs = zip((one.prompt, *one.completions), (other.prompt, *other.completions), strict=True)
        assert min(similarity(*texts) for texts in pairs) == pytest.approx(finding.similarity)
        assert finding.similarity >= 0.9
    assert len(report.removable) == report.counts["near_duplicate"] <= num_copies


@pytest.mark.parametrize("script", ["latin", "arabic", "han"])
def test_planted_prompts_are_found(script: str) -> None:
    rng = random.Random(script)
    train = [preference_texts.text(rng, script, 20) for _ in range(200)]
    changed = [new for text in train[:100] if (new := changed_to(rng, text)) is not None]
    fresh = [preference_texts.text(rng, script, 20) for _ in range(100)]
    rows = [
        [Preference(f"{n}", text, ("a", "b")) for n, text in enumerate(part)]
        for part in (train, changed + fresh)
    ]
    report = prompt_overlap(*rows)
    assert len(changed) > 60
    assert report.exact == 0
    assert 0.95 * len(changed) <= report.near <= len(changed)


def test_a_band_is_shared_as_often_as_the_features_are() -> None:
    """One minimum a field: P(equal) is the Jaccard similarity; of four in a band, its fourth power."""
    words = [f"w{number}" for number in range(61)]
    others = words[:50] + [f"v{number}" for number in range(11)]
    # 62 features each (61 neighbours and an end each): the first 50 are common, so J = 50 / 74.
    jaccard = 50 / 74
    shared = total = 0
    for trial in range(60):
        texts = [" ".join(f"{word}x{trial}" for word in part) for part in (words, others)]
        keys = band_keys([texts], range(NUM_BANDS))
        shared += int((keys[:, 0] == keys[:, 1]).sum())
        total += NUM_BANDS
    expected = jaccard**4
    # Five standard deviations, as if the bands of one trial were independent.
    assert abs(shared / total - expected) < 5 * (expected * (1 - expected) / total) ** 0.5


def test_band_keys_are_those_of_each_text_by_itself() -> None:
    rng = random.Random(1)
    texts = [
        normalise(preference_texts.text(rng, script, n))
        for script in preference_texts.SCRIPTS
        for n in (1, 9)
    ]
    texts += ["", "!?", "a" * 1000]
    together = band_keys([texts, texts[::-1], texts], range(NUM_BANDS))
    for place, text in enumerate(texts):
        alone = band_keys([[text], [texts[::-1][place]], [text]], range(NUM_BANDS))
        assert (together[:, place] == alone[:, 0]).all()
    part = band_keys([texts, texts[::-1], texts], range(5, 9))
    assert (part == together[5:9]).all()


def test_edit_similarity_is_levenshteins() -> None:
    assert edit_similarity("kitten", "sitting", 0.0) == pytest.approx(1 - 3 / 7)
    assert edit_similarity("abcdefghij", "abcdefghiX", 0.9) == pytest.approx(0.9)
    assert edit_similarity("abcdefghij", "abcdefghiX", 0.91) == 0.0
    assert edit_similarity("", "", 0.9) == 1.0
