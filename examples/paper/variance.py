"""Bias and variance of the token-level and the sequence-level gradient: section 2 and appendix D, in exact numbers.

The models are tables, so all sequences of a few tokens can be listed, and expectations over longer ones follow by
recursion. Only the variances of long sequences are sampled. There are two cases, a chain that mixes and a chain of
halves. The first token of the latter decides where all the others are, so its steps stay correlated.

Appendix D bounds E|g|^2 by T^2 (B_r B_s)^2 at the token level and by T^4 (B_r B_s)^2 at the sequence level, where B_r
and B_s bound |r_t| and |s_t|. Scores have mean 0 given the past, so E|s_1 + ... + s_T|^2 is at most T B_s^2. Hence
T^3 (B_r B_s)^2 bounds the sequence level too.
"""

import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from examples.paper.chains import (
    Chain,
    chain,
    estimates,
    every_sequence,
    expected,
    moments,
    penalties,
    probability,
    reverse_kl_gradient,
    sampled,
    sizes,
    weighted_scores,
)
from examples.paper.study import PAPER, Claim, Record, Rows, bar, interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SEEDS = (0, 1, 2, 3, 4, 5, 6, 7)
GAMMAS = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0)
TOKEN, CAUSAL, SEQUENCE = "token level", "causal sequence level", "sequence level"
ESTIMATORS = {TOKEN: 0.0, "gamma 0.5": 0.5, "gamma 0.9": 0.9, CAUSAL: 1.0, SEQUENCE: None}
CASES = ("mixing", "halves")
POWERS = {TOKEN: 2, CAUSAL: 4, SEQUENCE: 4}  # of T, in the bounds of appendix D
FITTED = 4  # lengths, the longest ones, that exponents are fitted to
EXACT = 1e-10  # a relative error below counts as equality
MISSED = 5.0  # a sampled mean whose squared error is this many times the expected one is no chance


class Size(NamedTuple):
    vocab: int = 4
    listed: tuple[int, ...] = (2, 4, 8)  # all sequences of these lengths
    lengths: tuple[int, ...] = (2, 4, 8, 16, 32, 64, 128)
    samples: int = 8192
    distances: tuple[float, ...] = (1.0, 0.3, 0.1)  # of the student's logits from the teacher's
    length: int = 32  # where the distances are compared


FULL = Size(listed=(2, 4, 8, 9), lengths=(2, 4, 8, 16, 32, 64, 128, 256, 512), samples=16_384)


def identities(of: Chain, length: int) -> dict[str, float]:
    """Errors of equalities over all sequences of that length, relative to the norm of the gradient."""
    ids = every_sequence(of.student.shape[1], length)  # (V^T, T)
    p, r = probability(of, ids), penalties(of, ids)  # (V^T,), (V^T, T)
    mean = {name: p @ estimates(of, ids, gamma) for name, gamma in ESTIMATORS.items()}  # (P,) each
    later = r.flip(1).cumsum(1).flip(1) - r  # (V^T, T) the sum over t' > t
    truth = reverse_kl_gradient(of, length)  # (P,)
    errors = {
        SEQUENCE: mean[SEQUENCE] - truth,
        CAUSAL: mean[CAUSAL] - truth,
        "difference": mean[SEQUENCE] - mean[TOKEN] - p @ weighted_scores(of, ids, later),
        "recursion": torch.cat([mean[n] - expected(of, length, g) for n, g in ESTIMATORS.items() if g is not None]),
    }
    return {name: digits((error.norm() / truth.norm()).item()) for name, error in errors.items()}


def exact_variances(of: Chain, length: int) -> dict[str, float]:
    ids = every_sequence(of.student.shape[1], length)  # (V^T, T)
    p = probability(of, ids)  # (V^T,)
    return {name: digits(moments(estimates(of, ids, gamma), p)[0]) for name, gamma in ESTIMATORS.items()}


def sampling_error(
    of: Chain,
    ids: Tensor,  # (n, T)
    exact: dict[str, float],
) -> dict[str, float]:
    """|sampled mean - expectation|^2 over variance / n, whose own expectation is 1."""
    found = {}
    for name, gamma in ESTIMATORS.items():
        away = estimates(of, ids, gamma).mean(0) - expected(of, ids.shape[1], 1.0 if gamma is None else gamma)  # (P,)
        found[name] = digits(away.square().sum().item() * len(ids) / exact[name])
    return found


def bias(of: Chain, length: int, gamma: float) -> tuple[float, float]:
    """|bias| / |gradient|, and the cosine of the expected estimate with the gradient of the reverse KL."""
    truth, mean = expected(of, length, 1.0), expected(of, length, gamma)  # (P,) each
    cosine = torch.cosine_similarity(mean, truth, dim=0).item()
    return digits(((mean - truth).norm() / truth.norm()).item()), digits(cosine)


def sampled_moments(
    of: Chain,
    ids: Tensor,  # (n, T)
    gamma: float | None,
) -> tuple[float, float]:
    weights = torch.full((len(ids),), 1 / len(ids), dtype=torch.float64)  # (n,)
    variance, second = moments(estimates(of, ids, gamma), weights)
    return digits(variance), digits(second)


