"""Rewards of the sampled token: formulas in float64, loops over time, exact expectations over the vocabulary."""

import math

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from topk_rkl.recipe.rewards import (
    box_cox,
    contrast,
    extrapolated_log_ratio,
    k1,
    k2,
    k3,
    log_ratio,
    power_difference,
    probability_difference,
    return_to_go,
    tanh_log_ratio,
)

INF = math.inf
SEARCH = settings(max_examples=100, deadline=None, derandomize=True, database=None)
LOG_PROBS = st.floats(-40.0, 0.0, width=32)


def scalar(x: float) -> Tensor:
    return torch.tensor([x], dtype=torch.float64)


FORMULAS = {
    "log_ratio": (log_ratio, lambda p, q: math.log(q) - math.log(p)),
    "clip": (lambda p, q: log_ratio(p, q, clip=(-5, 2)), lambda p, q: min(max(math.log(q) - math.log(p), -5), 2)),
    "tanh": (lambda p, q: tanh_log_ratio(p, q, tau=3), lambda p, q: math.tanh((math.log(q) - math.log(p)) / 3)),
    "power": (power_difference, lambda p, q: q**5 - p**5),
    "power 0.5": (lambda p, q: power_difference(p, q, alpha=0.5), lambda p, q: math.sqrt(q) - math.sqrt(p)),
    "box_cox": (lambda p, q: box_cox(p, q, alpha=0.1), lambda p, q: (q**0.1 - p**0.1) / 0.1),
    "difference": (probability_difference, lambda p, q: q - p),
    "k1": (k1, lambda p, q: math.log(p) - math.log(q)),
    "k2": (k2, lambda p, q: (math.log(p) - math.log(q)) ** 2 / 2),
    "k3": (k3, lambda p, q: q / p - 1 - math.log(q / p)),
}


