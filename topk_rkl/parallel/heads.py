"""DTensors: logits and heads whose vocabulary ranks share, and heads that fully sharded data parallelism took apart.

A sharded head beside hidden states that are a DTensor, or beside a group, is of tensor parallelism: all ranks have the
same rows, and each keeps its shard. Beside a plain tensor it is of data parallelism: each rank has rows of its own, and
needs the rows of the head that its ids name.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from topk_rkl.parallel.agreement import read_on_host
from topk_rkl.parallel.collectives import all_reduce, all_to_all_of
from topk_rkl.rows import result_dtype

STUDENT = "student_hidden", "student_weight", "student_bias"
TEACHER = "teacher_hidden", "teacher_weight", "bias"
FEWER = 2  # times the rows that any rank names, for rows to be fetched and not the whole head


def is_dtensor(x: object) -> bool:
    return isinstance(x, Tensor) and hasattr(x, "device_mesh")


def unwrap_logits(
    name: str,
    x: Any,  # (..., V), or any argument that is refused later
    group: dist.ProcessGroup | None,
) -> tuple[Any, dist.ProcessGroup | None]:  # (..., V_local), and the group that shares V
    """This rank's shard of a DTensor. Its gradient comes back as a DTensor of the same placements."""
    if not is_dtensor(x):
        return x, group
    return _local(x), _sharing(name, x, x.dim() - 1, group)


def unwrap_teacher(
    teacher: Any,  # (..., V) logits, a Support, or any argument that is refused later
    of_student: str,
    asked: dist.ProcessGroup | None,  # the argument
    group: dist.ProcessGroup | None,  # that shares the student's vocabulary
) -> Any:  # (..., V_local) logits, or the Support
    """A plain tensor is a shard beside a group that was asked for, and whole beside a DTensor: then it is refused."""
    if not isinstance(teacher, Tensor):
        return teacher
    local, own = unwrap_logits("teacher", teacher, group)
    if own is not group:
        raise ValueError(
            f"teacher is a DTensor with {_placements(teacher)}, but {of_student} is whole; pass "
            "teacher_topk(teacher_logits, k), which every rank has whole"
        )
    if asked is None and group is not None and not is_dtensor(teacher):
        raise ValueError(
            f"teacher holds logits of the whole vocabulary, but {of_student} is a DTensor that ranks share; pass "
            "teacher_topk(teacher_logits, k), which every rank has whole, or teacher logits sharded alike"
        )
    return local


def unwrap_head(
    hidden: Any,  # (..., H)
    weight: Any,  # (V, H)
    bias: Any,  # (V,), or None
    group: dist.ProcessGroup | None,
    names: tuple[str, str, str] = STUDENT,
) -> tuple[Any, Any, Any, dist.ProcessGroup | None]:  # (..., H), (V_local, H), (V_local,), and the group that shares V
    """This rank's shard of a head of tensor parallelism; a head of data parallelism stays a DTensor.

    Gradients come back as DTensors: of the head with its own placements, of hidden states on every rank alike.
    """
    of_hidden, of_weight, of_bias = names
    if is_dtensor(bias) and not is_dtensor(weight) and group is not None:
        raise ValueError(f"{of_bias} is a DTensor and {of_weight} this rank's shard; pass {of_bias}.to_local()")
    if is_dtensor(hidden):
        if not all(placement.is_replicate() for placement in hidden.placements):
            raise ValueError(
                f"{of_hidden} is a DTensor with {_placements(hidden)}; every rank of a sharded head needs all rows: "
                f"pass {of_hidden}.redistribute(placements=[{', '.join(['Replicate()'] * hidden.device_mesh.ndim)}])"
            )
        if group is None and not is_dtensor(weight):
            raise ValueError(f"{of_hidden} is a DTensor and {of_weight} is none; pass {of_hidden}.to_local()")
        if is_dtensor(weight) and weight.device_mesh != hidden.device_mesh:
            raise ValueError(
                f"{of_weight} is a DTensor of {weight.device_mesh} and {of_hidden} one of {hidden.device_mesh}; "
                f"pass {of_hidden}.to_local() with group=, the group that shares the head"
            )
    elif group is None:
        return hidden, weight, bias, None
    if is_dtensor(weight):
        group = _sharing(of_weight, weight, 0, group)
        if is_dtensor(bias) and _sharing(of_bias, bias, 0, group) is not group:
            raise ValueError(
                f"{of_bias} is a DTensor with {_placements(bias)} and {of_weight} has {_placements(weight)}; shard "
                f"both alike: pass {of_bias}.redistribute(placements={of_weight}.placements)"
            )
    return *(_local(x) if is_dtensor(x) else x for x in (hidden, weight, bias)), group


