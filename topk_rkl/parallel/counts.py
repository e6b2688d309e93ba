"""How many positions one step has over all micro-batches and ranks: the denominator of its mean."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from topk_rkl import checks
from topk_rkl.parallel.collectives import Group, all_reduce, require_group


def global_count(
    weights: Tensor | Sequence[Tensor],  # (...), or a list of them: all micro-batches of the step on this rank
    group: Group | None = None,
    *,
    averaged: bool = False,
) -> Tensor:  # ()
    """The sum of `weights` over all ranks, for `denominator=`: one all-reduce of one number.

    Every rank must call it, a rank without a single valid token included. The sum of the losses of all micro-batches
    and ranks is then the mean over all positions, however unevenly they are spread.

    Args:
        weights: (...) bool or float: the `weights` of the losses, 1 per position where a loss has none. A
            list holds those of all micro-batches that one optimiser step accumulates, of any shapes. A rank without
            rows passes a tensor of 0 elements.
        group: the ranks whose losses or gradients are added up: a ProcessGroup, or a DeviceMesh of one dimension such
            as mesh["dp"]. None is every rank, as in torch.distributed, and this process alone where no process group
            is initialised, so that one script runs with and without torchrun. Ranks that hold the same rows, such as
            those of a tensor-parallel group, must not be counted twice: pass the data-parallel group.
        averaged: divides the sum by the number of ranks. True belongs to DDP, FSDP1 and FSDP2, which average the
            gradients of the ranks; False to gradients that are summed, and to a loss that is multiplied by the number
            of ranks, as HF Trainer does.

    Returns:
        () float64 on the device of `weights`, the same on every rank. Nothing is read on the host.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it, and nothing has been sent. The other
            ranks then wait for this one until the time-out of their group.
    """
    counted = _require_counted(weights)
    checks.require_flag("averaged", averaged)
    ranks = _group_of(group)
    total = torch.stack([x.sum(dtype=torch.float64) for x in counted]).sum()
    if ranks is None:
        return total
    total = all_reduce(total, ranks)
    return total / dist.get_world_size(ranks) if averaged else total


def _require_counted(weights: object) -> Sequence[Tensor]:
    """The tensors to count, all on one device."""
    if isinstance(weights, Tensor):
        named: dict[str, Any] = {"weights": weights}
    elif isinstance(weights, (tuple, list)):
        named = {f"weights[{i}]": x for i, x in enumerate(weights)}
    else:
        raise TypeError(
            f"weights is {checks.kind_of(weights)}; it must be a tensor, or a list of tensors, one per micro-batch"
        )
    if not named:
        raise ValueError(
            "weights is an empty list; a rank without a micro-batch takes part too: pass torch.zeros(0, device=...)"
        )
    (first, like), *_ = named.items()
    for name, x in named.items():
        if hasattr(x, "full_tensor"):
            raise TypeError(f"{name} is a DTensor; pass {name}.to_local(), the part of this rank, and their group")
        checks.require_factors(name, x)
        checks.require_constant(name, x)
        checks.require_same_device(name, x, first, like)
    return [*named.values()]


def _group_of(group: Group | None) -> dist.ProcessGroup | None:
    """The group to sum over; None where this process is alone."""
    if isinstance(group, DeviceMesh) and group.ndim != 1:
        one = (group.mesh_dim_names or ("dp",))[0]
        raise ValueError(
            f"group is a DeviceMesh of {group.ndim} dimensions, {group.mesh_dim_names or tuple(group.shape)}; pass the "
            f"one whose ranks hold different positions, such as mesh[{one!r}]"
        )
    if group is None and dist.is_available() and dist.is_initialized():
        return dist.group.WORLD
    chosen: dist.ProcessGroup | None = require_group(group)
    return chosen