@pytest.mark.parametrize("name", FORMULAS)
@given(log_p=LOG_PROBS, log_q=LOG_PROBS)
@SEARCH
def test_every_transform_is_its_formula(name: str, log_p: float, log_q: float) -> None:
    function, formula = FORMULAS[name]
    got = function(scalar(log_p), scalar(log_q)).item()
    assert got == pytest.approx(formula(math.exp(log_p), math.exp(log_q)), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("name", ["log_ratio", "clip", "tanh", "power", "power 0.5", "box_cox", "difference"])
def test_a_reward_is_positive_where_the_teacher_likes_the_token_better(name: str) -> None:
    low, high = scalar(math.log(0.3)), scalar(math.log(0.6))
    reward = FORMULAS[name][0]
    assert reward(low, high).item() > 0 > reward(high, low).item() and reward(low, low).item() == 0


@given(log_p=LOG_PROBS, log_q=LOG_PROBS)
@SEARCH
def test_bounded_rewards_stay_within_their_bounds(log_p: float, log_q: float) -> None:
    p, q = torch.tensor([log_p]), torch.tensor([log_q])
    for reward in (tanh_log_ratio(p, q), power_difference(p, q), probability_difference(p, q)):
        assert -1 <= reward.item() <= 1
    assert k2(p, q).item() >= 0 and k3(p, q).item() >= 0


def test_box_cox_goes_to_the_log_ratio() -> None:
    p, q = torch.tensor([-30.0, -1.0, -2.0]), torch.tensor([-1.0, -30.0, -2.0])
    assert torch.equal(box_cox(p, q, alpha=0), log_ratio(p, q))
    torch.testing.assert_close(box_cox(p, q, alpha=1e-9), log_ratio(p, q), rtol=1e-6, atol=0)
    torch.testing.assert_close(box_cox(p, q, alpha=5) * 5, power_difference(p, q), rtol=1e-6, atol=0)


def test_probabilities_that_are_0_or_tiny_do_not_overflow() -> None:
    p, q = torch.tensor([-1000.0, -INF, 0.0, -INF]), torch.tensor([0.0, -1.0, -INF, -INF])
    torch.testing.assert_close(probability_difference(p, q), torch.tensor([1.0, math.exp(-1), -1.0, 0.0]))
    torch.testing.assert_close(power_difference(p, q, alpha=2), torch.tensor([1.0, math.exp(-2), -1.0, 0.0]))


def test_extrapolation_and_contrast() -> None:
    p, q, b, c = torch.log(torch.tensor([[0.5, 0.2], [0.25, 0.4], [0.1, 0.6], [0.3, 0.2]], dtype=torch.float64))
    want = 1.25 * (q - b) - (p - b)
    torch.testing.assert_close(extrapolated_log_ratio(p, q, b), want)
    torch.testing.assert_close(extrapolated_log_ratio(p, q, b, lam=3.0), 3 * q - p - 2 * b)
    torch.testing.assert_close(extrapolated_log_ratio(p, q, b, lam=1.0), log_ratio(p, q))
    torch.testing.assert_close(contrast(q, b), q - b)
    torch.testing.assert_close(contrast(q, [b, c]).exp(), torch.tensor([0.25 / 0.2, 0.4 / 0.4], dtype=torch.float64))


def test_over_the_students_own_tokens_k1_and_k3_average_to_the_divergence() -> None:
    log_p, log_q = torch.randn(2, 30, dtype=torch.float64).log_softmax(-1)
    divergence = (log_p.exp() * (log_p - log_q)).sum()
    for estimate in (k1, k3):
        torch.testing.assert_close((log_p.exp() * estimate(log_p, log_q)).sum(), divergence)
    assert not torch.isclose((log_p.exp() * k2(log_p, log_q)).sum(), divergence)


def returns(rewards: list[float], mask: list[bool], gamma: float) -> list[float]:
    """From the end, a position at a time."""
    total, out = 0.0, [0.0] * len(rewards)
    for t in reversed(range(len(rewards))):
        if mask[t]:
            total = out[t] = rewards[t] + gamma * total
    return out


@given(
    steps=st.lists(st.tuples(st.floats(-10, 10), st.booleans()), min_size=1, max_size=20),
    gamma=st.sampled_from([0.0, 0.3, 0.95, 1.0]),
)
@SEARCH
def test_returns_are_those_of_a_loop(steps: list[tuple[float, bool]], gamma: float) -> None:
    rewards, mask = zip(*steps, strict=True)
    want = returns(list(rewards), list(mask), gamma)
    noisy = torch.tensor(rewards, dtype=torch.float64).masked_fill(~torch.tensor(mask), math.nan)
    got = return_to_go(noisy.expand(2, -1), torch.tensor(mask).float().expand(2, -1), gamma=gamma)
    assert got.tolist() == [pytest.approx(want, rel=1e-12, abs=1e-12)] * 2
    everywhere = returns(list(rewards), [True] * len(rewards), gamma)
    got = return_to_go(torch.tensor(rewards, dtype=torch.float64), gamma=gamma)
    assert got.tolist() == pytest.approx(everywhere, rel=1e-12, abs=1e-12)


def test_a_tools_answer_between_two_turns_costs_no_discount() -> None:
    rewards, mask = torch.tensor([1.0, 7, 7, 1, 1]), torch.tensor([1.0, 0, 0, 1, 1])
    assert return_to_go(rewards, mask, gamma=0.5).tolist() == [1.75, 0, 0, 1.5, 1]
    assert return_to_go(rewards, mask).tolist() == [3, 0, 0, 2, 1]


def test_a_long_response_neither_overflows_nor_underflows() -> None:
    got = return_to_go(torch.ones(1, 16_384), gamma=0.5)
    assert torch.equal(got[:, :-40], torch.full((1, 16_344), 2.0)) and got[0, -1] == 1
    got = return_to_go(torch.ones(16_384, dtype=torch.float64), gamma=0.999)
    torch.testing.assert_close(got[0].item(), (1 - 0.999**16_384) / 0.001, rtol=1e-10, atol=0)


def test_token_level_returns_do_not_see_what_follows() -> None:
    rewards = torch.tensor([1.0, -INF, math.nan])
    torch.testing.assert_close(return_to_go(rewards, gamma=0), rewards, equal_nan=True)


CALLS = {
    "log_ratio": log_ratio,
    "tanh": tanh_log_ratio,
    "power": power_difference,
    "box_cox": lambda p, q: box_cox(p, q, alpha=2),
    "difference": probability_difference,
    "extrapolated": lambda p, q: extrapolated_log_ratio(p, q, q),
    "contrast": contrast,
    "return_to_go": lambda p, q: return_to_go(p + q),
    "k1": k1,
    "k2": k2,
    "k3": k3,
}


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.int64])
def test_any_number_serves(kind: type) -> None:
    p, q = torch.randn(2, 3, 4)
    one = kind(1)
    for got, want in (
        (log_ratio(p, q, clip=(-one, one)), log_ratio(p, q, clip=(-1, 1))),
        (tanh_log_ratio(p, q, tau=one), tanh_log_ratio(p, q)),
        (power_difference(p, q, alpha=one), probability_difference(p, q)),
        (box_cox(p, q, alpha=one), box_cox(p, q, alpha=1)),
        (extrapolated_log_ratio(p, q, q, lam=one), log_ratio(p, q)),
        (return_to_go(p, gamma=one), return_to_go(p)),
    ):
        assert isinstance(got, Tensor) and got.dtype == torch.float32
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", CALLS)
def test_rewards_are_constants_in_at_least_float32(name: str) -> None:
    p, q = torch.randn(2, 3, 4).clamp(max=0).bfloat16()
    got = CALLS[name](p.requires_grad_(), q)
    assert got.dtype == torch.float32 and not got.requires_grad and got.shape == (3, 4)
    want = CALLS[name](p.detach().double(), q.double())
    assert want.dtype == torch.float64
    if name != "return_to_go":  # whose argument was rounded above
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)