def whole_head(
    weight: Any,  # (V, H), plain or a DTensor
    bias: Any,  # (V,), or None
    ids: Any = None,  # (..., K): the only rows that are needed; None for all
) -> tuple[Tensor, Any, Any]:  # (V or fewer, H), (V or fewer,), (..., K) of those rows
    """A plain head as it is. A DTensor gathered, or the rows that ids name, for ranks with hidden states of their own.

    Rows are fetched where no rank names more than V / 2, on CPU tensors, from a head that one mesh dimension shards by
    rows: the sizes are read on the host. Otherwise every rank gathers the head, once. Gradients are averaged over the
    ranks, as FSDP2 does by default, and are DTensors with the placements of the parameters. Every rank takes part in
    every collective, whatever rows it has.
    """
    if ids is not None and is_dtensor(weight) and read_on_host(weight) and _by_rows(weight):
        group = weight.device_mesh.get_group()
        named, ids_of_named = _named(ids, weight.shape[0])
        counts = _counts(named, weight.shape[0], group)
        if FEWER * max(map(sum, counts)) <= weight.shape[0]:
            rows = _Rows.apply(_local(weight), named, weight.shape[0], counts, group)
            return rows, None if bias is None else _whole(bias).index_select(0, named), ids_of_named
    return _whole(weight), None if bias is None else _whole(bias), ids


def _whole(x: Any) -> Any:  # the shape of x
    """All of x, whose gradient is averaged over the ranks: right for rows of their own, and for the same rows."""
    if not is_dtensor(x):
        return x
    from torch.distributed.tensor import Partial

    return _Averaged.apply(x.full_tensor(grad_placements=(Partial(),) * x.device_mesh.ndim), x.device_mesh.size())


