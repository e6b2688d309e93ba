"""Training of a tiny transformer over ranks follows one process: FSDP, DDP, tensor parallelism, adapters."""

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from tests.ranks import on_ranks, together
from tests.sharded_model import LENGTH, VOCAB, LoRA, Tiny, mesh_of, whole
from topk_rkl import Support, linear_teacher_topk, linear_topk_reverse_kl, topk_reverse_kl
from topk_rkl.trainers.head_loss import within_head

pytestmark = together
K, STEPS = 4, 20
SIZES = {2: ((3, 1), (1, 2), (9, 0)), 3: ((2, 1, 1), (1, 0, 3), (9, 2, 1)), 4: ((1, 2, 1, 0),)}


def batch(step: int, group: Any, teacher: Tiny) -> tuple[slice, Tensor, Support, Tensor]:
    """Which sequences are of this rank; tokens, teacher and weights of all. Some ranks have no token that counts."""
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    sizes = SIZES[ranks][step % len(SIZES[ranks])]
    torch.manual_seed(step)
    tokens = torch.randint(0, VOCAB, (sum(sizes), LENGTH))
    weights = (torch.rand(tokens.shape) < 0.7).float()
    if step % 4 == 1:
        weights[: sizes[0]] = 0
    with torch.no_grad():
        support = linear_teacher_topk(teacher(tokens), teacher.head.weight, K)
    return slice(sum(sizes[:rank]), sum(sizes[: rank + 1])), tokens, support, weights


def some(support: Support, rows: slice) -> Support:
    return support[rows]


def shard(model: nn.Module, mesh: DeviceMesh, own_group: bool, resharded: bool = False, **options: Any) -> None:
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, **options)
    if own_group:
        fully_shard(model.head, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, reshard_after_forward=resharded, **options)


def assert_follows(model: nn.Module, one: nn.Module, by: float = 1e-5) -> None:
    names = dict(one.named_parameters())
    for name, p in model.named_parameters():
        torch.testing.assert_close(
            whole(p.detach()), names[name].detach(), rtol=by, atol=by, msg=lambda m, n=name: n + m
        )


