"""Tables and claims of the study `smollm2`, from its record alone."""

import statistics
from typing import NamedTuple

from examples.paper.study import OURSELVES, PAPER, Claim, Record
from examples.paper.summary import Rows, above, shown

OURS, BASELINE = "top-K + top-p", "sampled"
SMALL = 0.05  # of a step's time
OURS_ALONE, PLAIN_FULL = "topk_reverse_kl", "plain PyTorch, whole vocabulary"
VARIANTS = {
    "V2": "the student's top K and the sampled token",
    "V3": "the teacher's top K and the sampled token",
    "V4": "EMA-PG on the student's top K",
    "V5": "EMA-PG on the teacher's top K",
}


def tables(record: Record) -> dict[str, Rows]:
    return {
        "questions": outcomes(record, "questions"),
        "open text": outcomes(record, "text"),
        "step": costs(record),
        "loss alone": alone(record),
    }


def outcomes(record: Record, task: str) -> Rows:
    """Means over seeds with 95 % intervals."""
    asked, seeds = record[task]["asked"], len(record[task]["seeds"])
    fields = {
        "own": "full reverse KL, own greedy answers" if task == "questions" else "full reverse KL, own answers",
        "fixed": "full reverse KL, the teacher's answers",
    }
    if record[task]["teacher"] is not None:
        fields = {"score": f"right of {asked} questions"} | fields
    rows = [["student", "seeds", *fields.values()]]
    if "score" in fields:
        rows.append(["the teacher itself", "", f"{record[task]['teacher']:.3f}", "0", "0"])
    rows.append(["before", "", *(f"{record[task]['before'][name]:.3f}" for name in fields)])
    for objective in record["size"]["objectives"]:
        values = [shown(after(record, task, objective, name)) for name in fields]
        rows.append([objective, str(seeds), *values])
    return rows


def costs(record: Record) -> Rows:
    """Medians over steps, then over seeds."""
    parts = list(record["questions"]["runs"][0]["seconds"])
    rows = [["task", "objective", *(f"{part}, s" for part in parts), "share of the loss", "peak memory, MiB"]]
    for task in ("questions", "text"):
        for objective in record["size"]["objectives"]:
            seconds = part_seconds(record, task, objective)
            peaks = [run["peak_mib"] for run in runs(record, task, objective) if run["peak_mib"] is not None]
            peak = f"{max(peaks):.0f}" if peaks else ""
            cells = [f"{seconds[part]:.3g}" for part in parts]
            rows.append([task, objective, *cells, percent(share_of_loss(seconds)), peak])
    return rows


def alone(record: Record) -> Rows:
    size, cost = record["size"], record["loss_cost"]
    where = f"N = {size['positions']}, V = {size['vocab']:,}, K = {size['k']}"
    rows = [[f"loss, both passes, {where}", "ms", f"over {OURS_ALONE}", "memory added, gradient included, MiB"]]
    for name, value in cost.items():
        ratio = value["seconds"] / cost[OURS_ALONE]["seconds"]
        extra = "" if value["extra_mib"] is None else f"{value['extra_mib']:.0f}"
        rows.append([name, f"{1000 * value['seconds']:.1f}", f"{ratio:.2f}", extra])
    return rows


class Comparison(NamedTuple):
    """The first objective is said to do better than the second, or than the student before training."""

    source: str
    claim: str
    task: str
    first: str
    second: str | None
    field: str = "score"


