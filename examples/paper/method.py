"""The paper's comparison on small transformers: sampled token against top-K, masks, top-p, K, variants, and the mass.

Teacher and student walk rooks over a board (see `task`). Each seed has its own teacher, student, problems and rollouts,
which all runs of that seed share. The score is the share of held-back problems answered right by plain samples, at
temperature 1 and top-p 1: the model as it is, with no sampler to help it. Each loss has the learning rate that a sweep
found best. Every K and every top-p takes the one found for top-K at 32 and 0.9. Rates fall to 0 along a run.
"""

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from examples.paper.costs import costs
from examples.paper.distil import SAMPLERS, Run, Size, base, distil, judge
from examples.paper.objectives import LOSSES
from examples.paper.study import PAPER, Claim, Record, Rows, bar, interval
from examples.paper.task import VOCAB

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FULL = Size(teacher_steps=3000, student_steps=400, steps=1200, held_back=1024, sweep=True)
SEEDS = (0, 1, 2, 3, 4)
SWEPT = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
SWEPT_SEEDS = (100, 101, 102)
# The best score of a coarse sweep at the default size: runs with the mask, on SWEPT_SEEDS, at SWEPT, of which some were
# left out once a loss had become worse. A smaller rate than 3e-4 leaves the student as it is.
RATES = {
    "sampled": 1e-3,
    "top-K": 3e-2,
    "V2": 3e-2,
    "V3": 3e-2,
    "V4": 3e-2,
    "V5": 3e-4,
    "raw": 3e-4,
    "raw, stop-gradient": 1e-3,
    "tail": 3e-2,
}
METHOD = "top-K + top-p"
RUNS = {
    "sampled": Run("sampled", top_p=1.0, mask=False),
    "sampled + mask": Run("sampled", top_p=1.0),
    "sampled + mask + top-p": Run("sampled"),
    "top-K": Run("top-K", top_p=1.0),
    METHOD: Run("top-K"),
    "top-K + top-p, no mask": Run("top-K", mask=False),
    "V2: student's top K, y": Run("V2"),
    "V3: teacher's top K, y": Run("V3"),
    "V4: EMA-PG, student's top K": Run("V4"),
    "V5: EMA-PG, teacher's top K": Run("V5"),
    "not renormalised": Run("raw", rate_of="top-K"),
    "not renormalised, own rate": Run("raw"),
    "stop-gradient": Run("raw, stop-gradient", rate_of="top-K"),
    "stop-gradient, own rate": Run("raw, stop-gradient"),
    "tail": Run("tail"),
    "K = 1": Run("top-K", k=1),
    "K = 4": Run("top-K", k=4),
    "K = 16": Run("top-K", k=16),
    "K = 48": Run("top-K", k=48),
    "K = V": Run("top-K", k=VOCAB),
    "top-p = 0.8": Run("top-K", top_p=0.8),
}
BY_K = {1: "K = 1", 4: "K = 4", 16: "K = 16", 32: METHOD, 48: "K = 48", VOCAB: "K = V"}
BY_TOP_P = {0.8: "top-p = 0.8", 0.9: METHOD, 1.0: "top-K"}
CLOSE = 0.05  # of exact answers
COLOURS = {"sampled + mask": "tab:orange", METHOD: "tab:blue", "not renormalised": "tab:red", "tail": "tab:green"}


def measure(size: Size, seeds: Sequence[int]) -> Record:
    swept = sweep(size) if size.sweep else None
    rates = {loss: max(scores, key=scores.get) for loss, scores in swept.items()} if swept else RATES
    models = base(size, seeds)
    record: Record = {"rates": rates, "swept": swept, "costs": costs(models, size, seeds), "runs": {}}
    record["teacher"] = judge(models.teacher, models.teacher, size, seeds)
    record["student"] = judge(models.student, models.teacher, size, seeds)
    for name, run in bar(RUNS.items(), "method"):
        rate = rates[run.rate_of or run.loss]
        student, history = distil(models, run, rate, size, seeds)
        came_to = judge(student, models.teacher, size, seeds)
        record["runs"][name] = {"loss": run.loss, "rate": rate, **history, **came_to}
    return rounded(record)


