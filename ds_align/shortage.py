"""Out of memory, said in the numbers of the plan."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ds_align import distributed
from ds_align.batch import GlobalBatch
from ds_align.errors import OutOfMemory

if TYPE_CHECKING:
    from ds_align.engine import AlignEngine

# What torch says of the memory of the host; of a device it has a class.
_OF_THE_HOST = ("can't allocate memory", "not enough memory")


@contextlib.contextmanager
def explained(engine: AlignEngine, batch: GlobalBatch) -> Iterator[None]:
    """Turns an allocation that failed inside of a step into OutOfMemory, which names what to change.

    It may fail on one rank alone, so nothing is agreed on.
    """
    import torch

    try:
        yield
    except RuntimeError as error:
        is_device = isinstance(error, torch.OutOfMemoryError)
        if not is_device and not any(words in str(error) for words in _OF_THE_HOST):
            raise
        raise OutOfMemory(_describe(engine, batch, error)) from error


def _describe(engine: AlignEngine, batch: GlobalBatch, error: RuntimeError) -> str:
    config = engine.config
    largest = max((pack.num_tokens for pack in batch.micro_batches), default=0)
    of_reference = max((pack.num_tokens for pack in batch.reference_batches), default=0)
    remedies = [f"lower pack_max_tokens (now {engine.pack_tokens})"]
    if not config.gradient_checkpointing:
        remedies.append("set gradient_checkpointing=true")
    if of_reference:
        remedies.append(f"lower ref_batch_tokens (now {engine.reference_tokens})")
    remedies.append("take more ranks or a ds_config that offloads")
    reason = str(error).partition("\n")[0][:300]
    return (
        f"rank {distributed.rank()}, step {batch.step}: out of memory ({reason}); the largest pack of this "
        f"step has {largest} tokens, of the reference {of_reference}; {', or '.join(remedies)}"
    )
