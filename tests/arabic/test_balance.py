"""Balanced data sets: which rows, in what order, with what columns, from where."""

from __future__ import annotations

import json
from collections import Counter

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_align import ArabicDialectDatasetProcessor, DataError
from ds_align.config.dialects import DIALECTS
from tests.arabic.sentences import HELD_OUT, NEUTRAL, TUNED, lines


def labelled(*counts: tuple[str, int]) -> list[dict]:
    """Rows of these dialects, the dialects taking turns, numbered in file order."""
    left, rows = dict(counts), []
    while any(left.values()):
        for label in [label for label, number in left.items() if number]:
            left[label] -= 1
            number = len(rows)
            rows.append(
                {
                    "prompt": f"س{number}",
                    "chosen": "نعم",
                    "rejected": "لا",
                    "dialect": label,
                    "number": number,
                }
            )
    return rows


def balance(rows, shares, **settings_given):
    processor = ArabicDialectDatasetProcessor()
    return processor.balance_dataset(rows, shares, **settings_given), processor.report


def test_the_largest_part_without_a_row_twice_in_file_order() -> None:
    rows = labelled(("msa", 30), ("egy", 8), ("glf", 20), ("lev", 9), ("mgr", 5))
    found, report = balance(rows, {"msa": 0.3, "egy": 0.25, "glf": 0.25, "lev": 0.2})
    # egy is scarce: 8 / 0.25 = 32; 33 gives 9.9, 8.25, 8.25, 6.6 -> 10, 8, 8, 7; 34: 8.5 and 8.5 -> one 9.
    # 34: 10.2, 8.5, 8.5, 6.8 -> 10, 8, 8, 6 and two more, to lev (0.8) and egy (0.5, before glf): egy 9 > 8.
    assert Counter(found["dialect"]) == {"msa": 10, "egy": 8, "glf": 8, "lev": 7}
    assert report.quotas == {"msa": 10, "egy": 8, "glf": 8, "lev": 7} and report.rows == 33
    assert found["number"] == sorted(set(found["number"]))
    assert report.found == {"msa": 30, "egy": 8, "glf": 20, "lev": 9, "mgr": 5, "unknown": 0}
    assert report.sources["msa"] == {"column": 30}
    for row in found:
        assert {name: row[name] for name in rows[0]} == rows[row["number"]]


def test_the_seed_alone_decides_which_rows() -> None:
    rows = labelled(("msa", 30), ("egy", 10))
    shares = {"msa": 0.5, "egy": 0.5}
    first, again, other = (balance(rows, shares, seed=seed)[0]["number"] for seed in (1, 1, 2))
    assert first == again != other


@given(
    st.lists(st.sampled_from(DIALECTS), min_size=1, max_size=40),
    st.integers(0, 3),
    st.booleans(),
)
@settings(max_examples=25, deadline=None, database=None)
def test_any_data_set(labels: list[str], seed: int, repeat: bool) -> None:
    rows = [
        {"prompt": str(number), "dialect": label, "number": number} for number, label in enumerate(labels)
    ]
    present = [label for label in DIALECTS if label in labels]
    shares = {label: 1 / len(present) for label in present}
    found, report = balance(rows, shares, seed=seed, allow_repeat=repeat)
    taken = Counter(found["dialect"])
    assert dict(taken) == {label: number for label, number in report.quotas.items() if number}
    assert max(report.quotas.values()) - min(report.quotas.values()) <= 1
    assert found["number"] == sorted(found["number"])
    assert all(
        labels[number] == label for number, label in zip(found["number"], found["dialect"], strict=True)
    )
    if repeat:
        assert len(found) == len(rows)
    else:
        assert len(set(found["number"])) == len(found)
        # With equal shares the smallest group is used up, and nothing larger would fit.
        scarce = min(Counter(labels).values())
        assert scarce * len(present) <= len(found) < (scarce + 1) * len(present)


def test_repeated_rows_fill_up_what_is_scarce() -> None:
    rows = labelled(("msa", 9), ("egy", 2), ("lev", 4))
    shares = {"msa": 0.5, "egy": 0.5}
    found, report = balance(rows, shares, allow_repeat=True)
    # 11 rows are msa or egy: 5.5 and 5.5 -> 6 msa and 5 egy; two egy rows five times: 3 and 2.
    assert report.quotas == {"msa": 6, "egy": 5}
    times = Counter(
        number for number, label in zip(found["number"], found["dialect"], strict=True) if label == "egy"
    )
    assert sorted(times.values()) == [2, 3]
    assert Counter(balance(rows, shares, allow_repeat=True, size=40)[0]["dialect"]) == {"msa": 20, "egy": 20}
    assert len(balance(rows, shares, size=3)[0]) == 3
    with pytest.raises(DataError, match="size=6 needs msa 3, egy 3; found .* at most 5 rows meet the shares"):
        balance(rows, shares, size=6)
    with pytest.raises(DataError, match="size=0"):
        balance(rows, shares, size=0)


