"""Tables and claims of the study `method`, from its record alone."""

import math
from collections.abc import Sequence

from examples.paper.method.costs import COSTS_K
from examples.paper.method.experiment import METHOD
from examples.paper.method.task import VOCAB
from examples.paper.method.training import SAMPLERS
from examples.paper.study import OURSELVES, PAPER, Claim, Record
from examples.paper.summary import Rows, above, every, interval, shown

CLOSE = 0.05  # of exact answers
WITHIN = f"within {100 * CLOSE:g} points"
VARIANTS = (
    "V2: student's top K, y",
    "V3: teacher's top K, y",
    "V4: EMA-PG, student's top K",
    "V5: EMA-PG, teacher's top K",
)


def outcome(record: Record, name: str) -> dict:
    """What a run, or the teacher, or the student before any, came to."""
    return record[name] if name in ("teacher", "student") else record["runs"][name]


def differences(record: Record, over: str, under: str, what: str = "score") -> list[float]:
    """One run less another, for each seed."""
    return [a - b for a, b in zip(outcome(record, over)[what], outcome(record, under)[what])]


def gap(record: Record, over: str, under: str, what: str = "score") -> tuple[float, float]:
    return interval(differences(record, over, under, what))


def higher(record: Record, over: str, under: str, what: str = "score") -> bool | None:
    return above(differences(record, over, under, what))


def close(record: Record, names: Sequence[str]) -> bool | None:
    """Whether runs are as good as the method, up to CLOSE; None where it taught nothing, or the seeds cannot tell."""
    return every([within(*gap(record, name, METHOD)) for name in names]) if higher(record, METHOD, "student") else None


def within(mean: float, half: float) -> bool | None:
    """Whether the whole interval is within CLOSE of 0, or all of it beyond; None for any other, and for one seed."""
    if abs(mean) + half < CLOSE:
        return True
    return False if abs(mean) - half > CLOSE else None


def points(record: Record, over: str, under: str) -> str:
    """The difference of two scores in points, as a claim says it."""
    mean, half = gap(record, over, under)
    noise = ", within noise" if abs(mean) <= half else ""
    return f"{over} minus {under}, points: {signed(100 * mean, 100 * half)}{noise}"


def signed(mean: float, half: float, digits: int = 1) -> str:
    """A difference, and half its interval."""
    if math.isnan(half):
        return f"{mean:+.{digits}f}, one seed, so no interval"
    return f"{mean:+.{digits}f} ± {half:.{digits}f}"


def percent(values: Sequence[float]) -> str:
    return shown([100 * x for x in values], 1)


def tables(record: Record) -> dict[str, Rows]:
    heading = ["", "rate", "exact, %", "top-p 0.9, %", "greedy, %", "full KL", "entropy", "P_S", "gradient spread"]
    rows = [heading]
    for name in ("teacher", "student", *record["runs"]):
        run = outcome(record, name)
        watched = [shown(run["full_kl"], 2), shown(run["entropy"], 2), shown(run["mass"], 3)]
        spread = shown(run["grad_spread"], 2) if "grad_spread" in run else ""
        rows.append([name, rate_of(record, name), *(percent(run[x]) for x in SAMPLERS), *watched, spread])
    return {"runs": rows, "costs": cost_rows(record)}


def rate_of(record: Record, name: str) -> str:
    return f"{record['runs'][name]['rate']:g}" if name in record["runs"] else ""


def cost_rows(record: Record) -> Rows:
    """Beside those of top-K, on N tokens."""
    of, size = record["costs"], record["size"]
    tokens = len(record["seeds"]) * size["batch"] * (size["moves"] + 2)
    loss = f"loss of N = {tokens:,} tokens, V = {VOCAB}, K = {COSTS_K} (full vocabulary: K = {VOCAB})"
    rows = [[loss, "time, beside top-K", "bytes kept, beside top-K", "whole step, ms"]]
    steps = {run["loss"]: run["step_seconds"] for run in reversed(record["runs"].values())}
    for name, cost in of.items():
        ratios = [f"{cost[what] / of['top-K'][what]:.2f}" for what in ("seconds", "kept")]
        rows.append([name, *ratios, f"{1000 * steps[name]:.1f}" if name in steps else ""])
    return rows


def claims(record: Record) -> list[Claim]:
    return [*on_methods(record), *on_settings(record), *on_mass(record)]


