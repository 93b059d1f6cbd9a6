"""Whatever file holds them, the same rows are the same preferences, token for token."""

from __future__ import annotations

import gzip
import pickle
import random
from itertools import pairwise

import pytest

from ds_align.data import load_preferences
from ds_align.data.readers import CHUNK_ROWS, Record, open_records
from ds_align.errors import DataError
from tests.data import formats, messy

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# What a cell of a CSV file could be mistaken for, or break at.
TEXTS = (
    'say "no"\nor, perhaps,\r\n"yes"',
    "[INST] hello [/INST]",
    "[1, 2, 3]",
    '{"answer": true}',
    "{}",
    "ما عاصمة مصر؟\u200c\u0640",
    " leading; and\ttab ",
    "true",
    "#1",
)


def text_rows(number: int) -> list[dict]:
    rng = random.Random(number)
    return [
        {
            "prompt": f"{rng.choice(TEXTS)} {index}",
            "chosen": f"{rng.choice(TEXTS)} sat {index}",
            "rejected": rng.choice(TEXTS),
            "score": index,
        }
        for index in range(number)
    ]


def talk(*texts: str) -> list[dict]:
    return [
        {"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, texts, strict=False)
    ]


def chats(number: int) -> list[dict]:
    """Messages; the prompt is what chosen and rejected have in common."""
    return [
        {"chosen": talk(TEXTS[0], f"sat {index}"), "rejected": talk(TEXTS[0], TEXTS[1])}
        for index in range(number)
    ]


def ids(number: int) -> list[dict]:
    return [
        {"prompt_ids": [5, index], "chosen_ids": [index, 6, 7], "rejected_ids": [8]}
        for index in range(number)
    ]


def labelled(number: int) -> list[dict]:
    return [
        {"prompt": f"the cat {index % 3}", "completion": TEXTS[index % 9], "label": index % 2 == 0}
        for index in range(number)
    ]


KINDS = {"texts": text_rows, "chats": chats, "ids": ids, "labels": labelled}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", formats.FORMATS)
def test_every_form_gives_the_tokens_of_jsonl(name, kind, bpe, settings, tmp_path):
    rows = KINDS[kind](40)
    inputs = "unpaired" if kind == "labels" else "pairs"
    loaded = [
        load_preferences(
            formats.write(tmp_path / folder, form, rows),
            tokenizer=bpe(CHATML),
            inputs=inputs,
            config=settings(dataset_cache_dir="none"),
        )
        for folder, form in (("expected", "a.jsonl"), ("found", name))
    ]
    expected, found = loaded
    assert messy.contents(found) == messy.contents(expected)
    assert found.digest() == expected.digest()
    assert found.counts == expected.counts
    assert len(found) == 40


@pytest.mark.parametrize("name", formats.FORMATS)
def test_parts_are_the_rows_in_any_order_and_travel(name, tmp_path):
    """Each part equals the slice of a whole pass; what is pickled does not grow with the file."""
    rows = text_rows(3 * CHUNK_ROWS)
    records = open_records(formats.write(tmp_path, name, rows))
    whole = list(records.rows())
    assert [row.columns["prompt"] for row in whole] == [row["prompt"] for row in rows]
    rng = random.Random(0)
    bounds = sorted(rng.sample(range(len(rows)), 6))
    for start, stop in rng.sample(list(pairwise(bounds)), 5):
        part = pickle.loads(pickle.dumps(records.part(start, stop)))
        assert list(part) == whole[start:stop]
        assert len(part) == stop - start
    size = len(pickle.dumps(records.part(0, 20)))
    few = open_records(formats.write(tmp_path / "few", name, rows[:20]))
    assert size < 1.2 * len(pickle.dumps(few.part(0, 20)))


def test_origins_are_lines_of_texts_and_rows_of_parquet(tmp_path):
    rows = [{"prompt": "a\nb"}, {"prompt": "c"}, {"prompt": "d"}]
    # The first row of CSV names the columns, and "a\nb" takes two lines.
    places = {"a.jsonl": ":1 :2 :3", "a.json": ":2 :5 :8", "a.csv": ":2 :4 :5", "a.csv.gz": ":2 :4 :5"}
    places["a.parquet"] = ": row 1|: row 2|: row 3"
    for name, expected in places.items():
        path = formats.write(tmp_path, name, rows)
        found = [row.origin.removeprefix(str(path)) for row in open_records(path).rows()]
        assert found == expected.split("|" if "|" in expected else " "), name
        last = list(open_records(path, "train[2:]").rows())
        assert last[0].origin == f"{path}{found[-1]}"


@pytest.mark.parametrize("name", formats.FORMATS)
@pytest.mark.parametrize("split", ["train[:90%]", "train[90%:]", "train[3:-2]", "train[-1:]"])
def test_slices_of_every_form(name, split, tmp_path):
    rows = text_rows(23)
    start, stop = {"train[:90%]": (0, 21), "train[90%:]": (21, 23), "train[3:-2]": (3, 21)}.get(
        split, (22, 23)
    )
    found = open_records(formats.write(tmp_path, name, rows), split)
    assert [row.columns["score"] for row in found.rows()] == [
        str(index) if "sv" in name.lower() else index for index in range(start, stop)
    ]


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_a_compressed_file_that_was_cut_off_is_an_error(ending, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "temporary").mkdir()
    path = formats.write(tmp_path, f"a.jsonl{ending}", text_rows(3000))
    content = path.read_bytes()
    for damaged in (content[: len(content) // 2], content[:-1], b"\0" + content):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="cannot be unpacked .*again"):
            open_records(path)
    assert not list((tmp_path / "temporary").iterdir())


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_several_compressed_parts_are_one_file(ending, tmp_path):
    """`cat a.gz b.gz > c.gz` is a whole file by both formats' rules."""
    rows = text_rows(10)
    parts = [formats.write(tmp_path, f"a.jsonl{ending}", part).read_bytes() for part in (rows[:4], rows[4:])]
    path = tmp_path / f"both.jsonl{ending}"
    path.write_bytes(b"".join(parts))
    assert [row.columns for row in open_records(path).rows()] == rows


def test_the_unpacked_file_goes_with_the_rows(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    records = open_records(formats.write(tmp_path / "data", "a.jsonl.gz", text_rows(5)))
    part = records.part(0, 2)
    copy = pickle.loads(pickle.dumps(part))
    assert len(list(tmp_path.glob("*.unpacked"))) == 1
    del copy, records
    assert len(list(part)) == 2
    del part
    assert not list(tmp_path.glob("*.unpacked"))


def test_no_room_to_unpack_names_the_remedy(tmp_path, monkeypatch):
    path = formats.write(tmp_path, "a.jsonl.gz", text_rows(5))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"cannot be unpacked into .*nowhere \(No such file.*set TMPDIR"):
        open_records(path)


def test_compressed_json_knows_its_splits(tmp_path):
    path = tmp_path / "a.json.gz"
    path.write_bytes(gzip.compress(formats.as_splits(text_rows(4))))
    assert next(open_records(path, "test").rows()) == Record(f"{path}:1", text_rows(4)[0])


@pytest.mark.parametrize("name", ["a.parquet", "a.csv.gz", "a.json.zst"])
def test_processes_share_the_rows_of_every_form(name, settings, tmp_path):
    path = formats.write(tmp_path, name, ids(3 * CHUNK_ROWS))
    found = [
        load_preferences(
            path,
            tokenizer=None,
            inputs="pairs",
            config=settings(dataset_cache_dir="none", dataset_num_proc=number),
        )
        for number in (1, 2)
    ]
    assert [data.num_processes for data in found] == [1, 2]
    assert found[0].digest() == found[1].digest()
    assert len(found[0]) == 3 * CHUNK_ROWS


def test_an_empty_part_has_no_rows(tmp_path):
    for name in formats.PLAIN:
        records = open_records(formats.write(tmp_path, name, text_rows(3)))
        assert list(records.part(2, 2)) == [], name
        assert len(list(records.part(0, 3))) == 3, name
