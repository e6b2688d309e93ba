"""Train a small student whose vocabulary is split over ranks, and compare it with the same training on one process.

    torchrun --nproc-per-node 4 examples/tensor_parallel.py

Each rank holds some rows of the LM heads of student and teacher. Everything before the heads is the same on every rank.
The losses see the shard of this rank and its group, and each rank gets the gradient of one process for what it holds.
"""

import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from topk_rkl.loss import linear_teacher_topk, linear_topk_reverse_kl, topk_reverse_kl

VOCAB, K, STEPS = 1_003, 16, 5  # 1,003 = 3 * 251 + 250: the last of four shards is smaller
AGREE = 1e-5


class Model(nn.Module):
    """Tokens to hidden states, and the shard of the head that this rank holds."""

    def __init__(self, width: int, group: Any) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Embedding(VOCAB, width), nn.Linear(width, width), nn.GELU())
        self.head = nn.Parameter(shard(torch.randn(VOCAB, width) / width**0.5, group).clone())


def shard(
    x: Tensor,  # (VOCAB, ...)
    group: Any,
) -> Tensor:  # (VOCAB / ranks, ...)
    return x if group is None else x.tensor_split(group.size())[group.rank()]


class SumOfGradients(torch.autograd.Function):
    """Nothing forwards; backwards the sum over the shards of the head, as a column-parallel layer has it."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        if ctx.group is not None:
            grad = grad.contiguous()
            dist.all_reduce(grad, group=ctx.group)
        return grad, None


def from_logits(student: Model, teacher: Model, tokens: Tensor, mask: Tensor, group: Any) -> Tensor:
    student_logits = SumOfGradients.apply(student.body(tokens), group) @ student.head.T  # (B, T, VOCAB / ranks)
    with torch.no_grad():
        teacher_logits = teacher.body(tokens) @ teacher.head.T
    return topk_reverse_kl(student_logits, teacher_logits, k=K, weights=mask, group=group)


def from_hidden_states(student: Model, teacher: Model, tokens: Tensor, mask: Tensor, group: Any) -> Tensor:
    """The loss itself sums the gradient of the hidden states."""
    with torch.no_grad():
        support = linear_teacher_topk(teacher.body(tokens), teacher.head, K, group=group)
    return linear_topk_reverse_kl(student.body(tokens), student.head, support, weights=mask, group=group)


def train(loss_of: Any, group: Any) -> tuple[list[float], Model]:
    """The loss of each step, and the student after them; without a group the whole vocabulary is here."""
    torch.manual_seed(0)
    teacher, student = Model(48, group).requires_grad_(False), Model(24, group)
    optimizer = torch.optim.SGD(student.parameters(), lr=2.0, momentum=0.9)
    losses = []
    for _ in range(STEPS):
        tokens, mask = torch.randint(VOCAB, (4, 32)), torch.rand(4, 32) < 0.8
        loss = loss_of(student, teacher, tokens, mask, group)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, student


def difference(losses: list[float], student: Model, alone: list[float], whole: Model, group: Any) -> Tensor:  # ()
    """The largest between this rank and one process, of the losses and of the parameters."""
    found = [torch.tensor(losses) - torch.tensor(alone), student.head - shard(whole.head, group)]
    found += [a - b for a, b in zip(student.body.parameters(), whole.body.parameters())]
    return torch.stack([x.detach().abs().max() for x in found]).max()


def main() -> int:
    dist.init_process_group("gloo")
    group = dist.group.WORLD
    first, worst = group.rank() == 0, torch.zeros(())
    for name, loss_of in (("logits", from_logits), ("hidden states", from_hidden_states)):
        losses, student = train(loss_of, group)
        worst = worst.maximum(difference(losses, student, *train(loss_of, None), group))
        if first:
            print(f"from {name}, loss per step:", *(f"{loss:.6f}" for loss in losses))
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    if first:
        print(f"{group.size()} ranks differ from one process by at most {worst:.1e}")
    dist.destroy_process_group()
    return int(not worst <= AGREE)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # a thread of gloo may let go of a tensor while Python ends, which would abort the process
