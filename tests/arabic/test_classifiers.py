"""A user's own classifier in its three forms, and what is said where it cannot be used."""

from __future__ import annotations

import sys

import pytest

from ds_align import ArabicDialectDatasetProcessor
from ds_align.arabic.classifiers import classify, open_classifier
from ds_align.arabic.names import LabelNames
from ds_align.arabic.scorer import Label
from ds_align.errors import ConfigError, DataError

TEXTS = ["ازيك يا صاحبي", "شلونك", "شو بدك تعمل اليوم", "سوف نكتب"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory):
    """A BERT of two layers with random weights, whose classes have names of their own."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", *dict.fromkeys(" ".join(TEXTS).split())]
    inner = Tokenizer(
        models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]")
    )
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    path = tmp_path_factory.mktemp("classifier")
    PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(
        path
    )
    torch.manual_seed(3)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = BertConfig(
        vocab_size=len(words),
        **shape,
        max_position_embeddings=24,
        pad_token_id=0,
        initializer_range=1.0,
        id2label=dict(enumerate(("Egyptian", "gulf", "LABEL_2"))),
        label2id={"Egyptian": 0, "gulf": 1, "LABEL_2": 2},
    )
    BertForSequenceClassification(config).save_pretrained(path)
    return path


def test_a_hugging_face_classifier_labels_as_the_model_does(directory) -> None:
    import torch
    from transformers import AutoTokenizer, BertForSequenceClassification

    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = BertForSequenceClassification.from_pretrained(directory).eval()
    texts = [*TEXTS, " ".join(TEXTS * 4)]  # the last is longer than the model takes
    names = LabelNames({"LABEL_2": "msa"})
    found = classify(open_classifier(directory), texts, names)
    classes = ("egy", "glf", "msa")
    for text, label in zip(texts, found, strict=True):
        ids = torch.tensor([tokenizer(text)["input_ids"][:24]])
        with torch.no_grad():
            shares = model(ids).logits[0].softmax(-1)
        assert label.name == classes[int(shares.argmax())]
        assert label.confidence == pytest.approx(float(shares.max()), rel=1e-4)
    assert len({label.name for label in found}) > 1


def test_a_name_that_is_no_label_is_refused_with_the_remedy(directory) -> None:
    with pytest.raises(DataError, match="unknown dialect 'LABEL_2'.*expected one of msa, egy.*label_map"):
        classify(open_classifier(directory), TEXTS * 3, LabelNames({"gulf": "glf"}))


def test_a_fasttext_model_labels_rows(tmp_path) -> None:
    fasttext = pytest.importorskip("fasttext", reason="the package fasttext is not installed")
    lines = ["__label__EGY ازيك النهارده", "__label__gulf شلونك الحين"] * 50
    (tmp_path / "train.txt").write_text("\n".join(lines), encoding="utf-8")
    model = fasttext.train_supervised(str(tmp_path / "train.txt"), epoch=25, dim=8, thread=1, verbose=0)
    model.save_model(str(tmp_path / "model.bin"))
    found = classify(open_classifier(tmp_path / "model.bin"), ["النهارده\nازيك", "شلونك"], LabelNames())
    assert [label.name for label in found] == ["egy", "glf"]
    assert all(0.5 < label.confidence <= 1.0 for label in found)


def test_a_fasttext_model_without_the_package(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.bin").write_bytes(b"model")
    monkeypatch.setitem(sys.modules, "fasttext", None)
    with pytest.raises(ConfigError, match="model.bin.*needs the package fasttext, which is not installed"):
        open_classifier(tmp_path / "model.bin")


def test_functions_may_give_names_or_names_with_confidence() -> None:
    names = LabelNames({"iraqi": "glf"})
    assert classify(lambda texts: ["EGY" for _ in texts], ["a", "b"], names) == [Label("egy", None)] * 2
    answers = [("Levantine", 0.25), ["iraqi", 1], ("unknown", 0.0)]
    assert classify(lambda _: answers, ["a"] * 3, names) == [
        Label("lev", 0.25),
        Label("glf", 1.0),
        Label("unknown", 0.0),
    ]


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        (["egy"], "1 labels for 2 texts"),
        (["egy", 3], "got 3 for a text"),
        ([("egy", 1.5), "egy"], r"got \('egy', 1.5\)"),
        ([("egy", "high"), "egy"], "expected a label or"),
        ([None, "egy"], "got None"),
    ],
)
def test_answers_of_another_form_are_refused(answers, words) -> None:
    with pytest.raises(ConfigError, match=words):
        classify(lambda _: answers, ["a", "b"], LabelNames())


def test_paths_that_hold_no_classifier(tmp_path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ConfigError, match="nothing is there; expected a fastText model"):
        ArabicDialectDatasetProcessor(tmp_path / "missing.bin")
    with pytest.raises(ConfigError, match="it is neither"):
        ArabicDialectDatasetProcessor(tmp_path / "notes.txt")
    with pytest.raises(ConfigError, match="got int, expected a function or a path"):
        ArabicDialectDatasetProcessor(3)
    (tmp_path / "config.json").write_text('{"model_type": "bert", "architectures": ["BertModel"]}')
    with pytest.raises(
        ConfigError, match="cannot be loaded as a text classifier .its architecture is BertModel"
    ):
        ArabicDialectDatasetProcessor(tmp_path)
    with pytest.raises(ConfigError, match="'x' means the unknown dialect 'egypt'; did you mean egy"):
        ArabicDialectDatasetProcessor(label_map={"x": "egypt"})


def test_a_classifier_labels_only_rows_without_a_label() -> None:
    seen: list[str] = []

    def classifier(texts):
        seen.extend(texts)
        return [("glf", 0.5)] * len(texts)

    rows = [{"prompt": "a", "chosen": "b", "rejected": "c", "dialect": name} for name in ("egy", None, " ")]
    processor = ArabicDialectDatasetProcessor(classifier)
    found = processor.balance_dataset(rows, {"egy": 1 / 3, "glf": 2 / 3})
    assert seen == ["a\nb", "a\nb"]
    assert found["dialect"] == ["egy", "glf", "glf"]
    assert found["dialect_source"] == ["column", "classifier", "classifier"]
    assert found["dialect_confidence"] == [1.0, 0.5, 0.5]
    assert processor.report.mean_confidence["glf"] == 0.5


@pytest.mark.parametrize("answer", ["egy", None, 3])
def test_a_function_that_gives_no_list_is_told_what_it_must_give(answer) -> None:
    with pytest.raises(ConfigError, match="it must return a list with a label, or .label, confidence., for"):
        classify(lambda _: answer, ["a", "b", "c"], LabelNames())
