"""Weights, reductions, aggregation and masks: values computed by hand or by a loop."""

import pytest
import torch
from conftest import DEVICE

from topk_rkl import Support, teacher_topk, topk_reverse_kl
from topk_rkl.weighting import aggregate, special_token_mask


def per_token(student, teacher, **options):
    return topk_reverse_kl(student, teacher, k=5, reduction="none", **options)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32, torch.bfloat16, torch.float64])
def test_reductions_of_weighted_losses(backend, dtype: torch.dtype) -> None:
    student, teacher = torch.randn(2, 2, 3, 40, device=DEVICE)
    weights = torch.tensor([[1.0, 0.0, 1.0], [1.0, 1.0, 0.0]], device=DEVICE).to(dtype)
    if dtype.is_floating_point:
        weights = weights * torch.tensor([[0.5, 9.0, -2.0], [1.0, 3.0, 9.0]], device=DEVICE).to(dtype)
    plain = per_token(student, teacher)
    want = plain * weights.float()
    torch.testing.assert_close(per_token(student, teacher, weights=weights), want, rtol=1e-6, atol=1e-7)
    for reduction, value in [("sum", want.sum()), ("mean", want.sum() / weights.float().sum())]:
        got = topk_reverse_kl(student, teacher, k=5, weights=weights, reduction=reduction)
        torch.testing.assert_close(got, value, rtol=1e-6, atol=1e-7)
    for denominator in (7.0, 7, torch.tensor(7.0, device=DEVICE), torch.tensor(7)):
        got = topk_reverse_kl(student, teacher, k=5, weights=weights, denominator=denominator)
        torch.testing.assert_close(got, want.sum() / 7, rtol=1e-6, atol=1e-7)


def test_a_mean_without_weights_counts_positions(backend) -> None:
    student, teacher = torch.randn(2, 2, 3, 40, device=DEVICE)
    torch.testing.assert_close(topk_reverse_kl(student, teacher, k=5), per_token(student, teacher).mean())


@pytest.mark.parametrize("given", ["logits", "support"])
def test_weights_scale_the_gradient_of_their_row(backend, given: str) -> None:
    student, teacher = torch.randn(2, 3, 40, device=DEVICE)
    weights = torch.tensor([2.0, -0.5, 0.0], device=DEVICE)
    target, k = (teacher, 5) if given == "logits" else (teacher_topk(teacher, 5), None)

    def gradient(weights):
        leaf = student.clone().requires_grad_()
        topk_reverse_kl(leaf, target, k=k, weights=weights, reduction="sum").backward()
        return leaf.grad

    torch.testing.assert_close(gradient(weights), gradient(None) * weights[:, None], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("given", ["logits", "support"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_row_of_weight_0_contributes_exactly_0_whatever_it_holds(backend, given: str, bad: float) -> None:
    student, teacher = torch.randn(2, 3, 40, device=DEVICE)
    student[1], teacher[1] = bad, bad
    weights = torch.tensor([1.0, 0.0, 1.0], device=DEVICE)
    target, k = (teacher, 5) if given == "logits" else (Support(*torch.topk(teacher, 5)[::-1]), None)
    leaf = student.requires_grad_()
    loss = topk_reverse_kl(leaf, target, k=k, weights=weights, reduction="none")
    loss.sum().backward()
    assert loss[1] == 0 and (leaf.grad[1] == 0).all()
    assert loss[[0, 2]].isfinite().all() and (loss[[0, 2]] > 0).all() and leaf.grad.isfinite().all()


def test_a_mean_over_nothing_is_0_and_stays_attached(backend) -> None:
    student = torch.full((3, 40), torch.nan, device=DEVICE, requires_grad=True)
    for options in (
        {"weights": torch.zeros(3, device=DEVICE)},
        {"weights": torch.zeros(3, device=DEVICE), "denominator": 0},
    ):
        student.grad = None
        loss = topk_reverse_kl(student, torch.randn(3, 40, device=DEVICE), k=5, **options)
        loss.backward()
        assert loss == 0 and (student.grad == 0).all()


def test_a_mean_over_no_rows_is_0_and_stays_attached(backend) -> None:
    student = torch.randn(0, 40, device=DEVICE, requires_grad=True)
    loss = topk_reverse_kl(student, torch.randn(0, 40, device=DEVICE), k=5)
    loss.backward()
    assert loss == 0 and student.grad.shape == (0, 40)


LOSSES = torch.tensor([[1.0, 2.0, 3.0, torch.nan], [4.0, torch.nan, torch.nan, torch.nan], [torch.nan] * 4])
MASK = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]])


@pytest.mark.parametrize(
    ("mode", "options", "want"),
    [
        ("token-mean", {}, 10 / 4),
        ("token-mean", {"denominator": 8}, 10 / 8),
        ("token-sum", {}, 10),
        ("seq-mean-token-sum", {}, (6 + 4) / 2),
        ("seq-mean-token-sum", {"denominator": torch.tensor(3)}, (6 + 4) / 3),
        ("seq-mean-token-mean", {}, (2 + 4) / 2),
        ("seq-mean-token-sum-norm", {}, (6 / 4 + 4 / 4) / 2),
        ("seq-mean-token-sum-norm", {"norm": 100, "denominator": 3}, (6 / 100 + 4 / 100) / 3),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_aggregate(mode: str, options: dict, want: float, dtype: torch.dtype) -> None:
    losses = LOSSES.clone().requires_grad_()
    value = aggregate(losses, MASK.to(dtype), mode, **options)
    value.backward()
    assert value.item() == pytest.approx(want, rel=1e-6)
    assert (losses.grad[MASK == 0] == 0).all() and (losses.grad[MASK == 1] > 0).all()


def test_aggregate_takes_weights() -> None:
    losses, mask = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[0.5, 1.5], [0.0, -1.0]])
    assert aggregate(losses, mask, "token-mean").item() == pytest.approx((0.5 + 3 - 4) / 1.0)
    assert aggregate(losses, mask, "seq-mean-token-mean").item() == pytest.approx((3.5 / 2 + 4) / 2)


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"])
def test_aggregate_of_nothing_is_0_and_stays_attached(mode: str) -> None:
    losses = torch.full((2, 3), torch.nan, requires_grad=True)
    value = aggregate(losses, torch.zeros(2, 3), mode)
    value.backward()
    assert value == 0 and (losses.grad == 0).all()


def test_special_token_mask() -> None:
    ids = torch.tensor([[7, 1, 7, 2, 1], [3, 3, 1, 3, 7]])
    first = special_token_mask(ids, [7, 1])
    assert first.tolist() == [[False, False, True, True, True], [True, True, False, True, False]]
    every = special_token_mask(ids, torch.tensor([7, 1]), occurrences="all")
    assert every.tolist() == [[False, False, False, True, False], [True, True, False, True, False]]
    assert special_token_mask(ids, []).all() and special_token_mask(ids[0], [2], "first").tolist() == [
        True,
        True,
        True,
        False,
        True,
    ]
