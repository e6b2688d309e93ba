"""The objectives on a real language model: SmolLM2-135M-Instruct teaches itself without some of its middle layers.

Two tasks: short questions whose answers a program checks, and open questions. A run is one objective and one seed: the
student answers a few prompts, the teacher reads the answers, AdamW takes a step. All runs start from the same student.
Runs of one seed see the same prompts in the same order. Only the layers beside the cut learn, so that no gradient
is needed below them: they have to make up for the layers that went.
"""

import copy
import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from examples.paper.smollm2 import questions
from examples.paper.smollm2.loss_cost import Clock, loss_cost, peak_mib, reset_peak
from examples.paper.smollm2.objectives import OBJECTIVES, Objective
from examples.paper.study import Record, bar
from topk_rkl.diagnostics import topk_diagnostics

if TYPE_CHECKING:
    from examples.smollm2 import Rollout, Tokenizer

SEEDS = (0, 1, 2, 3, 4)
POINTS = 8  # at most, of a run's curve in the record
CURVES = ("loss", "full", "student_mass", "student_entropy", "norm")


class Size(NamedTuple):
    kept: int = 26  # layers of the student, of the teacher's 30
    trained: int = 6  # layers beside the cut
    k: int = 32
    objectives: tuple[str, ...] = ("sampled", "top-K", "top-K + top-p")
    questions: tuple[int, int, int] = (8, 8, 10)  # steps, prompts in a step, most tokens in an answer
    asked: int = 16  # held-back questions
    text: tuple[int, int, int] = (6, 8, 24)
    text_asked: int = 8  # held-back open prompts
    text_seeds: int = 1
    positions: int = 256  # of the loss alone
    vocab: int = 49152
    repeats: int = 7


FULL = Size(
    objectives=("sampled", "sampled + mask", "top-K", "top-K + top-p", "V2", "V3", "V4", "V5", "raw"),
    questions=(24, 8, 10),
    asked=24,
    text=(12, 8, 32),
    text_seeds=5,
    repeats=25,
)


class Task(NamedTuple):
    prompts: list[str]
    held_back: list[str]
    steps: int
    batch: int
    length: int
    top_p: float  # of the answers that are judged
    right: Callable[[int, str], bool] | None  # whether a text answers held-back prompt i


class Lab(NamedTuple):
    """What all runs share."""

    teacher: nn.Module
    tokenizer: "Tokenizer"
    student: nn.Module
    learning: nn.ModuleList  # the layers of the student that learn
    untrained: dict[str, Tensor]  # their weights before
    k: int


def measure(size: Size, seeds: Sequence[int]) -> Record:
    from examples.smollm2 import load_teacher

    return measured(*load_teacher(), size, seeds)


def measured(teacher: nn.Module, tokenizer: "Tokenizer", size: Size, seeds: Sequence[int]) -> Record:
    record = {"loss_cost": loss_cost(size.positions, size.vocab, size.k, size.repeats)}
    lab = laboratory(teacher, tokenizer, size)
    for name, task in tasks(size).items():
        fixed = answers(lab, lab.teacher, task)
        logits = speak(lab.teacher, fixed)  # (n, V), once for all runs
        own_seeds = list(seeds[: size.text_seeds] if name == "text" else seeds)
        wanted = list(itertools.product(own_seeds, size.objectives))  # runs of one seed follow one another
        runs: list[Record] = []
        for seed, objective in bar(wanted, f"smollm2, {name}"):
            lab.learning.load_state_dict(lab.untrained)
            run = train(lab, task, OBJECTIVES[objective], seed)
            runs.append({"objective": objective, "seed": seed, **run, "after": judge(lab, task, fixed, logits)})
        lab.learning.load_state_dict(lab.untrained)
        before = judge(lab, task, fixed, logits)
        record[name] = {"seeds": own_seeds, "asked": len(task.held_back), "trained_on": len(task.prompts)}
        record[name] |= {"before": before, "teacher": score(lab, task, fixed), "runs": runs}
    return record


def laboratory(teacher: nn.Module, tokenizer: "Tokenizer", size: Size) -> Lab:
    from examples.smollm2 import without_layers

    student = without_layers(teacher, size.kept).requires_grad_(False)
    first = (size.kept + 1) // 2 - size.trained // 2
    learning = nn.ModuleList(student.model.layers[first : first + size.trained]).requires_grad_(True)
    return Lab(teacher, tokenizer, student, learning, copy.deepcopy(learning.state_dict()), size.k)


def tasks(size: Size) -> dict[str, Task]:
    from examples.smollm2 import GREEDY, PROMPTS, read_prompts

    train, asked = questions.split(size.asked)
    text = read_prompts(PROMPTS)
    return {
        "questions": Task(
            [x.prompt for x in train], [x.prompt for x in asked], *size.questions, GREEDY,
            lambda i, answer: questions.right(asked[i], answer),
        ),
        "text": Task(text["train"], text["held back"][: size.text_asked], *size.text, 1.0, None),
    }  # fmt: skip


