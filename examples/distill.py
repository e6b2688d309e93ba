"""Distil a real language model on a laptop: on policy, with two objectives that share everything else.

Teacher: SmolLM2-135M-Instruct. Student: the same model without some of its layers. At every step the student answers a
few prompts, the teacher reads the answers, and AdamW moves the student closer to it, by the top-K reverse KL or by the
sampled-token baseline. Both start from the same student, with the same prompts and seed. The default learning rate of
each is the best of its own sweep, judged on prompts that are not in prompts.txt.
"""

import argparse
import copy
import json
import os
import resource
import time
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # on shared cores, threads that spin make decoding 10 times slower

from examples.smollm2 import (  # isort: skip  it says how to install what is missing
    GREEDY,
    PROMPTS,
    Rollout,
    Tokenizer,
    full_reverse_kl,
    load_teacher,
    read_prompts,
    response_logits,
    response_weights,
    rollout,
    without_layers,
)

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

from topk_rkl.diagnostics import topk_diagnostics
from topk_rkl.loss import teacher_topk, topk_reverse_kl
from topk_rkl.plot import TokenReport, save_html, save_png, token_report
from topk_rkl.recipe.rollout import sampled_token_loss

LR = {"topk": 1e-4, "sampled": 6e-5}
REPEATS = 2  # answers to each held-back prompt: less noise than one
ROWS = {"teacher": "teacher", "before": "before", "topk": "after, top-K", "sampled": "after, sampled token"}
IN_NATS = {
    "topk": "top-K loss",
    "sampled": "sampled-token loss",
    "full": "full reverse KL",
    "full_fixed": "full reverse KL, fixed responses",
}
METRICS = IN_NATS | {"student_mass": "student's mass on S"}


class Demo(NamedTuple):
    """What both objectives share."""

    args: argparse.Namespace
    teacher: nn.Module
    tokenizer: Tokenizer
    prompts: dict[str, list[str]]


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--objective", choices=["topk", "sampled", "both"], default="both", help="what to train by")
    parser.add_argument("--steps", type=int, default=10, help="optimiser steps of each objective")
    parser.add_argument("--batch", type=int, default=8, help="prompts in a step")
    parser.add_argument("--length", type=int, default=32, help="most new tokens in a response")
    parser.add_argument("--student-layers", type=int, default=24, help="layers kept of the teacher's 30")
    parser.add_argument("--k", type=int, default=32, help="teacher tokens compared at each position")
    parser.add_argument("--top-p", type=float, default=0.9, help="nucleus of the student's rollouts")
    parser.add_argument("--lr", type=float, help=f"learning rate of every objective; None: {LR}")
    parser.add_argument("--seed", type=int, default=0, help="of every rollout and of the order of prompts")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads; another number rounds differently")
    parser.add_argument("--prompts", type=Path, default=PROMPTS, help="two sections")
    parser.add_argument("--out", type=Path, default=Path("demo-results"), help="folder of the results")
    return parser.parse_args()


def losses(
    demo: Demo,
    ours: Tensor,  # (B, T, V) the student's logits
    theirs: Tensor,  # (B, T, V) the teacher's
    sample: Rollout,
) -> dict[str, Tensor]:  # each ()
    """Both objectives, the full-vocabulary reverse KL and the student's mass on S, means over the tokens that count."""
    response, weights = response_weights(demo.tokenizer, sample)  # (B, T), (B, T)
    watched = topk_diagnostics(ours[weights], theirs[weights], ["student_mass"], k=demo.args.k)  # (n,) each
    return {
        "topk": topk_reverse_kl(ours, theirs, k=demo.args.k, weights=weights),
        "sampled": sampled_token_loss(ours, theirs, response, weights=weights),
        "full": full_reverse_kl(ours[weights].detach(), theirs[weights]).mean(),
        "student_mass": watched["student_mass"].mean(),
    }


def train(demo: Demo, student: nn.Module, objective: str) -> list[dict[str, float]]:
    """On-policy steps; returns what `losses` says of each step's own rollouts, before the step."""
    args, prompts = demo.args, demo.prompts["train"]
    optimizer = torch.optim.AdamW(student.parameters(), lr=args.lr or LR[objective], weight_decay=0.0)
    generator = torch.Generator().manual_seed(args.seed)
    queue, history = [], []
    for _ in (bar := tqdm(range(args.steps), desc=f"{objective:>7}", unit="step")):
        while len(queue) < args.batch:
            queue += torch.randperm(len(prompts), generator=generator).tolist()
        batch, queue = [prompts[i] for i in queue[: args.batch]], queue[args.batch :]
        sample = rollout(student, demo.tokenizer, batch, args.length, args.top_p, generator)
        with torch.no_grad():
            theirs = response_logits(demo.teacher, sample)  # (B, T, V)
        values = losses(demo, response_logits(student, sample), theirs, sample)
        values[objective].backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        history.append({name: value.item() for name, value in values.items()})
        shown = {"loss": objective, "full KL": "full", "mass": "student_mass"}
        bar.set_postfix({label: f"{history[-1][name]:.3f}" for label, name in shown.items()})
    return history


@torch.no_grad()
def evaluate(demo: Demo, student: nn.Module, sample: Rollout) -> dict[str, float]:
    values = losses(demo, response_logits(student, sample), response_logits(demo.teacher, sample), sample)
    return {name: value.item() for name, value in values.items()}


