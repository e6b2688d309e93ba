"""On-policy distillation of R small transformers at once, on the walks of `task`: the runs of the study `method`."""

import copy
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from examples.paper.method.language_model import Shape, Transformer, respond, response_logits
from examples.paper.method.task import ENDS, PAD, STUDENT_END, TEACHER_END, VOCAB, is_right, pose, solve
from examples.paper.objectives import LOSSES
from examples.paper.stacked import clip_grads, generators
from examples.paper.study import bar
from topk_rkl.diagnostics import topk_diagnostics
from topk_rkl.loss import topk_reverse_kl
from topk_rkl.recipe.weighting import special_token_mask

WATCHED_K = 32  # whatever a run compares, so that masses can be compared
SAMPLERS = {"score": 1.0, "nucleus": 0.9, "greedy": 1e-9}  # top-p; a nucleus of 1e-9 holds the best token alone
CURVES = ("loss", "grad_norm", "full_kl", "entropy", "mass")


class Size(NamedTuple):
    """Models, problems and steps; the defaults take minutes on two cores."""

    moves: int = 5
    obstacles: int = 1
    teacher_width: int = 64
    student_width: int = 32
    teacher_steps: int = 1200
    student_steps: int = 400
    steps: int = 300  # of distillation
    batch: int = 32  # problems in a step, of each run
    held_back: int = 256  # problems, of each run
    points: int = 30  # of a curve


class Run(NamedTuple):
    """A loss, and the tokens that it sees."""

    loss: str
    k: int = 32
    top_p: float = 0.9  # of the student's rollouts
    mask: bool = True  # drops the first end tokens of a response


class Models(NamedTuple):
    teacher: Transformer
    student: Transformer


def optimizer(model: Transformer, rate: float) -> torch.optim.Optimizer:
    # A bias of keys has no gradient but rounding, which a smaller eps would blow up.
    return torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0, eps=1e-6)


def pretrained(name: str, width: int, end: int, steps: int, size: Size, seeds: Sequence[int]) -> Transformer:
    """Cross-entropy with the exact distribution of the next token among all right answers, along one right answer."""
    sources = generators(seeds)
    model = Transformer(Shape(VOCAB, size.obstacles + 2 + size.moves + 2, width, layers=1), sources)
    adam = optimizer(model, 1e-2)
    # The rate rises over 50 steps, and then falls in a line to a twentieth of its peak.
    decay = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: min((step + 1) / 50, 1.05 - step / steps))
    for _ in bar(range(steps), name):
        prompts = pose(size.batch, size.obstacles, sources)  # (R, B, P)
        ids, probs = solve(prompts, size.moves, end, sources)  # (R, B, T), (R, B, T, V)
        losses = -(probs * response_logits(model, prompts, ids).log_softmax(-1)).sum(-1)  # (R, B, T)
        losses.mean((1, 2)).sum().backward()
        clip_grads(model.parameters(), 1.0)
        adam.step()
        adam.zero_grad()
        decay.step()
    return model


def base(size: Size, seeds: Sequence[int]) -> Models:
    """A good teacher and a smaller student, taught less and with an end token of its own."""
    teacher = pretrained("teacher", size.teacher_width, TEACHER_END, size.teacher_steps, size, seeds)
    others = [seed + 1000 for seed in seeds]
    student = pretrained("student", size.student_width, STUDENT_END, size.student_steps, size, others)
    return Models(teacher.requires_grad_(False), student)


def until_end(
    responses: Tensor,  # (R, B, T)
) -> Tensor:  # (R, B, T) bool
    """The tokens of the responses, with the one that ends each."""
    ended = torch.isin(responses, torch.tensor(ENDS)).int()  # (R, B, T)
    return ended.cumsum(-1) == ended


def per_run_mean(
    kept: Tensor,  # (R, B, T) bool
) -> Tensor:  # (R, B, T)
    """The weights that make a sum over a run's tokens the mean over those kept, and 0 where none is."""
    return kept / kept.sum((1, 2), keepdim=True).clamp_min(1)


def shared_tokens(
    responses: Tensor,  # (R, B, T)
) -> Tensor:  # (R, B, T) bool
    """The tokens but for the end tokens, which teacher and student spell differently."""
    return until_end(responses) & special_token_mask(responses, ENDS)