def train(lab: Lab, task: Task, objective: Objective, seed: int) -> Record:
    """On-policy steps: the values of every step before its update, and the median seconds of a step's parts."""
    from examples.smollm2 import rollout

    order, sampling = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(lab.learning.parameters(), lr=objective.lr, weight_decay=0.0)
    steps, clocks = [], []
    every = -(-task.steps // POINTS)
    resettable = reset_peak()
    for prompts in itertools.islice(batches(task, order), task.steps):
        clocks.append(clock := Clock())
        sample = rollout(lab.student, lab.tokenizer, prompts, task.length, objective.top_p, sampling)
        clock("rollout")
        steps.append(step(lab, objective, optimizer, sample, clock))
    parts = {part: statistics.median(clock.seconds[part] for clock in clocks) for part in clocks[0].seconds}
    curves = {name: [values[name] for values in steps[::every]] for name in CURVES}
    peak = peak_mib() if resettable else None
    return {"steps": list(range(0, task.steps, every)), "curves": curves, "seconds": parts, "peak_mib": peak}


def batches(task: Task, order: torch.Generator) -> Iterator[list[str]]:
    """The prompts in random orders one after another, `batch` at a time."""
    endless = (i for _ in itertools.count() for i in torch.randperm(len(task.prompts), generator=order).tolist())
    while True:
        yield [task.prompts[i] for i in itertools.islice(endless, task.batch)]


def step(
    lab: Lab, objective: Objective, optimizer: torch.optim.Optimizer, sample: "Rollout", clock: Clock
) -> dict[str, float]:
    """One update by the answers of `sample`; what the losses and the diagnostics were before."""
    from examples.smollm2 import full_reverse_kl

    y, weights = counted(lab, sample, objective.masked)  # (n,), (n,)
    with torch.no_grad():
        w = speak(lab.teacher, sample)  # (n, V)
    clock("teacher")
    logits = speak(lab.student, sample)  # (n, V)
    clock("student forward")
    z = logits.detach().requires_grad_()  # (n, V) a leaf, so that the loss has a backward pass of its own to time
    loss = objective.loss(z, w, y, lab.k, weights).sum() / weights.sum()  # ()
    loss.backward()
    clock("loss, both passes")
    logits.backward(z.grad)
    clock("student backward")
    norm = nn.utils.clip_grad_norm_(lab.learning.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    clock("AdamW")
    watch = topk_diagnostics(z, w, ["student_mass", "student_entropy"], k=lab.k)  # (n,) each
    means = {name: value.mean().item() for name, value in watch.items()}
    return {"loss": loss.item(), "full": full_reverse_kl(z.detach(), w).mean().item(), "norm": norm.item(), **means}


def counted(lab: Lab, sample: "Rollout", masked: bool) -> tuple[Tensor, Tensor]:  # (n,), (n,)
    """The ids of the answers' n tokens, and which of them the loss counts."""
    from examples.smollm2 import response, response_weights

    ids, real = response(sample)  # (B, T), (B, T)
    _, unmasked = response_weights(lab.tokenizer, sample)  # (B, T)
    y, weights = ids[real], unmasked[real]  # (n,), (n,)
    return y, weights if masked else torch.ones_like(weights)


def speak(model: nn.Module, sample: "Rollout") -> Tensor:  # (n, V)
    """What the model says at the answers' n tokens."""
    from examples.smollm2 import response, response_logits

    _, real = response(sample)  # (B, T)
    return response_logits(model, sample)[real]


def answers(lab: Lab, model: nn.Module, task: Task) -> "Rollout":
    """Answers to the held-back prompts, from the same random numbers for every model."""
    from examples.smollm2 import rollout

    generator = torch.Generator().manual_seed(0)
    return rollout(model, lab.tokenizer, task.held_back, task.length, task.top_p, generator)


@torch.no_grad()
def judge(
    lab: Lab,
    task: Task,
    fixed: "Rollout",
    theirs: Tensor,  # (n, V) the teacher's logits on `fixed`
) -> Record:
    """Held-back prompts: the full reverse KL on the student's own answers and on the teacher's; the share right."""
    from examples.smollm2 import full_reverse_kl

    own = answers(lab, lab.student, task)
    values = {
        "own": full_reverse_kl(speak(lab.student, own), speak(lab.teacher, own)).mean(),
        "fixed": full_reverse_kl(speak(lab.student, fixed), theirs).mean(),
    }
    return {name: value.item() for name, value in values.items()} | {"score": score(lab, task, own)}


def score(lab: Lab, task: Task, sample: "Rollout") -> float | None:
    """The share of the answers that are right."""
    if task.right is None:
        return None
    texts = lab.tokenizer.batch_decode(sample.ids[:, -sample.length :], skip_special_tokens=True)
    return statistics.fmean(task.right(i, text) for i, text in enumerate(texts))
