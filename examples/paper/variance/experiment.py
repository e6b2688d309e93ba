"""Bias and variance of the token-level and the sequence-level gradient: section 2 and appendix D.

The models are tables, so all sequences of a few tokens can be listed, and means over longer ones follow by recursion.
Those numbers are exact. Moments of long sequences are sampled. There are two cases, a chain that mixes and a chain of
halves. The first token of the latter decides where all the others are, so its steps stay correlated.

Appendix D.2 bounds E|g|^2 by T^2 (B_r B_s)^2 at the token level and by T^4 (B_r B_s)^2 at the sequence level, where B_r
and B_s bound |r_t| and |s_t|. Scores have mean 0 given the past, so E|s_1 + ... + s_t|^2 is at most t B_s^2. Hence
T^3 (B_r B_s)^2 bounds the sequence level too. The causal form is sum over t' of r_t' (s_1 + ... + s_t'). Cauchy-Schwarz
over t' gives T^2 (T + 1) / 2 (B_r B_s)^2, which is at most T^3 (B_r B_s)^2.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from examples.paper.study import Record, bar
from examples.paper.variance.chains import (
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

SEEDS = (0, 1, 2, 3, 4, 5, 6, 7)
GAMMAS = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0)
TOKEN, CAUSAL, SEQUENCE = "token level", "causal sequence level", "sequence level"
ESTIMATORS = {TOKEN: 0.0, "gamma 0.5": 0.5, "gamma 0.9": 0.9, CAUSAL: 1.0, SEQUENCE: None}
CASES = ("mixing", "halves")


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
    return {name: (error.norm() / truth.norm()).item() for name, error in errors.items()}


def exact_variances(of: Chain, length: int) -> dict[str, float]:
    ids = every_sequence(of.student.shape[1], length)  # (V^T, T)
    p = probability(of, ids)  # (V^T,)
    return {name: moments(estimates(of, ids, gamma), p)[0] for name, gamma in ESTIMATORS.items()}


def sampling_error(
    of: Chain,
    ids: Tensor,  # (n, T)
    exact: dict[str, float],
) -> dict[str, float]:
    """|sampled mean - expectation|^2 over variance / n, whose own expectation is 1."""
    found = {}
    for name, gamma in ESTIMATORS.items():
        away = estimates(of, ids, gamma).mean(0) - expected(of, ids.shape[1], 1.0 if gamma is None else gamma)  # (P,)
        found[name] = away.square().sum().item() * len(ids) / exact[name]
    return found


def bias(of: Chain, length: int, gamma: float) -> tuple[float, float]:
    """|bias| / |gradient|, and the cosine of the expected estimate with the gradient of the reverse KL."""
    truth, mean = expected(of, length, 1.0), expected(of, length, gamma)  # (P,) each
    cosine = torch.cosine_similarity(mean, truth, dim=0).item()
    return ((mean - truth).norm() / truth.norm()).item(), cosine


def sampled_moments(
    of: Chain,
    ids: Tensor,  # (n, T)
    gamma: float | None,
) -> tuple[float, float]:
    weights = torch.full((len(ids),), 1 / len(ids), dtype=torch.float64)  # (n,)
    return moments(estimates(of, ids, gamma), weights)


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


def crossing(token: float, causal: float, off: float) -> float:
    """The number of sequences whose mean is as far from the gradient at the token level as at the causal level.

    Their mean squared errors are off^2 + token / n and causal / n, by the norm of the bias and both variances.
    """
    return (causal - token) / off**2


def at_distance(size: Size, seed: int, distance: float) -> dict[str, float]:
    of = chain(size.vocab, seed, distance)
    ids = sampled(of, size.samples, size.length, seed + 10**6)
    (token, _), (causal, _) = (sampled_moments(of, ids, ESTIMATORS[name]) for name in (TOKEN, CAUSAL))
    relative, _ = bias(of, size.length, 0.0)
    norm = expected(of, size.length, 1.0).norm().item()
    return {"bias": relative, "variances": causal / token, "crossing": crossing(token, causal, relative * norm)}


def measure_seed(size: Size, seed: int) -> Record:
    of = {case: chain(size.vocab, seed, halves=case == "halves") for case in CASES}
    ids = {case: sampled(of[case], size.samples, max(size.lengths), seed + 10**6) for case in CASES}  # (n, T) each
    mixing, longest = of["mixing"], max(size.listed)
    exact = {length: exact_variances(mixing, length) for length in size.listed}
    return {
        "identities": {length: identities(mixing, length) for length in size.listed},
        "exact": exact,
        "sampling": sampling_error(mixing, ids["mixing"][:, :longest], exact[longest]),
        "norm": [expected(mixing, length, 1.0).norm().item() for length in size.lengths],
        "bias": {gamma: [bias(mixing, length, gamma) for length in size.lengths] for gamma in GAMMAS},
        "cases": {case: by_length(of[case], ids[case], size.lengths) for case in CASES},
        "distances": {distance: at_distance(size, seed, distance) for distance in size.distances},
    }


def measure(size: Size, seeds: Sequence[int]) -> Record:
    return {"runs": [measure_seed(size, seed) for seed in bar(seeds, "seeds")]}