def held_back(demo: Demo, student: nn.Module) -> Rollout:
    prompts = demo.prompts["held back"] * REPEATS
    return rollout(student, demo.tokenizer, prompts, demo.args.length, demo.args.top_p, seeded(demo))


def judge(demo: Demo, student: nn.Module, fixed: Rollout) -> dict[str, float]:
    """Held-back prompts: on the student's own answers, which are what it is trained on, and on the same for all."""
    own = held_back(demo, student)
    return evaluate(demo, student, own) | {"full_fixed": evaluate(demo, student, fixed)["full"]}


def answer(demo: Demo, model: nn.Module, prompt: str) -> str:
    greedy = rollout(model, demo.tokenizer, [prompt], demo.args.length, GREEDY, seeded(demo))
    return demo.tokenizer.decode(greedy.ids[0, -greedy.length :], skip_special_tokens=True).strip()


def seeded(demo: Demo) -> torch.Generator:
    return torch.Generator().manual_seed(demo.args.seed)


def table(scores: dict[str, dict[str, float]], answers: dict[str, str], prompt: str) -> str:
    lines = [f"| student, held-back prompts | {' | '.join(METRICS.values())} |", "|---|" + "---:|" * len(METRICS)]
    lines += [
        f"| {ROWS[name]} | {' | '.join(f'{score[metric]:.3f}' for metric in METRICS)} |"
        for name, score in scores.items()
    ]
    lines += ["", f'Greedy answers to the held-back prompt "{prompt}"', "", "| model | answer |", "|---|---|"]
    lines += [f"| {ROWS[name]} | {' '.join(text.split()).replace('|', '/')} |" for name, text in answers.items()]
    return "\n".join(lines) + "\n"


def plot(scores: dict[str, dict[str, float]], histories: dict[str, list[dict[str, float]]], path: Path) -> None:
    colours = {"before": "0.65", "sampled": "tab:orange", "topk": "tab:blue"}
    figure = Figure(figsize=(14, 4), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=[2, 2, 4])
    for panel, metric in ((left, "full"), (middle, "student_mass")):
        for name, history in histories.items():
            panel.plot([step[metric] for step in history], marker=".", color=colours[name], label=ROWS[name])
        panel.set(xlabel="step", ylabel=METRICS[metric], title="training: each step's own rollouts")
    width = 0.8 / len(scores)
    for place, (name, score) in enumerate(scores.items()):
        where = [column + place * width for column in range(len(IN_NATS))]
        bars = right.bar(where, [score[metric] for metric in IN_NATS], width, color=colours[name], label=ROWS[name])
        right.bar_label(bars, fmt="%.2f", fontsize=8)
    right.set_xticks([column + 0.4 - width / 2 for column in range(len(IN_NATS))])
    right.set_xticklabels([metric.replace(", ", "\n") for metric in IN_NATS.values()])
    right.set(title="held-back prompts", ylabel="nats per token")
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=len(scores))
    figure.savefig(path, dpi=150)


@torch.no_grad()
def errors(demo: Demo, student: nn.Module) -> TokenReport:
    """Where the student errs in its greedy answers to the held-back prompts."""
    sample = rollout(student, demo.tokenizer, demo.prompts["held back"], demo.args.length, GREEDY, seeded(demo))
    support = teacher_topk(response_logits(demo.teacher, sample), demo.args.k, normalize=True)  # of (B, T, K)
    _, weights = response_weights(demo.tokenizer, sample)  # (B, T)
    return token_report(response_logits(student, sample), support, sample.ids, demo.tokenizer, weights=weights)


def peak_bytes() -> int:
    """Resident memory of this process at its largest."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def main() -> None:
    started, args = time.perf_counter(), options()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    demo = Demo(args, *load_teacher(), read_prompts(args.prompts))
    initial = without_layers(demo.teacher, args.student_layers)
    prompt = demo.prompts["held back"][0]
    fixed = held_back(demo, initial)
    before = evaluate(demo, initial, fixed)
    scores = {"before": before | {"full_fixed": before["full"]}}  # its own answers are the fixed ones
    answers = {"teacher": answer(demo, demo.teacher, prompt), "before": answer(demo, initial, prompt)}
    histories = {}
    for objective in ("topk", "sampled") if args.objective == "both" else (args.objective,):
        student = copy.deepcopy(initial)
        histories[objective] = train(demo, student, objective)
        scores[objective] = judge(demo, student, fixed)
        answers[objective] = answer(demo, student, prompt)
        report = errors(demo, student)
        save_html(report, args.out / f"errors_{objective}.html")
        save_png(report, args.out / f"errors_{objective}.png")
    text = table(scores, answers, prompt)
    (args.out / "table.md").write_text(text, encoding="utf-8")
    taken = {name: value for name, value in vars(args).items() if name != "out"} | {"prompts": args.prompts.name}
    record = {"options": taken, "held_back": scores, "training": histories, "answers": answers}
    record |= {"metrics": METRICS, "rows": ROWS, "torch": torch.__version__, "cores": args.threads}
    record |= {"seconds": time.perf_counter() - started, "peak_bytes": peak_bytes()}
    (args.out / "results.json").write_text(json.dumps(record, indent=2, default=str) + "\n", encoding="utf-8")
    plot(scores, histories, args.out / "distill.png")
    print(f"\n{text}\n{args.out / 'distill.png'}, {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
