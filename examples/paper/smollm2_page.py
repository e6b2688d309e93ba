"""What the record of the study `smollm2` says: tables, claims and a picture."""

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from examples.paper.study import PAPER, Claim, Record, Rows, interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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
    fields = {"own": "full reverse KL, own answers", "fixed": "full reverse KL, the teacher's answers"}
    if record[task]["teacher"] is not None:
        fields = {"score": f"right of {asked} questions"} | fields
    rows = [["student", "seeds", *fields.values()]]
    if "score" in fields:
        rows.append(["the teacher itself", "", f"{record[task]['teacher']:.3f}", "0", "0"])
    rows.append(["before", "", *(f"{record[task]['before'][name]:.3f}" for name in fields)])
    for objective in record["size"]["objectives"]:
        values = [with_interval(after(record, task, objective, name)) for name in fields]
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


def claims(record: Record) -> list[Claim]:
    """Of each pair the first objective is said to do better than the second, or than the student before training."""
    asked = f"{record['questions']['asked']} held-back questions"
    closer = "comes closer to the teacher than the sampled-token baseline, measured on its own answers"
    said = [
        ("equation 8", f"Training by {OURS} brings the student closer to the teacher, on its own answers to {asked}.",
         "questions", OURS, None, "own"),
        ("equation 8", f"Training by {OURS} brings the student closer to the teacher, on its own answers in open text.",
         "text", OURS, None, "own"),
        ("table 1", f"Training by {OURS} raises the score, here on {asked}.", "questions", OURS, None, "score"),
        ("table 1", f"Training by {OURS} scores above the sampled-token baseline, here on {asked}.",
         "questions", OURS, BASELINE, "score"),
        ("section 3.2", f"Training by {OURS} {closer} to {asked}.", "questions", OURS, BASELINE, "own"),
        ("section 3.2", f"Training by {OURS} {closer} in open text.", "text", OURS, BASELINE, "own"),
        ("table 3", f"Top-K needs top-p rollouts: top-K alone scores below {OURS}.",
         "questions", OURS, "top-K", "score"),
        ("table 3", "Top-K alone scores below the sampled-token baseline.", "questions", BASELINE, "top-K", "score"),
        ("table 1", "Masked special tokens raise the baseline's score; here both models have one tokenizer.",
         "questions", "sampled + mask", BASELINE, "score"),
        *(("table 4", f"Training by {OURS} scores above {name}, {what}.", "questions", OURS, name, "score")
          for name, what in VARIANTS.items()),
        ("section 5", "Without renormalisation the score is below that with it.", "questions", OURS, "raw", "score"),
    ]  # fmt: skip
    there = {None, *record["size"]["objectives"]}
    return [compared(record, *each) for each in said if {each[3], each[4]} <= there] + [small_cost(record)]


def compared(record: Record, source: str, claim: str, task: str, first: str, second: str | None, field: str) -> Claim:
    """Paired by seed. Held where the interval of the differences is on the side that was said, None where it has 0."""
    ours = after(record, task, first, field)
    theirs = [record[task]["before"][field]] * len(ours) if second is None else after(record, task, second, field)
    source, name = f"{PAPER}, {source}", "right" if field == "score" else "full reverse KL"
    means = f"{name} {statistics.fmean(ours):.3f} with {first}, {statistics.fmean(theirs):.3f} {versus(second)}"
    differences = [a - b for a, b in zip(ours, theirs)]
    if len(differences) < 2:
        return Claim(source, claim, f"{means}; one seed, so no interval", None)
    measured = f"{means}; paired difference {with_interval(differences)}, {len(differences)} seeds"
    return Claim(source, claim, measured, verdict(differences, +1 if field == "score" else -1))


def versus(second: str | None) -> str:
    return "before" if second is None else f"with {second}"


def verdict(differences: Sequence[float], sign: int) -> bool | None:
    mean, half = interval(differences)
    return sign * mean > 0 if abs(mean) > half else None


def small_cost(record: Record) -> Claim:
    shares = [share_of_loss(part_seconds(record, task, OURS)) for task in ("questions", "text")]
    times = [1000 * record["loss_cost"][name]["seconds"] for name in (OURS_ALONE, PLAIN_FULL)]
    measured = (
        f"{percent(min(shares))} to {percent(max(shares))} of a step; alone {times[0]:.1f} ms, "
        f"the whole vocabulary in plain PyTorch {times[1]:.1f} ms"
    )
    claim = f"The top-K loss takes a small part of a step's time: below {SMALL:.0%} on either task."
    return Claim("topk_rkl", claim, measured, max(shares) < SMALL)


def draw(record: Record) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.6, 6.6), layout="constrained")
    (divergence, right), (mass, time) = figure.subplots(2, 2)
    colours = {name: f"C{place}" for place, name in enumerate(record["size"]["objectives"])}
    for name, colour in colours.items():
        curve(divergence, record, "text", name, "full", colour)
        curve(mass, record, "questions", name, "student_mass", colour)
    divergence.set(title="open text, a step's own answers", xlabel="step", ylabel="full reverse KL, nats")
    mass.set(title="questions, a step's own answers", xlabel="step", ylabel="student's mass on S")
    scores(right, record, colours)
    parts(time, record)
    handles, labels = divergence.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(len(labels), 5), title="objective")
    return figure


def curve(axes: Any, record: Record, task: str, objective: str, field: str, colour: str) -> None:
    """The mean over seeds."""
    found = runs(record, task, objective)
    means = [statistics.fmean(column) for column in zip(*(run["curves"][field] for run in found))]
    axes.plot(found[0]["steps"], means, marker=".", color=colour, label=objective)


def scores(axes: Any, record: Record, colours: dict[str, str]) -> None:
    for name, colour in colours.items():
        values = after(record, "questions", name, "score")
        mean, half = interval(values)
        axes.barh(name, mean, color=colour, height=0.6)
        if len(values) > 1:
            axes.errorbar(mean, name, xerr=half, color="0.2", capsize=4)
    levels = {"teacher": record["questions"]["teacher"], "before": record["questions"]["before"]["score"]}
    for (name, level), style in zip(levels.items(), ("--", ":")):
        axes.axvline(level, color="0.3", linestyle=style, label=name)
    axes.invert_yaxis()
    asked, seeds = record["questions"]["asked"], len(record["questions"]["seeds"])
    axes.set(
        title=f"{asked} held-back questions", xlabel=f"share right, 95 % intervals, seeds: {seeds}", xlim=(-0.02, 1)
    )
    axes.legend(fontsize="small")


def parts(axes: Any, record: Record) -> None:
    names, objectives = list(record["questions"]["runs"][0]["seconds"]), record["size"]["objectives"]
    left = [0.0] * len(objectives)
    for place, part in enumerate(names):
        widths = [part_seconds(record, "questions", objective)[part] for objective in objectives]
        axes.barh(objectives, widths, left=left, color=f"C{place + 3}", label=part, height=0.6)
        left = [a + b for a, b in zip(left, widths)]
    axes.invert_yaxis()
    axes.set(title="questions, a step's parts", xlabel="seconds, medians")
    axes.legend(loc="upper center", bbox_to_anchor=(0.4, -0.22), ncols=3, fontsize="small")


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


def with_interval(values: Sequence[float]) -> str:
    mean, half = interval(values)
    return f"{mean:.3f}" if len(values) < 2 else f"{mean:.3f} ± {half:.3f}"


def percent(share: float) -> str:
    return f"{100 * share:.2g} %"