def test_a_dialect_that_is_not_there_is_an_error_with_the_counts() -> None:
    with pytest.raises(
        DataError, match="records: no row of glf, which the wanted shares name; found msa 3, egy 1"
    ):
        balance(labelled(("msa", 3), ("egy", 1)), {"msa": 0.5, "glf": 0.5})
    # A share of 0 asks for nothing.
    assert len(balance(labelled(("msa", 3)), {"msa": 1, "glf": 0})[0]) == 3
    with pytest.raises(DataError, match="sum to 0.7"):
        balance(labelled(("msa", 3)), {"msa": 0.7})


def test_the_lexicon_labels_what_has_no_column() -> None:
    groups = {label: lines(TUNED[label]) + lines(HELD_OUT[label]) for label in TUNED}
    texts = [(label, text) for label, group in groups.items() for text in group]
    texts += [("unknown", text) for text in lines(NEUTRAL)]
    rows = [
        # The rejected answer is in another dialect on purpose.
        {"prompt": "؟", "chosen": text, "rejected": "شلونك الحين وايد", "meant": label}
        for label, text in texts
    ]
    found, report = balance(rows, dict.fromkeys(TUNED, 0.2))
    assert set(found["dialect_source"]) == {"lexicon"}
    right = sum(row["dialect"] == row["meant"] for row in found)
    assert right >= 0.9 * len(found) and len(found) >= 100
    assert all(0 < value < 1 for value in found["dialect_confidence"])
    table = str(report)
    print(table)
    assert f"records: {len(found)} of {len(rows)} rows by dialect" in table
    assert "lexicon" in table and "unknown" in table


def test_which_text_decides_can_be_chosen() -> None:
    rows = [{"prompt": "شلونك الحين", "chosen": "ازيك دلوقتي", "rejected": "واش بزاف"}] * 3
    for field, label in (
        ("prompt", "glf"),
        ("chosen", "egy"),
        (["rejected"], "mgr"),
        ("prompt, chosen", "unknown"),
    ):
        assert set(balance(rows, {label: 1.0}, text_field=field)[0]["dialect"]) == {label}
    assert set(balance(rows, {"unknown": 1.0})[0]["dialect"]) == {"unknown"}
    with pytest.raises(DataError, match="record 1: the text field 'answer' is missing"):
        balance(rows, {"egy": 1.0}, text_field="answer")
    with pytest.raises(
        DataError, match="record 1: no text to tell the dialect from, found the columns number"
    ):
        balance([{"number": 1}], {"egy": 1.0})


def test_of_a_conversation_user_and_assistant_count() -> None:
    talk = [
        {"role": "system", "content": "سوف تجيب عن الأسئلة التي يطرحها المستخدم، ولن تكذب"},
        {"role": "user", "content": "شو هاد؟"},
    ]
    rows = [{"prompt": talk, "chosen": [{"role": "assistant", "content": "هيك"}], "rejected": talk}]
    assert balance(rows, {"lev": 1.0})[0]["dialect"] == ["lev"]
    shared = [
        {
            "conversations": [{"from": "human", "value": "ازيك دلوقتي"}],
            "chosen": {"from": "gpt", "value": "كويس"},
        }
    ]
    assert balance(shared, {"egy": 1.0})[0]["dialect"] == ["egy"]


def test_columns_of_other_names_and_labels_of_other_names() -> None:
    rows = [{"text": "x", "region": name} for name in ("Egyptian", "GLF", "bagdad", "Modern-Standard Arabic")]
    processor = ArabicDialectDatasetProcessor(label_map={"bagdad": "glf"})
    found = processor.balance_dataset(rows, {"egy": 0.25, "glf": 0.5, "msa": 0.25}, dialect_column="region")
    assert found["dialect"] == ["egy", "glf", "glf", "msa"]
    assert found["region"] == [row["region"] for row in rows]
    with pytest.raises(DataError, match="no row has the dialect column 'regoin', the nearest is 'region'"):
        balance(rows, {"unknown": 1.0}, dialect_column="regoin")
    with pytest.raises(DataError, match="record 3: column 'region': unknown dialect 'bagdad'"):
        balance(rows, {"egy": 1.0}, dialect_column="region")
    with pytest.raises(DataError, match="record 1: column 'dialect' holds int 3"):
        balance([{"text": "x", "dialect": 3}], {"egy": 1.0})
    with pytest.raises(DataError, match="there is a column 'dialect' beside dialect_column='region'"):
        balance([{"text": "x", "dialect": "egy", "region": "egy"}], {"egy": 1.0}, dialect_column="region")


