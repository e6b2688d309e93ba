"""A vocabulary that ranks share gives what one process gives: the same ids, losses and gradients."""

import contextlib
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.testing import assert_close

from tests.formulas import FORMULAS
from tests.probes import NoHostSync
from tests.processes import HANGS
from tests.ranks import free_port, on_ranks, together
from tests.shards import ACCURACY, ROWS, SPLITS, VOCAB, exactly, mine, problem, same_everywhere, with_gradients, within
from topk_rkl import backends
from topk_rkl.loss import (
    Support,
    TopKDivergenceLoss,
    TopKReverseKLLoss,
    linear_teacher_topk,
    linear_topk_divergence,
    linear_topk_reverse_kl,
    teacher_topk,
    topk_divergence,
    topk_reverse_kl,
    use_backend,
)
from topk_rkl.parallel import agreement, losses

pytestmark = together
GPUS = torch.cuda.device_count()
each_world = pytest.mark.parametrize("world", [1, 2, 3, 4])
each_split = pytest.mark.parametrize("split", SPLITS)
DTYPES = torch.bfloat16, torch.float32, torch.float64


@each_world
@each_split
def test_ids_and_log_probs_are_those_of_one_process(world: int, split: str) -> None:
    on_ranks(world, _selects, split)


def _selects(group: dist.ProcessGroup, split: str) -> None:
    own = mine(split, group)
    for dtype in DTYPES:
        hostile = torch.randint(-2, 3, (*ROWS, VOCAB)).to(dtype)  # ties that straddle the ranks
        hostile[0, 0] = -torch.inf
        hostile[0, 1, 3:] = -torch.inf
        hostile[1, 0, 20], hostile[1, 1, 1], hostile[2, 0, ::7] = torch.nan, torch.inf, -0.0
        hostile[2, 1] = 1
        for teacher in (hostile, torch.randn(*ROWS, VOCAB).to(dtype)[:, :0], torch.randn(1, VOCAB).to(dtype)):
            for k in (1, 4, VOCAB):
                one, many = teacher_topk(teacher, k), teacher_topk(teacher[..., own], k, group=group)
                exactly(many.ids, one.ids)
                exactly(many.log_probs, one.log_probs)
                one = teacher_topk(teacher, k, normalize=True)
                many = teacher_topk(teacher[..., own], k, normalize=True, group=group)
                exactly(many.ids, one.ids)
                assert_close(many.log_probs, one.log_probs, rtol=2e-7, atol=2e-7, equal_nan=True)
                same_everywhere(many.log_probs, group)


@each_world
@each_split
def test_the_loss_from_logits_has_the_bits_of_one_process(world: int, split: str) -> None:
    on_ranks(world, _logits, split)


def _logits(group: dist.ProcessGroup, split: str) -> None:
    own = mine(split, group)
    for dtype in DTYPES:
        for divergence in FORMULAS if dtype == torch.float32 else list(FORMULAS)[:1]:
            student, teacher, weights = problem(dtype, ties=dtype == torch.bfloat16)
            options = {"weights": weights, "temperature": 1.5, "reduction": "none", "divergence": divergence}
            for k in (2, 7):
                support = teacher_topk(teacher, k)
                one = with_gradients(lambda x: topk_divergence(x, teacher, k=k, **options), student)
                from_logits = with_gradients(
                    lambda x: topk_divergence(x, teacher[..., own], k=k, group=group, **options), student[..., own]
                )
                from_support = with_gradients(
                    lambda x: topk_divergence(x, support, group=group, **options), student[..., own]
                )
                for loss, gradient in (from_logits, from_support):
                    exactly(loss, one[0])
                    exactly(gradient, one[1][..., own])
                    same_everywhere(loss, group)


@each_world
@pytest.mark.parametrize("mass", ["tail", "raw", "raw_stop_grad", "ema_pg", "ema_pg_corrected"])
def test_the_mass_outside_s_is_that_of_all_ranks(world: int, mass: str) -> None:
    on_ranks(world, _masses, mass)


