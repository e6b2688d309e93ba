"""The controlled study of appendix E: how far a reward reaches back decides the variance of the gradient.

A student learns from the teachers of both tasks in turn, on its own walks, by equation 3: the log-ratio of step t' is a
reward of every step t <= t', times gamma^(t' - t). Students of one seed differ in gamma alone; they start from the same
weights and see the same noise. The variance is that of the output layer's gradient, over M batches.

The learning rate of the paper is not known. RATE was set beforehand. Others are tried at the two ends of gamma. Each
has a verdict of its own.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from examples.paper import stacked
from examples.paper.control.walkers import START, TASKS, Policy, Walk, pick, train_teachers, walk
from examples.paper.study import Record, bar
from topk_rkl.recipe.rewards import log_ratio, return_to_go

SEEDS = (42, 43, 2026, 1, 2, 3)  # the first three are those of the paper
GAMMAS = (0.0, 0.25, 0.5, 0.75, 1.0)
ENDS = (0.0, 1.0)  # the gammas at the other rates
RATE = 1e-3  # of Adam


class Size(NamedTuple):
    iterations: int = 2000
    teacher_iterations: int = 500
    points: int = 20  # measurements during training
    steps: int = 20  # T; read off an axis of the paper's plots, which do not name it
    batch: int = 64
    batches: int = 8  # M
    others: tuple[float, ...] = (3e-3, 1e-2)  # learning rates beside RATE


FULL = Size(iterations=20_000, teacher_iterations=3000, points=50)


def distillation_loss(
    student: Normal,  # (R, B, T) R: the runs of the first gamma, then those of the second, ...
    teacher: Normal,  # (R, B, T)
    moves: Tensor,  # (R, B, T)
    gammas: Sequence[float],
) -> Tensor:  # (R,)
    """Its gradient is equation 3: the return from step t on is a constant factor of grad log p of move t."""
    log_p = student.log_prob(moves)  # (R, B, T)
    rewards = log_ratio(log_p, teacher.log_prob(moves)).chunk(len(gammas))  # (R / gammas, B, T) each
    returns = torch.cat([return_to_go(group, gamma=gamma) for group, gamma in zip(rewards, gammas)])
    return -(returns * log_p).sum(-1).mean(-1)


def output_gradient(
    student: Policy,
    teacher: Policy,
    made: Walk,
    gammas: Sequence[float],
) -> Tensor:  # (R, WIDTH + 1, 2) of the weights and the bias of the output layer
    loss = distillation_loss(student(made.inputs), teacher(made.inputs), made.moves, gammas)
    return torch.cat(torch.autograd.grad(loss.sum(), [student.output.weight, student.output.bias]), 1)


def variance(
    gradients: Tensor,  # (M, R, ...)
) -> Tensor:  # (R,)
    """The mean of |g - mean|^2 over M batches."""
    return (gradients - gradients.mean(0)).flatten(2).square().sum(-1).mean(0)


class Point(NamedTuple):
    """The measurements of each run at one moment, averaged over the two tasks."""

    variance: Tensor  # (R,) of the gradient the student is trained by
    same: Tensor  # (R,) of the gradient of that gamma, for the student of gamma = 0
    kl: Tensor  # (R,) KL(student || teacher) per step, on the student's own states
    distance: Tensor  # (R,) to the target, after the last step


def task_walks(
    policy: Policy,
    sign: float,
    noise: Sequence[int],  # (R,) seeds
    size: Size,
) -> list[Walk]:  # M of R runs
    signs, sources = torch.full((len(noise),), sign), stacked.generators(noise)
    return [walk(policy, signs, sources, size.batch, size.steps) for _ in range(size.batches)]


def gradient_variance(
    student: Policy,
    teacher: Policy,
    walks: Sequence[Walk],  # M of the student
    gammas: Sequence[float],
) -> Tensor:  # (R,)
    return variance(torch.stack([output_gradient(student, teacher, made, gammas) for made in walks]))


@torch.no_grad()
def nearness(
    student: Policy,
    teacher: Policy,
    walks: Sequence[Walk],  # M of the student
) -> tuple[Tensor, Tensor]:  # (R,) each
    """KL(student || teacher) per step, and the distance to the target after the last step."""
    inputs, left = torch.cat([made.inputs for made in walks], 1), torch.cat([made.left for made in walks], 1)
    kl = kl_divergence(student(inputs), teacher(inputs)).mean((1, 2))  # (R,)
    return kl, left[..., -1].mean(1)


def measure_point(
    student: Policy,
    teachers: Sequence[Policy],  # of each task
    gammas: Sequence[float],
    noise: Sequence[int],  # (R,) seeds
    size: Size,
) -> Point:
    seeds = len(noise) // len(gammas)
    first = pick(student, [*range(seeds)] * len(gammas))  # every run becomes its seed's student of gamma = 0
    found = []
    for teacher, sign in zip(teachers, TASKS.values()):
        walks, firsts = (task_walks(policy, sign, noise, size) for policy in (student, first))
        own = gradient_variance(student, teacher, walks, gammas)
        same = gradient_variance(first, teacher, firsts, gammas)
        found.append(Point(own, same, *nearness(student, teacher, walks)))
    return Point(*(torch.stack(values).mean(0) for values in zip(*found)))


def distil(
    size: Size,
    teachers: Policy,
    gammas: Sequence[float],
    rate: float,
    seeds: Sequence[int],
) -> tuple[Policy, Record]:
    """Trains a student for every gamma and seed."""
    sources = stacked.generators([*seeds] * len(gammas))  # (R,)
    student = Policy(sources)
    by_task = [pick(teachers, [*range(len(seeds) * i, len(seeds) * (i + 1))] * len(gammas)) for i in (0, 1)]
    optimizer = torch.optim.Adam(student.parameters(), lr=rate)
    every, when, points = math.ceil(size.iterations / size.points), [], []
    for i in bar(range(size.iterations + 1), f"students, lr {rate:g}"):
        if i % every == 0 or i == size.iterations:
            when.append(i)
            noise = [seed + 10**6 * (i + 1) for seed in seeds] * len(gammas)  # (R,)
            points.append(measure_point(student, by_task, gammas, noise, size))
        signs = torch.full((len(sources),), list(TASKS.values())[i % 2])  # (R,)
        made = walk(student, signs, sources, size.batch, size.steps)
        optimizer.zero_grad()
        distillation_loss(student(made.inputs), by_task[i % 2](made.inputs), made.moves, gammas).sum().backward()
        optimizer.step()
    curves = {name: torch.stack(values, -1) for name, values in zip(Point._fields, zip(*points))}  # (R, points) each
    by_gamma = {gamma: {name: x.chunk(len(gammas))[g] for name, x in curves.items()} for g, gamma in enumerate(gammas)}
    return student, {"iterations": when, "gammas": by_gamma}


def path(policy: Policy, runs: Sequence[int], size: Size) -> dict[str, list[float]]:
    """The mean position over time in each task, both ends included; `runs` are the run of each task."""
    found = {}
    for run, (task, sign) in zip(runs, TASKS.items()):
        made = walk(pick(policy, [run]), torch.tensor([sign]), stacked.generators([0]), size.batch, size.steps)
        found[task] = [START * sign, *(made.moves[0].mean(0).cumsum(0) + START * sign).tolist()]
    return found


def measure(size: Size, seeds: Sequence[int]) -> Record:
    teachers = train_teachers(size.teacher_iterations, size.batch, size.steps, seeds)
    signs = torch.tensor(list(TASKS.values())).repeat_interleave(len(seeds))  # (R,)
    made = walk(teachers, signs, stacked.generators([*seeds] * 2), size.batch * size.batches, size.steps)
    with torch.no_grad():
        std = teachers(made.inputs).stddev.mean((1, 2))  # (R,)
    rates = {}
    for rate in (RATE, *size.others):
        gammas = GAMMAS if rate == RATE else ENDS
        student, rates[rate] = distil(size, teachers, gammas, rate, seeds)
        firsts = {gamma: gammas.index(gamma) * len(seeds) for gamma in ENDS}
        rates[rate]["paths"] = {gamma: path(student, [run, run], size) for gamma, run in firsts.items()}
    return {
        "teacher": {
            "distance": made.left[..., -1].mean(1),  # of every left teacher, then of every right one
            "std": std,
            "path": path(teachers, [0, len(seeds)], size),
        },
        "rates": rates,
    }
