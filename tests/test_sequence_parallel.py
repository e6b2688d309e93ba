"""Rows spread over ranks and micro-batches give the gradient of one process, and no rank skips a collective."""

from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from tests.probes import NoHostSync
from tests.ranks import on_ranks, together
from topk_rkl.loss import Support, linear_topk_reverse_kl, topk_reverse_kl
from topk_rkl.parallel.counts import global_count

pytestmark = together
V, K, H, W = 23, 4, 8, 6

# Rows of each micro-batch of each rank, of which a test takes as many ranks as it has.
SPREADS = {
    "uneven micro-batches": ((5, 2), (1, 4), (3, 3)),
    "a rank without rows": ((0, 0), (4, 3), (2, 0)),
    "a rank without a valid token": ((3, 2), (4, 1), (2, 5)),
}


class Student(nn.Module):
    """Gives its logits, or what `loss` makes of its hidden states and its head."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(W, H), nn.Linear(H, V, bias=False)
        self.double()

    def forward(self, x: Tensor, loss: Any = None) -> Tensor:
        hidden = self.body(x).tanh()
        return self.head(hidden) if loss is None else loss(hidden, self.head.weight)


def drawn(spread: str, world: int) -> tuple[list[list[int]], Tensor, Support, Tensor]:
    """Rows per micro-batch, inputs (N, W), the support (N, K) and weights (N,) of all ranks, one after the other."""
    rows = [list(each) for each in SPREADS[spread][:world]]
    n = sum(map(sum, rows))
    support = Support(torch.rand(n, V).topk(K).indices.int(), torch.randn(n, K).double())
    weights = torch.tensor([1.0, 0.0, 2.0, 0.5]).double()[torch.arange(n) % 4]
    if spread == "a rank without a valid token":
        weights[: sum(rows[0])] = 0
    return rows, torch.randn(n, W).double(), support, weights


def loss_of(student: nn.Module, entry: str, x: Tensor, support: Support, weights: Tensor, **options: Any) -> Tensor:
    if entry == "linear":
        return student(x, partial(linear_topk_reverse_kl, teacher=support, weights=weights, **options))
    return topk_reverse_kl(student(x), support, weights=weights, **options)


def whole(parameter: Tensor) -> Tensor:
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


def step(
    group: Any, how: str, entry: str, reduction: str, averaged: bool, rows: list, x: Tensor, support: Support, w: Tensor
) -> tuple[list[Tensor], Tensor, int]:
    """The gradients of this rank after all micro-batches, the sum of its losses, and how many collectives it ran."""
    student: nn.Module = Student()
    if how == "DDP":
        student = DistributedDataParallel(student, process_group=group)
    if how == "FSDP1":
        student = FullyShardedDataParallel(
            student, process_group=group, use_orig_params=True, device_id=torch.device("cpu")
        )
    if how == "FSDP2":
        fully_shard(student, mesh=DeviceMesh.from_group(group, "cpu"))
    bounds = torch.tensor([0, *(n for each in rows for n in each)]).cumsum(0).tolist()
    first = sum(map(len, rows[: group.rank()]))
    mine = [slice(*bounds[i : i + 2]) for i in range(first, first + len(rows[group.rank()]))]
    before = group._get_sequence_number_for_group()
    denominator = global_count([w[part] for part in mine], group, averaged=averaged)
    total = torch.zeros((), dtype=torch.float64)
    for part in mine:
        last = part == mine[-1]
        some = loss_of(
            student, entry, x[part], Support(support.ids[part], support.log_probs[part]), w[part], reduction=reduction,
            denominator=denominator if reduction == "mean" else None,
        )  # fmt: skip
        loss = some if reduction == "mean" else some.sum() / denominator
        with nullcontext() if last or how != "DDP" else student.no_sync():
            loss.backward()
        total += loss.detach()
    if how == "FSDP1":
        with FullyShardedDataParallel.summon_full_params(student, with_grads=True):
            grads = [p.grad.clone() for p in student.parameters()]
    else:
        grads = [whole(p.grad) for p in student.parameters()]
    if how == "by hand":
        for grad in grads:
            dist.all_reduce(grad, group=group)
    return grads, total, group._get_sequence_number_for_group() - before


def alone(entry: str, x: Tensor, support: Support, weights: Tensor) -> tuple[list[Tensor], Tensor]:
    """The same step with all rows in one call, from the student that the seed of the test gives every rank."""
    torch.manual_seed(torch.initial_seed())
    student = Student()
    loss = loss_of(student, entry, x, support, weights)
    loss.backward()
    return [p.grad for p in student.parameters()], loss.detach()


def assert_equals_one_process(world: int, how: str, entry: str, spread: str, reduction: str = "mean") -> None:
    rows, *batch = drawn(spread, world)
    averaged = how != "by hand"
    results = on_ranks(world, step, how, entry, reduction, averaged, rows, *batch)
    want, loss = alone(entry, *batch)
    assert all(grad.abs().max() > 1e-3 for grad in want)
    for grads, _, _ in results:
        for got, grad in zip(grads, want, strict=True):
            torch.testing.assert_close(got, grad, rtol=1e-12, atol=1e-15)
    total = sum(total for _, total, _ in results) / (world if averaged else 1)
    torch.testing.assert_close(total, loss, rtol=1e-12, atol=0)
    counts = {count for _, _, count in results}
    assert len(counts) == 1 and counts.pop() >= 2, "a rank skipped a collective"


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("how", ["by hand", "DDP", "FSDP1", "FSDP2"])
@pytest.mark.parametrize("entry", ["logits", "linear"])
@pytest.mark.parametrize("spread", SPREADS)
def test_accumulated_micro_batches_give_the_gradient_of_one_process(
    world: int, how: str, entry: str, spread: str
) -> None:
    assert_equals_one_process(world, how, entry, spread)


@pytest.mark.parametrize("how", ["by hand", "DDP"])
@pytest.mark.parametrize("entry", ["logits", "linear"])
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_the_other_reductions_give_it_too(how: str, entry: str, reduction: str) -> None:
    assert_equals_one_process(2, how, entry, "a rank without rows", reduction)


def test_a_sum_for_an_average_shows() -> None:
    """The gradient of DDP with the denominator of a trainer that sums is 1 / ranks of the right one."""
    rows, *batch = drawn("uneven micro-batches", 3)
    results = on_ranks(3, step, "DDP", "linear", "mean", False, rows, *batch)
    for got, want in zip(results[0][0], alone("linear", *batch)[0], strict=True):
        torch.testing.assert_close(3 * got, want, rtol=1e-12, atol=1e-15)


def test_no_valid_token_anywhere_gives_0() -> None:
    rows, x, support, weights = drawn("uneven micro-batches", 2)
    for grads, total, _ in on_ranks(2, step, "FSDP2", "linear", "mean", True, rows, x, support, 0 * weights):
        assert total == 0 and all((grad == 0).all() for grad in grads)


def counted(group: Any, given: list[Tensor], as_mesh: bool, averaged: bool) -> tuple[Tensor, int]:
    where = DeviceMesh.from_group(group, "cpu", mesh_dim_names=("dp",)) if as_mesh else group
    before = group._get_sequence_number_for_group()
    with NoHostSync():
        count = global_count(given[group.rank()], where, averaged=averaged)
    assert type(count) is Tensor and count.dtype == torch.float64 and count.dim() == 0
    return count, group._get_sequence_number_for_group() - before


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("as_mesh", [False, True])
@pytest.mark.parametrize("averaged", [False, True])
def test_a_count_is_the_sum_of_all_ranks_by_one_collective(world: int, as_mesh: bool, averaged: bool) -> None:
    given = [
        torch.tensor([[True, False], [True, True]]),
        [torch.tensor([2.0, 0, 1]), torch.tensor(0.25)],  # of two micro-batches
        torch.zeros(0),
        (torch.full((2, 1, 2), -0.5, dtype=torch.bfloat16),),
    ]
    want = sum([3, 3.25, 0, -2][:world]) / (world if averaged else 1)
    assert on_ranks(world, counted, given, as_mesh, averaged) == [(want, 1)] * world


def everyone(group: Any) -> float:
    return global_count(torch.ones(group.rank())).item()


def test_no_group_is_every_rank_or_this_process_alone() -> None:
    assert on_ranks(4, everyone) == [6.0] * 4
    assert not dist.is_initialized()
    assert global_count(torch.ones(3)) == global_count([torch.ones(3)], averaged=True) == 3


def traced(group: Any, by: str) -> tuple[Tensor, Tensor]:
    where = {"group": group, "mesh": DeviceMesh.from_group(group, "cpu"), "none": None}[by]

    def count(x: Tensor) -> Tensor:
        return global_count([x, x > 0], where, averaged=True)

    x = torch.arange(group.rank() + 2.0)
    return torch.compile(count, fullgraph=True, backend="aot_eager")(x), count(x)


@pytest.mark.slow
@pytest.mark.parametrize("by", ["group", "mesh", "none"])
def test_a_count_compiles(by: str) -> None:
    ((got, want), *_) = on_ranks(4, traced, by)
    assert got == want == (2 + 5 + 9 + 14) / 4


def refused(group: Any) -> dict[str, str]:
    """What each wrong call says, with the advice followed after it."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    sharded = distribute_tensor(torch.ones(8), mesh["dp"], [Shard(0)])
    calls = {
        "2-D mesh": lambda: global_count(torch.ones(2), mesh),
        "outside": lambda: global_count(torch.ones(2), dist.GroupMember.NON_GROUP_MEMBER),
        "DTensor": lambda: global_count(sharded, mesh["dp"]),
        "empty list": lambda: global_count([], group),
        "grad": lambda: global_count([torch.ones(2), torch.ones(2, requires_grad=True)], group),
        "kind": lambda: global_count(3.0, group),
        "complex": lambda: global_count(torch.ones(2, dtype=torch.complex64), group),
        "flag": lambda: global_count(torch.ones(2), group, averaged=1),
    }
    messages = {}
    for name, call in calls.items():
        with pytest.raises((TypeError, ValueError)) as raised:
            call()
        messages[name] = str(raised.value)
    assert global_count(torch.ones(2), mesh["dp"]) == 4
    assert global_count(sharded.to_local(), mesh["dp"]) == 8
    assert global_count(torch.zeros(0), group) == 0
    return messages


def test_a_wrong_argument_is_refused_by_name() -> None:
    said = on_ranks(4, refused)[3]
    assert said["2-D mesh"].endswith(
        "2 dimensions, ('dp', 'tp'); pass the one whose ranks hold different positions, such as mesh['dp']"
    )
    assert said["outside"].startswith("group is ") and "it must be a ProcessGroup, a" in said["outside"]
    assert said["DTensor"] == "weights is a DTensor; pass weights.to_local(), the part of this rank, and their group"
    assert (
        said["empty list"].startswith("weights is an empty list; ")
        and "torch.zeros(0, device=...)" in said["empty list"]
    )
    assert said["grad"].startswith("weights[1] requires grad") and "weights[1].detach()" in said["grad"]
    assert said["kind"] == ("weights is a float; it must be a tensor, or a list of tensors, one per micro-batch")
    assert said["complex"].startswith("weights is torch.complex64; use one of bool, ")
    assert said["flag"] == "averaged is 1; it must be True or False"
