"""Tables and claims of the study `variance`, from its record alone."""

import math
import statistics
from itertools import pairwise

from examples.paper.study import OURSELVES, PAPER, Claim, Record
from examples.paper.summary import Rows, above, every, reach, shown
from examples.paper.variance.experiment import CASES, CAUSAL, ESTIMATORS, GAMMAS, SEQUENCE, TOKEN, crossing

# Of T, in the bounds of appendix D.2. The causal one is derived: its terms are some of those of the sequence level.
POWERS = {TOKEN: 2, CAUSAL: 4, SEQUENCE: 4}
SEQUENCE_LEVEL = (CAUSAL, SEQUENCE)
FITTED = 4  # lengths, the longest ones, that exponents are fitted to
EXACT = 1e-10  # a relative error below counts as equality
MISSED = 5.0  # a sampled mean whose squared error is this many times the expected one is no chance


def exponents(record: Record, case: str, name: str, count: int = FITTED) -> list[float]:
    """The slope of log variance over log T for each seed, at the longest lengths."""
    x = [math.log(length) for length in record["size"]["lengths"][-count:]]
    series = (run["cases"][case]["moments"][name][-count:] for run in record["runs"])
    return [statistics.linear_regression(x, [math.log(pair[0]) for pair in pairs]).slope for pairs in series]


def exponents_of_the_rest(record: Record, case: str, name: str) -> list[float]:
    """The exponent of what is left of the variance without a part that grows like T, at the three longest lengths.

    Lengths double. V(2 T) - 2 V(T) has no such part: of a T + b T^2 it is 2 b T^2, and its exponent is 2 at any T.
    """
    found = []
    for short, middle, long in zip(*(variances(record, case, name, at) for at in (-3, -2, -1))):
        before, after = middle - 2 * short, long - 2 * middle
        found.append(math.log2(after / before) if min(before, after) > 0 else 1.0)  # 1: nothing grows faster than T
    return found


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


def parts_of_errors(record: Record, at: int) -> list[tuple[float, float, float]]:
    """The variance at the token level and at the causal level, and the norm of the former's bias, for each seed."""
    token, causal = (variances(record, "mixing", name, at) for name in (TOKEN, CAUSAL))
    off = [relative * run["norm"][at] for relative, run in zip(biases(record, 0.0, at), record["runs"])]
    return list(zip(token, causal, off))


def crossings(record: Record, at: int) -> list[float]:
    return [crossing(*parts) for parts in parts_of_errors(record, at)]


def squared_error(record: Record, name: str, at: int, sequences: float) -> float:
    """E|mean of the estimates - gradient|^2 / |gradient|^2, the median over seeds."""
    gamma = ESTIMATORS[name]
    off = biases(record, 1.0 if gamma is None else gamma, at)
    noise = [v / run["norm"][at] ** 2 for v, run in zip(variances(record, "mixing", name, at), record["runs"])]
    return statistics.median(b**2 + v / sequences for b, v in zip(off, noise))


def places(record: Record) -> range:
    """Of the lengths in tables."""
    return range(len(record["size"]["lengths"]))[-FITTED - 1 :: 2]


def tables(record: Record) -> dict[str, Rows]:
    return {"growth": growth(record), "bias": by_gamma(record), "distance": by_distance(record)}


def growth(record: Record) -> Rows:
    lengths = record["size"]["lengths"]
    listed = max(set(record["size"]["listed"]) & set(lengths))
    heading = ["case", "estimator", f"exact variance, T = {listed}"]
    heading += [*(f"variance, T = {lengths[at]}" for at in places(record)), "exponent", "exponent of the bound"]
    rows = [heading]
    for case in CASES:
        for name in ESTIMATORS:
            exact = [run["exact"][str(listed)][name] for run in record["runs"]] if case == "mixing" else []
            found = [exact, *(variances(record, case, name, at) for at in places(record))]
            medians = [f"{statistics.median(values):.3g}" if values else "" for values in found]
            rows.append([case, name, *medians, shown(exponents(record, case, name), 2), str(POWERS.get(name, ""))])
    return rows


def by_gamma(record: Record) -> Rows:
    lengths = record["size"]["lengths"]
    heading = ["gamma", *(f"norm of bias / gradient, T = {lengths[at]}" for at in places(record))]
    rows = [[*heading, f"cosine, T = {lengths[-1]}"]]
    for gamma in GAMMAS:
        medians = [f"{statistics.median(biases(record, gamma, at)):.3f}" for at in places(record)]
        cosine = statistics.median(run["bias"][str(gamma)][-1][1] for run in record["runs"])
        rows.append([f"{gamma:g}", *medians, f"{cosine:.4f}"])
    return rows


