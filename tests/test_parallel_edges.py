"""A vocabulary that ranks share, with unusual inputs, modes and options: as one process, or refused on all ranks."""

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils.checkpoint import checkpoint

from tests.ranks import on_ranks, together
from tests.shards import ACCURACY, ROWS, SPLITS, VOCAB, exactly, mine, problem, with_gradients, within
from topk_rkl.loss import (
    LinearTopKReverseKLLoss,
    Support,
    TopKReverseKLLoss,
    global_count,
    linear_teacher_topk,
    linear_topk_divergence,
    linear_topk_reverse_kl,
    teacher_topk,
    topk_divergence,
    topk_reverse_kl,
    use_backend,
)

pytestmark = together
MASSES = "renormalized", "tail"
BOUND = 8 * ACCURACY  # of gradients that are sums over rows or shards


def head_of(dtype: torch.dtype = torch.float32, lead: tuple[int, ...] = ROWS) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states (..., 8), a head (V, 8) and its bias (V,)."""
    return tuple(torch.randn(shape).to(dtype) for shape in ((*lead, 8), (VOCAB, 8), (VOCAB,)))


def as_it_is(loss: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    return loss(*inputs)


def from_logits(
    group: dist.ProcessGroup,
    own: slice,
    student: Tensor,  # (..., V)
    whole: Tensor | Support,  # (..., V), or a Support of (..., K)
    around: Callable[..., Tensor] = as_it_is,
    **options: Any,
) -> None:
    """Loss and gradient of this rank are those of one process."""
    shard = whole[..., own] if isinstance(whole, Tensor) else whole
    one = functools.partial(around, lambda x: topk_divergence(x, whole, **options))
    many = functools.partial(around, lambda x: topk_divergence(x, shard, group=group, **options))
    want, got = with_gradients(one, student), with_gradients(many, student[..., own])
    within(got[0], want[0], 4 * ACCURACY)
    within(got[1], want[1][..., own], BOUND)


def from_hidden(
    group: dist.ProcessGroup,
    own: slice,
    leaves: tuple[Tensor, Tensor, Tensor],  # (..., H), (V, H), (V,)
    whole: Tensor | Support,  # (..., V), or a Support of (..., K)
    around: Callable[..., Tensor] = as_it_is,
    **options: Any,
) -> None:
    """Loss and gradients of this rank are those of one process."""
    shard = whole[..., own] if isinstance(whole, Tensor) else whole

    def one(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return linear_topk_divergence(x, w, whole, student_bias=b, **options)

    def many(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return linear_topk_divergence(x, w, shard, student_bias=b, group=group, **options)

    hidden, *head = leaves
    want = with_gradients(functools.partial(around, one), *leaves)
    got = with_gradients(functools.partial(around, many), hidden, *(x[own] for x in head))
    within(got[0], want[0], 4 * ACCURACY)
    for part, a, b in zip((slice(None), own, own), got[1:], want[1:], strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.layout == b.layout
            within(a.to_dense(), b.to_dense()[part], BOUND)


# Shapes and numbers


@pytest.mark.parametrize("lead", [(), (1,), (2, 1), (0,), (2, 0)])
def test_fewer_rows_than_ranks(lead: tuple[int, ...]) -> None:
    on_ranks(4, _few, lead)


def _few(group: dist.ProcessGroup, lead: tuple[int, ...]) -> None:
    student, teacher, leaves = torch.randn(*lead, VOCAB), torch.randn(*lead, VOCAB), head_of(lead=lead)
    support = teacher_topk(teacher, 4, normalize=True)
    for split in SPLITS:
        own = mine(split, group)
        for mass in MASSES:
            for whole, k in ((teacher, 4), (support, None)):
                options = {"k": k, "mass": mass, "reduction": "mean" if k else "none"}
                from_logits(group, own, student, whole, **options)
                from_hidden(group, own, leaves, whole, **options)
        one = linear_teacher_topk(*leaves[:2], 3, normalize=True)
        many = linear_teacher_topk(leaves[0], leaves[1][own], 3, normalize=True, group=group)
        exactly(many.ids, one.ids)
        within(many.log_probs, one.log_probs, 4 * ACCURACY)


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "cut": lambda x: x[:, :-1],
    "transposed": lambda x: x.transpose(0, 1),
    "expanded": lambda x: x[:, :1].expand(-1, 3, -1),
    "columns apart": lambda x: x.mT.contiguous().mT,
}


@pytest.mark.parametrize("view", VIEWS)
def test_inputs_of_any_strides(view: str) -> None:
    on_ranks(3, _strided, view)


def _strided(group: dist.ProcessGroup, name: str) -> None:
    own, view = mine("unequal", group), VIEWS[name]
    student, teacher, leaves = torch.randn(4, 6, VOCAB), view(torch.randn(4, 6, VOCAB)), head_of(lead=(4, 6))
    for mass in MASSES:
        options = {"k": 4, "mass": mass, "reduction": "none"}
        from_logits(group, own, student, teacher, lambda loss, x: loss(view(x)), **options)
        from_hidden(group, own, leaves, teacher, lambda loss, x, w, b: loss(view(x), w.T.contiguous().T, b), **options)


def test_ids_of_no_rank_are_outside_s_however_large() -> None:
    on_ranks(3, _large)


def _large(group: dist.ProcessGroup) -> None:
    student, teacher, _ = problem(torch.float32)
    ids, log_probs = teacher_topk(teacher, 4, normalize=True).tensors
    ids = ids.long()
    ids[0, 0, 1], ids[0, 1, 2], ids[1, 0, 0], ids[1, 1, 1] = 2**63 - 1, -(2**63), 2**32 + 3, 2**31
    for mass in MASSES:
        options = {"mass": mass, "reduction": "none"}
        from_logits(group, mine("unequal", group), student, Support(ids, log_probs), **options)
        from_hidden(group, mine("unequal", group), head_of(), Support(ids, log_probs), **options)


def test_an_infinite_logit_spoils_its_row_with_a_scale_and_without_a_cap() -> None:
    on_ranks(2, _infinite)


def _infinite(group: dist.ProcessGroup) -> None:
    own, head, support = (
        mine("unequal", group),
        torch.ones(VOCAB, 2),
        Support(torch.tensor([[1, 20]] * 3), torch.zeros(3, 2)),
    )
    head[20] = torch.tensor([torch.inf, 1])
    hidden = torch.tensor([[1.0, 0.5], [-1.0, 0.5], [0.0, 0.0]])  # +inf, -inf, and 0 times inf
    for options in ({"logit_scale": 0.5}, {"logit_scale": -2.0, "temperature": 3.0}, {"softcap": 5.0}):
        one = linear_topk_reverse_kl(hidden, head, support, reduction="none", **options)
        exactly(linear_topk_reverse_kl(hidden, head[own], support, reduction="none", group=group, **options), one)
        assert one.isnan().any()


def test_rows_of_weight_0_count_as_nothing_where_every_logit_counts() -> None:
    on_ranks(3, _dropped)


def _dropped(group: dist.ProcessGroup) -> None:
    student, teacher, (hidden, *head) = torch.randn(7, VOCAB), torch.randn(7, VOCAB), head_of(lead=(7,))
    student[0, 3], student[1, 20], student[2], teacher[3, 5] = torch.nan, torch.inf, -torch.inf, torch.nan
    hidden[0], hidden[1], student[5, 2] = torch.nan, torch.inf, torch.nan  # row 5 has a weight
    weights = torch.tensor([0.0, 0, 0, 0, 1, 1, 2])
    for mass in ("tail", "raw", "raw_stop_grad"):
        options = {"k": 4, "mass": mass, "weights": weights, "reduction": "none"}
        from_logits(group, mine("unequal", group), student, teacher, **options)
        from_hidden(group, mine("unequal", group), (hidden, *head), teacher, **options)


# Modes of torch


def test_gradients_of_some_inputs_alone() -> None:
    on_ranks(3, _some)


def _some(group: dist.ProcessGroup) -> None:
    own, teacher, leaves = mine("empty shards", group), torch.randn(*ROWS, VOCAB), head_of()

    def frozen(wanted: tuple[bool, ...], loss: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        return loss(*(x if has else x.detach() for x, has in zip(inputs, wanted, strict=True)))

    for wanted in ((1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1), (1, 0, 1)):
        for mass in MASSES:
            around = functools.partial(frozen, wanted)
            from_hidden(group, own, leaves, teacher, around, k=4, mass=mass, reduction="none")


@pytest.mark.parametrize("split", SPLITS)
def test_a_row_sparse_gradient_of_a_shard(split: str) -> None:
    on_ranks(4, _sparse, split)


def _sparse(group: dist.ProcessGroup, split: str) -> None:
    teacher = torch.randn(*ROWS, VOCAB)
    teacher[..., :9] += 20  # some ranks have no id
    from_hidden(group, mine(split, group), head_of(), teacher, k=4, weight_grad="sparse", reduction="none")


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_runs_the_collectives_again(reentrant: bool) -> None:
    on_ranks(3, _checkpointed, reentrant)


def _checkpointed(group: dist.ProcessGroup, reentrant: bool) -> None:
    own, (student, teacher, _) = mine("unequal", group), problem(torch.float32)
    again = functools.partial(checkpoint, use_reentrant=reentrant)
    for mass in MASSES:
        options = {"k": 4, "mass": mass, "reduction": "none"}
        from_logits(group, own, student, teacher, again, **options)
        from_hidden(group, own, head_of(), teacher, again, **options)


def test_tensors_of_inference_mode_and_calls_without_gradients() -> None:
    on_ranks(3, _inferred)


def _inferred(group: dist.ProcessGroup) -> None:
    own, (student, teacher, _) = mine("empty shards", group), problem(torch.float32)
    want = topk_reverse_kl(student, teacher, k=4)
    with torch.inference_mode():
        support, constant = teacher_topk(teacher[..., own], 4, normalize=True, group=group), teacher.clone()
        exactly(topk_reverse_kl(student[..., own], teacher[..., own], k=4, group=group), want)
    with torch.no_grad():
        leaf = student[..., own].clone().requires_grad_()
        exactly(topk_reverse_kl(leaf, teacher[..., own], k=4, group=group), want)
    for mass in MASSES:
        options = {"mass": mass, "reduction": "none"}
        from_logits(group, own, student, constant, k=4, **options)
        from_logits(group, own, student, support, **options)
        from_hidden(group, own, head_of(), support, lambda loss, x, w, b: loss(inferred(x), w, b), **options)
        from_hidden(group, own, head_of(), support, lambda loss, x, w, b: loss(x, inferred(w), b), **options)


def inferred(x: Tensor) -> Tensor:
    with torch.inference_mode():
        return x.detach().clone()


def test_autocast_changes_nothing() -> None:
    on_ranks(2, _autocast)


def _autocast(group: dist.ProcessGroup) -> None:
    own, (student, teacher, _) = mine("unequal", group), problem(torch.float32)
    want = teacher_topk(teacher, 4, normalize=True)
    with torch.autocast("cpu", torch.bfloat16):
        within(teacher_topk(teacher[..., own], 4, normalize=True, group=group).log_probs, want.log_probs, ACCURACY)
        for mass in MASSES:
            options = {"k": 4, "mass": mass, "reduction": "none"}
            from_logits(group, own, student, teacher, **options)
            from_hidden(group, own, head_of(), teacher, **options)


@pytest.mark.slow
@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("mass", MASSES)
def test_a_schedule_of_the_temperature_compiles_at_most_twice(linear: bool, mass: str) -> None:
    on_ranks(2, _scheduled, linear, mass)


def _scheduled(group: dist.ProcessGroup, linear: bool, mass: str) -> None:
    own, counter = mine("unequal", group), CompileCounter()
    head = torch.randn(VOCAB, 8)[own]

    def loss(x: Tensor, teacher: Tensor, number: float) -> Tensor:
        options = {"k": 3, "mass": mass, "temperature": number, "group": group}
        if linear:
            return linear_topk_divergence(x, head, teacher, softcap=3 * number, **options)
        return topk_divergence(x, teacher, **options)

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    for i in range(4):
        rows = 6 - i
        x = torch.randn(rows, 8) if linear else torch.randn(rows, VOCAB)[:, own]
        given = x.requires_grad_(), torch.randn(rows, VOCAB)[:, own], 1.3 + i / 7
        within(compiled(*given), loss(*given), BOUND)
    assert counter.frame_count <= 2, counter.frame_count


# Groups, and calls that one rank alone would refuse


def test_ranks_of_a_group_ascend_and_groups_do_not_meet() -> None:
    on_ranks(4, _two_groups)


def _two_groups(group: dist.ProcessGroup) -> None:
    groups = dist.new_group([2, 0]), dist.new_group([3, 1])
    torch.manual_seed(dist.get_rank() % 2)  # other rows in each group
    chosen, (student, teacher, _) = groups[dist.get_rank() % 2], problem(torch.float32)
    own = mine("unequal", chosen)
    assert own.start == (0 if dist.get_rank() < 2 else 3)
    for mass in MASSES:
        options = {"k": 4, "mass": mass, "reduction": "none"}
        from_logits(chosen, own, student, teacher, **options)
        from_hidden(chosen, own, head_of(), teacher, **options)


def test_data_and_tensor_parallelism_at_once() -> None:
    on_ranks(4, _two_dimensions)


def _two_dimensions(group: dist.ProcessGroup) -> None:
    """Rows are split over one dimension of the mesh, the vocabulary over the other."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    (_, teacher, weights), leaves = problem(torch.float32), head_of()
    first, second = slice(0, 3), slice(3, 5)
    rows, own = (first, second)[mesh["dp"].get_local_rank()], mine("unequal", mesh["tp"].get_group())
    of_all = with_gradients(
        lambda x, w, b: linear_topk_reverse_kl(x, w, teacher, student_bias=b, k=4, weights=weights).expand(1), *leaves
    )
    loss = LinearTopKReverseKLLoss(4, group=mesh["tp"])
    denominator = global_count(weights[rows], mesh["dp"])
    hidden, head, bias = leaves
    found = with_gradients(
        lambda x, w, b: loss(x, w, teacher[rows][..., own], weights[rows], denominator, b).expand(1),
        hidden[rows], head[own], bias[own],
    )  # fmt: skip
    within(found[1], of_all[1][rows], BOUND)
    for i, part in ((0, ...), (2, own), (3, own)):
        total = found[i].clone()
        dist.all_reduce(total, group=mesh["dp"].get_group())
        within(total, of_all[i][part], BOUND)