def claims(record: Record) -> list[Claim]:
    asked = f"{record['questions']['asked']} held-back questions"
    closer = "comes closer to the teacher than the sampled-token baseline, measured on its own answers"
    table_1, table_3, table_4 = (f"{PAPER}, table {n}" for n in (1, 3, 4))
    said = [
        Comparison(OURSELVES, f"Top-K + top-p brings the student closer to the teacher, on its own answers to {asked}.",
                   "questions", OURS, None, "own"),
        Comparison(OURSELVES, "Top-K + top-p brings the student closer to the teacher, on own answers in open text.",
                   "text", OURS, None, "own"),
        Comparison(table_1, f"Training by {OURS} raises the score, here on {asked}.", "questions", OURS, None),
        Comparison(table_1, f"Training by {OURS} scores above the sampled-token baseline, here on {asked}.",
                   "questions", OURS, BASELINE),
        Comparison(OURSELVES, f"Training by {OURS} {closer} to {asked}.", "questions", OURS, BASELINE, "own"),
        Comparison(OURSELVES, f"Training by {OURS} {closer} in open text.", "text", OURS, BASELINE, "own"),
        Comparison(table_3, f"Top-K needs top-p rollouts: top-K alone scores below {OURS}.",
                   "questions", OURS, "top-K"),
        Comparison(table_3, "Top-K alone scores below the sampled-token baseline.", "questions", BASELINE, "top-K"),
        Comparison(table_1, "Masking special tokens raises the baseline's score; both models have one tokenizer here.",
                   "questions", "sampled + mask", BASELINE),
        *(Comparison(f"{table_4}, AIME24", f"Training by {OURS} scores above {name}, {what}, at the rate of {OURS}.",
                     "questions", OURS, name) for name, what in VARIANTS.items()),
        Comparison(PAPER, f"Without renormalisation the score is lower, at the rate of {OURS}.",
                   "questions", OURS, "raw"),
    ]  # fmt: skip
    there = {None, *record["size"]["objectives"]}
    return [*(compared(record, x) for x in said if {x.first, x.second} <= there), small_cost(record)]


def compared(record: Record, said: Comparison) -> Claim:
    """Paired by seed. Held where the interval of the differences is on the side that was said, None where it has 0."""
    ours = after(record, said.task, said.first, said.field)
    before = [record[said.task]["before"][said.field]] * len(ours)
    theirs = before if said.second is None else after(record, said.task, said.second, said.field)
    name = "right" if said.field == "score" else "full reverse KL"
    means = (
        f"{name} {statistics.fmean(ours):.3f} with {said.first}, {statistics.fmean(theirs):.3f} {versus(said.second)}"
    )
    better = [a - b if said.field == "score" else b - a for a, b in zip(ours, theirs)]
    paired = f"better by {shown(better)}, {len(better)} seeds" if len(better) > 1 else "one seed, so no interval"
    return Claim(said.source, said.claim, f"{means}; {paired}", above(better))


def versus(second: str | None) -> str:
    return "before" if second is None else f"with {second}"


def small_cost(record: Record) -> Claim:
    shares = [share_of_loss(part_seconds(record, task, OURS)) for task in ("questions", "text")]
    times = [1000 * record["loss_cost"][name]["seconds"] for name in (OURS_ALONE, PLAIN_FULL)]
    measured = (
        f"{percent(min(shares))} to {percent(max(shares))} of a step; alone {times[0]:.1f} ms, "
        f"the whole vocabulary in plain PyTorch {times[1]:.1f} ms"
    )
    claim = f"The top-K loss takes a small part of a step's time: below {SMALL:.0%} on either task."
    return Claim(OURSELVES, claim, measured, max(shares) < SMALL)


def runs(record: Record, task: str, objective: str) -> list[Record]:
    """In the order of the seeds."""
    return [run for run in record[task]["runs"] if run["objective"] == objective]


def after(record: Record, task: str, objective: str, field: str) -> list[float]:
    return [run["after"][field] for run in runs(record, task, objective)]


def part_seconds(record: Record, task: str, objective: str) -> dict[str, float]:
    found = runs(record, task, objective)
    return {part: statistics.median(run["seconds"][part] for run in found) for part in found[0]["seconds"]}


def share_of_loss(seconds: dict[str, float]) -> float:
    return seconds["loss, both passes"] / sum(seconds.values())


def percent(share: float) -> str:
    return f"{100 * share:.2g} %"
