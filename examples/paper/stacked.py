"""Several small models at once: run r of R has its own weights, its own seed, and shares nothing with the others.

A small model on a CPU waits for Python, not for arithmetic. R of them in one batched product cost little more than one.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn


def generators(seeds: Sequence[int]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def normal(
    shape: Sequence[int],
    sources: Sequence[torch.Generator],
) -> Tensor:  # (R, *shape)
    """Standard normal numbers, each run's from its own generator: a run is the same beside any others."""
    return torch.stack([torch.randn(shape, generator=source) for source in sources])


class Linear(nn.Module):
    """R linear layers."""

    def __init__(self, inputs: int, outputs: int, sources: Sequence[torch.Generator], scale: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(normal((inputs, outputs), sources) * (scale / inputs**0.5))  # (R, I, O)
        self.bias = nn.Parameter(torch.zeros(len(sources), 1, outputs))  # (R, 1, O)

    def forward(
        self,
        x: Tensor,  # (R, ..., I)
    ) -> Tensor:  # (R, ..., O)
        return torch.baddbmm(self.bias, x.flatten(1, -2), self.weight).unflatten(1, x.shape[1:-1])


@torch.no_grad()
def grad_norms(
    parameters: Iterable[nn.Parameter],  # (R, ...) each
) -> Tensor:  # (R,)
    return torch.stack([p.grad.flatten(1).norm(dim=1) for p in parameters if p.grad is not None]).norm(dim=0)


@torch.no_grad()
def clip_grads(
    parameters: Iterable[nn.Parameter],  # (R, ...) each
    largest: float,
) -> Tensor:  # (R,) the norms before
    """torch.nn.utils.clip_grad_norm_ for each run on its own."""
    parameters = list(parameters)
    norms = grad_norms(parameters)
    factors = (largest / norms.clamp_min(1e-12)).clamp_max(1)  # (R,)
    for p in parameters:
        if p.grad is not None:
            p.grad.mul_(factors.view(-1, *[1] * (p.dim() - 1)))
    return norms