def test_every_source_gives_the_same_rows(tmp_path) -> None:
    rows = labelled(("msa", 9), ("egy", 5))
    table = datasets.Dataset.from_list(rows)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "rows.json").write_text(json.dumps({"train": rows, "validation": rows[:2]}))
    table.save_to_disk(tmp_path / "directory")
    datasets.DatasetDict(train=table, test=table.select(range(2))).save_to_disk(tmp_path / "splits")
    sources = [rows, table, *(tmp_path / name for name in ("rows.jsonl", "rows.json", "directory", "splits"))]
    sources.append(str(tmp_path / "rows.jsonl"))
    found = [balance(source, {"msa": 0.5, "egy": 0.5})[0].to_list() for source in sources]
    assert all(other == found[0] for other in found)
    # egy 5; of 11, each has 5.5 and msa comes first.
    assert Counter(row["dialect"] for row in found[0]) == {"msa": 6, "egy": 5}
    # A part of a split, and what was balanced before.
    assert balance(table, {"msa": 0.5, "egy": 0.5}, split="train[:4]")[0]["number"] == [0, 1, 2, 3]
    again = balance(datasets.Dataset.from_list(found[0]), {"msa": 0.5, "egy": 0.5})[0]
    assert again.to_list() == found[0]


def test_a_dataset_keeps_its_types_and_texts_their_bytes() -> None:
    features = datasets.Features(
        {
            "text": datasets.Value("string"),
            "kind": datasets.ClassLabel(names=["a", "b"]),
            "dialect": datasets.Value("string"),
        }
    )
    text = "\u200fإِزَّيَّـــك\u200c ﻻ\u200d"
    table = datasets.Dataset.from_dict(
        {"text": [text] * 2, "kind": [0, 1], "dialect": ["EGY", "egy"]}, features=features
    )
    found, _ = balance(table, {"egy": 1.0})
    assert found.features["kind"] == features["kind"]
    assert found["text"] == [text] * 2 and found["dialect"] == ["egy", "egy"]
    rows = [{"text": text, "dialect": "egy"}, {"dialect": "egy", "score": 2.5}]
    assert balance(rows, {"egy": 1.0})[0].to_list() == [
        {
            "text": row.get("text"),
            "score": row.get("score"),
            "dialect": "egy",
            "dialect_source": "column",
            "dialect_confidence": 1.0,
        }
        for row in rows
    ]


def test_rows_that_cannot_be_read_or_kept_are_errors(tmp_path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "x", "dialect": "egy"}\n{broken\n')
    with pytest.raises(DataError, match="1 rows cannot be read; .*rows.jsonl:2"):
        balance(path, {"egy": 1.0})
    with pytest.raises(DataError, match="column 'score' holds what a datasets.Dataset cannot"):
        balance([{"score": 1, "dialect": "egy"}, {"score": "high", "dialect": "egy"}], {"egy": 1.0})


def test_of_a_ranked_list_the_best_answer_is_judged() -> None:
    good, poor = "عايز إيه دلوقتي", "شو بدك هلق"
    for row in (
        {"prompt": "x", "completions": [poor, good], "scores": [1, 2]},
        {"instruction": "x", "responses": [poor, good], "ranks": [2, 1]},
        {
            "instruction": "x",
            "completions": [{"response": poor, "score": 1}, {"response": good, "score": 5}],
        },
    ):
        assert list(balance([row], {"egy": 1.0})[0]["dialect"]) == ["egy"]
    # The column of a user's own: every answer of it.
    row = {"completions": [{"response": good}, {"response": good}]}
    assert list(balance([row], {"egy": 1.0}, text_field="completions")[0]["dialect"]) == ["egy"]


def test_a_text_field_that_no_row_has_is_an_error_even_where_a_column_says_all() -> None:
    rows = [{"dialect": "egy", "prompt": "x"}]
    with pytest.raises(DataError, match="no row has the text field 'promt', the nearest is 'prompt'"):
        balance(rows, {"egy": 1.0}, text_field="promt")


def test_all_unknown_names_of_the_column_are_named_at_once() -> None:
    rows = [{"dialect": name, "prompt": "x"} for name in ("egy", "Cairo", "Riyadh", "Cairo", "Doha")]
    with pytest.raises(
        DataError, match="unknown dialect 'Cairo'.*dialect_label_map.*also has 'Riyadh', 'Doha'"
    ):
        balance(rows, {"egy": 1.0})


def test_a_share_of_less_than_a_row_is_said() -> None:
    processor = ArabicDialectDatasetProcessor()
    rows = [{"dialect": "egy", "prompt": "x"}] * 9 + [{"dialect": "msa", "prompt": "y"}]
    processor.balance_dataset(rows, {"egy": 0.99, "msa": 0.01})
    assert "msa: the share is less than a row of 9, so none is taken" in str(processor.report)
