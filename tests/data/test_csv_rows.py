"""CSV files as people write them."""

from __future__ import annotations

import json

import pytest

from ds_align.data.readers import BadRow, Record, open_records
from ds_align.data.schemas import Columns, parse_row
from ds_align.errors import DataError

TALK = [{"role": "user", "content": 'a "b"\n'}]


def rows(tmp_path, text: str | bytes, columns: Columns | None = None) -> list:
    path = tmp_path / "a.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return list(open_records(path, columns=columns).rows())


def quoted(value: object) -> str:
    return '"' + json.dumps(value).replace('"', '""') + '"'


def test_blank_lines_and_a_byte_order_mark_are_not_rows(tmp_path):
    found = rows(tmp_path, '\ufeff"prompt",chosen\r\n\r\nة,b\r\n  \n"c,""d""",e')
    assert [row.columns for row in found] == [
        {"prompt": "ة", "chosen": "b"},
        {"prompt": 'c,"d"', "chosen": "e"},
    ]
    assert [row.origin.rpartition(":")[2] for row in found] == ["3", "5"]


def test_messages_are_parsed_in_preference_columns_alone(tmp_path):
    cell = quoted(TALK)
    (found,) = rows(tmp_path, f"prompt,notes,chosen\n{cell},{cell},{quoted(TALK[0])}\n")
    assert found.columns == {"prompt": TALK, "notes": json.dumps(TALK), "chosen": TALK[0]}
    share = [{"from": "human", "value": "a"}]
    (found,) = rows(tmp_path, f"question,prompt\n{quoted(share)},{cell}\n", Columns(prompt="question"))
    assert found.columns == {"question": share, "prompt": json.dumps(TALK)}


def test_answers_that_are_json_stay_text(tmp_path):
    for text in ("[1, 2]", "[]", "{}", '[{"a": 1}]', "[not json", '{"role": 1}'):
        (found,) = rows(tmp_path, 'chosen\n"' + text.replace('"', '""') + '"\n')
        assert isinstance(found, Record)
        assert found.columns == {"chosen": text}


def test_messages_in_the_manner_of_python_are_refused(tmp_path):
    (bad,) = rows(tmp_path, "chosen\n\"[{'role': 'user', 'content': 'a'}]\"\n")
    assert isinstance(bad, BadRow)
    assert "column 'chosen' looks like messages and is not JSON" in bad.reason
    (bad,) = rows(tmp_path, "chosen_ids\n1 2 3\n")
    assert "column 'chosen_ids' is not JSON" in bad.reason


def test_labels_and_empty_cells(tmp_path):
    found = rows(tmp_path, "prompt,completion,label,prompt_ids,tools\na,true,True,,\n,b,0,[1],\n")
    assert [row.columns for row in found] == [
        {"prompt": "a", "completion": "true", "label": True},
        {"prompt": "", "completion": "b", "label": False, "prompt_ids": [1]},
    ]
    (found,) = rows(tmp_path, "good,label\n1,1\n", Columns(label="good"))
    assert found.columns == {"good": True, "label": "1"}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a,b\n1,2,3\n4,5\n", "the row has 3 cells, the first row names 2 columns"),
        ('a,b\n1,"2"x\n4,5\n', "malformed CSV"),
        (b"a,b\n1,\xff\n4,5\n", r"invalid UTF-8 at byte offset 6 (0xff)"),
    ],
)
def test_a_bad_row_does_not_hide_the_next(tmp_path, text, reason):
    bad, good = rows(tmp_path, text)
    assert bad.origin.endswith("a.csv:2")
    assert reason in bad.reason
    assert good.columns == {"a": "4", "b": "5"}


def test_a_quote_that_is_not_closed_takes_the_rest_and_is_named(tmp_path):
    good, bad = rows(tmp_path, 'a,b\n1,2\n3,"4\n5,6\n')
    assert good.columns == {"a": "1", "b": "2"}
    assert bad.origin.endswith(":3")
    assert "malformed CSV (unexpected end of data)" in bad.reason


def test_first_rows_that_name_no_columns(tmp_path):
    with pytest.raises(DataError, match=r"a\.csv:1: two columns have the name 'a'"):
        rows(tmp_path, "a,b,a\n1,2,3\n")
    with pytest.raises(DataError, match=r"a\.csv:2: invalid UTF-8"):
        rows(tmp_path, b"\n\xff,b\n1,2\n")
    with pytest.raises(DataError, match=r"a\.csv:2: malformed CSV \(new-line character"):
        rows(tmp_path, "a,b\n1\r2,3\n")


