"""The collectives between the ranks of a group, on the current stream, in the form that torch.compile traces."""

from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.functional import pad

from topk_rkl import checks

Group: TypeAlias = dist.ProcessGroup | DeviceMesh  # a mesh of one dimension, such as mesh["tp"]


def require_group(group: object) -> Any:
    """The ProcessGroup of a group or of a mesh; None stays None."""
    if group is None or isinstance(group, dist.ProcessGroup):
        return group
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(
                f"group is a DeviceMesh of {group.ndim} dimensions; pass the one that shares the vocabulary, such as "
                "mesh['tp']"
            )
        return group.get_group()
    raise TypeError(f"group is {checks.seen(group)}; it must be a ProcessGroup, a DeviceMesh of one dimension, or None")


def all_reduce(
    x: Tensor,  # (...)
    group: dist.ProcessGroup | None,
) -> Tensor:  # (...)
    """The sum over the ranks, or x without a group."""
    return wait(start_all_reduce(x, group)) if x.numel() and group is not None else x


def start_all_reduce(
    x: Tensor,  # (...)
    group: dist.ProcessGroup,
) -> Tensor:  # (...), to `wait` for
    started: Tensor = _functional().all_reduce(x.contiguous(), "sum", group)
    return started


def all_gather(
    x: Tensor,  # (...)
    group: dist.ProcessGroup,
) -> Tensor:  # (ranks, ...)
    return wait(start_all_gather(x, group)) if x.numel() else x.expand(dist.get_world_size(group), *x.shape)


def start_all_gather(
    x: Tensor,  # (...)
    group: dist.ProcessGroup,
) -> Tensor:  # (ranks, ...), to `wait` for
    functional = _functional()
    # The older name warns from torch 2.13 on.
    gather = getattr(functional, "all_gather_single", None) or functional.all_gather_tensor
    started: Tensor = gather(x[None].contiguous(), 0, group)
    return started


def all_to_all(
    x: Tensor,  # (ranks, ...) one part for each rank
    group: dist.ProcessGroup,
) -> Tensor:  # (ranks, ...) one part from each rank
    return wait(_functional().all_to_all_single(x.contiguous(), None, None, group))


def all_to_all_of(
    x: Tensor,  # (sum of sends, ...)
    sends: list[int],  # to each rank
    receives: list[int],  # from each rank
    group: dist.ProcessGroup,
) -> Tensor:  # (sum of receives, ...)
    return wait(_functional().all_to_all_single(x.contiguous(), receives, sends, group))


def wait(x: Tensor) -> Tensor:
    waited: Tensor = _functional().wait_tensor(x)
    return waited


def _functional() -> Any:
    import torch.distributed._functional_collectives as functional  # takes as long as the rest of the package

    return functional


def to_owners(
    x: Tensor,  # (N, X) this rank's numbers of all rows
    group: dist.ProcessGroup,
) -> Tensor:  # (ranks, n, X) every rank's numbers of the n rows that this rank owns: those from rank * n on
    return all_to_all(dealt(x, group), group)


def dealt(
    x: Tensor,  # (N, ...)
    group: dist.ProcessGroup,
) -> Tensor:  # (ranks, n, ...) by the rank that owns a row, zeros behind the last row
    ranks = dist.get_world_size(group)
    missing = owned(len(x), group) * ranks - len(x)
    if torch.compiler.is_compiling() or missing:  # a graph that did not pad would serve some N alone
        x = pad(x, (0, 0) * (x.dim() - 1) + (0, missing))
    return x.view(ranks, -1, *x.shape[1:])


def from_owners(
    x: Tensor,  # (ranks, n, X) what each rank is to know of the rows that this rank owns
    rows: int,
    group: dist.ProcessGroup,
) -> Tensor:  # (N, X) what this rank is to know of all rows
    return all_to_all(x, group).view(-1, x.shape[2])[:rows]


def owned(rows: int, group: dist.ProcessGroup) -> int:
    """How many rows each rank owns, at least 1: a collective of nothing would not be one everywhere."""
    return max(1, -(-rows // dist.get_world_size(group)))


def as_bytes(*tensors: Tensor) -> Tensor:  # (N, X) each -> (N, bytes of a row)
    """Numbers of several dtypes in one collective, to the bit."""
    return torch.cat([x.contiguous().view(torch.uint8) for x in tensors], -1)


def from_bytes(
    x: Tensor,  # (..., bytes of a row)
    *dtypes: torch.dtype,
    columns: int,
) -> list[Tensor]:  # (..., columns) each
    sizes = [columns * dtype.itemsize for dtype in dtypes]
    # A copy, since contiguous() keeps the strides of dimensions of size 1, which no wider dtype may have.
    return [
        part.clone(memory_format=torch.contiguous_format).view(dtype) for part, dtype in zip(x.split(sizes, -1), dtypes)
    ]
