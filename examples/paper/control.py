"""The controlled study of appendix E: how far a reward reaches back decides the variance of the gradient.

A student learns from the teachers of both tasks in turn, on its own walks, by equation 3: the log-ratio of step t' is a
reward of every step t <= t', times gamma^(t' - t). Students of one seed differ in gamma alone; they start from the same
weights and see the same noise. The variance is that of the output layer's gradient, over M batches.

The learning rate of the paper is not known. RATE was set beforehand. Others are tried at the two ends of gamma. Each
has a verdict of its own.
"""

import itertools
import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from examples.paper import stacked
from examples.paper.study import PAPER, Claim, Record, Rows, bar
from examples.paper.walkers import START, TASKS, Policy, Walk, pick, train_teachers, walk
from topk_rkl.recipe.rewards import log_ratio, return_to_go

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SEEDS = (42, 43, 2026)
GAMMAS = (0.0, 0.25, 0.5, 0.75, 1.0)
ENDS = (0.0, 1.0)  # the gammas at the other rates
RATE = 1e-3  # of Adam
LATE = 0.25  # the last part of training, where students are judged
DRIFT = 2.0  # a student whose KL is this many times that of another has drifted
ORDER = 10.0


class Size(NamedTuple):
    iterations: int = 2000
    teacher_iterations: int = 500
    points: int = 20  # measurements during training
    steps: int = 20  # T
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


def measure_task(
    student: Policy,
    teacher: Policy,
    sign: float,
    gammas: Sequence[float],
    noise: Sequence[int],  # (R,) seeds
    size: Size,
) -> tuple[Tensor, Tensor, Tensor]:  # (R,) each: variance, KL and distance
    signs, sources = torch.full((len(noise),), sign), stacked.generators(noise)
    walks = [walk(student, signs, sources, size.batch, size.steps) for _ in range(size.batches)]
    gradients = torch.stack([output_gradient(student, teacher, made, gammas) for made in walks])  # (M, R, ...)
    inputs, left = torch.cat([made.inputs for made in walks], 1), torch.cat([made.left for made in walks], 1)
    with torch.no_grad():
        kl = kl_divergence(student(inputs), teacher(inputs)).mean((1, 2))  # (R,)
    return variance(gradients), kl, left[..., -1].mean(1)