def by_length(
    of: Chain,
    ids: Tensor,  # (n, T)
    lengths: Sequence[int],
) -> Record:
    """Variance and second moment of each estimator over the first tokens of the same sequences."""
    found = {
        name: [sampled_moments(of, ids[:, :length], gamma) for length in lengths] for name, gamma in ESTIMATORS.items()
    }
    return {"moments": found, "B_r": sizes(of)[0], "B_s": sizes(of)[1]}


def at_distance(size: Size, seed: int, distance: float) -> dict[str, float]:
    of = chain(size.vocab, seed, distance)
    ids = sampled(of, size.samples, size.length, seed + 10**6)
    (token, _), (causal, _) = (sampled_moments(of, ids, ESTIMATORS[name]) for name in (TOKEN, CAUSAL))
    relative, _ = bias(of, size.length, 0.0)
    norm = expected(of, size.length, 1.0).norm().item()
    return {"bias": relative, "variances": causal / token, "crossing": (causal - token) / (relative * norm) ** 2}


def measure_seed(size: Size, seed: int) -> Record:
    of = {case: chain(size.vocab, seed, halves=case == "halves") for case in CASES}
    ids = {case: sampled(of[case], size.samples, max(size.lengths), seed + 10**6) for case in CASES}  # (n, T) each
    mixing, longest = of["mixing"], max(size.listed)
    exact = {length: exact_variances(mixing, length) for length in size.listed}
    return {
        "identities": {length: identities(mixing, length) for length in size.listed},
        "exact": exact,
        "sampling": sampling_error(mixing, ids["mixing"][:, :longest], exact[longest]),
        "norm": [digits(expected(mixing, length, 1.0).norm().item()) for length in size.lengths],
        "bias": {gamma: [bias(mixing, length, gamma) for length in size.lengths] for gamma in GAMMAS},
        "cases": {case: by_length(of[case], ids[case], size.lengths) for case in CASES},
        "distances": {distance: at_distance(size, seed, distance) for distance in size.distances},
    }


def digits(x: float) -> float:
    return float(f"{x:.5g}")


def measure(size: Size, seeds: Sequence[int]) -> Record:
    return {"runs": [measure_seed(size, seed) for seed in bar(seeds, "seeds")]}


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


def spread(values: Sequence[float]) -> str:
    mean, half = interval(values)
    return f"{mean:.2f} ± {half:.2f}"


def reach(values: Sequence[float], form: str) -> str:
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def tables(record: Record) -> dict[str, Rows]:
    lengths = record["size"]["lengths"]
    shown = range(len(lengths))[-FITTED - 1 :: 2]
    growth = [
        ["case", "estimator", *(f"variance, T = {lengths[at]}" for at in shown), "exponent", "exponent of the bound"]
    ]
    for case in CASES:
        for name in ESTIMATORS:
            medians = [f"{statistics.median(variances(record, case, name, at)):.3g}" for at in shown]
            growth.append([case, name, *medians, spread(exponents(record, case, name)), str(POWERS.get(name, ""))])
    off = [["gamma", *(f"bias, T = {lengths[at]}" for at in shown), f"cosine, T = {lengths[-1]}"]]
    for gamma in GAMMAS:
        cosine = statistics.median(run["bias"][str(gamma)][-1][1] for run in record["runs"])
        off.append([f"{gamma:g}", *(f"{statistics.median(biases(record, gamma, at)):.3f}" for at in shown)])
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
    halves = spread(exponents(record, "halves", TOKEN))
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


COLOURS = dict(zip(ESTIMATORS, ("tab:blue", "tab:cyan", "tab:green", "tab:orange", "tab:red")))
SHADES = {0.25: "0.7", 0.75: "0.4"} | {gamma: COLOURS[name] for name, gamma in ESTIMATORS.items()}  # by gamma


def draw(record: Record) -> "Figure":
    from matplotlib.figure import Figure

    lengths, runs = record["size"]["lengths"], record["runs"]
    figure = Figure(figsize=(10.5, 4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for name, colour in COLOURS.items():
        for case, style in zip(CASES, ("-", ":")):
            medians = [statistics.median(variances(record, case, name, at)) for at in range(len(lengths))]
            left.plot(lengths, medians, style, color=colour, label=name if case == "mixing" else None)
    left.set(xscale="log", yscale="log", xlabel="T (tokens)", ylabel="E|g - mean|^2")
    left.set_title("variance (dotted: chain of halves)")
    for gamma in GAMMAS[:-1]:
        medians = [statistics.median(biases(record, gamma, at)) for at in range(len(lengths))]
        middle.plot(lengths, medians, marker=".", color=SHADES[gamma], label=f"gamma {gamma:g}")
    middle.set(xscale="log", xlabel="T (tokens)", ylabel="|bias| / |gradient|", ylim=(0, None), title="bias")
    middle.legend(fontsize=8)
    sequences = [2.0**power for power in range(17)]
    for name, colour in COLOURS.items():
        errors = [squared_error(record, name, -1, n) for n in sequences]
        right.plot(sequences, errors, color=colour)
    right.set(xscale="log", yscale="log", xlabel="sequences in the mean", ylabel="E|mean - gradient|^2 / |gradient|^2")
    right.set_title(f"error at T = {lengths[-1]}, median of {len(runs)} seeds")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=len(COLOURS))
    return figure
