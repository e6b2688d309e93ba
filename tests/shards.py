"""A vocabulary split over the ranks of a group: how it is split, and what each rank holds."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing import assert_close

# The lengths of the shards of 1 to 4 ranks, V = 23 in each.
SPLITS = {
    "as equal as can be": {1: (23,), 2: (12, 11), 3: (8, 8, 7), 4: (6, 6, 6, 5)},
    "unequal": {1: (23,), 2: (3, 20), 3: (9, 1, 13), 4: (1, 2, 15, 5)},
    "empty shards": {1: (23,), 2: (0, 23), 3: (11, 0, 12), 4: (0, 12, 11, 0)},
}
VOCAB = 23
ROWS = 5, 2
ACCURACY = 2e-6  # of loss and gradient, for log-ratios of about 1


def mine(split: str, group: dist.ProcessGroup) -> slice:
    """The ids of this rank."""
    lengths = SPLITS[split][dist.get_world_size(group)]
    start = sum(lengths[: dist.get_rank(group)])
    return slice(start, start + lengths[dist.get_rank(group)])


def same_everywhere(x: Tensor, group: dist.ProcessGroup) -> None:
    """The tensor has the same bits on every rank."""
    found = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, x.contiguous(), group=group)
    for other in found:
        assert_close(other, found[0], rtol=0, atol=0, equal_nan=True)


def exactly(a: Tensor, b: Tensor) -> None:
    assert a.dtype == b.dtype
    assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def within(a: Tensor, b: Tensor, bound: float) -> None:
    assert a.dtype == b.dtype
    assert_close(a, b, rtol=0, atol=bound, equal_nan=True)


def with_gradients(loss: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
    """The loss of every position, and the gradients for a gradient that differs from one to the next."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    found = loss(*leaves)
    found.backward(torch.linspace(-1, 2, found.numel(), dtype=found.dtype).view(found.shape))
    return found.detach(), *(x.grad for x in leaves)


def problem(dtype: torch.dtype, ties: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of both sides (5, 2, V), and weights (5, 2) of which some are 0."""
    student, teacher = torch.randn(*ROWS, VOCAB), torch.randn(*ROWS, VOCAB)
    if ties:
        teacher = teacher.round()
    return student.to(dtype), teacher.to(dtype), torch.tensor([[1, 0.5], [0, 2], [1, 1], [0, 0], [3, 1]])