def by_distance(record: Record) -> Rows:
    names = ["norm of bias / gradient", "variance, causal / token level", "sequences at the crossing"]
    rows = [["distance of the logits", *(f"{name}, T = {record['size']['length']}" for name in names)]]
    for distance in record["size"]["distances"]:
        runs = [run["distances"][str(distance)] for run in record["runs"]]
        relative, ratio, even = (statistics.median(values) for values in zip(*(run.values() for run in runs)))
        rows.append([f"{distance:g}", f"{relative:.3f}", f"{ratio:.1f}", f"{even:.0f}"])
    return rows


def claims(record: Record) -> list[Claim]:
    said = (unbiased, biased, bounded, sequence_conservative, token_conservative, faster, ordered, trade)
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
        f"{size['samples']} samples have at most {max(missed):.1f} times the squared error that is due",
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
    cubic = max(largest_share(record, name, 3) for name in SEQUENCE_LEVEL)
    return Claim(
        f"{PAPER}, appendix D.2",
        "The mean square of g is at most T^2 (B_r B_s)^2 at the token level, T^4 (B_r B_s)^2 at the sequence level.",
        "largest share of its bound: "
        + ", ".join(f"{name} {share:.2g}" for name, share in most.items())
        + f"; scores have mean 0 given the past, so T^3 bounds the sequence level too, of which {cubic:.2g} is reached",
        max(most.values()) <= 1,
    )


def sequence_conservative(record: Record) -> Claim:
    """T^3 is proved in `experiment`, and both cases are to stay below 4."""
    found = {(case, name): exponents(record, case, name) for case in CASES for name in SEQUENCE_LEVEL}
    return Claim(
        f"{PAPER}, appendix D.2",
        "The exponent 4 of the sequence level's bound is conservative.",
        "T^3 is a bound too; exponents of the variance: "
        + "; ".join(f"{case}, {name} {shown(values, 2)}" for (case, name), values in found.items()),
        every([above([POWERS[name] - x for x in values]) for (_, name), values in found.items()]),
    )


def token_conservative(record: Record) -> Claim:
    """Judged where steps stay correlated, and without the part like T, which hides the exponent at short lengths."""
    lengths, rest = record["size"]["lengths"], exponents_of_the_rest(record, "halves", TOKEN)
    mixing, fitted, local = (
        shown(exponents(record, case, TOKEN, count), 2)
        for case, count in (("mixing", FITTED), ("halves", FITTED), ("halves", 2))
    )
    return Claim(
        f"{PAPER}, appendix D.2",
        "The exponent 2 of the token level's bound is conservative.",
        f"mixing chain {mixing}; chain of halves {fitted} over T = {lengths[-FITTED]} to {lengths[-1]}, {local} from "
        f"{lengths[-2]} on, and {shown(rest, 2)} without the part of the variance that grows like T",
        above([POWERS[TOKEN] - x for x in rest]),
    )


def faster(record: Record) -> Claim:
    gaps = {
        case: [c - t for c, t in zip(exponents(record, case, CAUSAL), exponents(record, case, TOKEN))] for case in CASES
    }
    return Claim(
        f"{PAPER}, section 2, appendix D",
        "The variance of the sequence level grows faster with T than that of the token level.",
        "the causal exponent is larger, " + ", ".join(f"{case}: by {shown(gap, 2)}" for case, gap in gaps.items()),
        every([above(gap) for gap in gaps.values()]),
    )


def ordered(record: Record) -> Claim:
    found = [variances(record, "mixing", name, -1) for name in ESTIMATORS if name != SEQUENCE]  # for each seed
    steps = [[high / low for low, high in zip(*pair)] for pair in pairwise(found)]
    rising = sum(all(step > 1 for step in run) for run in zip(*steps))
    middle, one = ([x / zero for x, zero in zip(found[i], found[0])] for i in (1, -1))
    return Claim(
        f"{OURSELVES}, after appendix E",
        "A larger gamma has a larger gradient variance, in tables too.",
        f"rising from gamma 0 over 0.5 and 0.9 to 1 in {rising} of {len(found[0])} seeds; "
        f"at T = {record['size']['lengths'][-1]} the variance is that of gamma 0 times {reach(middle, '.2f')} at gamma "
        f"0.5, and times {reach(one, '.0f')} at gamma 1",
        every([above([math.log(x) for x in step]) for step in steps]),
    )


def trade(record: Record) -> Claim:
    """Judged by the squared errors of one sequence, where the token level has the best chance."""
    found = {record["size"]["lengths"][at]: crossings(record, at) for at in places(record)}
    return Claim(
        OURSELVES,
        "The token level trades bias for less variance, and so can be nearer to the gradient than the unbiased form.",
        "the causal form is nearer from this many sequences on: "
        + "; ".join(f"T = {length}: {reach(values, '.0f')}" for length, values in found.items()),
        above([math.log(causal / (token + off**2)) for token, causal, off in parts_of_errors(record, -1)]),
    )
