"""Tables and claims of the study `variance`, from its record alone."""

import math
import statistics

from examples.paper.study import PAPER, Claim, Record
from examples.paper.summary import Rows, interval, reach, shown
from examples.paper.variance.experiment import CASES, CAUSAL, ESTIMATORS, GAMMAS, SEQUENCE, TOKEN

POWERS = {TOKEN: 2, CAUSAL: 4, SEQUENCE: 4}  # of T, in the bounds of appendix D
FITTED = 4  # lengths, the longest ones, that exponents are fitted to
EXACT = 1e-10  # a relative error below counts as equality
MISSED = 5.0  # a sampled mean whose squared error is this many times the expected one is no chance


def exponents(record: Record, case: str, name: str) -> list[float]:
    """The slope of log variance over log T for each seed, at the longest lengths."""
    lengths = record["size"]["lengths"][-FITTED:]
    x = [math.log(length) for length in lengths]
    series = (run["cases"][case]["moments"][name][-FITTED:] for run in record["runs"])
    return [statistics.linear_regression(x, [math.log(pair[0]) for pair in pairs]).slope for pairs in series]


def largest_share(record: Record, name: str, power: int) -> float:
    """The largest E|g|^2 over T^power B_r^2 B_s^2, of all seeds, cases and lengths."""
    return max(
        pair[1] / (length**power * (case["B_r"] * case["B_s"]) ** 2)
        for run in record["runs"]
        for case in run["cases"].values()
        for length, pair in zip(record["size"]["lengths"], case["moments"][name])
    )


def variances(record: Record, case: str, name: str, at: int) -> list[float]:
    return [run["cases"][case]["moments"][name][at][0] for run in record["runs"]]


def biases(record: Record, gamma: float, at: int) -> list[float]:
    return [run["bias"][str(gamma)][at][0] for run in record["runs"]]


def crossings(record: Record, at: int) -> list[float]:
    """The number of sequences whose mean is as far from the gradient at the token level as at the causal level."""
    token, causal = (variances(record, "mixing", name, at) for name in (TOKEN, CAUSAL))
    off = [relative * run["norm"][at] for relative, run in zip(biases(record, 0.0, at), record["runs"])]
    return [(c - t) / b**2 for c, t, b in zip(causal, token, off)]


def squared_error(record: Record, name: str, at: int, sequences: float) -> float:
    """E|mean of the estimates - gradient|^2 / |gradient|^2, the median over seeds."""
    gamma = ESTIMATORS[name]
    off = biases(record, 1.0 if gamma is None else gamma, at)
    noise = [v / run["norm"][at] ** 2 for v, run in zip(variances(record, "mixing", name, at), record["runs"])]
    return statistics.median(b**2 + v / sequences for b, v in zip(off, noise))


def tables(record: Record) -> dict[str, Rows]:
    lengths = record["size"]["lengths"]
    places = range(len(lengths))[-FITTED - 1 :: 2]
    growth = [
        ["case", "estimator", *(f"variance, T = {lengths[at]}" for at in places), "exponent", "exponent of the bound"]
    ]
    for case in CASES:
        for name in ESTIMATORS:
            medians = [f"{statistics.median(variances(record, case, name, at)):.3g}" for at in places]
            growth.append([case, name, *medians, shown(exponents(record, case, name), 2), str(POWERS.get(name, ""))])
    off = [["gamma", *(f"bias, T = {lengths[at]}" for at in places), f"cosine, T = {lengths[-1]}"]]
    for gamma in GAMMAS:
        cosine = statistics.median(run["bias"][str(gamma)][-1][1] for run in record["runs"])
        off.append([f"{gamma:g}", *(f"{statistics.median(biases(record, gamma, at)):.3f}" for at in places)])
        off[-1].append(f"{cosine:.4f}")
    near = [["distance of the logits", "bias", "variance, causal / token level", "sequences at the crossing"]]
    for distance in record["size"]["distances"]:
        runs = [run["distances"][str(distance)] for run in record["runs"]]
        relative, ratio, crossing = (statistics.median(values) for values in zip(*(run.values() for run in runs)))
        near.append([f"{distance:g}", f"{relative:.3f}", f"{ratio:.1f}", f"{crossing:.0f}"])
    return {"growth": growth, "bias": off, "distance": near}


def claims(record: Record) -> list[Claim]:
    said = (unbiased, biased, bounded, conservative, faster, ordered, trade)
    return [claim(record) for claim in said]


def worst(record: Record, *names: str) -> float:
    return max(errors[name] for run in record["runs"] for errors in run["identities"].values() for name in names)


