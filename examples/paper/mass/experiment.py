"""Where the student's probability goes: inside S, the teacher's K best tokens, or outside, where no loss may look.

Free logits: what each form converges to, beside its closed form.
A linear-softmax student with fewer features than the teacher's logits have ranks: its mass outside S, its entropy and
its full reverse KL over thousands of steps, by the form of the loss.
Settings: what makes the renormalised loss leak, and whether a tail class stops the leak there.
The gradients of one position: their variance over contexts and sampled tokens, by enumeration.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from examples.paper.mass.linear_softmax import Language, drawn, language, shares
from examples.paper.stacked import generators
from examples.paper.study import Record, bar
from examples.paper.summary import rounded
from topk_rkl.diagnostics import topk_diagnostics
from topk_rkl.loss import Support, teacher_topk, topk_divergence
from topk_rkl.recipe.builders import teacher_top_p
from topk_rkl.recipe.rollout import sampled_token_loss

SEEDS = (0, 1, 2, 3, 4)
MASSES = ("renormalized", "tail", "raw_stop_grad", "raw")
CURVES = ("student_mass", "teacher_mass", "student_entropy", "full")  # what is recorded over the steps
EARLY = 100  # steps within which a collapse is rapid
Loss = Callable[..., Tensor]  # (logits, reduction="sum", weights=...)


class Size(NamedTuple):
    vocab: int = 128
    k: int = 8
    rank: int = 64  # of the teacher's logits
    length: int = 16  # positions of an answer
    pretraining: int = 1500
    lr: float = 0.01
    steps: int = 8000
    short: int = 1500  # steps of each setting
    free_steps: int = 2000
    contexts: int = 16  # of free logits


class Setting(NamedTuple):
    """The defaults are those of the long runs."""

    capacity: float | None = 3 / 8  # the student's features over the rank of the teacher's logits; None: free logits
    noise: float = 1.0  # on the logits that the student has learnt
    wider: int = 1  # K over that of the size
    top_p: float = 1.0  # S is the teacher's nucleus, of at most K tokens
    sgd: bool = False  # Adam otherwise
    rate: float = 1.0  # times the learning rate of the size
    decay: float = 0.0  # of the weights, decoupled
    batch: int = 0  # contexts drawn in a step; 0 is the exact mean
    on_policy: bool = True  # otherwise every context has the same weight


FULL = Size(steps=100_000, short=20_000, free_steps=20_000)
SETTINGS = {
    "as above": Setting(),
    "no noise: learnt from the teacher": Setting(noise=0.0),
    "every context alike": Setting(on_policy=False),
    "a tenth of the learning rate": Setting(rate=0.1),
    "gradient descent": Setting(sgd=True, rate=300.0),
    "batches of 8 contexts": Setting(batch=8),
    "weight decay 0.01": Setting(decay=0.01),
    "4 K tokens in S": Setting(wider=4),
    "S = top-p 0.95, at most 4 K": Setting(wider=4, top_p=0.95),
    "half as many features": Setting(capacity=3 / 16),
    "as many features as ranks": Setting(capacity=1.0),
    "free logits": Setting(capacity=None),
}


def measure(size: Size, seeds: Sequence[int]) -> Record:
    seeds = tuple(seeds)
    task = of_setting(Setting(), size, seeds)
    before = watched(task.head, task, support(Setting(), task, size), size)
    record = {"start": {name: rounded(x) for name, x in before.items()}, "teacher": of_teacher(task, size)}
    record |= {"identity": plus_one(task, size), "position": one_position(task, size), "free": free_logits(size, seeds)}
    forms = bar((*MASSES, "blend", "full"), "mass: forms")
    record["runs"] = {form: distilled(form, Setting(), size, marks(size.steps), seeds) for form in forms}
    pairs = [(name, form) for name in SETTINGS for form in ("renormalized", "tail")]
    record["settings"] = {name: {} for name in SETTINGS}
    for name, form in bar(pairs, "mass: settings"):
        found = distilled(form, SETTINGS[name], size, [0, size.short], seeds)
        record["settings"][name] |= {"start": found["start"], form: found["end"]}
    return record


def of_setting(setting: Setting, size: Size, seeds: tuple[int, ...]) -> Language:
    features = None if setting.capacity is None else round(setting.capacity * size.rank)
    return language(size.vocab, size.rank, features, setting.noise, size.pretraining, seeds)


def support(setting: Setting, task: Language, size: Size) -> Support:
    return teacher_top_p(task.teacher, setting.top_p, setting.wider * size.k, normalize=True)


def loss_of(form: str, task: Language, chosen: Support) -> Loss:
    """The form named, as a function of the logits, (R, V, V)."""
    if form == "full":
        return partial(topk_divergence, teacher=teacher_topk(task.teacher, task.teacher.shape[-1], normalize=True))
    if form != "blend":
        return partial(topk_divergence, teacher=chosen, mass=form)
    parts = [(0.9, loss_of("renormalized", task, chosen)), (0.1, loss_of("tail", task, chosen))]
    return lambda logits, **options: sum(factor * part(logits, **options) for factor, part in parts)


def marks(steps: int) -> list[int]:
    """The steps that are looked at: EARLY, every one at first, and as many in each factor of ten."""
    return sorted({0, min(EARLY, steps), *(round(steps ** (i / 60)) for i in range(61))})


def distilled(form: str, setting: Setting, size: Size, where: list[int], seeds: tuple[int, ...]) -> Record:
    """What is watched after each of the numbers of steps in `where`, for each seed."""
    task = of_setting(setting, size, seeds)
    chosen = support(setting, task, size)
    heads = trained(loss_of(form, task, chosen), setting, task, size, generators(seeds))
    seen = [watched(head, task, chosen, size) for step, head in zip(range(where[-1] + 1), heads) if step in where]
    curves = {name: rounded(torch.stack([x[name] for x in seen], 1)) for name in CURVES}  # (R, marks) each
    start, end = ({name: rounded(x) for name, x in seen[i].items()} for i in (0, -1))
    return {"steps": where, "curves": curves, "start": start, "end": end}


def trained(
    loss: Loss, setting: Setting, task: Language, size: Size, sources: Sequence[torch.Generator]
) -> Iterator[Tensor]:  # (R, H, V) each
    """The student's head before each step."""
    head = task.head.clone().requires_grad_()
    kind = torch.optim.SGD if setting.sgd else torch.optim.AdamW
    optimizer = kind([head], lr=setting.rate * size.lr, weight_decay=setting.decay)
    while True:
        yield head.detach()
        logits = task.features @ head  # (R, V, V)
        weights = shares(logits if setting.on_policy else torch.zeros_like(logits), size.length)  # (R, V)
        if setting.batch:
            weights = drawn(weights, setting.batch, sources)
        optimizer.zero_grad()
        loss(logits, weights=weights, reduction="sum").backward()
        optimizer.step()


