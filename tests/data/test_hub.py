"""Ids of the Hub against misspelt paths, and directories that the `datasets` library reads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ds_align.data import available_splits, load_preferences
from ds_align.data.hub import Place, locate, with_choice
from ds_align.data.readers import open_records
from ds_align.errors import DataError
from tests.data import formats

README = """---
license: mit
configs:
- config_name: helpful
  data_files:
  - {split: train, path: helpful/*.parquet}
  - {split: test, path: helpful_test/*.parquet}
- config_name: harmless
  data_files: harmless/*.parquet
---
# A data set
"""


def rows(word: str, number: int = 3) -> list[dict]:
    return [{"prompt": f"{word} {index}", "chosen": " sat", "rejected": " barked"} for index in range(number)]


@pytest.fixture
def hub_directory(tmp_path, monkeypatch) -> Path:
    """A copy of a repository of the Hub; what `datasets` makes of it stays in tmp_path."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    directory = tmp_path / "copy"
    formats.write(directory / "helpful", "a.parquet", rows("help"))
    formats.write(directory / "harmless", "a.parquet", rows("harm", 2))
    formats.write(directory / "helpful_test", "a.parquet", rows("held", 1))
    (directory / "README.md").write_text(README)
    return directory


def test_a_config_of_a_copied_repository(hub_directory):
    source = f"{hub_directory}:helpful"
    assert available_splits(source) == ["train", "test"]
    found = list(open_records(source).rows())
    assert [row.columns for row in found] == rows("help")
    assert found[2].origin == f"{source} (train): record 3"
    assert [row.columns for row in open_records(f"{hub_directory}:harmless", "train[1:]").rows()] == rows(
        "harm", 2
    )[1:]


def test_a_config_must_be_named_and_must_exist(hub_directory):
    with pytest.raises(DataError, match=r"cannot be read as its README\.md says.*DIRECTORY:config \("):
        open_records(hub_directory)
    with pytest.raises(DataError, match=r"README\.md says.*'helpfull' not found"):
        open_records(f"{hub_directory}:helpfull")
    (hub_directory / "README.md").unlink()
    with pytest.raises(DataError, match="has no configs in a README"):
        open_records(f"{hub_directory}:helpful")


def test_tokens_of_a_config_are_kept_under_its_own_key(hub_directory, settings, bpe):
    def load(source: str):
        return load_preferences(source, tokenizer=bpe(), inputs="pairs", config=settings())

    expected = load(str(formats.write(hub_directory.parent / "plain", "a.jsonl", rows("help"))))
    helpful = load(f"{hub_directory}:helpful")
    assert helpful.digest() == expected.digest()
    assert (helpful.num_processes, load(f"{hub_directory}:helpful").num_processes) == (1, 0)
    assert len(load(f"{hub_directory}:harmless")) == 2


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("trl-lib/ultrafeedback_binarized", Place(None, "trl-lib/ultrafeedback_binarized")),
        ("org/name-v1.2:en@main", Place(None, "org/name-v1.2", "en", "main")),
        ("hf://datasets/org/name.jsonl", Place(None, "org/name.jsonl")),
        ("org/name@refs/convert/parquet", Place(None, "org/name", None, "refs/convert/parquet")),
        ("data/pairs.jsnol", Place(Path("data/pairs.jsnol"))),
        ("data/pairs.paquet", Place(Path("data/pairs.paquet"))),
        ("data/pairs.jsonl.gzip", Place(Path("data/pairs.jsonl.gzip"))),
        ("pairs", Place(Path("pairs"))),
        ("./org/name", Place(Path("./org/name"))),
        ("/org/name", Place(Path("/org/name"))),
        ("a/b/c", Place(Path("a/b/c"))),
        ("here/pairs", Place(Path("here/pairs"))),
    ],
)
def test_ids_and_paths_are_told_apart(text, place, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    assert locate(text) == place


def test_a_misspelt_path_is_a_missing_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("data/pairs.jsnol", "data/pairs.csvv"):
        with pytest.raises(DataError, match=rf"{name}: no such file or directory; .*check the path"):
            open_records(name)
    with pytest.raises(DataError, match="not the address of a data set"):
        open_records("hf://datasets/name")


def test_offline_one_line_names_the_remedy(tmp_path):
    program = (
        "from ds_align.data.readers import open_records\n"
        "from ds_align.errors import DataError\n"
        "try:\n    open_records('no-such-org/no-such-set', 'train')\n"
        "except DataError as error:\n    print(error)\n"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert line.startswith(
        "no-such-org/no-such-set: this data set of the Hub is not on this machine and HF_HUB"
    )
    assert "unset it, or `hf download --repo-type dataset no-such-org/no-such-set" in line


def test_settings_and_source_choose_one_config(tmp_path):
    assert with_choice("org/name", None, None) == "org/name"
    assert with_choice("org/name", "en", "v1") == "hf://datasets/org/name:en@v1"
    assert with_choice("org/name:en", "en", "v1") == "hf://datasets/org/name:en@v1"
    assert with_choice(str(tmp_path), "en", None) == f"{tmp_path}:en"
    with pytest.raises(DataError, match="dataset_config_name='ar' disagree"):
        with_choice("org/name:en", "ar", None)
    with pytest.raises(DataError, match="dataset_revision='v1' without effect"):
        with_choice(str(tmp_path), None, "v1")