def test_a_module_with_a_mesh_can_be_copied() -> None:
    on_ranks(2, _copied)


def _copied(group: dist.ProcessGroup) -> None:
    own, (student, teacher, _), (hidden, head, _) = mine("unequal", group), problem(torch.float32), head_of()
    mesh = DeviceMesh.from_group(group, "cpu")
    of_logits, of_hidden = copy.deepcopy((TopKReverseKLLoss(4, group=mesh), LinearTopKReverseKLLoss(4, group=mesh)))
    exactly(of_logits(student[..., own], teacher[..., own]), topk_reverse_kl(student, teacher, k=4))
    within(
        of_hidden(hidden, head[own], teacher[..., own]), linear_topk_reverse_kl(hidden, head, teacher, k=4), ACCURACY
    )


def scaled(scale: float, log_p: Tensor, log_q: Tensor) -> Tensor:
    return scale * log_p.exp() * (log_p - log_q)


class Scaled:
    def __call__(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return scaled(3.0, log_p, log_q)


@pytest.mark.parametrize("divergence", [functools.partial(scaled, 2.0), Scaled()], ids=["partial", "object"])
def test_a_function_whose_repr_differs_from_rank_to_rank(divergence: Callable) -> None:
    on_ranks(3, _functions, divergence)


def _functions(group: dist.ProcessGroup, divergence: Callable) -> None:
    own, (student, teacher, _) = mine("unequal", group), problem(torch.float32)
    for mass in MASSES:
        options = {"k": 4, "mass": mass, "divergence": divergence, "reduction": "none"}
        from_logits(group, own, student, teacher, **options)
        from_hidden(group, own, head_of(), teacher, **options)


def test_ranks_that_differ_beyond_the_length_of_a_message_are_refused() -> None:
    on_ranks(2, _beyond)


def _beyond(group: dist.ProcessGroup) -> None:
    def long(log_p: Tensor, log_q: Tensor) -> Tensor:
        return log_p.exp() * (log_p - log_q)

    long.__qualname__ = "long" * 1_000
    own, (student, teacher, _) = mine("unequal", group), problem(torch.float32)
    with pytest.raises(ValueError, match=r"differ in what is beyond 2048 bytes of .* call all ranks alike"):
        topk_divergence(
            student[..., own], teacher[..., own], k=3, divergence=long, temperature=1.0 + group.rank(), group=group
        )


def test_a_backend_that_cannot_take_a_call_is_refused_on_all_ranks() -> None:
    on_ranks(3, _unserved)


def _unserved(group: dist.ProcessGroup) -> None:
    """The second rank has no token, and no tensor that a backend would refuse."""
    own, (student, teacher, _), (hidden, head, _) = mine("empty shards", group), problem(torch.float64), head_of()
    support = teacher_topk(teacher, 4, normalize=True)
    for call in (
        lambda: teacher_topk(teacher[..., own], 4, group=group),
        lambda: topk_reverse_kl(student[..., own], teacher[..., own], k=4, group=group),
        lambda: topk_divergence(student[..., own], support, mass="tail", group=group),
        lambda: linear_topk_reverse_kl(hidden, head[own], teacher[..., own], k=4, group=group),
        lambda: linear_teacher_topk(hidden.double(), head[own].double(), 4, group=group),
    ):
        with use_backend("native"), pytest.raises(RuntimeError, match="the 'native' backend cannot take these tensors"):
            call()
    from_logits(group, own, student, teacher, k=4)  # the group is as good as before


def test_a_support_of_one_shard_alone_is_refused() -> None:
    on_ranks(3, _local_support)


def _local_support(group: dist.ProcessGroup) -> None:
    """What teacher_topk gives without group=: ids that begin at 0 on every rank."""
    own, (student, teacher, _) = mine("as equal as can be", group), problem(torch.float32)
    local = teacher_topk(teacher[..., own], 3)
    with pytest.raises(
        ValueError, match=r"the first ids of teacher is \[.*\] on rank 1 of the group and \[.*\] on rank"
    ):
        topk_reverse_kl(student[..., own], local, group=group)
    from_logits(group, own, student, teacher_topk(teacher[..., own], 3, group=group))