def measure_point(
    student: Policy,
    teachers: Sequence[Policy],  # of each task
    gammas: Sequence[float],
    noise: Sequence[int],  # (R,) seeds
    size: Size,
) -> Point:
    first = pick(student, [*range(len(noise) // len(gammas))] * len(gammas))
    found = []
    for teacher, sign in zip(teachers, TASKS.values()):
        own, kl, distance = measure_task(student, teacher, sign, gammas, noise, size)
        same, _, _ = measure_task(first, teacher, sign, gammas, noise, size)
        found.append(Point(own, same, kl, distance))
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
    by_gamma = {
        gamma: {name: [rounded(run) for run in x.chunk(len(gammas))[g]] for name, x in curves.items()}
        for g, gamma in enumerate(gammas)
    }
    return student, {"iterations": when, "gammas": by_gamma}


def path(policy: Policy, runs: Sequence[int], size: Size) -> dict[str, list[float]]:
    """The mean position over time in each task, both ends included; `runs` are the run of each task."""
    found = {}
    for run, (task, sign) in zip(runs, TASKS.items()):
        made = walk(pick(policy, [run]), torch.tensor([sign]), stacked.generators([0]), size.batch, size.steps)
        found[task] = [START * sign, *rounded(made.moves[0].mean(0).cumsum(0) + START * sign)]
    return found


def rounded(
    values: Tensor,  # (n,)
) -> list[float]:
    return [float(f"{x:.5g}") for x in values.tolist()]


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
            "distance": rounded(made.left[..., -1].mean(1)),  # of every left teacher, then of every right one
            "std": rounded(std),
            "path": path(teachers, [0, len(seeds)], size),
        },
        "rates": rates,
    }


def curves(record: Record, gamma: float, name: str, rate: float = RATE) -> list[list[float]]:
    """Over the measurements, for each seed."""
    found: list[list[float]] = record["rates"][str(rate)]["gammas"][str(gamma)][name]
    return found


def late(record: Record, gamma: float, name: str, rate: float = RATE) -> list[float]:
    """The mean over the last part of training, for each seed."""
    runs = curves(record, gamma, name, rate)
    return [statistics.fmean(run[-math.ceil(LATE * len(run)) :]) for run in runs]


def ratios(record: Record, gamma: float, name: str, rate: float = RATE) -> list[float]:
    """Variance over that of gamma = 0 at the same moment, the median over training, for each seed."""
    pairs = zip(curves(record, gamma, name, rate), curves(record, 0.0, name, rate))
    return [statistics.median(x / zero for x, zero in zip(*pair)) for pair in pairs]


def at_start(record: Record, gamma: float) -> list[float]:
    """The same for the untrained students, which do not depend on gamma."""
    pairs = zip(curves(record, gamma, "same"), curves(record, 0.0, "same"))
    return [one[0] / zero[0] for one, zero in pairs]


def rise(record: Record, gamma: float, rate: float) -> list[float]:
    """The late KL over the lowest one, for each seed."""
    runs = curves(record, gamma, "kl", rate)
    return [end / min(run) for end, run in zip(late(record, gamma, "kl", rate), runs)]


def excess(record: Record, rate: float) -> list[float]:
    """The late KL at gamma = 1 over that at gamma = 0, for each seed."""
    return [one / zero for one, zero in zip(*(late(record, gamma, "kl", rate) for gamma in (1.0, 0.0)))]


def reach(values: Sequence[float], form: str = ".3g") -> str:
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def tables(record: Record) -> dict[str, Rows]:
    noisy = [["gamma", "variance", "over gamma 0", "over gamma 0, the same students", "over gamma 0, untrained"]]
    for gamma in GAMMAS:
        typical = statistics.median(x for run in curves(record, gamma, "variance") for x in run)
        found = (ratios(record, gamma, "variance"), ratios(record, gamma, "same"), at_start(record, gamma))
        noisy.append([f"{gamma:g}", f"{typical:.3g}", *map(reach, found)])
    students = [["learning rate", "gamma", "late KL per step", "late / lowest KL", "late distance to the target"]]
    for rate in map(float, record["rates"]):
        for gamma in map(float, record["rates"][str(rate)]["gammas"]):
            found = (late(record, gamma, "kl", rate), rise(record, gamma, rate), late(record, gamma, "distance", rate))
            students.append([f"{rate:g}", f"{gamma:g}", *map(reach, found)])
    seeds, teacher = len(record["seeds"]), record["teacher"]
    taught = [["teacher", "distance to the target", "std of a move"]]
    for i, task in enumerate(TASKS):
        taught.append([task, *(reach(teacher[x][i * seeds : (i + 1) * seeds]) for x in ("distance", "std"))])
    return {"variance": noisy, "students": students, "teachers": taught}


def claims(record: Record) -> list[Claim]:
    rates = [float(rate) for rate in record["rates"]]
    return [ordered(record), *(magnitude(record, rate) for rate in rates), *(drifts(record, rate) for rate in rates)]


def ordered(record: Record) -> Claim:
    seeds = list(zip(*(ratios(record, gamma, "variance") for gamma in GAMMAS)))
    rising = sum(all(low < high for low, high in itertools.pairwise(run)) for run in seeds)
    medians = ", ".join(f"{statistics.median(ratios(record, gamma, 'variance')):.3g}" for gamma in GAMMAS)
    return Claim(
        f"{PAPER}, appendix E",
        "A larger gamma has a larger gradient variance.",
        f"rising with every gamma in {rising} of {len(seeds)} seeds; variance over that of gamma 0: {medians}",
        rising == len(seeds),
    )


def magnitude(record: Record, rate: float) -> Claim:
    found = ratios(record, 1.0, "variance", rate)
    return Claim(
        f"{PAPER}, appendix E",
        f"The variance at gamma = 1 is one to several orders of magnitude above gamma = 0. Learning rate {rate:g}.",
        f"{reach(found)} times, {math.log10(statistics.median(found)):.1f} orders; for the untrained students "
        f"{reach(at_start(record, 1.0))} times",
        statistics.median(found) >= ORDER,
    )


def drifts(record: Record, rate: float) -> Claim:
    """Judged by the KL; the distance to the target is also that of the teachers."""
    found = excess(record, rate)
    drifted = sum(x >= DRIFT for x in found)
    zero, one = (reach(late(record, gamma, "distance", rate)) for gamma in ENDS)
    return Claim(
        f"{PAPER}, appendix E",
        f"Students of gamma = 1 drift from their teachers, measured by those of gamma = 0. Learning rate {rate:g}.",
        f"the late KL is {reach(found)} times that at gamma 0, at least {DRIFT:g} times in {drifted} of {len(found)} "
        f"seeds; late distance to the target {one}, at gamma 0 {zero}",
        drifted == len(found),
    )


def draw(record: Record) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    colours = dict(zip(GAMMAS, ("tab:blue", "tab:cyan", "tab:green", "tab:orange", "tab:red")))
    for positions in record["teacher"]["path"].values():
        right.plot(positions, color="0.75", linewidth=6)
    for rate, style in zip(map(float, record["rates"]), ("-", "--", ":")):
        found = record["rates"][str(rate)]
        for gamma in map(float, found["gammas"]):
            for axes, name in ((left, "variance"), (middle, "kl")):
                medians = [statistics.median(values) for values in zip(*curves(record, gamma, name, rate))]
                label = f"gamma {gamma:g}" if rate == RATE else None
                axes.plot(found["iterations"], medians, style, color=colours[gamma], label=label)
        for gamma, tasks in found["paths"].items():
            for task, positions in tasks.items():
                label = f"lr {rate:g}" if gamma == "0.0" and task == "left" else None
                right.plot(positions, style, color=colours[float(gamma)], label=label)
    left.set(yscale="log", xlabel="iteration", ylabel="E|g - mean|^2, output layer", title="variance, median of seeds")
    middle.set(
        yscale="log", xlabel="iteration", ylabel="nats per step", title="KL(student || teacher), median of seeds"
    )
    right.set(xlabel="time (steps)", ylabel="mean position", ylim=(-6, 6))
    right.set_title(f"both tasks, seed {record['seeds'][0]} (grey: teachers)")
    right.legend(fontsize=8)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=len(GAMMAS))
    return figure
