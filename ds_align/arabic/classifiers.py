"""A user's own classifier of dialects: a function, a fastText model or a Hugging Face text classifier."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from ds_align.arabic.names import LabelNames
from ds_align.arabic.scorer import Label
from ds_align.errors import ConfigError

# texts -> a name for each, or (name, confidence from 0 to 1).
Classifier = Callable[[Sequence[str]], Sequence[Any]]
FASTTEXT_ENDINGS = (".bin", ".ftz")
# Most encoders take 512 tokens; a dialect shows earlier.
_MAX_TOKENS = 512


def open_classifier(given: Classifier | str | Path) -> Classifier:
    """A function as it is; a path as what lies there. Raises ConfigError."""
    if not isinstance(given, str | Path):
        if callable(given):
            return given
        raise ConfigError(f"classifier: got {type(given).__name__}, expected a function or a path")
    path = Path(given)
    if path.is_dir() and (path / "config.json").is_file():
        return _transformers_classifier(path)
    if path.is_file() and path.suffix.lower() in FASTTEXT_ENDINGS:
        return _fasttext_classifier(path)
    found = "nothing is there" if not path.exists() else "it is neither"
    raise ConfigError(
        f"dialect classifier {str(given)!r}: {found}; expected a fastText model "
        f"({', '.join(FASTTEXT_ENDINGS)}) or a directory with config.json of a text classifier; check it"
    )


def classify(classifier: Classifier, texts: Sequence[str], names: LabelNames) -> list[Label]:
    """Labels of the texts. Raises ConfigError for an answer of another form, DataError for a name."""
    given = classifier(texts)
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise ConfigError(
            f"dialect classifier: got {given!r} for a list of {len(texts)} texts; it must return a list with "
            "a label, or (label, confidence), for each text"
        )
    answers = list(given)
    if len(answers) != len(texts):
        raise ConfigError(
            f"dialect classifier: {len(answers)} labels for {len(texts)} texts; it must give one for each"
        )
    return [_checked(answer, names) for answer in answers]


def _checked(answer: Any, names: LabelNames) -> Label:
    name, confidence = (answer, None) if isinstance(answer, str) else _pair(answer)
    return Label(names.label(name, "dialect classifier"), confidence)


def _pair(answer: Any) -> tuple[str, float]:
    if isinstance(answer, Label):
        return answer.name, answer.confidence
    if isinstance(answer, tuple | list) and len(answer) == 2 and isinstance(answer[0], str):
        try:
            confidence = float(answer[1])
        except (TypeError, ValueError):
            confidence = -1.0
        # A softmax in float32 may pass 1 by its last digit.
        if 0.0 <= confidence <= 1.0 + 1e-4:
            return answer[0], min(confidence, 1.0)
    raise ConfigError(
        f"dialect classifier: got {answer!r} for a text, expected a label or (label, confidence from 0 to 1)"
    )


def _fasttext_classifier(path: Path) -> Classifier:
    try:
        import fasttext
    except ImportError as error:
        raise ConfigError(
            f"dialect classifier {str(path)!r}: a fastText model needs the package fasttext, which is not "
            "installed; install it, or give a directory of a Hugging Face classifier, or leave it out"
        ) from error
    try:
        model = fasttext.load_model(str(path))
    except ValueError as error:
        raise ConfigError(
            f"dialect classifier {str(path)!r}: fastText cannot read it ({error}); give a trained model"
        ) from error

    def predict(texts: Sequence[str]) -> list[tuple[str, float]]:
        # fastText reads one text a line. A list, because its answer for one text does not work with NumPy 2.
        lines = [" ".join(text.split()) for text in texts]
        labels, scores = model.predict(lines, k=1)
        if not all(len(label) for label in labels):
            raise ConfigError(
                f"dialect classifier {str(path)!r}: gives no label; it was not trained as a classifier"
            )
        return [
            (str(label[0]).removeprefix("__label__"), float(score[0]))
            for label, score in zip(labels, scores, strict=True)
        ]

    return predict


def _transformers_classifier(path: Path) -> Classifier:
    """Runs on the CPU, before any policy is loaded."""
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    try:
        kinds = AutoConfig.from_pretrained(path, local_files_only=True).architectures or []
        # Any other model would be given a head with random weights.
        if not any(kind.endswith("ForSequenceClassification") for kind in kinds):
            raise ValueError(f"its architecture is {', '.join(kinds) or 'not named'}")
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        model = AutoModelForSequenceClassification.from_pretrained(path, local_files_only=True).eval()
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"dialect classifier {str(path)!r}: cannot be loaded as a text classifier ({reason}); give a "
            "directory with its weights and tokenizer"
        ) from error
    limits = (_MAX_TOKENS, tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None))
    longest = min(limit for limit in limits if limit)

    @torch.no_grad()
    def scores(texts: list[str]) -> torch.Tensor:
        several = len(texts) > 1
        inputs = tokenizer(texts, padding=several, truncation=True, max_length=longest, return_tensors="pt")
        return model(**inputs).logits.float().softmax(-1)

    def predict(texts: Sequence[str]) -> list[tuple[str, float]]:
        # Without a padding token only one text at a time has one shape.
        width = 32 if tokenizer.pad_token is not None else 1
        batches = [list(texts[start : start + width]) for start in range(0, len(texts), width)]
        best = [scores(batch).max(-1) for batch in batches]
        return [
            (str(model.config.id2label[int(label)]), float(score))
            for batch in best
            for score, label in zip(batch.values, batch.indices, strict=True)
        ]

    return predict
