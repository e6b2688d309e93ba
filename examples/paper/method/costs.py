"""Time and memory of each loss by itself, on the rollouts of a student."""

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from examples.paper.method.language_model import respond, response_logits
from examples.paper.method.task import ENDS, PAD, VOCAB, pose
from examples.paper.method.training import Models, Size, per_run_mean, shared_tokens
from examples.paper.objectives import LOSSES, Loss
from examples.paper.stacked import generators

COSTS_K = 32


def costs(models: Models, size: Size, seeds: Sequence[int], repeats: int = 15) -> dict[str, dict[str, float]]:
    """The bytes that each loss keeps, and its least seconds for both passes, which a busy machine disturbs least."""
    sources = generators(seeds)
    prompts = pose(size.batch, size.obstacles, sources)  # (R, B, P)
    y = respond(models.student, prompts, size.moves + 2, ENDS, PAD, 0.9, sources)  # (R, B, T)
    z = response_logits(models.student, prompts, y).detach().requires_grad_()  # (R, B, T, V)
    inputs = z, response_logits(models.teacher, prompts, y), y, per_run_mean(shared_tokens(y))
    asked = {loss: (loss, COSTS_K) for loss in LOSSES} | {"full vocabulary": ("top-K", VOCAB)}
    seconds: dict[str, list[float]] = {name: [] for name in asked}
    for _ in range(repeats):
        for name, (loss, k) in asked.items():
            started = time.perf_counter()
            LOSSES[loss](*inputs[:3], k, inputs[3]).sum().backward()
            seconds[name].append(time.perf_counter() - started)
    return {
        name: {"seconds": min(seconds[name]), "kept": kept_bytes(LOSSES[loss], k, *inputs)}
        for name, (loss, k) in asked.items()
    }


def kept_bytes(
    loss: Loss,
    k: int,
    z: Tensor,  # (R, B, T, V)
    w: Tensor,  # (R, B, T, V)
    y: Tensor,  # (R, B, T)
    weights: Tensor,  # (R, B, T)
) -> int:
    """The tensors that the graph of a loss holds besides its arguments."""
    held: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        held[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        value = loss(z, w, y, k, weights)  # noqa: F841  the graph lives as long as the value
    given = {x.untyped_storage().data_ptr() for x in (z, w, y, weights)}
    return sum(size for place, size in held.items() if place not in given)