P = torch.zeros(2, 3)
REFUSALS = {
    "shape": (
        lambda: log_ratio(P, P[:1]),
        ValueError,
        r"teacher_log_probs has shape \(1, 3\) and student_log_probs \(2",
    ),
    "list": (lambda: k1([0.0], P), TypeError, "student_log_probs is a list"),
    "ids": (lambda: k3(P, P.long()), TypeError, "teacher_log_probs is torch.int64"),
    "device": (lambda: k2(P, P.to("meta")), ValueError, "teacher_log_probs is on meta"),
    "base": (lambda: extrapolated_log_ratio(P, P, P[0]), ValueError, r"base_log_probs has shape \(3,\)"),
    "wrong": (lambda: contrast(P, [P, P[0]]), ValueError, r"wrong_log_probs\[1\] has shape"),
    "no wrong": (lambda: contrast(P, []), ValueError, "wrong_log_probs is empty"),
    "clip": (lambda: log_ratio(P, P, clip=5), TypeError, r"clip is 5; it must be a pair \(low, high\)"),
    "clip order": (lambda: log_ratio(P, P, clip=(1, -1)), ValueError, "low must not be above high"),
    "tau": (lambda: tanh_log_ratio(P, P, tau=0), ValueError, "tau is 0; it must be positive"),
    "alpha": (lambda: power_difference(P, P, alpha=0), ValueError, "alpha is 0; it must be positive"),
    "box_cox": (lambda: box_cox(P, P, alpha=-1), ValueError, "alpha is -1; it must not be negative"),
    "lam": (lambda: extrapolated_log_ratio(P, P, P, lam=math.inf), ValueError, "lam is inf; it must be finite"),
    "gamma": (lambda: return_to_go(P, gamma=1.5), ValueError, "gamma is 1.5; it must be from 0 to 1"),
    "gamma text": (lambda: return_to_go(P, gamma="1"), TypeError, "gamma is a str; it must be a number"),
    "mask": (lambda: return_to_go(P, P[0]), ValueError, r"mask has shape \(3,\) and rewards \(2, 3\)"),
    "0-d": (lambda: return_to_go(P[0, 0]), ValueError, "rewards has no dimension"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name: str) -> None:
    call, kind, message = REFUSALS[name]
    with pytest.raises(kind, match=message):
        call()
