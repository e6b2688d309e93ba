"""Defects that other projects have, or had, with a split vocabulary: ours has none, and each would be seen.

Every defect is planted into a vocabulary-parallel loss in plain PyTorch, which passes the same check without it.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.ranks import Failed, on_ranks, together
from topk_rkl.loss import Support, linear_topk_reverse_kl, topk_reverse_kl

pytestmark = together
N, V, K, H = 12, 24, 6, 5  # V splits evenly over 2, 3 and 4 ranks

SOURCES = {
    "local id 0 of a shard": "verl-recipe gkd/megatron at 48ea0a7: ids of other shards overwrite its gradient",
    "times the ranks": "NVIDIA-NeMo/Automodel#3776: gradients times the size of the group",
    "out of range is logit 0": "NeMo-RL: an id that no shard has takes part in the softmax, with logit 0",
    "the first grad_output": "NVIDIA-NeMo/Automodel#3853: every token is scaled by the first grad_output",
    "a raw all-reduce": "modelscope/ms-swift#9947: autograd misses what shards owe to the sums of the others",
    "the last duplicate": "verl-recipe gkd/megatron at 48ea0a7: grad[row, ids] += g keeps one of equal ids",
}
LINEAR = {
    "times the ranks": "NVIDIA-NeMo/Automodel#3776, as the gradient of hidden states summed once too often",
    "this shard alone": "the gradient of hidden states without the parts of the other shards",
}


def drawn(defect: str, world: int) -> tuple[Tensor, Support, Tensor]:
    """Logits (N, V), the support (N, K), and a grad_output (N,) that differs per token."""
    noise = torch.rand(N, V)
    if defect == "local id 0 of a shard":
        noise[::2, :: V // world] += 2  # chosen in every other row
    ids = noise.topk(K).indices
    if defect == "out of range is logit 0":
        ids[:, 1], ids[::2, 3] = V + 2, -1
    if defect == "the last duplicate":
        ids[:, 2], ids[:, 4] = ids[:, 0], V - 1 - ids[:, 1]
        ids[:, 5] = ids[:, 4]
    return torch.randn(N, V).double(), Support(ids, torch.randn(N, K).double()), torch.rand(N).double() + 0.5


def ours(group: Any, logits: Tensor, support: Support, grad_output: Tensor) -> tuple[Tensor, Tensor]:
    logits = logits.requires_grad_()
    loss = topk_reverse_kl(logits, support, reduction="none", group=group)
    return loss.detach(), *torch.autograd.grad(loss, logits, grad_output)


def by_hand(
    group: Any, logits: Tensor, support: Support, grad_output: Tensor, defect: str = "none"
) -> tuple[Tensor, Tensor]:
    """Loss and gradient of this shard, right unless a defect is planted."""
    width = logits.shape[-1]
    columns = support.ids - group.rank() * width
    mine = (columns >= 0) & (columns < width)
    z = logits.gather(1, columns.where(mine, 0)).where(mine, 0)
    found = mine.double()
    for x in (z, found):
        dist.all_reduce(x, group=group)
    if defect != "out of range is logit 0":
        z = z.where(found > 0, -torch.inf)
    log_q = support.log_probs.where(z > -torch.inf, -torch.inf).log_softmax(1)
    log_p = z.log_softmax(1)
    ratio = (log_p - log_q).where(z > -torch.inf, 0)
    loss = (log_p.exp() * ratio).sum(1)
    if defect == "a raw all-reduce":
        g = gradient_of_own_terms(group, z.detach(), log_q, mine)
    else:
        g = log_p.exp() * (ratio - loss[:, None])
    if defect == "times the ranks":
        g = g * group.size()
    g = g * (grad_output[0] if defect == "the first grad_output" else grad_output[:, None])
    grad, rows = torch.zeros(N, width + 1).double(), torch.arange(N)[:, None]
    elsewhere = 0 if defect == "local id 0 of a shard" else width  # where the slots of other shards go
    accumulate = defect not in ("local id 0 of a shard", "the last duplicate")
    columns, g = columns.where(mine, elsewhere), g.where(mine, 0)
    if accumulate:
        grad.index_put_((rows, columns), g, accumulate=True)
    else:
        grad[rows, columns] += g
    return loss, grad[:, :width]


def gradient_of_own_terms(group: Any, z: Tensor, log_q: Tensor, mine: Tensor) -> Tensor:  # (N, K)
    """By autograd through the terms of this shard, whose sum of exponentials was all-reduced behind its back."""
    z = z.requires_grad_()
    total = z.exp().where(mine, 0).sum(1)
    others = total.detach().clone()
    dist.all_reduce(others, group=group)
    log_p = z - (total + (others - total.detach())).log()[:, None]
    terms = log_p.exp() * (log_p - log_q)
    return torch.autograd.grad(terms.where(mine, 0).sum(), z)[0]


def check(group: Any, name: str, defect: str, logits: Tensor, support: Support, grad_output: Tensor) -> None:
    """Compares the loss and the gradient of this shard with those of one process."""
    whole = logits.clone().requires_grad_()
    want = topk_reverse_kl(whole, support, reduction="none")
    want.backward(grad_output)
    mine = slice(group.rank() * (V // group.size()), (group.rank() + 1) * (V // group.size()))
    compute: Callable = ours if name == "ours" else by_hand
    more = () if name == "ours" else (defect,)
    loss, grad = compute(group, logits[:, mine].clone(), support, grad_output, *more)
    for got, right in ((loss, want.detach()), (grad, whole.grad[:, mine])):
        torch.testing.assert_close(got, right, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("defect", SOURCES)
def test_ours_has_no_such_defect(defect: str, world: int) -> None:
    on_ranks(world, check, "ours", defect, *drawn(defect, world))


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("defect", SOURCES)
def test_the_check_sees_the_defect(defect: str, world: int) -> None:
    given = drawn(defect, world)
    on_ranks(world, check, "by hand", "none", *given)
    with pytest.raises(Failed, match="AssertionError: Tensor-likes are not close"):
        on_ranks(world, check, "by hand", defect, *given)


def check_linear(group: Any, defect: str, hidden: Tensor, head: Tensor, support: Support, grad_output: Tensor) -> None:
    """The same from hidden states, (N, H), whose gradient every rank has whole."""
    leaves = [x.clone().requires_grad_() for x in (hidden, head)]
    loss = linear_topk_reverse_kl(*leaves, support, reduction="none")
    loss.backward(grad_output)
    shard = head.tensor_split(group.size())[group.rank()].clone().requires_grad_()
    mine = hidden.clone().requires_grad_()
    got = linear_topk_reverse_kl(mine, shard, support, reduction="none", group=group)
    got.backward(grad_output)
    dhidden = mine.grad
    if defect == "times the ranks":
        dhidden = dhidden * group.size()
    if defect == "this shard alone":
        dlogits = by_hand(group, hidden @ shard.detach().T, support, grad_output)[1]
        dhidden = dlogits @ shard.detach()
    torch.testing.assert_close(got, loss, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(dhidden, leaves[0].grad, rtol=1e-12, atol=1e-14)
    want = leaves[1].grad.tensor_split(group.size())[group.rank()]
    torch.testing.assert_close(shard.grad, want, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("defect", LINEAR)
def test_hidden_states_get_the_sum_over_shards_once(defect: str, world: int) -> None:
    _, support, grad_output = drawn(defect, world)
    given = torch.randn(N, H).double(), torch.randn(V, H).double(), support, grad_output
    on_ranks(world, check_linear, "none", *given)
    with pytest.raises(Failed, match="AssertionError: Tensor-likes are not close"):
        on_ranks(world, check_linear, defect, *given)
