"""Rank, world size, sums and agreement across ranks; torch.distributed only, no DeepSpeed.

Every function works in one process without a process group: it then is the identity.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from ds_align.errors import DsAlignError

if TYPE_CHECKING:
    import torch

Result = TypeVar("Result")


def environment_rank() -> int:
    """The global rank as the launcher set it (0 without a launcher); needs no process group."""
    return int(os.environ.get("RANK", "0"))


def is_initialized() -> bool:
    """Whether a process group is there; imports torch only when somebody else already has."""
    if "torch" not in sys.modules:
        return False
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Global rank of this process."""
    if not is_initialized():
        return environment_rank()
    import torch.distributed as dist

    return dist.get_rank()


def world_size() -> int:
    """Number of ranks of the process group (1 without one)."""
    if not is_initialized():
        return 1
    import torch.distributed as dist

    return dist.get_world_size()


def is_main() -> bool:
    """Whether this rank prints and writes."""
    return rank() == 0


def barrier() -> None:
    """Collective: every rank must call this."""
    if is_initialized():
        import torch.distributed as dist

        dist.barrier()


def all_reduce_sum(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Collective: every rank must call this. Sums a float64 tensor over ranks; returns it on device.

    values: float64 of any shape, on any device; device: where the process group's back end wants its tensors.
    """
    values = values.to(device)
    if is_initialized():
        import torch.distributed as dist

        dist.all_reduce(values)
    return values


def all_reduce_max(value: float, device: torch.device) -> float:
    """Collective: every rank must call this. Returns the largest value of all ranks."""
    if not is_initialized():
        return value
    import torch
    import torch.distributed as dist

    box = torch.tensor([value], dtype=torch.float64, device=device)
    dist.all_reduce(box, op=dist.ReduceOp.MAX)
    return box.item()


def host_group() -> Any:
    """A process group for messages between hosts, which do not wait for a device; None in one process.

    Collective: every rank must call this.
    """
    if not is_initialized() or world_size() == 1:
        return None
    import torch.distributed as dist

    return dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")


def first_rank(flag: bool, group: Any) -> int | None:  # noqa: FBT001 - what is asked
    """The lowest rank whose flag is set; None where none is. Collective: every rank must call this.

    group: that of host_group().
    """
    if group is None:
        return 0 if flag else None
    import torch
    import torch.distributed as dist

    box = torch.tensor(rank() if flag else world_size(), dtype=torch.int64)
    dist.all_reduce(box, op=dist.ReduceOp.MIN, group=group)
    return int(box) if int(box) < world_size() else None


def broadcast_text(text: str, source: int, group: Any) -> str:
    """The text of rank `source`, on every rank. Collective: every rank must call this."""
    if group is None:
        return text
    import torch.distributed as dist

    box = [text]
    dist.broadcast_object_list(box, src=source, group=group)
    return box[0]


def broadcast_object(value: Result) -> Result:
    """Collective: every rank must call this. Returns rank 0's value everywhere (picklable)."""
    if not is_initialized():
        return value
    import torch.distributed as dist

    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather_objects(value: Result) -> list[Result]:
    """Collective: every rank must call this. Returns the values of all ranks, in their order (picklable)."""
    if not is_initialized():
        return [value]
    import torch.distributed as dist

    found: list[Result | None] = [None] * world_size()
    dist.all_gather_object(found, value)
    return found


def agree(action: Callable[[], Result]) -> Result:
    """Collective: every rank must call this. Runs action on every rank; if it fails on one, it fails on all.

    A file may be missing on one node only: without agreement the other ranks would wait in the next
    collective until its time-out. Raises the error of the lowest failing rank, on every rank.
    """
    error: DsAlignError | None = None
    result = None
    try:
        result = action()
    except DsAlignError as caught:
        error = caught
    if not is_initialized() or world_size() == 1:
        if error is not None:
            raise error
        return result
    import torch.distributed as dist

    found: list[DsAlignError | None] = [None] * world_size()
    dist.all_gather_object(found, error)
    for number, other in enumerate(found):
        if other is not None:
            if error is None:
                raise type(other)(f"rank {number}: {other}")
            raise error
    return result


def set_single_process_environment() -> None:
    """Fills in what a launcher would have set, so that one process works in a shell or a notebook."""
    if "RANK" in os.environ:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(
        RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