def fsdp(group: Any, own_group: bool, tied: bool, bias: bool, resharded: bool) -> None:
    teacher, model, ranks = Tiny(1).requires_grad_(False), Tiny(0, tied, bias), dist.get_world_size(group)
    one = copy.deepcopy(model)
    shard(model, mesh_of(group), own_group, resharded)
    fired = []
    if not tied:
        model.head.weight.register_post_accumulate_grad_hook(lambda p: fired.append(p.grad.placements))
    lr = 0.03 if tied else 0.3  # more, and the training of a tied head is chaotic
    optimizers = [torch.optim.SGD(m.parameters(), lr=lr, momentum=0.9) for m in (model, one)]
    for step in range(STEPS):
        mine, tokens, support, weights = batch(step, group, teacher)
        total = weights.sum()
        hidden = model(tokens[mine])
        assert isinstance(model.head.weight, DTensor) == (own_group or resharded)
        loss = linear_topk_reverse_kl(
            hidden, model.head.weight, some(support, mine), student_bias=model.head.bias, weights=weights[mine],
            denominator=total / ranks,
        )  # fmt: skip
        loss.backward()
        truth = linear_topk_reverse_kl(
            one(tokens), one.head.weight, support, student_bias=one.head.bias, weights=weights, denominator=total
        )
        truth.backward()
        mean = loss.detach() / ranks
        dist.all_reduce(mean, group=group)
        torch.testing.assert_close(mean, truth.detach(), rtol=1e-5, atol=1e-5)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert tied or fired == [(Shard(0),)] * STEPS
    assert_follows(model, one)
    assert not torch.allclose(one.head.weight, Tiny(0, tied, bias).head.weight, atol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize(
    "case",
    ["head alone, bias", "head in the root", "head in the root, resharded", "tied", "tied, resharded"],
)
def test_training_with_fsdp2_follows_one_process(world: int, case: str) -> None:
    asked = (word in case for word in ("alone", "tied", "bias", "resharded"))
    on_ranks(world, fsdp, *asked)


def accumulated(group: Any) -> None:
    """Two micro-batches, of which FSDP2 is told to reduce the second alone."""
    teacher, model, ranks = Tiny(1).requires_grad_(False), Tiny(0), dist.get_world_size(group)
    one = copy.deepcopy(model)
    shard(model, mesh_of(group), True)
    batches = [batch(step, group, teacher) for step in (0, 1)]
    total = sum(weights.sum() for *_, weights in batches)
    for last, (mine, tokens, support, weights) in enumerate(batches):
        model.set_requires_gradient_sync(bool(last))
        linear_topk_reverse_kl(
            model(tokens[mine]), model.head.weight, some(support, mine), weights=weights[mine],
            denominator=total / ranks,
        ).backward()  # fmt: skip
        linear_topk_reverse_kl(one(tokens), one.head.weight, support, weights=weights, denominator=total).backward()
    for p, q in zip(model.parameters(), one.parameters()):
        torch.testing.assert_close(whole(p.grad), q.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("world", [2, 3])
def test_accumulated_micro_batches_give_the_gradient_of_one_process(world: int) -> None:
    on_ranks(world, accumulated)


def hybrid(group: Any) -> None:
    """Replicas of shards, a 2-D mesh."""
    mesh = DeviceMesh("cpu", torch.arange(4).view(2, 2), mesh_dim_names=("replica", "shard"))
    teacher, model = Tiny(1).requires_grad_(False), Tiny(0)
    one = copy.deepcopy(model)
    shard(model, mesh, True)
    mine, tokens, support, weights = batch(0, group, teacher)
    linear_topk_reverse_kl(
        model(tokens[mine]),
        model.head.weight,
        some(support, mine),
        weights=weights[mine],
        denominator=weights.sum() / 4,
    ).backward()
    linear_topk_reverse_kl(one(tokens), one.head.weight, support, weights=weights).backward()
    for p, q in zip(model.parameters(), one.parameters()):
        assert p.grad.placements == (Replicate(), Shard(0))
        torch.testing.assert_close(whole(p.grad), q.grad, rtol=1e-5, atol=1e-6)


def test_replicas_of_shards_give_the_gradient_of_one_process() -> None:
    on_ranks(4, hybrid)


def mixed_precision(group: Any, reduced_in: str) -> None:
    """The head alone, its gradient against that of all ranks' own 16-bit hidden states."""
    teacher, model, ranks = Tiny(1).requires_grad_(False), Tiny(0), dist.get_world_size(group)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    shard(model, mesh_of(group), True, mp_policy=policy)
    mine, tokens, support, weights = batch(0, group, teacher)
    hidden, head = model(tokens[mine]), model.head.weight
    assert hidden.dtype == torch.bfloat16 and head.dtype == torch.float32
    given = head.bfloat16() if reduced_in == "bfloat16" else head
    linear_topk_reverse_kl(
        hidden, given, some(support, mine), weights=weights[mine], denominator=weights.sum() / ranks
    ).backward()
    rows: list[Any] = [None] * ranks
    dist.all_gather_object(rows, hidden.detach().float(), group=group)
    one = Tiny(0).head.weight
    linear_topk_reverse_kl(
        torch.cat(rows).bfloat16(), one.bfloat16() if reduced_in == "bfloat16" else one, support, weights=weights
    ).backward()
    assert head.grad.dtype == torch.float32 and head.grad.placements == (Shard(0),)
    by = 2e-2 if reduced_in == "bfloat16" else 2e-6
    torch.testing.assert_close(whole(head.grad), one.grad, rtol=by, atol=by * float(one.grad.abs().max()))


@pytest.mark.parametrize("reduced_in", ["float32", "bfloat16"])
def test_a_head_under_mixed_precision(reduced_in: str) -> None:
    on_ranks(2, mixed_precision, reduced_in)


def divided_otherwise(group: Any) -> None:
    """set_gradient_divide_factor(1) sums over ranks: so does the full tensor that is asked for sums."""
    teacher, model = Tiny(1).requires_grad_(False), Tiny(0)
    one = copy.deepcopy(model)
    shard(model, mesh_of(group), True)
    for module in (model, model.head, *model.layers):
        module.set_force_sum_reduction_for_comms(True)
        module.set_gradient_divide_factor(1.0)
    mine, tokens, support, weights = batch(0, group, teacher)
    hidden = model(tokens[mine])
    head = model.head.weight.full_tensor(grad_placements=(Partial("sum"),))
    linear_topk_reverse_kl(
        hidden, head, some(support, mine), weights=weights[mine], denominator=weights.sum()
    ).backward()
    linear_topk_reverse_kl(one(tokens), one.head.weight, support, weights=weights).backward()
    for p, q in zip(model.parameters(), one.parameters()):
        torch.testing.assert_close(whole(p.grad), q.grad, rtol=1e-5, atol=1e-6)


def test_gradients_that_fsdp2_is_told_to_sum() -> None:
    on_ranks(2, divided_otherwise)


# The loss within the head's forward


def inside(group: Any, head_alone: bool) -> None:
    teacher, model, ranks = Tiny(1).requires_grad_(False), Tiny(0), dist.get_world_size(group)
    one = copy.deepcopy(model)
    mine, tokens, support, weights = batch(0, group, teacher)
    shard(model, mesh_of(group), head_alone)

    def loss_of(hidden: Tensor) -> Tensor:
        weight = model.head.weight
        assert not isinstance(weight, DTensor) and weight.shape == one.head.weight.shape
        return linear_topk_reverse_kl(
            hidden, weight, some(support, mine), weights=weights[mine], denominator=weights.sum() / ranks
        )

    with within_head(model.head, loss_of) as taken:
        output = model(tokens[mine], through_head=True)
    (taken[0] + 0 * output.sum()).backward()  # through the output, on which wrappers wait
    linear_topk_reverse_kl(one(tokens), one.head.weight, support, weights=weights).backward()
    for p, q in zip(model.parameters(), one.parameters()):
        torch.testing.assert_close(whole(p.grad), q.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("head_alone", [True, False])  # in a group of its own, or with the root
def test_the_loss_within_the_forward_of_a_sharded_head(head_alone: bool) -> None:
    on_ranks(2, inside, head_alone)


# Adapters


def test_a_head_with_an_adapter_is_merged() -> None:
    torch.manual_seed(0)
    hidden, base = torch.randn(5, 32, requires_grad=True), nn.Linear(32, VOCAB, bias=False)
    support = Support(torch.randint(0, VOCAB, (5, K)), torch.randn(5, K))
    head = LoRA(base)
    linear_topk_reverse_kl(hidden, head.merged(), support).backward()
    found = [p.grad.clone() for p in (hidden, head.lora_A["default"].weight, head.lora_B["default"].weight)]
    head.zero_grad()
    hidden.grad = None
    topk_reverse_kl(head(hidden), support).backward()
    truth = [p.grad for p in (hidden, head.lora_A["default"].weight, head.lora_B["default"].weight)]
    assert base.weight.grad is None
    for a, b in zip(found, truth):
        assert b.abs().max() > 1e-3
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)


def sharded_adapter(group: Any) -> None:
    teacher, model, ranks = Tiny(1).requires_grad_(False), Tiny(0), dist.get_world_size(group)
    model.head = LoRA(model.head)
    one = copy.deepcopy(model)
    shard(model, mesh_of(group), True)
    mine, tokens, support, weights = batch(0, group, teacher)
    hidden = model(tokens[mine])
    merged = model.head.merged(lambda a: a.redistribute(placements=[Replicate()]))
    linear_topk_reverse_kl(
        hidden, merged, some(support, mine), weights=weights[mine], denominator=weights.sum() / ranks
    ).backward()
    linear_topk_reverse_kl(one(tokens), one.head.merged(), support, weights=weights).backward()
    for name in ("lora_A", "lora_B"):
        p, q = (getattr(m.head, name)["default"].weight for m in (model, one))
        assert p.grad.placements == (Shard(0),)
        torch.testing.assert_close(whole(p.grad), q.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("world", [2, 3])
def test_a_sharded_head_with_an_adapter_is_merged(world: int) -> None:
    on_ranks(world, sharded_adapter)


# Tensor parallelism


def tensor_parallel(group: Any, entry: str) -> None:
    mesh, teacher, model = mesh_of(group), Tiny(1).requires_grad_(False), Tiny(0)
    one = copy.deepcopy(model)
    plan = ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)
    parallelize_module(model, mesh, {"head": plan})
    parallelize_module(teacher, mesh, {"head": plan})
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.3, momentum=0.9) for m in (model, one)]
    for step in range(STEPS):
        torch.manual_seed(step)
        tokens = torch.randint(0, VOCAB, (3, LENGTH))
        weights = (torch.rand(tokens.shape) < 0.7).float()
        with torch.no_grad():
            logits = teacher(tokens, through_head=True)
        if entry == "logits":
            student = model(tokens, through_head=True)
            assert student.placements == logits.placements == (Shard(-1),) or student.placements == (Shard(2),)
            loss = topk_reverse_kl(student, logits, k=K, weights=weights)
        elif entry == "hidden states":
            hidden = DTensor.from_local(model(tokens), mesh, [Replicate()])
            loss = linear_topk_reverse_kl(hidden, model.head.weight, logits, k=K, weights=weights)
        else:
            loss = linear_topk_reverse_kl(
                model(tokens), model.head.weight, logits.to_local(), k=K, weights=weights, group=mesh
            )
        loss.backward()
        scale = 2 if entry == "logits" else 1  # as the model scales its logits
        truth = topk_reverse_kl(scale * one.head(one(tokens)), whole(logits), k=K, weights=weights)
        truth.backward()
        torch.testing.assert_close(loss.detach(), truth.detach(), rtol=1e-5, atol=1e-5)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert_follows(model, one)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("entry", ["logits", "hidden states", "group"])
def test_training_with_tensor_parallelism_follows_one_process(world: int, entry: str) -> None:
    on_ranks(world, tensor_parallel, entry)
