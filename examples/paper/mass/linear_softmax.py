"""A linear-softmax student of a language whose next token depends on the last one alone: nothing has to be sampled.

There are as many contexts as tokens. The share of each context among the positions of the student's own answers is a
product of matrices, so an on-policy loss is an exact mean. The student's logits are features times a head, H numbers
per token. The teacher's logits have a rank above H, or equal to it.
"""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from examples.paper.stacked import generators, normal

SCALE = 4.0  # the deviation of the teacher's logits: 8 of 128 tokens then have nine tenths of the probability


class Language(NamedTuple):
    """The teacher's and the student's side of R languages of V tokens."""

    teacher: Tensor  # (R, V, V) logits, a row per context
    features: Tensor  # (R, V, H) what the student sees of a context
    head: Tensor  # (R, H, V) the student before it is distilled


@cache
def language(vocab: int, rank: int, features: int | None, noise: float, steps: int, seeds: tuple[int, ...]) -> Language:
    """The student has learnt, by cross-entropy, a copy of the teacher whose logits have noise of this deviation.

    Each context has a feature of its own where their number is None, so that the student's logits are free.
    """
    sources = generators(seeds)
    seen, heads = normal((vocab, rank), sources), normal((rank, vocab), sources)  # (R, V, rank), (R, rank, V)
    teacher = SCALE / rank**0.5 * seen @ heads  # (R, V, V)
    noisy = teacher + noise * normal((vocab, vocab), sources)  # (R, V, V)
    if features is None:
        return Language(teacher, torch.eye(vocab).expand_as(noisy), noisy)
    seen = seen[..., :features] / features**0.5  # (R, V, H)
    return Language(teacher, seen, pretrained(seen, noisy.softmax(-1), steps))


def pretrained(
    features: Tensor,  # (R, V, H)
    target: Tensor,  # (R, V, V) probabilities
    steps: int,
) -> Tensor:  # (R, H, V)
    head = features.new_zeros(len(target), features.shape[-1], target.shape[-1], requires_grad=True)  # (R, H, V)
    optimizer = torch.optim.Adam([head], lr=0.03)
    for _ in range(steps):
        optimizer.zero_grad()
        (-(target * (features @ head).log_softmax(-1)).sum(-1).mean(-1).sum()).backward()
        optimizer.step()
    return head.detach()


@torch.no_grad()
def shares(
    logits: Tensor,  # (R, V, V)
    length: int,
) -> Tensor:  # (R, V), of sum 1
    """The mean over the positions of an answer of how probable each context is there; the first is any token."""
    step = logits.softmax(-1)  # (R, V, V)
    now = torch.full_like(step[:, :1], 1 / step.shape[-1])  # (R, 1, V)
    total = torch.zeros_like(now)  # (R, 1, V)
    for _ in range(length):
        total, now = total + now, now @ step
    return total.squeeze(1) / length


def drawn(
    weights: Tensor,  # (R, V), of sum 1
    count: int,
    sources: Sequence[torch.Generator],
) -> Tensor:  # (R, V), of sum 1
    """The shares in a batch of `count` contexts, drawn by these weights."""
    ids = torch.stack([torch.multinomial(w, count, True, generator=s) for w, s in zip(weights, sources)])  # (R, count)
    return torch.zeros_like(weights).scatter_add_(1, ids, torch.full_like(ids, 1 / count, dtype=weights.dtype))