@torch.no_grad()
def watched(
    head: Tensor,  # (R, H, V)
    task: Language,
    chosen: Support,
    size: Size,
) -> dict[str, Tensor]:  # (R,) each
    """Means over the positions of the student's own answers, and the worst context."""
    logits = task.features @ head  # (R, V, V)
    names = ["student_mass", "teacher_mass", "student_entropy", "top1_agreement"]
    found = topk_diagnostics(logits, chosen, names)  # (R, V) each
    found["full"] = loss_of("full", task, chosen)(logits, reduction="none")
    found["renormalized"] = topk_divergence(logits, chosen, reduction="none")
    weights = shares(logits, size.length)  # (R, V)
    means = {name: (weights * x).sum(-1) for name, x in found.items()}
    return means | {"worst": found["student_mass"].amin(-1)}


def of_teacher(task: Language, size: Size) -> Record:
    """The teacher on its own answers."""
    best = teacher_topk(task.teacher, size.k, normalize=True)
    found = topk_diagnostics(task.teacher, best, ["student_mass", "student_entropy"])  # (R, V) each
    weights = shares(task.teacher, size.length)  # (R, V)
    return {name: rounded((weights * x).sum(-1)) for name, x in found.items()}


def plus_one(task: Language, size: Size) -> Record:
    """The gradient of "raw" less that of "raw_stop_grad", beside the gradient of the student's mass on S."""
    chosen = teacher_topk(task.teacher.double(), size.k, normalize=True)

    def gradient(mass: str, logits: Tensor) -> Tensor:  # (R, V, V)
        z = logits.detach().clone().requires_grad_()
        inside = z.softmax(-1).gather(-1, chosen.ids.long()).sum()
        (inside if mass == "P" else topk_divergence(z, chosen, mass=mass, reduction="sum")).backward()
        return z.grad

    student, teacher = (task.features @ task.head).double(), task.teacher.double()
    left = gradient("raw", student) - gradient("raw_stop_grad", student)
    largest = {f"{mass} at the teacher": gradient(mass, teacher).abs().amax() for mass in MASSES}
    return {
        "difference": float((left - gradient("P", student)).abs().amax()),
        "P": float(gradient("P", student).abs().amax()),
        **{name: float(value) for name, value in largest.items()},
    }


