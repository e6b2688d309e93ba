"""The code of docs/parallel.md, run from the page on several ranks, gives what one process gives."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.experimental import context_parallel
from torch.nn.functional import pad
from torch.nn.parallel import DistributedDataParallel

from tests.ranks import on_ranks, together
from topk_rkl.loss import Support, linear_topk_reverse_kl, teacher_topk, topk_divergence, topk_reverse_kl

pytestmark = together
PAGE = Path(__file__).parent.parent / "docs/parallel.md"
V, K, H, B, T = 31, 5, 8, 2, 24
ENDS = torch.tensor([0, 7, 8, 24])  # of sequences packed into one


def blocks() -> dict[str, Any]:
    """What the blocks of the page define."""
    scope: dict = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        exec(block, scope)
    return scope


def batch(b: int = B, t: int = T) -> tuple[Tensor, Support, Tensor]:
    """Hidden states (B, T, H), the support (B, T, K) and the mask (B, T) of the tokens of the response."""
    support = Support(torch.rand(b, t, V).topk(K).indices.int(), torch.randn(b, t, K).double())
    return torch.randn(b, t, H).double(), support, (torch.rand(b, t) < 0.6).double()


def shifted(mask: Tensor) -> Tensor:  # (B, T)
    return pad(mask[:, 1:], (0, 1))


def cut_rows(
    group: Any, layout: str, head: Tensor, hidden: Tensor, support: Support, mask: Tensor
) -> tuple[Tensor, ...]:
    """Loss, gradients of the local logits, and the rows (B, T) that this rank holds."""
    page = blocks()
    cut = page[layout.split()[-1]]
    if layout.startswith("packed"):
        each = cut
        cut = lambda x, group: page["packed"](each, x, ENDS, group)  # noqa: E731
    logits = (cut(hidden, group) @ head.T).requires_grad_()
    loss = page["loss_of_my_rows"](logits, support, mask, cut, group)
    loss.backward()
    rows = torch.arange(mask.numel()).view(mask.shape)
    return loss.detach(), logits.grad, cut(rows, group)


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("layout", ["ulysses", "zigzag", "packed ulysses", "packed zigzag"])
def test_parts_of_a_sequence_give_what_one_process_gives(world: int, layout: str) -> None:
    hidden, support, mask = batch(1 if layout.startswith("packed") else B)
    head = torch.randn(V, H).double()
    results = on_ranks(world, cut_rows, layout, head, hidden, support, mask)
    logits = (hidden @ head.T).requires_grad_()
    loss = topk_reverse_kl(logits, support, weights=shifted(mask))
    loss.backward()
    assert sorted(torch.cat([rows.flatten() for *_, rows in results]).tolist()) == list(range(mask.numel()))
    torch.testing.assert_close(sum(part for part, *_ in results), loss.detach(), rtol=1e-13, atol=0)
    for _, grad, rows in results:
        torch.testing.assert_close(grad, logits.grad.flatten(0, 1)[rows], rtol=1e-12, atol=1e-16)
    assert not torch.equal(shifted(mask), mask)


def held_by_torch(group: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """The rows that torch's ring attention gives this rank, and those of the recipe."""
    mesh, theirs = DeviceMesh.from_group(group, "cpu"), x.clone()
    with context_parallel(mesh, buffers=[theirs], buffer_seq_dims=[1]):
        held = theirs.clone()
    return held, blocks()["zigzag"](x, group)


@pytest.mark.parametrize("world", [2, 4])
def test_zigzag_is_the_layout_of_torch(world: int) -> None:
    for theirs, ours in on_ranks(world, held_by_torch, torch.arange(B * T).view(B, T)):
        assert torch.equal(theirs, ours)


def stepped(group: Any, averaged: bool, model: nn.Module, micro_batches: list) -> list[Tensor]:
    blocks()["backward"](model, micro_batches[group.rank()], group, averaged)
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("averaged", [False, True])
def test_the_step_of_the_page_gives_the_gradient_of_one_process(averaged: bool) -> None:
    model = nn.Linear(H, V).double()
    parts = [batch(1, t) for t in (5, 3, 0, 4)]
    given = [{"inputs": hidden, "support": support, "weights": mask} for hidden, support, mask in parts]
    results = on_ranks(2, stepped, averaged, model, [given[:2], given[2:]])
    hidden, ids, log_probs, mask = (
        torch.cat(each, 1) for each in zip(*((x, *support.tensors, mask) for x, support, mask in parts), strict=True)
    )
    topk_reverse_kl(model(hidden), Support(ids, log_probs), weights=mask).backward()
    for *grads, p in zip(*results, model.parameters(), strict=True):
        got = sum(grads) / (2 if averaged else 1)  # as DDP and FSDP average them
        torch.testing.assert_close(got, p.grad, rtol=1e-12, atol=1e-15)