def sweep(size: Size) -> dict[str, dict[float, float]]:
    """The mean score of each loss at each learning rate, on seeds of its own."""
    models = base(size, SWEPT_SEEDS)
    swept: dict[str, dict[float, float]] = {loss: {} for loss in LOSSES}
    for loss, rate in bar([(loss, rate) for loss in LOSSES for rate in SWEPT], "sweep"):
        run = Run(loss, top_p=1.0 if loss == "sampled" else 0.9)
        student, _ = distil(models, run, rate, size, SWEPT_SEEDS)
        swept[loss][rate] = statistics.fmean(judge(student, models.teacher, size, SWEPT_SEEDS)["score"])
    return swept


def rounded(x: object) -> object:
    """The same with floats of five digits."""
    if isinstance(x, dict):
        return {str(key): rounded(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [rounded(value) for value in x]
    return float(f"{x:.5g}") if isinstance(x, float) else x


def seen(record: Record, name: str) -> dict:
    """What a run, or the teacher, or the student before any, came to."""
    return record[name] if name in ("teacher", "student") else record["runs"][name]


def gap(record: Record, over: str, under: str, what: str = "score") -> tuple[float, float]:
    """The mean over seeds of the difference of two runs, and half its interval."""
    return interval([a - b for a, b in zip(seen(record, over)[what], seen(record, under)[what])])


def above(record: Record, over: str, under: str, what: str = "score") -> bool:
    mean, half = gap(record, over, under, what)
    return mean - half > 0


def close(record: Record, names: Sequence[str]) -> bool | None:
    """Whether runs are as good as the method, up to CLOSE; None where it taught nothing, or the seeds cannot tell."""
    if not above(record, METHOD, "student"):
        return None
    gaps = [gap(record, name, METHOD) for name in names]
    if any(abs(mean) > max(half, CLOSE) for mean, half in gaps):
        return False
    return True if all(abs(mean) + half < CLOSE for mean, half in gaps) else None


def points(record: Record, over: str, under: str) -> str:
    """The difference of two scores in points, as a claim says it."""
    mean, half = gap(record, over, under)
    noise = "" if abs(mean) > half else ", within noise"
    return f"{over} minus {under}: {signed(100 * mean, 100 * half)} points{noise}"


def signed(mean: float, half: float, digits: int = 1) -> str:
    return f"{mean:+.{digits}f} ± {half:.{digits}f}"


def cell(values: Sequence[float], digits: int, scale: float = 1) -> str:
    mean, half = interval([scale * x for x in values])
    return f"{mean:.{digits}f} ± {half:.{digits}f}"


def tables(record: Record) -> dict[str, Rows]:
    heading = ["", "rate", "exact, %", "top-p 0.9, %", "greedy, %", "full KL", "entropy", "P_S", "gradient spread"]
    rows = [heading]
    for name in ("teacher", "student", *record["runs"]):
        run = seen(record, name)
        watched = [cell(run["full_kl"], 2), cell(run["entropy"], 2), cell(run["mass"], 3)]
        spread = cell(run["grad_spread"], 2) if "grad_spread" in run else ""
        rows.append([name, rate_of(record, name), *(cell(run[x], 1, 100) for x in SAMPLERS), *watched, spread])
    found = {"runs": rows, "costs": cost_rows(record)}
    if record["swept"]:
        rates = next(iter(record["swept"].values()))
        found["rates"] = [["exact, %, at a rate of", *rates]]
        found["rates"] += [[loss, *(f"{100 * x:.1f}" for x in row.values())] for loss, row in record["swept"].items()]
    return found


def rate_of(record: Record, name: str) -> str:
    return f"{record['runs'][name]['rate']:g}" if name in record["runs"] else ""


def cost_rows(record: Record) -> Rows:
    rows, of = [["loss", "time, beside top-K", "bytes kept, beside top-K", "whole step, ms"]], record["costs"]
    steps = {run["loss"]: run["step_seconds"] for run in reversed(record["runs"].values())}
    for name, cost in of.items():
        ratios = [f"{cost[what] / of['top-K'][what]:.2f}" for what in ("seconds", "kept")]
        rows.append([name, *ratios, f"{1000 * steps[name]:.1f}" if name in steps else ""])
    return rows


def claims(record: Record) -> list[Claim]:
    return [*on_methods(record), *on_settings(record), *on_mass(record)]


def on_methods(record: Record) -> list[Claim]:
    def higher(source: str, claim: str, over: str, under: str) -> Claim:
        return Claim(source, claim, points(record, over, under), above(record, over, under))

    one, three = f"{PAPER}, table 1", f"{PAPER}, table 3"
    mask = "Masked special tokens raise the sampled-token objective."
    both = "Top-K with top-p rollouts scores above the sampled token, both with the mask."
    neither = "Top-K with top-p rollouts scores above the sampled token, both without the mask."
    robust = ["top-K + top-p, no mask"]
    variants = [name for name in record["runs"] if name[0] == "V"]
    return [
        higher(one, mask, "sampled + mask", "sampled"),
        higher(one, both, METHOD, "sampled + mask"),
        higher(one, neither, *robust, "sampled"),
        Claim(one, "The mask matters little to top-K.", points(record, *robust, METHOD), close(record, robust)),
        higher(three, "Top-p rollouts raise top-K.", METHOD, "top-K"),
        higher(three, "Top-K with plain rollouts is below the sampled token.", "sampled + mask", "top-K"),
        higher(three, "Top-p rollouts raise the sampled token.", "sampled + mask + top-p", "sampled + mask"),
        Claim(
            f"{PAPER}, table 4", "The variants V1 to V5 are close in a single task.",
            "; ".join(points(record, name, METHOD) for name in variants), close(record, variants),
        ),
    ]  # fmt: skip


def on_settings(record: Record) -> list[Claim]:
    def steadier(source: str, claim: str, wild: str, calm: str) -> Claim:
        norms = "; ".join(f"norm of {name}: {cell(seen(record, name)['late_norm'], 2)}" for name in (wild, calm))
        spread = signed(*gap(record, wild, calm, "grad_spread"), digits=3)
        said = f"deviation over mean, {wild} minus {calm}: {spread}; {norms}"
        return Claim(source, claim, said, above(record, wild, calm, "grad_spread"))

    large, small = ["K = 16", "K = 48"], ["K = 1", "K = 4"]
    nothing = set(record["runs"]["K = 1"]["curves"]["loss"]) == {0.0}
    same = record["runs"]["K = 1"]["score"] == record["student"]["score"]
    said = f"loss {'exactly 0' if nothing else 'not 0'}, answers {'the same' if same else 'changed'}"
    return [
        steadier(f"{PAPER}, section 4", "The gradient norm of top-K varies less.", "sampled + mask", METHOD),
        steadier(f"{PAPER}, figure 6c", "Plain rollouts make top-K less stable than top-p 0.9.", "top-K", METHOD),
        Claim(
            f"{PAPER}, figure 6b", "K matters little once it is large: 16, 32 and 48.",
            "; ".join(points(record, name, METHOD) for name in large), close(record, large),
        ),
        Claim(
            f"{PAPER}, figure 6b", "A very small K hurts: 1 and 4.",
            "; ".join(points(record, METHOD, name) for name in small),
            all(above(record, METHOD, name) for name in small),
        ),
        Claim("thunlp/OPD, issues 15 and 19", "K = 1 has loss 0 and teaches nothing.", said, nothing and same),
    ]  # fmt: skip


def on_mass(record: Record) -> list[Claim]:
    section, many = f"{PAPER}, section 5", "2605.11182"
    raw, own, fixed = "not renormalised", "not renormalised, own rate", "stop-gradient"
    fixed_own = "stop-gradient, own rate"
    entropy, mass = (signed(*gap(record, raw, "student", what), digits=2) for what in ("entropy", "mass"))
    return [
        Claim(
            section, "Training without renormalisation collapses: it ends below its start.",
            f"{points(record, raw, 'student')}; {points(record, own, 'student')}", above(record, "student", raw),
        ),
        Claim(
            section, "The student's entropy blows up on the way.",
            f"entropy, {raw} minus student: {entropy} nats", above(record, raw, "student", "entropy"),
        ),
        Claim(
            "verl, pull request 5041", "The loss falls by moving the student's mass out of S.",
            f"P_S, {raw} minus student: {mass}", above(record, "student", raw, "mass"),
        ),
        Claim(
            many, "The logarithm held constant cures the collapse.",
            "; ".join(points(record, *pair) for pair in ((fixed, raw), (fixed, "student"), (fixed_own, "student"))),
            above(record, fixed, raw) and above(record, fixed, "student"),
        ),
    ]  # fmt: skip


def draw(record: Record) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.8, 5.4), layout="constrained")
    axes = figure.subplot_mosaic([["score", "mass", "norm"], ["score", "k", "top_p"]], width_ratios=[1.25, 1, 1])
    draw_scores(axes["score"], record)
    for place, what, title in (
        ("mass", "mass", "P_S: mass on the top 32"),
        ("norm", "grad_norm", "gradient norm, nats"),
    ):
        for name, colour in COLOURS.items():
            curves = record["runs"][name]["curves"]
            axes[place].plot(curves["step"], curves[what], color=colour, label=name, linewidth=2)
        axes[place].set(xlabel="step", title=title)
    axes["mass"].set(ylim=(0, 1.05))
    axes["mass"].legend(loc="center right")
    axes["norm"].set(yscale="log")
    draw_setting(axes["k"], record, BY_K, "K")
    draw_setting(axes["top_p"], record, BY_TOP_P, "top-p")
    axes["k"].set(ylabel="exact answers, %")
    axes["top_p"].legend(title="answers sampled at", loc="lower left")
    for each in axes.values():
        each.spines[["top", "right"]].set_visible(False)
    return figure


