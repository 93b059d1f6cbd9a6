"""What others offer for the same work.

Every peer gives a function of hidden [T, H], weight [V, H] and labels [T]: the log-probability of each label
[T], in nats and in the peer's own dtype. Nothing here is a requirement of the project: a package that is not
there is a reason, and the benchmark prints it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from kernel_problem import Logprobs
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Peer:
    """`load` imports it and gives its function.

    recomputes: its backward makes the logits again, one matrix product more.
    """

    name: str
    package: str
    load: Callable[[], Logprobs]
    recomputes: bool = False
    needs_cuda: bool = False


def naive(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """What everybody writes first: all logits, then their log-softmax in float32."""
    logits = hidden @ weight.T
    return torch.log_softmax(logits.float(), dim=-1).gather(1, labels.unsqueeze(1)).squeeze(1)


def compiled() -> Logprobs:
    """The naive function under torch.compile, for each shape by itself."""
    return torch.compile(naive, dynamic=False)


def torch_linear(*, chunked: bool) -> Logprobs:
    """torch's own function, through all logits or, with its default options, in chunks of tokens."""
    if not hasattr(torch.nn.functional, "linear_cross_entropy"):
        raise ImportError(f"torch {torch.__version__} has no torch.nn.functional.linear_cross_entropy")
    options = torch.nn.LinearCrossEntropyOptions() if chunked else None

    def logprobs(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return -torch.nn.functional.linear_cross_entropy(
            hidden, weight, labels, reduction="none", options=options
        )

    return logprobs


def trl_selective() -> Logprobs:
    """What TRL's trainers apply to logits that exist."""
    from trl.trainer.utils import selective_log_softmax

    return lambda hidden, weight, labels: selective_log_softmax(hidden @ weight.T, labels)


def trl_chunked() -> Logprobs:
    """What TRL's DPO trainer puts in place of the LM head, without its optional outputs."""
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as CHUNK

    return lambda hidden, weight, labels: ChunkedLogProbFunction.apply(
        hidden, weight, None, labels, 1.0, CHUNK, None, 1.0, ()
    )[0]


def deepspeed_chunked() -> Logprobs:
    """DeepSpeed's loss on logits that exist, in blocks of rows."""
    from deepspeed.runtime.chunked_cross_entropy import chunked_cross_entropy

    return lambda hidden, weight, labels: -chunked_cross_entropy(hidden @ weight.T, labels, reduction="none")


def deepspeed_linear() -> Logprobs:
    """DeepSpeed's LM head and loss in one, on one rank."""
    from deepspeed.sequence.linear_cross_entropy import vocab_parallel_linear_cross_entropy

    return lambda hidden, weight, labels: (
        -vocab_parallel_linear_cross_entropy(hidden, weight, labels, reduction="none")
    )


def liger() -> Logprobs:
    """Liger's fused LM head and loss."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return lambda hidden, weight, labels: (
        -liger_fused_linear_cross_entropy(hidden, weight, labels, reduction="none")
    )


def cut_cross_entropy(impl: str) -> Logprobs:
    """Cut Cross-Entropy (arXiv:2411.09009) with its own defaults, gradient filtering included."""
    from cut_cross_entropy import linear_cross_entropy

    return lambda hidden, weight, labels: (
        -linear_cross_entropy(hidden, weight, labels, reduction="none", impl=impl)
    )


PEERS = (
    Peer("torch.compile", "torch", compiled),
    Peer("torch linear CE", "torch", lambda: torch_linear(chunked=False)),
    Peer("torch linear CE, chunked", "torch", lambda: torch_linear(chunked=True), recomputes=True),
    Peer("TRL selective", "trl", trl_selective),
    Peer("TRL chunked head", "trl", trl_chunked, recomputes=True),
    Peer("DeepSpeed chunked CE", "deepspeed", deepspeed_chunked),
    Peer("DeepSpeed linear CE", "deepspeed", deepspeed_linear, recomputes=True),
    Peer("Liger", "liger_kernel", liger, recomputes=True, needs_cuda=True),
    Peer("CCE", "cut_cross_entropy", lambda: cut_cross_entropy("cce"), recomputes=True, needs_cuda=True),
    Peer("CCE, torch_compile", "cut_cross_entropy", lambda: cut_cross_entropy("torch_compile")),
)


def reason_of(error: BaseException) -> str:
    """The error in one line."""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
    return f"{type(error).__name__}: {first}"


def loaded(peer: Peer, device: str) -> Logprobs | str:
    """The peer's function, or why there is none here."""
    if find_spec(peer.package) is None:
        return "not installed"
    if peer.needs_cuda and device == "cpu":
        return "its kernels need a CUDA device"
    try:
        return peer.load()
    except Exception as error:  # noqa: BLE001 - another package may fail as it likes; the table says how
        return f"does not load: {reason_of(error)}"