class Scaled(nn.Module):
    """As a model that scales the logits of its head."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(H, H), nn.Linear(H, V, bias=False)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.head(self.body(x).tanh())


def gradients(model: nn.Module) -> list[Tensor]:
    if not isinstance(model, FullyShardedDataParallel):
        return [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in model.parameters()]
    with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
        return [p.grad.clone() for p in model.parameters()]


def in_the_head(group: Any, how: str, hidden: Tensor, support: Support, weights: Tensor) -> list[Tensor]:
    """The gradients of this rank, which has row `rank` of the batch."""
    page, model, row = blocks(), Scaled(), slice(group.rank(), group.rank() + 1)
    head, mesh = model.head, DeviceMesh.from_group(group, "cpu")
    wrapped = DistributedDataParallel(model, process_group=group) if how == "DDP" else model
    if how == "FSDP1":
        wrapped = FullyShardedDataParallel(
            model, process_group=group, use_orig_params=True, device_id=torch.device("cpu"),
            auto_wrap_policy=lambda module, recurse, **_: recurse or module is head,
        )  # fmt: skip
    if how == "FSDP2":
        fully_shard(model.head, mesh=mesh)
        fully_shard(model, mesh=mesh)
    denominator = page["global_count"](weights[row], group, averaged=True)

    def loss(x: Tensor, weight: Tensor) -> Tensor:
        teacher = Support(support.ids[row], support.log_probs[row])
        return linear_topk_reverse_kl(
            x, weight, teacher, weights=weights[row], denominator=denominator, logit_scale=2.0
        )

    page["from_model"](wrapped, head, hidden[row], loss).backward()
    grads = gradients(wrapped)
    assert wrapped(hidden[row]).shape == (1, T, V)  # the head is as it was
    return grads


@pytest.mark.parametrize("how", ["DDP", "FSDP1", "FSDP2"])
def test_the_loss_inside_the_head_fires_the_hooks(how: str) -> None:
    hidden, support, mask = batch()
    results = on_ranks(B, in_the_head, how, hidden, support, mask)
    torch.manual_seed(torch.initial_seed())
    model = Scaled()
    topk_reverse_kl(model(hidden), support, weights=mask).backward()
    for grads in results:
        for got, p in zip(grads, model.parameters(), strict=True):
            torch.testing.assert_close(got, p.grad, rtol=1e-12, atol=1e-15)


def from_own_rows(group: Any, hidden: Tensor, head: Tensor, support: Support, weights: Tensor) -> list[Any]:
    """Gradients of this rank's hidden states, and of a head that all ranks share, (V, H)."""
    page, row = blocks(), slice(group.rank(), group.rank() + 1)
    module = nn.Linear(H, len(head), bias=False).double()
    module.weight.data.copy_(head)
    fully_shard(module, mesh=DeviceMesh.from_group(group, "cpu"))
    mine = hidden[row].clone().requires_grad_()
    denominator = page["global_count"](weights[row], group, averaged=True)
    part = Support(support.ids[row], support.log_probs[row])
    page["from_fsdp"](mine, module.weight, part, weights[row], denominator).backward()
    return [mine.grad / group.size(), module.weight.grad.full_tensor()]  # the body's gradients would be averaged


