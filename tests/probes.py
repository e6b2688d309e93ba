"""What shows a read on the host, and an offset beyond 32 bits."""

import mmap
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class NoHostSync(TorchDispatchMode):
    """Refuses every operation that reads a device value on the host."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.split(".")[0]
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2"), name
        return function(*args, **(kwargs or {}))


def captured(step: Callable[[], tuple[Tensor, ...]]) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...]]:
    """The step as a graph and what that writes to; an error if the step reads a device value on the host."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    side.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return graph, results


def lazy_memory(elements: int, dtype: torch.dtype) -> Tensor:
    """Address space that costs no memory until it is written."""
    return torch.frombuffer(mmap.mmap(-1, elements * dtype.itemsize), dtype=dtype)