def on_methods(record: Record) -> list[Claim]:
    def compared(source: str, claim: str, over: str, under: str) -> Claim:
        return Claim(source, claim, points(record, over, under), higher(record, over, under))

    one, three = f"{PAPER}, table 1", f"{PAPER}, table 3"
    mask = "Masking special tokens raises the score of the sampled-token objective."
    both = "Top-K with top-p rollouts scores above the sampled token, both with the mask."
    neither = "Top-K with top-p rollouts scores above the sampled token, both without the mask."
    nucleus = "Top-p rollouts raise the score of the sampled token."
    corrected = "V5 with the corrected gradient scores above the published form."
    robust = ["top-K + top-p, no mask"]
    return [
        compared(one, mask, "sampled + mask", "sampled"),
        compared(one, both, METHOD, "sampled + mask"),
        compared(one, neither, *robust, "sampled"),
        Claim(
            one, f"The mask matters little to top-K: it is {WITHIN} without.",
            points(record, *robust, METHOD), close(record, robust),
        ),
        compared(three, "Top-p rollouts raise the score of top-K.", METHOD, "top-K"),
        compared(three, "Top-K with plain rollouts is below the sampled token.", "sampled + mask", "top-K"),
        compared(three, nucleus, "sampled + mask + top-p", "sampled + mask"),
        Claim(
            f"{PAPER}, table 4", f"The variants V2 to V5 are {WITHIN} of V1 ({METHOD}) in a single task.",
            "; ".join(points(record, name, METHOD) for name in VARIANTS), close(record, VARIANTS),
        ),
        compared(OURSELVES, f"The tail class scores above {METHOD}.", "tail", METHOD),
        compared(OURSELVES, corrected, "V5 corrected", VARIANTS[-1]),
    ]  # fmt: skip


def on_settings(record: Record) -> list[Claim]:
    def steadier(source: str, claim: str, wild: str, calm: str) -> Claim:
        norms = "; ".join(f"norm of {name}: {shown(outcome(record, name)['late_norm'], 2)}" for name in (wild, calm))
        spread = signed(*gap(record, wild, calm, "grad_spread"), digits=3)
        said = f"deviation over mean, {wild} minus {calm}: {spread}; {norms}"
        return Claim(source, claim, said, higher(record, wild, calm, "grad_spread"))

    large, small = ["K = 16", "K = 48"], ["K = 1", "K = 4"]
    nothing = set(record["runs"]["K = 1"]["curves"]["loss"]) == {0.0}
    same = record["runs"]["K = 1"]["score"] == record["student"]["score"]
    said = f"loss {'exactly 0' if nothing else 'not 0'}, answers {'the same' if same else 'changed'}"
    return [
        steadier(OURSELVES, "The gradient norm of top-K varies less.", "sampled + mask", METHOD),
        steadier(f"{PAPER}, figure 6c", "Plain rollouts make top-K less stable than top-p 0.9.", "top-K", METHOD),
        Claim(
            f"{PAPER}, figure 6b",
            f"K matters little above the 14 moves of a square: 16, 32 and 48. They are {WITHIN} of K = 32.",
            "; ".join(points(record, name, METHOD) for name in large), close(record, large),
        ),
        Claim(
            f"{PAPER}, figure 6b", "A very small K hurts: 1 and 4.",
            "; ".join(points(record, METHOD, name) for name in small),
            every([higher(record, METHOD, name) for name in small]),
        ),
        Claim("thunlp/OPD, issues 15 and 19", "K = 1 has loss 0 and teaches nothing.", said, nothing and same),
    ]  # fmt: skip


def on_mass(record: Record) -> list[Claim]:
    """Losses without renormalisation, at two learning rates: that of top-K, and the best of their own."""
    pairs = {
        "at the rate of top-K": ("not renormalised", "stop-gradient"),
        "at its own best rate": ("not renormalised, own rate", "stop-gradient, own rate"),
    }
    return [claim for rate, pair in pairs.items() for claim in on_mass_at(record, rate, *pair)]


def on_mass_at(record: Record, rate: str, raw: str, fixed: str) -> list[Claim]:
    entropy, mass = (signed(*gap(record, raw, "student", what), digits=3) for what in ("entropy", "mass"))
    return [
        Claim(
            PAPER, f"Training without renormalisation collapses {rate}: it ends below its start.",
            points(record, raw, "student"), higher(record, "student", raw),
        ),
        Claim(
            PAPER, f"The student's entropy is higher at the end than before training (not renormalised, {rate}).",
            f"entropy in nats, {raw} minus student: {entropy}", higher(record, raw, "student", "entropy"),
        ),
        Claim(
            "verl, pull request 5041", f"The un-normalised loss moves the student's mass out of S {rate}.",
            f"P_S, {raw} minus student: {mass}", higher(record, "student", raw, "mass"),
        ),
        Claim(
            "2605.11182",
            f"The logarithm held constant cures the collapse {rate}: it ends above the raw loss and above its start.",
            "; ".join(points(record, fixed, other) for other in (raw, "student")),
            every([higher(record, fixed, raw), higher(record, fixed, "student")]),
        ),
    ]  # fmt: skip