@pytest.mark.parametrize("vocab", [V, 200])  # the head is gathered, or its rows are fetched
def test_a_head_of_fsdp2_is_passed_as_it_is(vocab: int) -> None:
    hidden, support, mask = batch()
    leaves = [hidden.requires_grad_(), torch.randn(vocab, H).double().requires_grad_()]
    linear_topk_reverse_kl(*leaves, support, weights=mask).backward()
    results = on_ranks(B, from_own_rows, *(x.detach() for x in leaves), support, mask)
    for rank, (dhidden, dhead) in enumerate(results):
        torch.testing.assert_close(dhidden, leaves[0].grad[rank : rank + 1], rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(dhead, leaves[1].grad, rtol=1e-12, atol=1e-15)


def test_weights_that_add_up_to_1_give_the_mean_of_the_sequences() -> None:
    hidden, support, mask = batch()
    logits = hidden @ torch.randn(H, V).double()
    weights = shifted(mask)
    want = torch.stack(
        [topk_reverse_kl(z, Support(*s), weights=w) for z, *s, w in zip(logits, *support.tensors, weights, strict=True)]
    )
    got = topk_reverse_kl(logits, support, weights=weights / weights.sum(1, keepdim=True))
    torch.testing.assert_close(got, want.mean(), rtol=1e-13, atol=0)


def gathered(group: Any, recipe: str, leaves: list[Tensor], support: Support, mask: Tensor) -> list[Tensor]:
    """Loss, and gradients of this rank's hidden states (S / ranks, B, H) and shard of the head."""
    hidden, head = (x.tensor_split(group.size())[group.rank()].clone().requires_grad_() for x in leaves)
    page = blocks()
    if recipe == "reduce-scatter":
        page["WholeSequence"].backward = staticmethod(
            lambda _, grad: (group.size() * grad.tensor_split(group.size())[group.rank()], None)
        )
    loss = page["from_split_hidden"](hidden, head, support, mask, group)
    loss.backward()
    return [loss.detach(), hidden.grad, head.grad]


@pytest.mark.parametrize("world", [2, 3, 4])
def test_hidden_states_split_as_in_megatron_give_what_one_process_gives(world: int) -> None:
    hidden, support, mask = batch(T, B)  # the sequence comes first
    leaves = [hidden.requires_grad_(), torch.randn(V, H).double().requires_grad_()]
    loss = linear_topk_reverse_kl(*leaves, support, weights=mask)
    loss.backward()
    given = [x.detach() for x in leaves], support, mask
    for rank, (got, *grads) in enumerate(on_ranks(world, gathered, "the page's", *given)):
        torch.testing.assert_close(got, loss.detach(), rtol=1e-13, atol=0)
        for grad, leaf in zip(grads, leaves, strict=True):
            want = leaf.grad.tensor_split(world)[rank]
            torch.testing.assert_close(grad, want, rtol=1e-12, atol=1e-16)
    [(_, summed, _), *_] = on_ranks(world, gathered, "reduce-scatter", *given)
    torch.testing.assert_close(summed, world * hidden.grad.tensor_split(world)[0], rtol=1e-12, atol=1e-16)


def split_vocabulary(group: Any, student: Tensor, teacher: Tensor, mask: Tensor, heads: list[Tensor]) -> list[Tensor]:
    """Both losses of the page with their vocabularies split: logits (B, T, V / ranks), heads (V / ranks, H)."""
    page, part = blocks(), lambda x, dim: x.tensor_split(group.size(), dim)[group.rank()]
    student_head, teacher_head = (part(head, 0) for head in heads)
    return [
        page["from_logits"](*(part(x @ head.T, -1) for x, head in zip((student, teacher), heads)), mask, group),
        page["from_hidden"](student, student_head, teacher, teacher_head, mask, group),
    ]


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_a_split_vocabulary_gives_the_losses_of_one_process(world: int) -> None:
    student, teacher, heads = *torch.randn(2, B, T, H).double(), list(torch.randn(2, 70, H).double())
    mask = (torch.rand(B, T) < 0.6).double()
    want = topk_reverse_kl(student @ heads[0].T, teacher @ heads[1].T, k=32, weights=mask)
    for losses in on_ranks(world, split_vocabulary, student, teacher, mask, heads):
        torch.testing.assert_close(losses, [want, want], rtol=1e-12, atol=0)


def collectives(group: Any) -> dict[str, int]:
    """How many each call of the page's table runs after the one that every call begins with."""
    z, w, support, hidden, head = torch.randn(6, V), torch.randn(6, V), *drawn(), torch.randn(V, H)
    counts: dict[str, int] = {}

    def count(name: str, call: Any, before: int = 1) -> Tensor:
        start = group._get_sequence_number_for_group()
        result = call()
        counts[name] = group._get_sequence_number_for_group() - start - before
        return result

    for leaf in (z, hidden, head):
        leaf.requires_grad_()
    select = count("teacher_topk", lambda: teacher_topk(w, K, group=group))
    assert select.ids.shape == (6, K)
    count("normalize", lambda: teacher_topk(w, K, normalize=True, group=group))
    from_logits = count("teacher logits", lambda: topk_reverse_kl(z, w, k=K, group=group))
    on_support = count("a Support", lambda: topk_reverse_kl(z, support, group=group))
    count("the rest", lambda: topk_divergence(z, normal(support), mass="tail", group=group))
    linear = count("hidden states", lambda: linear_topk_reverse_kl(hidden, head, support, group=group))
    for name, loss in (("logits' backward", from_logits), ("Support's backward", on_support), ("backward", linear)):
        count(name, loss.backward, before=0)
    return counts


def drawn() -> tuple[Support, Tensor]:
    torch.manual_seed(0)  # the same on every rank
    return Support(torch.rand(6, V).topk(K).indices.int(), torch.randn(6, K)), torch.randn(6, H)


def normal(support: Support) -> Support:
    return Support(support.ids, support.log_probs.log_softmax(-1) - 0.5)


@pytest.mark.parametrize("world", [2, 3])
def test_the_page_counts_the_collectives(world: int) -> None:
    table = dict(re.findall(r"^\| ([^|]*?) \| ((?:\d [\w-]+(?:, )?)+)(?: more)? \|", PAGE.read_text(), re.MULTILINE))
    said = {name: sum(map(int, re.findall(r"\d", kinds))) for name, kinds in table.items()}
    select = said["`teacher_topk`, 2 ranks" if world == 2 else "`teacher_topk`, more ranks"]
    [more] = [number for name, number in said.items() if name.startswith("log-probs")]
    want = {
        "teacher_topk": select,
        "normalize": select + more,
        "teacher logits": said["`topk_reverse_kl` with teacher logits"],
        "a Support": said["`topk_reverse_kl` with a `Support`"],
        "the rest": said["`topk_reverse_kl` with a `Support`"] + more,
        "hidden states": said["`linear_topk_reverse_kl` with a `Support`"],
        "logits' backward": 0,
        "Support's backward": 0,
        "backward": said["its backward pass"],
    }
    assert on_ranks(world, collectives) == [want] * world


def with_bits(group: Any, dtype: torch.dtype) -> dict[str, bool]:
    """What has the bits of one process on this rank, of the loss of each position and of the gradients."""
    torch.manual_seed(1)
    z, w = (3 * torch.randn(2, 40, 1_003)).to(dtype)
    hidden, head, bias = (torch.randn(shape).to(dtype) for shape in ((40, 48), (1_003, 48), (1_003,)))
    support, weights = teacher_topk(w, 32), torch.rand(40)

    def shard(x: Tensor, dim: int) -> Tensor:
        return x.tensor_split(group.size(), dim)[group.rank()]

    def equal(call: Any, *leaves: tuple[Tensor, int]) -> bool:
        whole = [x.clone().requires_grad_() for x, _ in leaves]
        mine = [shard(x, dim).clone().requires_grad_() for x, dim in leaves]
        losses = [
            call(*given, reduction="none", weights=weights, group=ranks)
            for given, ranks in ((whole, None), (mine, group))
        ]
        for loss in losses:
            loss.sum().backward()
        grads = [(shard(a.grad, dim), b.grad) for a, b, (_, dim) in zip(whole, mine, leaves, strict=True)]
        return all(torch.equal(a, b) for a, b in (losses, *grads))

    return {
        "support": all(
            map(torch.equal, support.tensors, teacher_topk(shard(w, -1), 32, group=group).tensors)
        ),
        "teacher logits": equal(
            lambda z, group, **more: topk_reverse_kl(z, shard(w, -1) if group else w, k=32, group=group, **more),
            (z, -1),
        ),
        "a Support": equal(lambda z, **more: topk_reverse_kl(z, support, **more), (z, -1)),
        "head and bias": equal(
            lambda head, bias, **more: linear_topk_reverse_kl(hidden, head, support, student_bias=bias, **more),
            (head, 0), (bias, 0),
        ),
        "itself": bool((topk_reverse_kl(shard(z, -1), shard(z, -1), k=32, reduction="none", group=group) == 0).all()),
    }  # fmt: skip


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_split_vocabulary_has_the_bits_of_one_process(world: int, dtype: torch.dtype) -> None:
    for found in on_ranks(world, with_bits, dtype):
        assert found == dict.fromkeys(found, True)
