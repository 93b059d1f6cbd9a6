"""Checks 5, 6 and 14 on rows whose numbers are known."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

from ds_align.config import METHODS, DPOConfig
from ds_align.doctor import TextFacts
from ds_align.doctor.pairs import far_shares
from ds_align.doctor.texts import is_garbled, read_texts
from ds_align.splits import load_splits
from tests.distributed import tiny
from tests.doctor.patients import CHATML, EOS, check, facts_of, ids, labelled, make_tokenizer, texts


@dataclass(frozen=True)
class Reported:
    """What a scan for duplicates or overlap gives, as far as the checks read it."""

    num_rows: int = 0
    counts: dict | None = None
    findings: tuple = ()
    exact: int = 0
    near: int = 0


@dataclass(frozen=True)
class Example:
    kind: str
    origins: tuple[str, ...]
    similarity: float = 1.0


def test_repeated_and_contradictory_rows():
    row = {"prompt": "a", "chosen": "yes", "rejected": "nay"}
    turned = {"prompt": "a", "chosen": "nay", "rejected": "yes"}
    equal = {"prompt": "b", "chosen": "yes", "rejected": "yes"}
    found = check(5, facts_of([row, row, turned, equal, *texts(2)]))
    assert found.level == "warning"
    assert found.value == {"equal": 1, "unusable": 0, "duplicate": 1, "contradictory": 1}
    assert check(5, facts_of(texts(6))).level == "ok"


def test_nearly_equal_answers_above_a_tenth():
    facts = facts_of(texts(20))
    for number, level in ((2, "ok"), (3, "warning")):  # 2 of 20 is a tenth, 3 are more
        report = Reported(20, {"near_equal": number, "equal": 0, "duplicate": 0, "contradictory": 0})
        found = check(5, replace(facts, texts=TextFacts(20, duplicates=report)))
        assert (found.level, found.value["near_equal"]) == (level, number)


def test_rows_that_nearly_repeat_others_are_a_warning():
    near = Example("near_duplicate", ("data.jsonl:1", "data.jsonl:4"))
    report = Reported(20, {"near_duplicate": 1, "near_equal": 0}, (near,))
    found = check(5, replace(facts_of(texts(20)), texts=TextFacts(20, duplicates=report)))
    assert (found.level, found.message) == ("warning", "1 rows nearly repeat an earlier one")
    assert found.remedy == "leave them out with --deduplicate near"
    assert found.examples == ("near_duplicate: data.jsonl:1 and data.jsonl:4",)


def test_rows_that_contradict_others_but_for_case_are_a_warning():
    near = Example("near_contradictory", ("data.jsonl:1", "data.jsonl:4"))
    report = Reported(20, {"near_contradictory": 2}, (near,))
    found = check(5, replace(facts_of(texts(20)), texts=TextFacts(20, duplicates=report)))
    assert (found.level, found.value["near_contradictory"]) == ("warning", 2)
    assert found.message.startswith("2 rows say the opposite of another one, case")
    assert found.examples == ("near_contradictory: data.jsonl:1 and data.jsonl:4",)


def mixed(tmp_path, *parts: list[dict], method="dpo", **settings):
    """Facts of a mixture of these parts."""
    named = []
    for number, rows in enumerate(parts):
        path = tmp_path / f"part{number}.jsonl"
        tiny.write_jsonl(path, rows)
        named.append({"path": str(path)})
    config = METHODS[method].config(mixture=named, dataset_cache_dir="none", **settings)
    facts = facts_of(texts(6)) if method == "dpo" else facts_of(labelled(6, 6), method=method)
    return replace(facts, config=config, train=load_splits(config, make_tokenizer()).train)


def test_the_texts_of_a_mixture_are_read(tmp_path):
    others = [row | {"prompt": f"other {row['prompt']}"} for row in texts(6)]
    facts = mixed(tmp_path, texts(6), others)
    assert (check(5, facts).level, check(5, facts).value["repeats_across_parts"]) == ("ok", 0)
    # One part has the prompt under another name; both have a row that the other nearly repeats.
    long = "this is a rather long answer to nothing in particular"
    first = [{"prompt": "why?", "chosen": long, "rejected": "no"}, *texts(3)]
    second = [{"question": "why? ", "chosen": long.upper(), "rejected": "no"}]
    second += [
        {"question": f"{number}!", "chosen": "caf\u00c3\u00a9 \u00c3\u00a9", "rejected": "no"}
        for number in range(2)
    ]
    paths = [
        tiny.write_jsonl(tmp_path / f"{name}.jsonl", rows) for name, rows in (("a", first), ("b", second))
    ]
    parts = [{"path": str(paths[0])}, {"path": str(paths[1]), "columns": {"prompt": "question"}}]
    config = DPOConfig(mixture=parts, dataset_cache_dir="none")
    found = read_texts(config, load_splits(config, make_tokenizer()))
    assert (found.num_rows, found.num_garbled) == (7, 2)
    assert found.duplicates.counts["near_duplicate"] == 1
    (finding,) = [f for f in found.duplicates.findings if f.kind == "near_duplicate"]
    assert finding.origins == (f"{paths[0]}:1", f"{paths[1]}:1")


def test_a_mixture_of_pairs_and_labelled_answers_is_read_as_both(tmp_path):
    pairs = [*texts(2), texts(1)[0]]
    answers = [*labelled(2, 2), labelled(1, 0)[0]]
    paths = [tiny.write_jsonl(tmp_path / f"{n}.jsonl", rows) for n, rows in enumerate((pairs, answers))]
    config = METHODS["kto"].config(mixture=[{"path": str(path)} for path in paths], dataset_cache_dir="none")
    found = read_texts(config, load_splits(config, make_tokenizer()))
    assert (found.num_rows, found.duplicates.num_rows) == (8, 8)
    assert found.duplicates.counts["duplicate"] == 2


def test_rows_that_stand_in_two_parts_of_a_mixture(tmp_path):
    turned = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in texts(2)]
    third = [row | {"prompt": f"other {row['prompt']}"} for row in texts(6)]
    found = check(5, mixed(tmp_path, texts(6), [*texts(6)[:2], *turned, *third[:2]], third))
    # The second part repeats two rows of the first, the third two of the second; each of the two turned
    # rows is opposed by one row of the first part, and opposes it; the second has both senses itself.
    assert found.value["repeats_across_parts"] == 4
    assert found.value["contradictory_across_parts"] == 4
    assert found.level == "warning" and "4 rows repeat a row of an earlier part" in found.message


def test_labelled_answers_that_stand_in_two_parts_of_a_mixture(tmp_path):
    rows = labelled(3, 3)
    turned = [row | {"label": not row["label"]} for row in rows[:2]]
    found = check(5, mixed(tmp_path, rows, [*turned, rows[5]], method="kto"))
    assert found.value["repeats_across_parts"] == 1
    assert found.value["contradictory_across_parts"] == 4


def test_parts_are_held_against_each_other_by_the_command_alone(tmp_path):
    facts = mixed(tmp_path, texts(6), texts(6))
    assert check(5, facts).value["repeats_across_parts"] == 6
    assert "repeats_across_parts" not in check(5, replace(facts, at_start=True)).value


def test_token_ids_beside_conversations_are_none():
    talk = {"prompt": [{"role": "user", "content": "a"}], "chosen": "yes", "rejected": "nay"}
    tokens, talks = facts_of([ids([5], [6, EOS], [7, EOS])]), facts_of([talk])
    for train, other in ((tokens, talks), (talks, tokens)):
        # Nobody knows what wrote the ids.
        assert check(14, replace(train, evaluation=other.train, eval_set="given")).level == "ok"


def test_strings_beside_conversations_are_a_warning():
    talk = [
        {"prompt": [{"role": "user", "content": f"{number}!"}], "chosen": "yes", "rejected": "nay"}
        for number in range(3)
    ]
    facts = facts_of(texts(3), tokenizer=make_tokenizer(template=CHATML))
    for evaluation, level in ((talk, "warning"), (texts(9)[6:], "ok")):
        other = facts_of(evaluation, tokenizer=make_tokenizer(template=CHATML)).train
        found = check(14, replace(facts, evaluation=other, eval_set="given"))
        assert found.level == level
    assert (
        "training rows are written as plain strings"
        in check(14, replace(facts, evaluation=facts_of(talk).train, eval_set="given")).message
    )


def test_examples_name_the_rows_of_the_file():
    row = {"prompt": "a", "chosen": "yes", "rejected": "nay"}
    report = Reported(2, {"duplicate": 1}, (Example("duplicate", ("data.jsonl:1", "data.jsonl:2")),))
    found = check(5, replace(facts_of([row, row]), texts=TextFacts(2, duplicates=report)))
    assert found.examples == ("duplicate: data.jsonl:1 and data.jsonl:2",)


def lengths(pairs: list[tuple[int, int]]) -> list[dict]:
    """Pairs of so many tokens, the EOS included."""
    return [
        ids([5, 6 + number], [7] * (chosen - 1) + [EOS], [8] * (rejected - 1) + [EOS])
        for number, (chosen, rejected) in enumerate(pairs)
    ]


def test_length_bias_by_the_mean():
    # 2 + 2 + 9 = 13 against 3 + 3 + 4 = 10: 1.3; one of three is longer.
    found = check(6, facts_of(lengths([(2, 3), (2, 3), (9, 4)])))
    assert found.level == "warning"
    assert found.value["ratio"] == pytest.approx(1.3)
    assert found.value["chosen_longer"] == pytest.approx(1 / 3)
    # 12 against 10 is the limit itself.
    assert check(6, facts_of(lengths([(2, 3), (2, 3), (8, 4)]))).level == "ok"


def test_length_bias_by_the_share():
    # 3 of 5 is the limit, 4 of 5 is more, though the means are equal.
    assert check(6, facts_of(lengths([(4, 3), (4, 3), (4, 3), (3, 4), (3, 5)]))).level == "ok"
    found = check(6, facts_of(lengths([(4, 3), (4, 3), (4, 3), (4, 3), (3, 7)])))
    assert (found.level, found.value["chosen_longer"], found.value["ratio"]) == ("warning", 0.8, 1.0)
    assert "simpo" in found.remedy
    assert "sigmoid_norm" in found.remedy
    assert "ld_alpha" in found.remedy


@pytest.mark.parametrize(
    ("method", "settings"),
    [("simpo", {}), ("ipo", {}), ("dpo", {"loss_type": "sigmoid_norm"}), ("dpo", {"ld_alpha": 0.5})],
)
def test_length_bias_is_information_where_the_loss_divides_by_length(method, settings):
    found = check(6, facts_of(lengths([(9, 2)]), method=method, **settings))
    assert found.level == "info"


def test_length_bias_of_unpaired_rows():
    rows = [
        {"prompt_ids": [5], "completion_ids": [7] * size, "label": label}
        for size, label in ((4, True), (6, True), (2, False), (5, False))
    ]
    found = check(6, facts_of(rows, method="kto"))
    # (4 + 6) / (2 + 5); of the four couples (4,2) (4,5) (6,2) (6,5) three are longer.
    assert found.value["ratio"] == pytest.approx(10 / 7)
    assert found.value["chosen_longer"] == pytest.approx(0.75)
    assert check(6, facts_of(labelled(3, 2), method="kto")).level == "ok"


def test_prompts_that_are_trained_and_evaluated():
    facts, others = facts_of(texts(5)), facts_of([*texts(2), *texts(3, prompt="another?")])
    together = replace(facts, evaluation=others.train, eval_set="given")
    found = check(14, together)
    assert (found.level, found.value["shared_prompts"]) == ("warning", 2)
    report = Reported(exact=2, near=1)
    found = check(14, replace(together, texts=TextFacts(5, overlap=report)))
    assert (found.value["shared_prompts"], found.value["near_prompts"]) == (2, 1)
    assert check(14, replace(together, eval_set="train")).level == "ok"
    apart = facts_of(texts(3, prompt="another?"))
    assert check(14, replace(facts, evaluation=apart.train, eval_set="given")).level == "ok"


def test_odd_characters():
    rows = texts(4)
    rows[1]["chosen"] = "yes\u202eno"
    rows[2]["prompt"] = "nul\0?"
    found = check(14, facts_of(rows))
    assert found.level == "warning"
    assert (found.value["rows_with_bidi_controls"], found.value["rows_with_nul"]) == (1, 1)
    clean = facts_of(texts(2))
    assert check(14, clean).level == "ok"
    found = check(14, replace(clean, texts=TextFacts(2, 1, ("data.jsonl:2",))))
    assert (found.level, found.examples) == ("warning", ("data.jsonl:2",))


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252"])
@pytest.mark.parametrize("text", ["القاهرة", "déjà vu", "日本語", "“well” — then"])
def test_utf8_read_as_another_encoding_is_found(text, encoding):
    wrong = text.encode().decode(encoding, "ignore")
    assert is_garbled(wrong)
    assert not is_garbled(text)


def test_odd_but_meant_texts_are_not_garbled():
    for text in ("plain", "CAFÉ”", "naïve façade", "Ça va ? Été", "ÄÖÜ äöü ß", "لا\u200cيزال"):
        assert not is_garbled(text), text
    assert is_garbled("lost \ufffd here")


def test_dialect_shares_that_are_more_than_five_points_off():
    target = {"msa": 0.6, "egy": 0.3, "glf": 0.1}
    assert far_shares(target, {"msa": 0.65, "egy": 0.25, "glf": 0.1}) == {}
    far = far_shares(target, {"msa": 0.66, "egy": 0.34})
    assert far == {"msa": pytest.approx(6.0), "glf": pytest.approx(-10.0)}


def test_dialects_come_from_the_column_and_only_for_arabic(tmp_path):
    def facts(rows: list[dict]) -> TextFacts:
        config = DPOConfig(dataset_path=str(tiny.write_jsonl(tmp_path / "rows.jsonl", rows)))
        return read_texts(config, load_splits(config, make_tokenizer()))

    rows = [{"prompt": f"{number}؟", "chosen": "نعم yes", "rejected": "لا no"} for number in range(4)]
    labelled_rows = [row | {"dialect": "egy" if place else "msa"} for place, row in enumerate(rows)]
    assert facts(labelled_rows).dialects == {"msa": 0.25, "egy": 0.75}
    assert facts(texts(4)).dialects is None
    # A column that means something else stops nothing that does not ask for dialects.
    found = facts([row | {"dialect": "A"} for row in rows])
    assert (found.dialects, len(found.remarks)) == (None, 1)
