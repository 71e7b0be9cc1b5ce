"""What Megatron-Core asks of CUDA when it is built and run on a CPU.

Its MoELayer makes a stream for copies to the host, asks for the current device, and turns the
splits of an exchange into numbers only where they come from a GPU; these get stand-ins. Nothing
else of it is changed.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch


class Stream:
    """A stream on which everything has happened already."""

    def wait_stream(self, other: Any) -> None:
        pass

    def record_event(self) -> Stream:
        return self

    def synchronize(self) -> None:
        pass


def stub_cuda() -> None:
    """Replace the parts of `torch.cuda` that the layer calls; for a process of its own."""
    one = Stream()
    torch.cuda.Stream = lambda *a, **k: one  # type: ignore[misc, assignment]
    torch.cuda.current_stream = lambda *a, **k: one  # type: ignore[assignment]
    torch.cuda.stream = lambda *a, **k: nullcontext()  # type: ignore[assignment]
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment]

    from megatron.core.transformer.moe import token_dispatcher

    def to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    token_dispatcher.maybe_move_tensor_to_cpu = to_host