@torch.no_grad()
def watch(
    z: Tensor,  # (R, B, T, V) of the student
    w: Tensor,  # (R, B, T, V) of the teacher
    responses: Tensor,  # (R, B, T)
) -> dict[str, Tensor]:  # (R,) each
    """Entropy, mass on the teacher's top tokens and full reverse KL: means over the tokens that both spell alike."""
    weights = per_run_mean(shared_tokens(responses))  # (R, B, T)
    found = topk_diagnostics(z, w, ["student_entropy", "student_mass"], k=WATCHED_K)
    per_token = {"entropy": found["student_entropy"], "mass": found["student_mass"]}
    per_token["full_kl"] = topk_reverse_kl(z.detach(), w, k=VOCAB, reduction="none")
    return {name: (values * weights).sum((1, 2)) for name, values in per_token.items()}


def step(
    models: Models, adam: torch.optim.Optimizer, run: Run, size: Size, sources: Sequence[torch.Generator], log: bool
) -> dict[str, Tensor]:  # (R,) each
    """Rollouts of the student, the teacher's word on them, a loss, and a step of the optimiser."""
    teacher, student = models
    prompts = pose(size.batch, size.obstacles, sources)  # (R, B, P)
    y = respond(student, prompts, size.moves + 2, ENDS, PAD, run.top_p, sources)  # (R, B, T)
    z, w = response_logits(student, prompts, y), response_logits(teacher, prompts, y)  # (R, B, T, V)
    weights = per_run_mean(shared_tokens(y) if run.mask else until_end(y))  # (R, B, T)
    losses = LOSSES[run.loss](z, w, y, run.k, weights).sum((1, 2))  # (R,)
    losses.sum().backward()
    norms = clip_grads(student.parameters(), 1.0)  # (R,)
    adam.step()
    adam.zero_grad()
    return {"loss": losses.detach(), "grad_norm": norms} | (watch(z, w, y) if log else {})


def distil(models: Models, run: Run, rate: float, size: Size, seeds: Sequence[int]) -> tuple[Transformer, dict]:
    """A trained copy of the student, and what was seen on the way."""
    models = Models(models.teacher, copy.deepcopy(models.student))
    adam, sources = optimizer(models.student, rate), generators([seed + 2000 for seed in seeds])
    decay = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: 1 - step / size.steps)
    every, curves, norms, seconds = max(size.steps // size.points, 1), {"step": []}, [], []
    for number in range(size.steps):
        started, log = time.perf_counter(), number % every == 0
        seen = step(models, adam, run, size, sources, log)
        decay.step()
        norms.append(seen["grad_norm"])
        if log:
            curves["step"].append(number)
            for name in CURVES:
                curves.setdefault(name, []).append(seen[name].mean().item())
        seconds.append(time.perf_counter() - started)
    late = torch.stack(norms[len(norms) // 2 :])  # (steps / 2, R)
    norm = late.mean(0)  # (R,)
    spread = (late.std(0) / norm.clamp_min(1e-12)).tolist()
    fast = sorted(seconds)[len(seconds) // 10]  # a busy machine slows the others
    history = {"curves": curves, "late_norm": norm.tolist(), "grad_spread": spread, "step_seconds": fast}
    return models.student, history


@torch.no_grad()
def judge(
    model: Transformer, teacher: Transformer, size: Size, seeds: Sequence[int]
) -> dict[str, list[float]]:  # a number per run
    """The share of held-back problems that are answered right, by each sampler; what is watched, on plain samples."""
    found: dict[str, list[float]] = {}
    prompts = pose(size.held_back, size.obstacles, generators([seed + 3000 for seed in seeds]))  # (R, B, P)
    for name, top_p in SAMPLERS.items():
        sources = generators([seed + 4000 for seed in seeds])
        responses = respond(model, prompts, size.moves + 2, ENDS, PAD, top_p, sources)  # (R, B, T)
        found[name] = is_right(prompts, responses, size.moves).float().mean(1).tolist()
        if name == "score":
            both = response_logits(model, prompts, responses), response_logits(teacher, prompts, responses)
            found |= {key: values.tolist() for key, values in watch(*both, responses).items()}
    return found