def one_position(task: Language, size: Size) -> Record:
    """One position and its token, drawn from the student's own answers: moments of its loss and its gradient."""
    logits = task.features @ task.head  # (R, V, V)
    contexts, each = shares(logits, size.length), logits.softmax(-1).permute(2, 0, 1)  # (R, V), (V, R, V)
    alone = task._replace(teacher=task.teacher[None])  # (1, R, V, V): a loss that no sampled token changes
    best = teacher_topk(alone.teacher, size.k, normalize=True)  # (1, R, V, K)
    ids = torch.arange(size.vocab)[:, None, None].expand_as(each)  # (V, R, V), all V tokens at every context: not drawn
    every_teacher = task.teacher.expand(size.vocab, -1, -1, -1)  # (V, R, V, V)
    sampled = partial(sampled_token_loss, teacher_logits=every_teacher, ids=ids)
    record = {"sampled": moments(sampled, logits.expand_as(every_teacher), task, contexts * each)}
    for form in ("full", *MASSES):
        record[form] = moments(loss_of(form, alone, best), logits[None], task, contexts[None])
    return record


def moments(
    loss: Callable[..., Tensor],
    logits: Tensor,  # (Y, R, V, V), of each token and context; Y is 1 where no token is sampled
    task: Language,
    probable: Tensor,  # (Y, R, V), of sum 1 over tokens and contexts
) -> dict[str, dict[str, list[float]]]:
    """The variance and the squared mean of the loss, and those of its gradient for the head."""
    z = logits.clone().requires_grad_()  # (Y, R, V, V)
    value = loss(z, reduction="none")  # (Y, R, V)
    value.sum().backward()
    squares = z.grad.square().sum(-1) * task.features.square().sum(-1)  # (Y, R, V)
    mean = task.features.mT @ (probable[..., None] * z.grad).sum(0)  # (R, H, V)
    return {
        "loss": about(value.detach().square(), (probable * value.detach()).sum((0, 2)).square(), probable),
        "gradient": about(squares, mean.square().sum((1, 2)), probable),
    }


def about(
    squares: Tensor,  # (Y, R, V)
    of_mean: Tensor,  # (R,) the square of the mean
    probable: Tensor,  # (Y, R, V)
) -> dict[str, list[float]]:
    return {"variance": rounded((probable * squares).sum((0, 2)) - of_mean), "squared mean": rounded(of_mean)}


def free_logits(size: Size, seeds: tuple[int, ...]) -> Record:
    """Gradient descent on the logits themselves, and the mass on S that each form converges to."""
    task = of_setting(Setting(capacity=None), size, seeds)
    teacher, start = (x[:, : size.contexts].double() for x in (task.teacher, task.head))  # (R, C, V) each
    best = teacher_topk(teacher, size.k, normalize=True)  # (R, C, K)
    found, expected = {}, limits(start, best)
    for mass in bar(MASSES, "mass: free logits"):
        z = start.clone().requires_grad_()  # (R, C, V)
        optimizer = torch.optim.SGD([z], lr=4.0)
        for _ in range(size.free_steps):
            optimizer.zero_grad()
            topk_divergence(z, best, mass=mass, reduction="sum").backward()
            optimizer.step()
        inside = topk_diagnostics(z, best, ["student_mass"])["student_mass"]  # (R, C)
        slots, moved = best.ids.long(), (z - start).detach()  # (R, C, K), (R, C, V)
        found[mass] = {
            "mass": rounded(inside.mean(-1)),
            "expected": rounded(expected[mass].mean(-1)),
            "error": float((inside - expected[mass]).abs().amax()),
            "outside moved": float(moved.scatter(-1, slots, 0.0).abs().amax()),
            "sum over S moved": float(moved.gather(-1, slots).sum(-1).abs().amax()),
        }
    teachers, first = best.log_probs.exp().sum(-1), topk_diagnostics(start, best, ["student_mass"])["student_mass"]
    return {"teacher": rounded(teachers.mean(-1)), "start": rounded(first.mean(-1)), "forms": found}


def limits(
    start: Tensor,  # (R, C, V)
    best: Support,  # (R, C, K)
) -> dict[str, Tensor]:  # (R, C) each
    """The student's mass on S at the end of gradient descent on free logits.

    The renormalised gradient is 0 outside S, and its sum over S is 0. Logits of S end at log q + a constant, which
    keeps their sum. "raw" is P (loss + log P - log Q), least where P = Q / e. The others are least where P = Q.
    """
    slots = best.ids.long()  # (R, C, K)
    constant = (start.gather(-1, slots) - best.log_probs).mean(-1)  # (R, C)
    teachers = best.log_probs.logsumexp(-1)  # (R, C), log Q
    outside = start.scatter(-1, slots, -torch.inf).logsumexp(-1)  # (R, C)
    kept, whole = (constant + teachers - outside).sigmoid(), teachers.exp()  # (R, C) each
    return {"renormalized": kept, "tail": whole, "raw_stop_grad": whole, "raw": whole / torch.e}