def _masses(group: dist.ProcessGroup, mass: str) -> None:
    for split in SPLITS:
        own = mine(split, group)
        for dtype in (torch.float32, torch.float64):
            student, teacher, weights = problem(dtype)
            sampled = torch.randint(-1, VOCAB + 1, ROWS) if mass.startswith("ema_pg") else None
            options = {"weights": weights, "mass": mass, "reduction": "none", "sampled_ids": sampled}
            one = with_gradients(lambda x: topk_divergence(x, teacher, k=4, temperature=0.7, **options), student)
            many = with_gradients(
                lambda x: topk_divergence(x, teacher[..., own], k=4, temperature=0.7, group=group, **options),
                student[..., own],
            )
            within(many[0], one[0], 4 * ACCURACY)
            within(many[1], one[1][..., own], 4 * ACCURACY)
            same_everywhere(many[0], group)
            if sampled is None:
                support = teacher_topk(teacher, 4, normalize=True)
                one = with_gradients(lambda x: topk_divergence(x, support, **options), student)
                many = with_gradients(lambda x: topk_divergence(x, support, group=group, **options), student[..., own])
                within(many[0], one[0], 4 * ACCURACY)
                within(many[1], one[1][..., own], 4 * ACCURACY)


@each_world
@each_split
def test_the_loss_from_hidden_states_and_its_gradients_are_those_of_one_process(world: int, split: str) -> None:
    on_ranks(world, _hidden, split)


