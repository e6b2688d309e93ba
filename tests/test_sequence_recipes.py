"""The recipes of docs/parallel.md, run from the page on several ranks, give what one process gives."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.experimental import context_parallel
from torch.nn.functional import pad

from tests.ranks import on_ranks, together
from topk_rkl.loss import Support, topk_reverse_kl

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
        torch.cat(each, 1) for each in zip(*((x, *support, mask) for x, support, mask in parts), strict=True)
    )
    topk_reverse_kl(model(hidden), Support(ids, log_probs), weights=mask).backward()
    for *grads, p in zip(*results, model.parameters(), strict=True):
        got = sum(grads) / (2 if averaged else 1)  # as DDP and FSDP average them
        torch.testing.assert_close(got, p.grad, rtol=1e-12, atol=1e-15)


def test_weights_that_add_up_to_1_give_the_mean_of_the_sequences() -> None:
    hidden, support, mask = batch()
    logits = hidden @ torch.randn(H, V).double()
    weights = shifted(mask)
    want = torch.stack(
        [topk_reverse_kl(z, Support(*s), weights=w) for z, *s, w in zip(logits, *support, weights, strict=True)]
    )
    got = topk_reverse_kl(logits, support, weights=weights / weights.sum(1, keepdim=True))
    torch.testing.assert_close(got, want.mean(), rtol=1e-13, atol=0)