def draw_scores(axes: "Axes", record: Record) -> None:
    """The methods from top to bottom, and where teacher and student are."""
    names = [name for name in record["runs"] if not name.startswith(("K = ", "top-p = "))]
    means, halves = zip(*(interval([100 * x for x in seen(record, name)["score"]]) for name in names))
    colours = [COLOURS.get(name, "0.7") for name in names]
    axes.barh(names, means, xerr=halves, color=colours, error_kw={"elinewidth": 1.2, "capsize": 3})
    for name, style in (("student", ":"), ("teacher", "--")):
        mean, _ = interval(seen(record, name)["score"])
        axes.axvline(100 * mean, color="black", linestyle=style)
        axes.text(100 * mean, -0.7, f" {name} ", ha="right" if mean > 0.5 else "left")
    axes.invert_yaxis()
    axes.set(xlim=(0, 100), xlabel="exact answers, %", title="score, with 95 % intervals")


def draw_setting(axes: "Axes", record: Record, runs: dict, label: str) -> None:
    """The method with another K, or another top-p."""
    places = [str(value) for value in runs]
    for sampler, style in (("nucleus", "s--"), ("score", "o-")):
        means, halves = zip(*(interval([100 * x for x in seen(record, name)[sampler]]) for name in runs.values()))
        drawn = f"top-p {SAMPLERS[sampler]:g}"
        axes.errorbar(places, means, halves, fmt=style, color=COLOURS[METHOD], capsize=3, label=drawn)
    axes.set(ylim=(0, 100), xlabel=f"{label} of the training", title=f"score by {label}")