def test_a_cell_longer_than_the_limit_of_python_is_read(tmp_path):
    text = "x" * 300_000
    (found,) = rows(tmp_path, f"a\n{text}\n")
    assert found.columns == {"a": text}


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("prompt;chosen;rejected\r\na;b, c;d\r\n", 2),
        ("\ufeffprompt;chosen;rejected\r\na;b, c;d\r\n", 2),
        ("sep=;\r\nprompt;chosen;rejected\r\na;b, c;d\r\n", 3),
        ('\ufeff"sep=;"\nprompt;chosen;rejected\na;"b, c";d\n', 3),
        ("prompt\tchosen\trejected\na\tb, c\td\n", 2),
        ("prompt|chosen|rejected\na|b, c|d\n", 2),
        ('sep=,\nprompt,chosen,rejected\na,"b, c",d\n', 3),
        ("prompt;chosen;rejected\na;b, c;d\n;;\n; ;\n", 2),
    ],
)
def test_what_a_spreadsheet_writes(tmp_path, text, first):
    (found,) = rows(tmp_path, text)
    assert found.columns == {"prompt": "a", "chosen": "b, c", "rejected": "d"}
    assert found.origin.endswith(f":{first}")


def test_a_comma_in_the_first_row_stays_the_delimiter(tmp_path):
    (found,) = rows(tmp_path, "prompt,chosen;x\na;b,c\n")
    assert found.columns == {"prompt": "a;b", "chosen;x": "c"}
    (found,) = rows(tmp_path, "prompt\na;b\n")
    assert found.columns == {"prompt": "a;b"}


def test_a_first_row_of_texts_is_asked_about(tmp_path):
    (bad,) = rows(tmp_path, "What is the largest planet?,Jupiter is the largest.\nWhy?\n")
    assert "the row has 1 cells, the first row names 2 columns; does the first row" in bad.reason


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be"])
def test_utf16_is_named(tmp_path, encoding):
    mark = "\ufeff" if encoding.endswith("be") else ""
    with pytest.raises(DataError, match="byte order mark of UTF-16; save it as UTF-8"):
        rows(tmp_path, f"{mark}prompt,chosen\na,b\n".encode(encoding))


def test_a_quote_that_is_not_closed_counts_all_that_it_takes_along(tmp_path):
    lines = ["prompt,chosen,rejected", *(f"q{n},good {n},bad {n}" for n in range(600))]
    lines[201] = 'q200,"good 200,bad 200'
    path = tmp_path / "big.csv"
    path.write_text("\n".join(lines) + "\n")
    *_, bad = open_records(path).rows()
    assert isinstance(bad, BadRow)
    assert bad.lines == 400
    assert "it goes over 400 lines, which count as as many rows: is a quote not closed?" in bad.reason


def test_a_cell_of_several_lines_is_one_row(tmp_path):
    (found,) = rows(tmp_path, 'prompt,chosen\n"a\nb\nc",d\n')
    assert found.columns == {"prompt": "a\nb\nc", "chosen": "d"}


def test_ranked_lists_and_labels_of_other_names(tmp_path):
    (found,) = rows(tmp_path, 'prompt;completions;scores;kto_tag\np;"[""a"", ""b""]";[1, 2.5];TRUE\n')
    assert found.columns == {"prompt": "p", "completions": ["a", "b"], "scores": [1, 2.5], "kto_tag": True}
    (found,) = rows(tmp_path, "mine,prompt\n[1],p\n", Columns(ranks="mine"))
    assert found.columns == {"mine": [1], "prompt": "p"}
    # A column of that name may be anything.
    (found,) = rows(tmp_path, "prompt,answers\np,[1] a note\n")
    assert found.columns == {"prompt": "p", "answers": "[1] a note"}
    (broken,) = rows(tmp_path, 'prompt;completions;scores\np;"[""a"", ""b""]";[1, 2\n')
    bad = parse_row(broken, "ranked", Columns())
    assert "column 'scores' holds str, expected a list of 2 numbers" in bad.reason


def test_carriage_returns_alone_are_named(tmp_path):
    with pytest.raises(DataError, match="end the lines with a line feed"):
        rows(tmp_path, "prompt,chosen\ra,b\r")
