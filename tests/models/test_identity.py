"""A model is known by what its files say, wherever they lie."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from ds_align.errors import ConfigError
from ds_align.file_digests import FileDigests
from ds_align.models import ModelSource
from ds_align.models.identity import adapter_digest, model_digest, tokenizer_digest
from tests.distributed.tiny import write_tokenizer

DIGESTS = FileDigests(None)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.fixture
def copy(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "copy"))


def digest(path: Path, *, trust_remote_code: bool = False) -> str:
    return model_digest(ModelSource.open(str(path), trust_remote_code=trust_remote_code), DIGESTS)


def test_a_copy_is_the_same_model(model: Path, copy: Path) -> None:
    assert digest(copy) == digest(model)
    (copy / "generation_config.json").write_text("{}")
    (copy / "README.md").write_text("words")
    (copy / "optimizer.pt").write_bytes(b"state")
    assert digest(copy) == digest(model)


def test_one_weight_makes_another_model(model: Path, copy: Path) -> None:
    file = copy / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert digest(copy) != digest(model)


def test_another_config_is_another_model(model: Path, copy: Path) -> None:
    file = copy / "config.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps(values | {"rms_norm_eps": 1e-3}))
    assert digest(copy) != digest(model)


def test_every_shard_counts(model: Path, tmp_path: Path) -> None:
    sharded = tmp_path / "sharded"
    LlamaForCausalLM.from_pretrained(model).save_pretrained(sharded, max_shard_size="4KB")
    shards = sorted(sharded.glob("model-*.safetensors"))
    assert len(shards) > 2
    before = digest(sharded)
    for shard in shards:
        whole = shard.read_bytes()
        shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        assert digest(sharded) != before, shard.name
        shard.write_bytes(whole)
    assert digest(sharded) == before


def test_code_counts_where_it_is_run(model: Path, copy: Path) -> None:
    (copy / "modeling_own.py").write_text("x = 1")
    assert digest(copy) == digest(model)
    trusted = digest(copy, trust_remote_code=True)
    (copy / "modeling_own.py").write_text("x = 2")
    assert digest(copy, trust_remote_code=True) != trusted


def test_an_adapter_is_known_by_settings_and_weights(tmp_path: Path) -> None:
    files = {"adapter_config.json": b'{"r": 4}', "adapter_model.safetensors": b"weights"}
    found = set()
    for change in (None, *files):
        folder = tmp_path / str(change)
        folder.mkdir()
        for name, content in files.items():
            (folder / name).write_bytes(content + b" " * (name == change))
        found.add(adapter_digest(folder, DIGESTS))
    assert len(found) == 3


def test_a_file_that_vanished_is_an_error_of_one_line(copy: Path) -> None:
    source = ModelSource.open(str(copy))
    (copy / "model.safetensors").unlink()
    (copy / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"model_name_or_path=.*config\.json cannot be read \(No such file"):
        model_digest(source, DIGESTS)


def test_a_tokenizer_is_known_by_its_tokens(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    first, again = (AutoTokenizer.from_pretrained(tmp_path) for _ in range(2))
    assert tokenizer_digest(first) == tokenizer_digest(again)
    again.add_tokens(["<one-more>"])
    assert tokenizer_digest(again) != tokenizer_digest(first)
