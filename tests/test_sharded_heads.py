"""Heads of data parallelism, rows fetched or the head gathered, with the gradients of one process; quantised heads."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from tests.ranks import on_ranks, together
from tests.sharded_model import WIDTH, assert_close, mesh_of, square, whole
from topk_rkl.diagnostics import NAMES, linear_topk_diagnostics
from topk_rkl.loss import (
    Support,
    linear_teacher_topk,
    linear_topk_divergence,
    linear_topk_reverse_kl,
    teacher_topk,
    topk_reverse_kl,
)
from topk_rkl.parallel import heads
from topk_rkl.recipe.builders import linear_fixed_ids

pytestmark = together
K = 4


def own_rows(group: Any, vocab: int, sizes: tuple[int, ...]) -> tuple[Any, ...]:
    """The rows of all ranks, which of them this rank has, a head and its bias."""
    n, rank = sum(sizes), dist.get_rank(group)
    hidden, ids = torch.randn(n, WIDTH), torch.randint(-1, vocab + 3, (n, K))
    log_probs, weight = torch.randn(n, K), torch.randn(vocab, WIDTH)
    bias = torch.randn(vocab)
    mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    return (hidden, ids, log_probs), mine, weight, bias


def fetched(group: Any, vocab: int, sizes: tuple[int, ...], by_rows: bool, frozen: bool = False) -> None:
    (hidden, ids, log_probs), mine, weight, bias = own_rows(group, vocab, sizes)
    mesh, ranks = mesh_of(group), dist.get_world_size(group)
    ids[:, 0] = 1  # which every rank names
    if not by_rows:
        ids[: sizes[0]] = torch.arange(sizes[0] * K).view(-1, K) % vocab
    w, b = (nn.Parameter(distribute_tensor(x, mesh, [Shard(0)]), requires_grad=not frozen) for x in (weight, bias))
    fired: list[Any] = []
    if not frozen:
        w.register_post_accumulate_grad_hook(fired.append)
    x = hidden[mine].clone().requires_grad_()
    rows, few, places = heads.whole_head(w, b, ids[mine])
    assert (len(rows) < vocab) == by_rows and type(rows) is Tensor
    own = linear_topk_reverse_kl(x, rows, Support(places, log_probs[mine]), student_bias=few, reduction="none")
    (own.sum() * ranks).backward()

    one = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
    per_token = linear_topk_reverse_kl(*one[:2], Support(ids, log_probs), student_bias=one[2], reduction="none")
    per_token.sum().backward()
    assert_close(own, per_token[mine])
    assert_close(x.grad / ranks, one[0].grad[mine])
    if frozen:
        assert w.grad is None and b.grad is None
        return
    assert fired == [w] or fired[0] is w
    for p, truth in ((w, one[1]), (b, one[2])):
        assert p.grad.placements == (Shard(0),) and p.grad.to_local().shape == p.to_local().shape
        assert_close(whole(p.grad), truth.grad)


@pytest.mark.parametrize(
    ("vocab", "sizes"), [(67, (3,)), (67, (2, 3)), (67, (5, 0)), (67, (0, 1, 4)), (5, (0, 0, 0, 0)), (9, (1, 0, 0, 0))]
)
def test_rows_of_the_head_are_fetched_where_few_are_named(vocab: int, sizes: tuple[int, ...]) -> None:
    on_ranks(len(sizes), fetched, vocab, sizes, True)


@pytest.mark.parametrize(("vocab", "sizes"), [(67, (9,)), (67, (20, 1)), (67, (20, 0, 1)), (5, (2, 0, 0, 0))])
def test_the_head_is_gathered_where_any_rank_names_many_rows(vocab: int, sizes: tuple[int, ...]) -> None:
    on_ranks(len(sizes), fetched, vocab, sizes, False)


@pytest.mark.parametrize("by_rows", [True, False])
def test_a_frozen_head_is_fetched_for_the_hidden_states_alone(by_rows: bool) -> None:
    on_ranks(2, fetched, 67, (2, 1) if by_rows else (20, 1), by_rows, True)


def counted(group: Any, by_rows: bool) -> dict[str, int]:
    rows = 2 if by_rows else 30
    w = nn.Parameter(distribute_tensor(torch.randn(67, WIDTH), mesh_of(group), [Shard(0)]))
    support = Support(torch.randint(0, 67, (rows, K)), torch.randn(rows, K))
    with CommDebugMode() as mode:
        linear_topk_reverse_kl(torch.randn(rows, WIDTH), w, support).backward()
    return {name.__name__: count for name, count in mode.get_comm_counts().items()}


def test_the_collectives_of_a_head_that_is_taken_apart() -> None:
    asked = {"all_reduce": 1}  # of ranks x ranks integers
    assert on_ranks(3, counted, True) == [asked | {"all_to_all_single": 3}] * 3  # ids, rows, and their gradients
    assert on_ranks(3, counted, False) == [asked | {"all_gather_into_tensor": 1, "reduce_scatter_tensor": 1}] * 3


def other_masses(group: Any) -> None:
    (hidden, *_), mine, weight, _ = own_rows(group, 67, (2, 0, 3))
    mesh, ranks = mesh_of(group), dist.get_world_size(group)
    teacher = linear_teacher_topk(hidden, weight.roll(1, 0), K, normalize=True)
    w, x = nn.Parameter(distribute_tensor(weight, mesh, [Shard(0)])), hidden[mine].clone().requires_grad_()
    options: dict[str, Any] = {"mass": "tail", "reduction": "sum"}
    linear_topk_divergence(x, w, teacher[mine], **options).backward()
    one = nn.Parameter(weight)
    linear_topk_divergence(hidden, one, teacher, **options).backward()
    assert w.grad.placements == (Shard(0),)
    assert_close(whole(w.grad) * ranks, one.grad)


def test_other_masses_take_the_whole_head() -> None:
    on_ranks(3, other_masses)


def whole_dimensions(group: Any, placements: tuple[Any, ...]) -> None:
    """The gradient of a head on a mesh of two dimensions, or sharded by columns."""
    (hidden, ids, log_probs), mine, weight, _ = own_rows(group, 67, (1, 2, 0, 1))
    mesh = square() if len(placements) == 2 else mesh_of(group)
    w = nn.Parameter(distribute_tensor(weight, mesh, placements))
    own = Support(ids[mine], log_probs[mine])
    (linear_topk_reverse_kl(hidden[mine], w, own, reduction="sum") * 4).backward()
    one = nn.Parameter(weight)
    linear_topk_reverse_kl(hidden, one, Support(ids, log_probs), reduction="sum").backward()
    assert w.grad.placements == placements
    assert_close(whole(w.grad), one.grad)


@pytest.mark.parametrize(
    "placements", [(Shard(1),), (Replicate(),), (Replicate(), Shard(0)), (Shard(0), Shard(0)), (Shard(0), Shard(1))]
)
def test_a_head_of_any_placements_beside_rows_of_its_own(placements: tuple[Any, ...]) -> None:
    on_ranks(4, whole_dimensions, placements)


def same_rows(group: Any, by_rows: bool) -> None:
    """Each rank does all: the mean of equal gradients is each of them."""
    rows = 2 if by_rows else 30
    hidden, weight = torch.randn(rows, WIDTH), torch.randn(67, WIDTH)
    support = Support(torch.randint(0, 67, (rows, K)), torch.randn(rows, K))
    w, x = (nn.Parameter(t) for t in (distribute_tensor(weight, mesh_of(group), [Shard(0)]), hidden.clone()))
    one, y = nn.Parameter(weight.clone()), nn.Parameter(hidden.clone())
    linear_topk_reverse_kl(x, w, support).backward()
    linear_topk_reverse_kl(y, one, support).backward()
    assert_close(whole(w.grad), one.grad)
    assert_close(x.grad, y.grad)


@pytest.mark.parametrize("by_rows", [True, False])
def test_a_sharded_head_beside_the_same_plain_rows_on_every_rank(by_rows: bool) -> None:
    on_ranks(3, same_rows, by_rows)


def constants(group: Any) -> None:
    """Functions without a gradient take a sharded head too."""
    hidden, weight, bias = torch.randn(3, WIDTH), torch.randn(67, WIDTH), torch.randn(67)
    w, b = (distribute_tensor(x, mesh_of(group), [Shard(0)]) for x in (weight, bias))
    ids = torch.arange(K).expand(3, K)
    plain, sharded = {"bias": bias, "normalize": True}, {"bias": b, "normalize": True}
    pairs = [
        (linear_teacher_topk(hidden, weight, K, **plain), linear_teacher_topk(hidden, w, K, **sharded)),
        (linear_fixed_ids(hidden, weight, ids, **plain), linear_fixed_ids(hidden, w, ids, **sharded)),
    ]
    names = [name for name in NAMES if "sampled" not in name][:3]
    one, many = (
        linear_topk_diagnostics(hidden, head, pairs[0][0], names, student_bias=c)
        for head, c in ((weight, bias), (w, b))
    )
    tensors = [x for pair in pairs for x in zip(*(support.tensors for support in pair), strict=True)]
    for a, c in (*tensors, *((one[name], many[name]) for name in names)):
        torch.testing.assert_close(a, c, rtol=0, atol=0, equal_nan=True)


def test_heads_of_constants_are_gathered() -> None:
    on_ranks(3, constants)


# Quantised heads


class Quantised(Tensor):
    """A tensor made of others, as torchao makes one."""

    @staticmethod
    def __new__(cls, numbers: Tensor, scale: Tensor) -> "Quantised":
        made: Quantised = Tensor._make_wrapper_subclass(cls, numbers.shape, dtype=torch.float32)
        made.numbers, made.scale = numbers, scale
        return made

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["numbers", "scale"], None

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError(f"{function}")

    def dequantize(self) -> Tensor:
        return self.numbers * self.scale


def test_a_quantised_head_is_refused_and_taken_as_the_message_says() -> None:
    numbers, scale = torch.randint(-127, 127, (67, WIDTH), dtype=torch.int8), torch.rand(67, 1) / 100
    head, hidden = Quantised(numbers, scale), torch.randn(3, WIDTH)
    support = teacher_topk(torch.randn(3, 67), K)
    for quantised in (head, numbers):
        with pytest.raises(TypeError, match=r"student_weight is .*; a quantised head must be given dequantised"):
            linear_topk_reverse_kl(hidden, quantised, support)
    dequantised = linear_topk_reverse_kl(hidden, head.dequantize(), support)
    of_module = topk_reverse_kl(nn.functional.linear(hidden, numbers * scale), support)
    assert_close(dequantised, of_module)
    with pytest.raises(
        TypeError, match=r"student_logits is .*Quantised, .*; pass a plain tensor, such as student_logits.d"
    ):
        topk_reverse_kl(head, support)