class _Averaged(torch.autograd.Function):
    """A gradient's share of the mean over the ranks: gloo of torch 2.7 has no average."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: int) -> Tensor:  # (...) -> (...)
        ctx.ranks = ranks
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # (...) -> (...), and nothing for ranks
        return gradient / ctx.ranks, None


def _named(
    ids: Tensor,  # (..., K)
    vocab: int,
) -> tuple[Tensor, Tensor]:  # (rows,) int64 ascending, (..., K) places among them, outside them if outside V
    inside = (ids >= 0) & (ids < vocab)
    named, places = ids[inside].unique(return_inverse=True)
    if len(named) == 0:
        named = ids.new_zeros(1)  # no op takes a head of no rows
    outside = torch.where(ids < 0, -1, len(named)).to(ids.dtype)
    return named.long(), outside.masked_scatter(inside, places.to(ids.dtype))


def _counts(
    named: Tensor,  # (rows,) ascending
    vocab: int,
    group: dist.ProcessGroup,
) -> list[list[int]]:  # [rank][owner]: how many rows of each owner each rank names
    ranks = dist.get_world_size(group)
    table = named.new_zeros((ranks, ranks))
    table[dist.get_rank(group)] = (named // _shard(vocab, ranks)).bincount(minlength=ranks)
    counts: list[list[int]] = all_reduce(table, group).tolist()
    return counts


def _shard(vocab: int, ranks: int) -> int:
    """Rows of the first shards, as torch.chunk makes them."""
    return -(-vocab // ranks)


class _Rows(torch.autograd.Function):
    """Rows of the head from their owners; their gradients go back, and an owner adds them up in the order of ranks."""

    @staticmethod
    def forward(
        ctx: Any,
        local: Tensor,  # (V_local, H)
        named: Tensor,  # (rows,) ascending
        vocab: int,
        counts: list[list[int]],
        group: dist.ProcessGroup,
    ) -> Tensor:  # (rows, H)
        rank = dist.get_rank(group)
        ctx.asks, ctx.asked, ctx.group = counts[rank], [row[rank] for row in counts], group
        ctx.shape = local.shape
        wanted = all_to_all_of(named, ctx.asks, ctx.asked, group) - rank * _shard(vocab, len(counts))
        ctx.save_for_backward(wanted)
        return all_to_all_of(local.index_select(0, wanted), ctx.asked, ctx.asks, group)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        gradient: Tensor,  # (rows, H)
    ) -> tuple[Tensor | None, ...]:  # (V_local, H), and nothing for the other four
        (wanted,) = ctx.saved_tensors
        total = gradient.new_zeros(ctx.shape, dtype=result_dtype(gradient))
        parts = all_to_all_of(gradient, ctx.asks, ctx.asked, ctx.group).split(ctx.asked)
        for rows, part in zip(wanted.split(ctx.asked), parts):  # no rank names a row twice
            total.index_add_(0, rows, part.to(total.dtype))
        return (total / len(ctx.asked)).to(gradient.dtype), None, None, None, None


def _by_rows(weight: Any) -> bool:
    """Whether each rank of one group has rows of its own, in the order of the ranks."""
    from torch.distributed.tensor import Shard

    mesh = weight.device_mesh
    return mesh.ndim == 1 and type(weight.placements[0]) is Shard and weight.placements[0].dim == 0 and _ascends(mesh)


def _ascends(mesh: Any, dim: int = 0) -> bool:
    """A group has its ranks in ascending order, whatever the order in the mesh."""
    return bool((mesh.mesh.diff(dim=dim) > 0).all())


def _sharing(
    name: str,
    x: Any,  # a DTensor
    dim: int,  # that holds the vocabulary
    group: dist.ProcessGroup | None,
) -> dist.ProcessGroup | None:
    """The group whose ranks share the vocabulary of x, or None where each rank has all of it."""
    from torch.distributed.tensor import Shard

    mesh, last = x.device_mesh, x.dim() - 1
    split = [i for i, placement in enumerate(x.placements) if not placement.is_replicate()]
    at = [i for i in split if type(x.placements[i]) is Shard and x.placements[i].dim == dim]
    if not split and group is None:
        return None
    if split != at or len(at) != 1:
        shard, place = f"Shard({-1 if dim == last else dim})", at[0] if at else mesh.ndim - 1
        wanted = ", ".join(shard if i == place else "Replicate()" for i in range(mesh.ndim))
        raise ValueError(
            f"{name} is a DTensor with {_placements(x)}; the ranks of {_selected(mesh, place)} are to share its "
            f"vocabulary and nothing else: pass {name}.redistribute(placements=[{wanted}])"
            + _or_own_rows(name, x, dim, [i for i in split if i not in at], at)
        )
    if not torch.compiler.is_compiling() and not _ascends(mesh, at[0]):
        raise ValueError(
            f"{name} is a DTensor of {mesh}, whose ranks do not ascend; shard it over a mesh whose ranks do, since a "
            "group has its ranks in ascending order"
        )
    own: dist.ProcessGroup = mesh.get_group(at[0])
    if group is not None and not _same(group, own):
        raise ValueError(
            f"{name} is a DTensor that ranks {dist.get_process_group_ranks(own)} share, beside a group, or another "
            f"DTensor, of ranks {dist.get_process_group_ranks(group)}; leave group out, and shard all over one mesh"
        )
    return own if group is None else group


def _or_own_rows(name: str, x: Any, dim: int, others: list[int], at: list[int]) -> str:
    """The other remedy, where all that is wrong is that ranks have rows of their own."""
    if dim != x.dim() - 1 or not others or not all(x.placements[i].is_shard() for i in others):
        return ""
    shared = f"group={_selected(x.device_mesh, at[0])} and " if at else ""
    return (
        f", or {name}.to_local() with this rank's rows of the other tensors, {shared}"
        "denominator=global_count(weights, group)"
    )


def _same(a: dist.ProcessGroup, b: dist.ProcessGroup) -> bool:
    return a is b or dist.get_process_group_ranks(a) == dist.get_process_group_ranks(b)


def _local(x: Any) -> Any:
    local = x.to_local()
    return local.wait() if hasattr(local, "trigger_wait") else local


def _placements(x: Any) -> str:
    return f"placements [{', '.join(map(repr, x.placements))}]"


def _selected(mesh: Any, dim: int) -> str:
    names = mesh.mesh_dim_names
    return f"mesh[{names[dim]!r}]" if names else f"mesh.get_group({dim})"
