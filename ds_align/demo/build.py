"""Build the demonstration directory once: preference files, tokenizer and starting model."""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ds_align.demo.data import preference_rows, write_preferences

DEFAULT_DIRECTORY = Path("runs") / "demo"
# A starting model outside of this range would already prefer one side: nothing would be left to show.
NEUTRAL_ACCURACY = (0.4, 0.6)
_MANIFEST = "manifest.json"
_SEED = 0


@dataclass(frozen=True, slots=True)
class DemoPaths:
    """Where the demonstration lies: a Hugging Face model directory and two JSONL files of pairs."""

    directory: Path
    model: Path
    train: Path
    heldout: Path
    accuracy: float

    @classmethod
    def of(cls, directory: Path, accuracy: float) -> DemoPaths:
        """Return the paths below `directory`; `accuracy` is the starting model's on the held-out pairs."""
        return cls(
            directory=directory,
            model=directory / "model",
            train=directory / "train.jsonl",
            heldout=directory / "heldout.jsonl",
            accuracy=accuracy,
        )


def build(directory: str | Path | None = None) -> DemoPaths:
    """Make the demonstration in `directory` (default runs/demo), or reuse it when this version made it.

    Safe to call from several processes at once: one builds while the others wait, and an interrupted
    build leaves nothing behind that a later one would take for whole. The random state is left as it was.
    """
    target = Path(directory) if directory is not None else DEFAULT_DIRECTORY
    target.parent.mkdir(parents=True, exist_ok=True)
    with _exclusive(target.parent / f".{target.name}.lock"):
        accuracy = _built_accuracy(target)
        if accuracy is None:
            accuracy = _build_and_publish(target)
    return DemoPaths.of(target, accuracy)


def version() -> str:
    """Return the digest of this room's sources: a directory made by other sources is made anew."""
    digest = hashlib.sha256()
    for name in ("data.py", "lexicon.py", "topics_living.py", "topics_things.py", "model.py", "build.py"):
        digest.update((Path(__file__).parent / name).read_bytes())
    return digest.hexdigest()


@contextmanager
def _exclusive(lock_path: Path) -> Iterator[None]:
    """Hold a lock that the system releases with the process, however it ends."""
    with lock_path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _built_accuracy(directory: Path) -> float | None:
    """Return the recorded accuracy of a directory that this version built, else None."""
    manifest = directory / _MANIFEST
    if not manifest.is_file():
        return None
    record = json.loads(manifest.read_text(encoding="utf-8"))
    return float(record["policy_accuracy"]) if record.get("version") == version() else None


def _build_and_publish(target: Path) -> float:
    """Build beside `target` and rename at the end; return the starting model's held-out accuracy."""
    if target.exists() and not (target / _MANIFEST).is_file() and any(target.iterdir()):
        raise FileExistsError(
            f"{target} holds other files; give an empty or new directory for the demonstration"
        )
    print(
        f"building the demonstration data and model in {target} (once, about a minute)",
        file=sys.stderr,
        flush=True,
    )
    started = time.monotonic()
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        scratch.chmod(0o755)
        accuracy = _fill(DemoPaths.of(scratch, 0.0))
        if target.exists():
            shutil.rmtree(target)
        scratch.rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    seconds = time.monotonic() - started
    print(f"built in {seconds:.0f} s; held-out policy_accuracy {accuracy:.3f}", file=sys.stderr, flush=True)
    return accuracy


def _fill(paths: DemoPaths) -> float:
    """Write the files and the model, the manifest last; return the held-out accuracy."""
    import torch

    from ds_align.demo import model as demo_model

    train, heldout = preference_rows("train", seed=_SEED), preference_rows("heldout", seed=_SEED)
    write_preferences(paths.train, "train", seed=_SEED)
    write_preferences(paths.heldout, "heldout", seed=_SEED)
    tokenizer = demo_model.train_tokenizer(train)
    num_threads = torch.get_num_threads()
    # The matrices are too small to share: on a busy machine two threads took five times the time of one.
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_SEED)
            model = demo_model.make_model(tokenizer)
            settings = demo_model.FineTuning()
            # Each epoch draws questions and answers anew, so that the model learns to speak, not one file.
            epochs = [preference_rows("train", seed=_SEED + epoch) for epoch in range(settings.num_epochs)]
            demo_model.fine_tune(model, tokenizer, epochs, settings, seed=_SEED)
        accuracy = demo_model.policy_accuracy(model, tokenizer, heldout)
    finally:
        torch.set_num_threads(num_threads)
    low, high = NEUTRAL_ACCURACY
    if not low <= accuracy <= high:
        raise RuntimeError(
            f"the starting model has held-out policy_accuracy {accuracy:.3f}, expected {low} to {high}"
        )
    model.save_pretrained(paths.model)
    tokenizer.save_pretrained(paths.model)
    manifest = {"version": version(), "policy_accuracy": accuracy}
    (paths.directory / _MANIFEST).write_text(json.dumps(manifest) + "\n", encoding="utf-8")
    return accuracy
