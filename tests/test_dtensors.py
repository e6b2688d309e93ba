"""DTensor logits and heads of tensor parallelism: their shards, their gradients, and placements that are refused."""

import re
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from tests.ranks import on_ranks, together
from tests.sharded_model import WIDTH, assert_close, mesh_of, square, whole
from topk_rkl.loss import (
    Support,
    global_count,
    linear_teacher_topk,
    linear_topk_reverse_kl,
    teacher_topk,
    topk_divergence,
    topk_reverse_kl,
)
from topk_rkl.parallel import heads
from topk_rkl.recipe.rollout import top_p_filter

pytestmark = together
K = 4
WORLDS = (1, 2, 3, 4)


# Logits


def shards_of_logits(group: Any, two_dimensions: bool) -> None:
    mesh, placements = mesh_of(group), [Shard(-1)]
    if two_dimensions:
        mesh, placements = square(), [Replicate(), Shard(-1)]
    logits, scale = torch.randn(2, 3, 7), torch.randn(2, 3, 7)
    x = distribute_tensor(logits, mesh, placements).requires_grad_()
    local, own = heads.unwrap_logits("x", x, None)
    ranks = mesh.size(mesh.ndim - 1)
    assert own is mesh.get_group(mesh.ndim - 1)
    first = dist.get_rank(own) * -(-7 // ranks)
    assert torch.equal(local, logits[..., first : first + -(-7 // ranks)])
    (local * scale[..., first : first + -(-7 // ranks)]).sum().backward()
    assert x.grad.placements == tuple(x.placements) and torch.equal(whole(x.grad), scale)
    assert heads.unwrap_logits("x", x, own)[1] is own
    assert heads.unwrap_logits("x", logits, own) == (logits, own)


@pytest.mark.parametrize("world", WORLDS)
def test_sharded_logits_give_their_shard_and_take_a_sharded_gradient(world: int) -> None:
    on_ranks(world, shards_of_logits, False)


def test_logits_may_be_sharded_over_one_dimension_of_a_mesh() -> None:
    on_ranks(4, shards_of_logits, True)


def logits_everywhere(group: Any) -> None:
    logits = torch.randn(3, 7)
    x = distribute_tensor(logits, mesh_of(group), [Replicate()]).requires_grad_()
    local, own = heads.unwrap_logits("x", x, None)
    local.square().sum().backward()
    assert own is None and torch.equal(local, logits)
    assert x.grad.placements == (Replicate(),) and torch.equal(whole(x.grad), 2 * logits)


def test_logits_on_every_rank_are_taken_as_they_are() -> None:
    on_ranks(2, logits_everywhere)


REFUSED = {
    "rows": ([Shard(0)], False, None),
    "positions": ([Shard(1)], False, None),
    "partial sums": ([Partial()], False, None),
    "rows and vocabulary": ([Shard(0), Shard(2)], True, "tp"),
    "vocabulary twice": ([Shard(2), Shard(2)], True, None),
    "whole beside a group": ([Replicate()], False, "group"),
}


def refused_logits(group: Any, case: str) -> str:
    """The message, once its first remedy was followed."""
    placements, two_dimensions, _ = REFUSED[case]
    mesh, logits = square() if two_dimensions else mesh_of(group), torch.randn(4, 4, 7)
    if case == "partial sums":
        x = given = DTensor.from_local(logits / 4, mesh, placements).requires_grad_()
    else:
        x = given = distribute_tensor(logits, mesh, placements).requires_grad_()
    try:
        heads.unwrap_logits("student_logits", given, group if case == "whole beside a group" else None)
    except ValueError as error:
        message = str(error)
    remedy = re.search(r"pass (student_logits\.redistribute\(placements=\[.*?\]\))", message).group(1)
    names = {"student_logits": given, "Shard": Shard, "Replicate": Replicate}
    local, own = heads.unwrap_logits("student_logits", eval(remedy, names), None)
    size = -(-7 // dist.get_world_size(own))
    first = dist.get_rank(own) * size
    assert torch.equal(local, logits[..., first : first + size])
    (2 * local).sum().backward()
    assert torch.equal(whole(x.grad), torch.full_like(logits, 2.0))
    return message


@pytest.mark.parametrize("case", REFUSED)
def test_other_placements_are_refused_with_a_remedy_that_works(case: str) -> None:
    messages = on_ranks(4, refused_logits, case)
    placements, _, own = REFUSED[case]
    for message in messages:
        assert f"student_logits is a DTensor with placements [{', '.join(map(repr, placements))}]" in message
        rows = case in ("rows", "positions", "rows and vocabulary")
        assert ("student_logits.to_local() with this rank's rows" in message) == rows
        assert ("group=mesh['tp']" in message) == (own == "tp")


def other_groups(group: Any) -> None:
    x = distribute_tensor(torch.randn(3, 7), mesh_of(group), [Shard(-1)])
    with pytest.raises(ValueError, match=r"teacher is a DTensor that ranks \[0, 1\] share.* of ranks \[0, 1, 2, 3\]"):
        heads.unwrap_logits("teacher", x, dist.group.WORLD)
    assert heads.unwrap_logits("teacher", x, None)[1] is not None  # as the message says
    downwards = DeviceMesh("cpu", torch.tensor([1, 0]), _init_backend=False)
    x = DTensor.from_local(torch.randn(3, 4), downwards, [Shard(-1)], run_check=False)
    with pytest.raises(ValueError, match="whose ranks do not ascend"):
        heads.unwrap_logits("teacher", x, None)


def test_logits_of_another_group_or_order_are_refused() -> None:
    on_ranks(2, other_groups)


# Heads of tensor parallelism


def shards_of_head(group: Any, hidden_sharded: bool) -> None:
    mesh, rank, ranks = mesh_of(group), dist.get_rank(group), dist.get_world_size(group)
    data = torch.randn(3, WIDTH), torch.randn(7, WIDTH), torch.randn(7)
    hidden = distribute_tensor(data[0], mesh, [Replicate()]).requires_grad_()
    weight = nn.Parameter(distribute_tensor(data[1], mesh, [Shard(0)]))
    bias = nn.Parameter(distribute_tensor(data[2], mesh, [Shard(0)]))
    given = (hidden, weight, bias, None) if hidden_sharded else (hidden.to_local(), weight, bias, group)
    x, w, b, own = heads.unwrap_head(*given)
    part = slice(rank * -(-7 // ranks), (rank + 1) * -(-7 // ranks))
    assert own is (mesh.get_group() if hidden_sharded else group)
    assert all(type(t) is Tensor or isinstance(t, nn.Parameter) for t in (x, w, b))
    assert torch.equal(w, data[1][part]) and torch.equal(b, data[2][part]) and torch.equal(x, data[0])
    ((w.sum() + b.sum()) * 3 + x.square().sum()).backward()
    for p in (weight, bias):
        assert p.grad.placements == (Shard(0),) and torch.equal(whole(p.grad), torch.full_like(whole(p), 3.0))
    assert hidden.grad.placements == (Replicate(),) and torch.equal(hidden.grad.to_local(), 2 * data[0])


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("hidden_sharded", [True, False])
def test_a_head_of_tensor_parallelism_gives_its_shard(world: int, hidden_sharded: bool) -> None:
    on_ranks(world, shards_of_head, hidden_sharded)


def refused_heads(group: Any) -> None:
    mesh = mesh_of(group)
    hidden, weight, bias = torch.randn(4, WIDTH), torch.randn(7, WIDTH), torch.randn(7)
    shared = {dim: distribute_tensor(weight, mesh, [Shard(dim)]) for dim in (0, 1)}
    everywhere = distribute_tensor(hidden, mesh, [Replicate()])
    rows = distribute_tensor(hidden, mesh, [Shard(0)])
    names = {"Shard": Shard, "Replicate": Replicate}

    def refused(text: str, *given: Any) -> Any:
        """What the remedy gives of what it names."""
        with pytest.raises(ValueError, match=text) as caught:
            heads.unwrap_head(*given)
        remedy = re.search(r"pass (student_\w+\.(redistribute\(.*\)|to_local\(\)))", str(caught.value)).group(1)
        return eval(remedy, names | dict(zip(heads.STUDENT, given)))

    known = refused("student_hidden is a DTensor with placements .*needs all rows", rows, shared[0], None, None)
    assert torch.equal(heads.unwrap_head(known, shared[0], None, None)[0], hidden)
    known = refused("student_weight is a DTensor with placements .*nothing else", everywhere, shared[1], None, None)
    assert torch.equal(heads.unwrap_head(everywhere, known, None, None)[1], shared[0].to_local())
    known = refused("student_hidden is a DTensor and student_weight is none", everywhere, weight, None, None)
    assert heads.unwrap_head(known, weight, None, None) == (known, weight, None, None)
    whole_bias = distribute_tensor(bias, mesh, [Replicate()])
    known = refused("student_bias is a DTensor with", everywhere, shared[0], whole_bias, None)
    assert len(heads.unwrap_head(everywhere, shared[0], known, None)[2]) == len(shared[0].to_local())
    split_bias = distribute_tensor(bias, mesh, [Shard(0)])
    known = refused(
        "student_bias is a DTensor and student_weight this", hidden, shared[0].to_local(), split_bias, group
    )
    assert heads.unwrap_head(hidden, shared[0].to_local(), known, group)[2] is known
    every_weight = distribute_tensor(weight, mesh, [Replicate()])
    known = refused("student_weight is a DTensor with placements .*nothing else", hidden, every_weight, None, group)
    assert torch.equal(heads.unwrap_head(hidden, known, None, group)[1], shared[0].to_local())
    other = DeviceMesh.from_group(group, "cpu", mesh_dim_names=("other",))
    known = refused(
        "student_weight is a DTensor of .* and student_hidden one of",
        everywhere,
        distribute_tensor(weight, other, [Shard(0)]),
        None,
        None,
    )
    assert torch.equal(heads.unwrap_head(known, shared[0], None, group)[0], hidden)


def test_heads_that_are_not_shared_by_rows_are_refused_with_a_remedy_that_works() -> None:
    on_ranks(2, refused_heads)


# The public functions, and what they refuse


def mixed(group: Any) -> None:
    mesh = mesh_of(group)
    student, teacher = torch.randn(3, 67), torch.randn(3, 67)
    z, w = (distribute_tensor(x, mesh, [Shard(-1)]) for x in (student, teacher))
    truth = topk_reverse_kl(student, teacher, k=K)
    assert_close(topk_reverse_kl(z, w, k=K), truth)
    with pytest.raises(
        ValueError, match=r"teacher holds logits of the whole vocabulary, but student_logits is a DTensor"
    ):
        topk_reverse_kl(z, teacher, k=K)
    assert_close(topk_reverse_kl(z, teacher_topk(teacher, K)), truth)  # as the message says
    with pytest.raises(ValueError, match=r"teacher is a DTensor with placements .*, but student_logits is whole"):
        topk_reverse_kl(student, w, k=K)
    assert_close(topk_reverse_kl(student, teacher_topk(w, K)), truth)
    assert_close(topk_reverse_kl(z, w.to_local(), k=K, group=mesh), truth)

    hidden, head = torch.randn(3, WIDTH), torch.randn(67, WIDTH)
    shared = distribute_tensor(head, mesh, [Shard(0)])
    everywhere = distribute_tensor(hidden, mesh, [Replicate()])
    truth = linear_topk_reverse_kl(hidden, head, teacher, k=K)
    assert_close(linear_topk_reverse_kl(everywhere, shared, w, k=K), truth)
    with pytest.raises(
        ValueError, match="teacher holds logits of the whole vocabulary, but student_weight is a DTensor"
    ):
        linear_topk_reverse_kl(everywhere, shared, teacher, k=K)
    assert_close(linear_topk_reverse_kl(everywhere, shared, teacher_topk(teacher, K)), truth)
    teacher_head = distribute_tensor(head.roll(1, 0), mesh, [Shard(0)])
    found = linear_teacher_topk(everywhere, teacher_head, K)
    assert torch.equal(found.ids, linear_teacher_topk(hidden, head.roll(1, 0), K).ids)

    with pytest.raises(ValueError, match="overwrite_student_logits=True, but student_logits is a DTensor; leave the"):
        topk_reverse_kl(z, w, k=K, overwrite_student_logits=True)
    with pytest.raises(ValueError, match=r"weight_grad is 'sparse', but student_weight is a DTensor.*use 'dense'"):
        linear_topk_reverse_kl(hidden, nn.Parameter(shared), teacher, k=K, weight_grad="sparse")


def test_student_and_teacher_are_sharded_alike_or_refused() -> None:
    on_ranks(2, mixed)


def other_arguments(group: Any) -> None:
    """Anything else is refused as a DTensor, and taken as the message says."""
    mesh = mesh_of(group)
    student, (ids, log_probs) = torch.randn(4, 67), teacher_topk(torch.randn(4, 67), K, normalize=True).tensors
    weights, sampled, count = torch.rand(4), torch.randint(0, 67, (4,)), torch.tensor(3.0)
    z = distribute_tensor(student, mesh, [Shard(-1)])
    cases: dict[str, tuple[Tensor, Any]] = {
        "weights": (weights, lambda x: topk_reverse_kl(z, Support(ids, log_probs), weights=x)),
        "denominator": (count, lambda x: topk_reverse_kl(z, Support(ids, log_probs), denominator=x)),
        "teacher.ids": (ids, lambda x: topk_reverse_kl(z, Support(x, log_probs))),
        "teacher.log_probs": (log_probs, lambda x: topk_reverse_kl(z, Support(ids, x))),
        "sampled_ids": (
            sampled,
            lambda x: topk_divergence(z, z.detach(), k=K, mass="ema_pg", sampled_ids=x),
        ),
        "logits": (student, lambda x: top_p_filter(x, 0.9)),
    }
    for name, (x, call) in cases.items():
        for placement in (Replicate(), Shard(0)) if x.dim() else (Replicate(),):
            given = distribute_tensor(x, mesh, [placement])
            with pytest.raises((TypeError, RuntimeError), match=rf"{name} is a DTensor; pass {name}\.full_tensor\(\)"):
                call(given)
            assert torch.equal(call(given.full_tensor()), call(x))


def test_other_arguments_are_refused_as_dtensors() -> None:
    on_ranks(2, other_arguments)


def own_rows_of_logits(group: Any) -> None:
    """The second remedy of sharded rows: to_local(), and the denominator of all ranks."""
    mesh, rank = mesh_of(group), dist.get_rank(group)
    student, teacher, weights = torch.randn(5, 67), torch.randn(5, 67), torch.rand(5)
    z = distribute_tensor(student, mesh, [Shard(0)]).requires_grad_()
    with pytest.raises(
        ValueError, match=r"or student_logits\.to_local\(\) with this rank's rows of the other tensors, d"
    ):
        topk_reverse_kl(z, teacher, k=K, weights=weights)
    mine = slice(3 * rank, 3 * rank + 3)
    loss = topk_reverse_kl(
        z.to_local(), teacher[mine], k=K, weights=weights[mine], denominator=global_count(weights[mine], group)
    )
    loss.backward()
    one = student.clone().requires_grad_()
    topk_reverse_kl(one, teacher, k=K, weights=weights).backward()
    assert z.grad.placements == (Shard(0),)
    assert_close(whole(z.grad), one.grad)


def test_logits_sharded_by_rows_are_losses_of_their_own_rows() -> None:
    on_ranks(2, own_rows_of_logits)


def awaited(group: Any) -> None:
    student, teacher = torch.randn(3, 67), torch.randn(3, 67)
    local = functional.all_reduce(student / 2, "sum", group)
    assert type(local).__name__ == "AsyncCollectiveTensor"
    z = DTensor.from_local(functional.all_reduce(student / 2, "sum", group), mesh_of(group), [Replicate()])
    for given in (local, z):
        assert torch.equal(topk_reverse_kl(given, teacher, k=K), topk_reverse_kl(student, teacher, k=K))


def test_logits_that_a_collective_is_still_making() -> None:
    on_ranks(2, awaited)


def compiled(group: Any) -> None:
    mesh, support = mesh_of(group), teacher_topk(torch.randn(3, 67), K)
    student, hidden, head = torch.randn(3, 67), torch.randn(3, WIDTH), torch.randn(67, WIDTH)
    z = nn.Parameter(distribute_tensor(student, mesh, [Shard(-1)]))
    w = nn.Parameter(distribute_tensor(head, mesh, [Shard(0)]))
    for loss_of, given, one in (
        (topk_reverse_kl, (z,), (student,)),
        (linear_topk_reverse_kl, (distribute_tensor(hidden, mesh, [Replicate()]), w), (hidden, head)),
        (linear_topk_reverse_kl, (hidden, w), (hidden, head)),
    ):
        loss = torch.compile(lambda *x, f=loss_of: f(*x, support), fullgraph=True, backend="aot_eager")(*given)
        leaves = [nn.Parameter(x) for x in one]
        truth = loss_of(*leaves, support)
        loss.backward()
        truth.backward()
        assert_close(loss.detach(), truth.detach())
        assert given[-1].grad.placements == given[-1].placements
        assert_close(whole(given[-1].grad), leaves[-1].grad)
        given[-1].grad = None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_dtensors_are_traced_whole() -> None:
    on_ranks(2, compiled)