def unbiased(record: Record) -> Claim:
    error, size = worst(record, SEQUENCE, CAUSAL), record["size"]
    missed = [value for run in record["runs"] for value in run["sampling"].values()]
    return Claim(
        f"{PAPER}, section 2",
        "The sequence-level estimator and its causal form both have the gradient of the sequence's reverse KL as mean.",
        f"largest relative error {error:.0e} over all sequences of up to {max(size['listed'])} tokens; means of "
        f"{size['samples']} samples have {statistics.fmean(missed):.2f} of the squared error that is due",
        error < EXACT and max(missed) < MISSED,
    )


def biased(record: Record) -> Claim:
    error, values, last = worst(record, "difference"), biases(record, 0.0, -1), record["size"]["lengths"][-1]
    cosines = [run["bias"]["0.0"][-1][1] for run in record["runs"]]
    return Claim(
        f"{PAPER}, appendix D.1",
        "The token level is biased: it lacks E[sum over t of s_t times the later r], and nothing else.",
        f"relative error of that difference {error:.0e}; at T = {last} its norm is {reach(values, '.2f')} of the "
        f"gradient's, and the cosine of token level and gradient is {reach(cosines, '.3f')}",
        error < EXACT and min(values) > 1e-3,
    )


def bounded(record: Record) -> Claim:
    most = {name: largest_share(record, name, power) for name, power in POWERS.items()}
    cubic = max(largest_share(record, name, 3) for name in (CAUSAL, SEQUENCE))
    return Claim(
        f"{PAPER}, appendix D.2",
        "The mean square of g is at most T^2 (B_r B_s)^2 at the token level, T^4 (B_r B_s)^2 at the sequence level.",
        "largest share of its bound: "
        + ", ".join(f"{name} {share:.2g}" for name, share in most.items())
        + f"; scores have mean 0 given the past, so T^3 bounds the sequence level too, of which {cubic:.2g} is reached",
        max(most.values()) <= 1,
    )


def conservative(record: Record) -> Claim:
    found = {name: interval(exponents(record, "mixing", name)) for name in POWERS}
    halves = shown(exponents(record, "halves", TOKEN), 2)
    return Claim(
        f"{PAPER}, appendix D.2",
        "The exponents 2 and 4 of those bounds are conservative.",
        "exponents of the variance, mixing chain: "
        + ", ".join(f"{name} {mean:.2f} ± {half:.2f}" for name, (mean, half) in found.items())
        + f"; chain of halves: token level {halves}",
        all(mean + half < POWERS[name] for name, (mean, half) in found.items()),
    )


def faster(record: Record) -> Claim:
    gaps = {
        case: interval([c - t for c, t in zip(exponents(record, case, CAUSAL), exponents(record, case, TOKEN))])
        for case in CASES
    }
    return Claim(
        f"{PAPER}, section 2",
        "The variance of the sequence level grows faster with T than that of the token level.",
        "the causal exponent is larger, " + ", ".join(f"{c}: by {m:.2f} ± {h:.2f}" for c, (m, h) in gaps.items()),
        all(mean - half > 0 for mean, half in gaps.values()),
    )


def ordered(record: Record) -> Claim:
    names = [name for name in ESTIMATORS if name != SEQUENCE]
    by_seed = list(zip(*(variances(record, "mixing", name, -1) for name in names)))
    rising = sum(list(values) == sorted(values) for values in by_seed)
    half, one = ([values[i] / values[0] for values in by_seed] for i in (1, -1))
    length, seeds = record["size"]["lengths"][-1], len(by_seed)
    return Claim(
        f"{PAPER}, appendix E",
        "A larger gamma has a larger gradient variance (tables instead of the control tasks).",
        f"rising from gamma 0 over 0.5 and 0.9 to 1 in {rising} of {seeds} seeds; "
        f"at T = {length} the variance is that of gamma 0 times {reach(half, '.2f')} at gamma 0.5, and times "
        f"{reach(one, '.0f')} at gamma 1",
        rising == seeds,
    )


def trade(record: Record) -> Claim:
    lengths = record["size"]["lengths"]
    found = {lengths[at]: crossings(record, at) for at in range(len(lengths))[-FITTED - 1 :: 2]}
    return Claim(
        f"{PAPER}, section 2",
        "The token level trades bias for less variance, and so can be nearer to the gradient than the unbiased form.",
        "the causal form is nearer from this many sequences on: "
        + "; ".join(f"T = {length}: {reach(values, '.0f')}" for length, values in found.items()),
        min(found[lengths[-1]]) > 1,  # one sequence is where the token level has the best chance
    )