def _hidden(group: dist.ProcessGroup, split: str) -> None:
    own = mine(split, group)
    for dtype in DTYPES:
        hidden, head, bias = torch.randn(*ROWS, 16), torch.randn(VOCAB, 16) / 4, torch.randn(VOCAB)
        hidden, head, bias = hidden.to(dtype), head.to(dtype), bias.to(dtype)
        _, teacher, weights = problem(dtype)
        bound = 2.0**-7 if dtype == torch.bfloat16 else 4 * ACCURACY
        for more in ({}, {"softcap": 2.0, "logit_scale": 0.5}, {"mass": "tail", "softcap": 3.0}):
            options = {"weights": weights, "reduction": "none", **more}
            for k, whole, shard in (
                (None, *[teacher_topk(teacher, 4, normalize=True)] * 2),
                (4, teacher, teacher[..., own]),
            ):

                def one(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
                    return linear_topk_divergence(x, w, whole, k=k, student_bias=b, **options)

                def many(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
                    return linear_topk_divergence(x, w, shard, k=k, student_bias=b, group=group, **options)

                want = with_gradients(one, hidden, head, bias)
                loss, of_hidden, of_head, of_bias = with_gradients(many, hidden, head[own], bias[own])
                same_bits = not more and dtype != torch.float64
                within(loss, want[0], 0 if same_bits else 4 * ACCURACY)
                within(of_hidden, want[1], bound)
                within(of_head, want[2][own], 0 if same_bits else bound)
                within(of_bias, want[3][own], 0 if same_bits else bound)
                same_everywhere(loss, group)
                same_everywhere(of_hidden, group)


@each_world
def test_the_teacher_is_selected_from_its_hidden_states(world: int) -> None:
    on_ranks(world, _linear_selects)


def _linear_selects(group: dist.ProcessGroup) -> None:
    for split in SPLITS:
        own = mine(split, group)
        for dtype in DTYPES:
            hidden = torch.randint(-2, 3, (*ROWS, 8)).to(dtype)  # exact products, and ties
            head, bias = torch.randint(-1, 2, (VOCAB, 8)).to(dtype), torch.randint(-1, 2, (VOCAB,)).to(dtype)
            for options in ({}, {"normalize": True}, {"softcap": 4.0, "normalize": True}):
                for k in (3, VOCAB):
                    one = linear_teacher_topk(hidden, head, k, bias=bias, **options)
                    many = linear_teacher_topk(hidden, head[own], k, bias=bias[own], group=group, **options)
                    exactly(many.ids, one.ids)
                    assert_close(many.log_probs, one.log_probs, rtol=2e-7, atol=2e-7)


@pytest.mark.parametrize("name", ["reference", "native", pytest.param("triton", marks=pytest.mark.interpreter)])
def test_every_backend_serves_a_shard(name: str) -> None:
    if reason := backends.unavailable(name):
        pytest.skip(reason)
    on_ranks(3, _backend, name)


def _backend(group: dist.ProcessGroup, name: str) -> None:
    own = mine("empty shards", group)
    student, teacher, _ = (x[:1] for x in problem(torch.float32))
    hidden, head = torch.randn(1, 2, 16), torch.randn(VOCAB, 16) / 4
    with use_backend(name):
        for options in ({}, {"mass": "tail"}):
            one = with_gradients(lambda x: topk_divergence(x, teacher, k=3, reduction="none", **options), student)
            many = with_gradients(
                lambda x: topk_divergence(x, teacher[..., own], k=3, reduction="none", group=group, **options),
                student[..., own],
            )
            check = exactly if not options else lambda a, b: within(a, b, 4 * ACCURACY)
            check(many[0], one[0])
            check(many[1], one[1][..., own])
        support = teacher_topk(teacher[..., own], 3, group=group)
        one = with_gradients(lambda x, w: linear_topk_reverse_kl(x, w, support, reduction="none"), hidden, head)
        many = with_gradients(
            lambda x, w: linear_topk_reverse_kl(x, w, support, reduction="none", group=group), hidden, head[own]
        )
        within(many[0], one[0], 2 * ACCURACY)
        within(many[1], one[1], 2 * ACCURACY)
        within(many[2], one[2][own], 2 * ACCURACY)


@each_world
def test_hostile_rows_stay_in_their_rows_and_weight_0_drops_them(world: int) -> None:
    on_ranks(world, _hostile)


def _hostile(group: dist.ProcessGroup) -> None:
    own = mine("unequal", group)
    student, teacher, _ = (x.view(10, -1) for x in problem(torch.float32))
    ids, log_probs = teacher_topk(teacher, 4).tensors
    ids[0, 1], ids[1] = -1, -1  # empty slots
    ids[2, :2] = ids[2, 0]  # an id twice
    ids[3] = torch.tensor([22, 0, 23, 2**30])  # the last two are of no rank
    student[4, teacher[4].argmin()] = torch.nan  # outside S
    student[5, ids[5, 0]], student[6, ids[6, 1]] = -torch.inf, torch.inf
    log_probs[7, 2], log_probs[8, 0] = torch.nan, -torch.inf
    student[9], weights = torch.nan, torch.ones(10).index_fill(0, torch.tensor(9), 0)
    support = Support(ids.long(), log_probs)
    one = with_gradients(lambda x: topk_reverse_kl(x, support, weights=weights, reduction="none"), student)
    many = with_gradients(
        lambda x: topk_reverse_kl(x, support, weights=weights, reduction="none", group=group), student[:, own]
    )
    exactly(many[0], one[0])
    exactly(many[1], one[1][:, own])
    assert one[0].isnan().tolist() == [False] * 6 + [True, True] + [False] * 2
    hidden, head = torch.randn(10, 8), torch.randn(VOCAB, 8)
    hidden[9], head[7] = torch.nan, torch.nan
    ids[ids == 7] = 6
    options = {"weights": weights, "reduction": "none", "softcap": 2.0}
    one = with_gradients(lambda x, w: linear_topk_reverse_kl(x, w, support, **options), hidden, head)
    many = with_gradients(lambda x, w: linear_topk_reverse_kl(x, w, support, group=group, **options), hidden, head[own])
    within(many[0], one[0], 4 * ACCURACY)
    within(many[1], one[1], 4 * ACCURACY)
    within(many[2], one[2][own], 4 * ACCURACY)


@each_world
def test_a_student_of_another_vocabulary_than_the_teacher(world: int) -> None:
    on_ranks(world, _vocabularies)


def _vocabularies(group: dist.ProcessGroup) -> None:
    """The last shard may be padded on one side; shards that begin at other ids are for a Support."""
    own, rank, world = mine("as equal as can be", group), dist.get_rank(group), dist.get_world_size(group)
    student, teacher, weights = problem(torch.float32)
    last = rank == world - 1
    for longer in ("student", "teacher"):
        padded = torch.randn(*ROWS, VOCAB + 4)
        sides = {"student": student, "teacher": teacher, longer: padded}
        shard = slice(own.start, VOCAB + 4 if last else own.stop)
        options = {"k": 6, "weights": weights, "reduction": "none"}
        for mass in ("renormalized", "tail"):
            one = with_gradients(lambda x: topk_divergence(x, sides["teacher"], mass=mass, **options), sides["student"])
            many = with_gradients(
                lambda x: topk_divergence(x, sides["teacher"][..., shard], mass=mass, group=group, **options),
                sides["student"][..., shard],
            )
            within(many[0], one[0], 4 * ACCURACY)
            within(many[1], one[1][..., shard], 4 * ACCURACY)
    other = mine("unequal", group)
    support = teacher_topk(teacher[..., other], 6, group=group)
    one = with_gradients(lambda x: topk_reverse_kl(x, teacher, reduction="none", k=6), student)
    many = with_gradients(lambda x: topk_reverse_kl(x, support, reduction="none", group=group), student[..., own])
    exactly(many[0], one[0])
    exactly(many[1], one[1][..., own])
    if world > 1:  # what the message advises is what was done above
        with pytest.raises(ValueError, match=r"the shards of teacher begin at .* select first, with teacher_topk"):
            topk_reverse_kl(student[..., own], teacher[..., other], k=6, group=group)


@pytest.mark.parametrize("world", [1, 3])
def test_modules_take_a_group(world: int) -> None:
    on_ranks(world, _modules)


def _modules(group: dist.ProcessGroup) -> None:
    own = mine("unequal", group)
    student, teacher, _ = problem(torch.float32)
    want = topk_reverse_kl(student, teacher, k=5)
    exactly(TopKReverseKLLoss(5, group=group)(student[..., own], teacher[..., own]), want)
    exactly(TopKDivergenceLoss(5, group=group)(student[..., own], teacher[..., own]), want)


def test_a_mesh_is_a_group() -> None:
    on_ranks(4, _meshes)


def _meshes(group: dist.ProcessGroup) -> None:
    student, teacher, _ = problem(torch.float32)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    own = slice(0, 12) if mesh["tp"].get_local_rank() == 0 else slice(12, VOCAB)
    exactly(
        topk_reverse_kl(student[..., own], teacher[..., own], k=5, group=mesh["tp"]),
        topk_reverse_kl(student, teacher, k=5),
    )
    with pytest.raises(ValueError, match=r"group is a DeviceMesh of 2 dimensions; .* such as mesh\['tp'\]"):
        topk_reverse_kl(student, teacher, k=5, group=mesh)


@pytest.mark.parametrize("world", [2, 4])
def test_a_refusal_on_one_rank_is_raised_on_all(world: int) -> None:
    results = on_ranks(world, _refused)
    for rank, (refused, unlike, above) in enumerate(results):
        if rank == 1:
            assert refused == "ValueError: temperature is -1.0; it must be positive, between 1e-30 and 1e+30"
        else:
            assert refused == (
                "RuntimeError: rank 1 of the group refused its arguments: ValueError: temperature is -1.0; it must be "
                "positive, between 1e-30 and 1e+30"
            )
        assert unlike == (
            "ValueError: k is 4 on rank 1 of the group and 3 on rank 0; call all ranks alike: only the shards of the "
            "vocabulary may differ"
        )
        assert above == (
            "ValueError: k is 24; it must be between 1 and V = 23, the last dimension of the teacher's logits over all "
            "ranks"
        )


def _refused(group: dist.ProcessGroup) -> list[str]:
    own, rank = mine("unequal", group), dist.get_rank(group)
    student, teacher, _ = problem(torch.float32)
    heard = []
    for options in ({"k": 3, "temperature": 1.0 - 2 * (rank == 1)}, {"k": 3 + (rank == 1)}, {"k": VOCAB + 1}):
        with pytest.raises((ValueError, RuntimeError)) as caught:
            topk_reverse_kl(student[..., own], teacher[..., own], group=group, **options)
        heard.append(f"{type(caught.value).__name__}: {caught.value}")
        # The group is as good as before.
        exactly(
            topk_reverse_kl(student[..., own], teacher[..., own], k=3, group=group),
            topk_reverse_kl(student, teacher, k=3),
        )
    return heard


@pytest.mark.slow
def test_a_rank_that_never_calls_ends_the_wait_of_the_others() -> None:
    """Whatever happened to it: the others raise at the time-out of the group."""
    on_ranks(4, _silent)


def _silent(group: dist.ProcessGroup) -> None:
    dist.barrier(group)
    hasty = dist.new_group([0, 1], timeout=timedelta(seconds=10))  # for both to find each other on a busy machine
    if dist.get_rank(group) == 0:
        with pytest.raises(RuntimeError, match=r"(?i)timed? ?out"):
            topk_reverse_kl(torch.randn(3, 5), torch.randn(3, 5), k=2, group=hasty)
    dist.barrier(group)  # the other stays alive until then


def test_every_entry_tells_the_other_ranks() -> None:
    on_ranks(2, _told)


def _told(group: dist.ProcessGroup) -> None:
    rank, own = dist.get_rank(group), mine("unequal", group)
    hidden, head = torch.randn(3, 8), torch.randn(VOCAB, 8)[own]
    logits, support = torch.randn(3, VOCAB)[:, own], Support(torch.zeros(3, 2), torch.zeros(3, 2))
    wrong: dict[str, Callable[[], Any]] = {
        "normalize": lambda: teacher_topk(logits, 2, normalize=rank or False, group=group),
        "reduction": lambda: topk_reverse_kl(logits, logits, k=2, reduction="sum" if not rank else "all", group=group),
        "mass": lambda: topk_divergence(logits, logits, k=2, mass="tail" if not rank else "all", group=group),
        "chunk_rows": lambda: linear_teacher_topk(hidden, head, 2, chunk_rows=None if not rank else 0, group=group),
        "student_hidden": lambda: linear_topk_reverse_kl(hidden if not rank else 1, head, logits, k=2, group=group),
        "teacher.ids": lambda: linear_topk_divergence(hidden, head, logits if not rank else support,
                                                      k=None if rank else 2, group=group),
    }  # fmt: skip
    for name, call in wrong.items():
        with pytest.raises((ValueError, TypeError) if rank else RuntimeError, match=name) as caught:
            call()
        assert rank or "rank 1 of the group refused its arguments: " in str(caught.value)


@pytest.mark.parametrize("group", ["tp", 3, [0, 1]])
def test_what_is_no_group_is_refused(group: Any) -> None:
    logits, hidden = torch.randn(2, 5), torch.randn(2, 5)
    for call in (
        lambda: teacher_topk(logits, 2, group=group),
        lambda: topk_reverse_kl(logits, logits, k=2, group=group),
        lambda: linear_topk_reverse_kl(hidden, hidden, logits, k=2, group=group),
        lambda: linear_teacher_topk(hidden, hidden, 2, group=group),
        lambda: TopKReverseKLLoss(2, group=group),
    ):
        with pytest.raises(TypeError, match=r"group is .*; it must be a ProcessGroup, a DeviceMesh of one dimension"):
            call()


def test_logits_are_overwritten_by_their_gradient() -> None:
    on_ranks(3, _overwritten)


def _overwritten(group: dist.ProcessGroup) -> None:
    own = mine("empty shards", group)
    student, teacher, _ = problem(torch.bfloat16)
    support = teacher_topk(teacher, 4, normalize=True)
    for mass, of in (("renormalized", teacher[..., own]), ("renormalized", support), ("tail", support)):
        found = []
        for overwrite in (False, True):
            leaf = student[..., own].clone().requires_grad_()
            logits = leaf * 1
            k = 4 if isinstance(of, Tensor) else None
            loss = topk_divergence(logits, of, k=k, mass=mass, group=group, overwrite_student_logits=overwrite)
            loss.backward()
            found.append(leaf.grad)
            if overwrite:
                exactly(logits.detach(), leaf.grad)
        exactly(*found)


def test_a_second_derivative_is_refused() -> None:
    on_ranks(2, _second)


def _second(group: dist.ProcessGroup) -> None:
    own = mine("unequal", group)
    student, teacher, _ = problem(torch.float32)
    hidden, head = torch.randn(*ROWS, 8), torch.randn(VOCAB, 8)
    support = teacher_topk(teacher, 3, normalize=True)
    for loss, x in (
        (lambda x: topk_reverse_kl(x, teacher[..., own], k=3, group=group), student[..., own]),
        (lambda x: topk_reverse_kl(x, support, group=group), student[..., own]),
        (lambda x: topk_divergence(x, support, mass="tail", group=group), student[..., own]),
        (lambda x: linear_topk_reverse_kl(x, head[own], support, group=group), hidden),
        (lambda x: linear_topk_divergence(x, head[own], support, mass="tail", group=group), hidden),
    ):
        x = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(x), x, create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            gradient.sum().backward()


def test_nothing_is_read_on_the_host_where_a_device_would_have_to_be_waited_for() -> None:
    on_ranks(3, _unread)


def _unread(group: dist.ProcessGroup) -> None:
    own = mine("empty shards", group)
    student, teacher, weights = problem(torch.float32)
    hidden, head = torch.randn(*ROWS, 8), torch.randn(VOCAB, 8)
    with as_on_a_device(), use_backend("reference"), NoHostSync():
        for mass in ("renormalized", "tail"):
            of = teacher_topk(teacher[..., own], 3, normalize=True, group=group)
            options = {"weights": weights, "mass": mass, "group": group}
            leaves = [x.clone().requires_grad_() for x in (student[..., own], hidden, head[own])]
            topk_divergence(leaves[0], teacher[..., own], k=3, **options).backward()
            topk_divergence(leaves[0], of, **options).backward()
            linear_topk_divergence(leaves[1], leaves[2], of, **options).backward()
    # Shards that begin at other ids give no number at all where they cannot be refused.
    with as_on_a_device():
        loss = topk_reverse_kl(student[..., mine("unequal", group)], teacher[..., own], k=3, group=group)
    assert loss.isnan()


@contextlib.contextmanager
def as_on_a_device() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for module in (agreement, losses):
            patch.setattr(module, "read_on_host", lambda _: False)
        yield


@pytest.mark.slow
def test_every_entry_compiles_whole() -> None:
    on_ranks(2, _compiled)


def _compiled(group: dist.ProcessGroup) -> None:
    own = mine("unequal", group)
    student, teacher, weights = problem(torch.float32)
    hidden, head, support = torch.randn(*ROWS, 8), torch.randn(VOCAB, 8), teacher_topk(teacher, 3, normalize=True)
    w = teacher[..., own]

    def from_logits(x: Tensor) -> Tensor:
        return topk_reverse_kl(x, w, k=3, weights=weights, temperature=2.0, group=group)

    def selected(x: Tensor) -> Tensor:
        of = teacher_topk(w, 3, normalize=True, group=group)
        return topk_divergence(x, of, mass="tail", weights=weights, group=group)

    for loss, *inputs in (
        (from_logits, student[..., own]),
        (selected, student[..., own]),
        (lambda x, h: linear_topk_reverse_kl(x, h, support, softcap=2.0, group=group), hidden, head[own]),
        (lambda x, h: linear_topk_divergence(x, h, support, mass="tail", group=group), hidden, head[own]),
    ):
        one = gradients(loss, *inputs)
        dynamic = True if from_logits is loss else None  # costly: once is enough for what all share
        many = gradients(torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=dynamic), *inputs)
        for a, b in zip(one, many, strict=True):
            within(b, a, ACCURACY)


def gradients(loss: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    found = loss(*leaves)
    found.backward()
    return found.detach(), *(x.grad for x in leaves)


@pytest.mark.slow
def test_inductor_compiles_what_ranks_send() -> None:
    on_ranks(2, _inductor)


def _inductor(group: dist.ProcessGroup) -> None:
    own = mine("unequal", group)
    student, teacher, _ = problem(torch.float32)
    loss = lambda x: topk_reverse_kl(x, teacher[..., own], k=3, group=group)  # noqa: E731
    one = gradients(loss, student[..., own])
    many = gradients(torch.compile(loss, fullgraph=True), student[..., own])
    for a, b in zip(one, many, strict=True):
        within(b, a, ACCURACY)


@pytest.mark.parametrize("world", range(2, 5))
@pytest.mark.gpu
@pytest.mark.skipif(GPUS < 2, reason=f"needs two GPUs, and this machine has {GPUS}")
def test_gpus_give_what_one_gpu_gives(world: int) -> None:
    """NCCL, CUDA tensors, and nothing read on the host. One GPU cannot show what ranks send."""
    if world > GPUS:
        pytest.skip(f"needs {world} GPUs, and this machine has {GPUS}")
    mp.spawn(_on_gpu, args=(world, free_port()), nprocs=world)


def _on_gpu(rank: int, world: int, port: int) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.cuda.set_device(rank)
    torch.set_default_device("cuda")
    dist.init_process_group("nccl", rank=rank, world_size=world, timeout=timedelta(seconds=HANGS))
    try:
        group = dist.group.WORLD
        for split in SPLITS:
            for case in (_selects, _logits, _hidden):
                torch.manual_seed(0)
                case(group, split)
        for mass in ("tail", "raw_stop_grad", "ema_pg"):
            torch.manual_seed(0)
            _masses(group, mass)
        for case in (_linear_selects, _hostile, _overwritten):
            torch.manual_seed(0)
            case(group)
        _without_a_host_sync(group)
    finally:
        dist.destroy_process_group()


def _without_a_host_sync(group: dist.ProcessGroup) -> None:
    torch.manual_seed(0)
    own = mine("unequal", group)
    student, teacher, weights = problem(torch.bfloat16)
    hidden, head = torch.randn(*ROWS, 8), torch.randn(student.shape[-1], 8)

    def step() -> None:
        support = teacher_topk(teacher[..., own], 3, normalize=True, group=group)
        leaves = [x.clone().requires_grad_() for x in (student[..., own], hidden, head[own])]
        options = {"weights": weights, "group": group}
        topk_divergence(leaves[0], teacher[..., own], k=3, **options).backward()
        topk_divergence(leaves[0], support, mass="tail", **options).backward()
        linear_topk_reverse_kl(leaves[1], leaves[2], support, **options).backward()

    step()  # compiles the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
