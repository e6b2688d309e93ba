"""Weights, reductions, aggregation and masks: values computed by hand or by a loop."""

import numpy as np
import pytest
import torch
from conftest import DEVICE
from torch._dynamo.testing import CompileCounter

from tests.probes import NoHostSync
from topk_rkl import Support, teacher_topk, topk_divergence, topk_reverse_kl
from topk_rkl.diagnostics import topk_diagnostics
from topk_rkl.recipe.builders import fixed_ids
from topk_rkl.recipe.composition import mixture
from topk_rkl.recipe.rewards import return_to_go
from topk_rkl.recipe.rollout import sample_top_p, sampled_token_loss
from topk_rkl.recipe.weighting import aggregate, special_token_mask


def per_token(student, teacher, **options):
    return topk_reverse_kl(student, teacher, k=5, reduction="none", **options)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float16, torch.float32, torch.bfloat16, torch.float64])
def test_reductions_of_weighted_losses(backend, dtype: torch.dtype) -> None:
    student, teacher = torch.randn(2, 2, 3, 40, device=DEVICE)
    weights = torch.tensor([[1.0, 0.0, 1.0], [1.0, 1.0, 0.0]], device=DEVICE).to(dtype)
    if dtype.is_floating_point:
        weights = weights * torch.tensor([[0.3, 9.0, -2.0], [1 / 3, 3.0, 9.0]], device=DEVICE).to(dtype)
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
    weights = torch.tensor([2.0, -0.3, 0.0], device=DEVICE)
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


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("zero", [0, 0.0, np.float32(0), torch.tensor(0), torch.tensor(0.0, dtype=torch.bfloat16)])
def test_a_denominator_of_0_is_one_thing_as_a_number_and_as_a_tensor(zero, bad: float) -> None:
    leaf, teacher, ids = torch.full((2, 3, 9), bad), torch.randn(2, 3, 9), torch.zeros(2, 3).long()
    leaf.requires_grad_()
    means = [lambda mode=mode: aggregate(leaf.sum(-1), torch.ones(2, 3), mode, denominator=zero) for mode in MEANS]
    means.append(lambda: sampled_token_loss(leaf, teacher, ids, denominator=zero))
    assert topk_reverse_kl(leaf, teacher, k=2, denominator=zero) == 0
    for mean in means:
        loss = mean()
        (gradient,) = torch.autograd.grad(loss, leaf)
        assert loss == 0 and (gradient == 0).all()


@pytest.mark.parametrize("denominator", [7, 3.5, 1e-46, 1e30, np.float32(2.5), np.int64(3)])
def test_any_number_divides_as_the_tensor_of_it(denominator) -> None:
    losses, mask = torch.rand(2, 3), torch.ones(2, 3)
    for mode in MEANS:
        of_number = aggregate(losses, mask, mode, denominator=denominator)
        of_tensor = aggregate(losses, mask, mode, denominator=torch.tensor(float(denominator), dtype=torch.float64))
        assert torch.equal(of_number, of_tensor) and of_number > 0


def test_a_mean_over_no_rows_is_0_and_stays_attached(backend) -> None:
    student = torch.randn(0, 40, device=DEVICE, requires_grad=True)
    loss = topk_reverse_kl(student, torch.randn(0, 40, device=DEVICE), k=5)
    loss.backward()
    assert loss == 0 and student.grad.shape == (0, 40)


MEANS = ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]
LOSSES = torch.tensor([[1.0, 2.0, 3.0, torch.nan], [4.0, torch.nan, torch.nan, torch.nan], [torch.nan] * 4])
MASK = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]]).bool()


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
@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16, torch.float32])
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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("mode", ["token-sum", *MEANS])
def test_nothing_is_counted_or_summed_in_low_precision(mode: str, dtype: torch.dtype, mask_dtype: torch.dtype) -> None:
    losses = torch.rand(10, 701).to(dtype).requires_grad_()
    mask = (torch.rand(10, 701) < 0.9).to(mask_dtype)
    exact = losses.detach().double().requires_grad_()
    got, want = aggregate(losses, mask, mode), aggregate(exact, mask.double(), mode)
    assert got.dtype == torch.float32 and want.dtype == torch.float64
    torch.testing.assert_close(got.double(), want, rtol=1e-7, atol=0)
    got.backward(), want.backward()
    assert torch.equal(losses.grad, exact.grad.float().to(dtype))


@pytest.mark.parametrize("mode", MEANS)
def test_aggregate_of_nothing_is_0_and_stays_attached(mode: str) -> None:
    losses = torch.full((2, 3), torch.nan, requires_grad=True)
    value = aggregate(losses, torch.zeros(2, 3), mode)
    value.backward()
    assert value == 0 and (losses.grad == 0).all()


LENGTHS = torch.tensor([4, 2, 0, 1, 5, 0])
PADDED = torch.arange(5) < LENGTHS[:, None]  # (sequences, T)
CUTS = torch.nn.functional.pad(LENGTHS.cumsum(0), (1, 0))


@pytest.mark.parametrize("cuts", [torch.int32, torch.int64])
@pytest.mark.parametrize("shape", [(-1,), (1, -1), (3, -1)])
@pytest.mark.parametrize("mode", ["token-sum", *MEANS])
def test_packed_sequences_aggregate_as_padded_ones(mode: str, shape: tuple, cuts: torch.dtype) -> None:
    options = {"norm": 9} if mode.endswith("norm") else {}
    mask = torch.randint(-1, 3, PADDED.shape).float() * PADDED
    padded = torch.randn(PADDED.shape, dtype=torch.float64).masked_fill(mask == 0, torch.nan).requires_grad_()
    packed = padded.detach()[PADDED].view(shape).requires_grad_()
    want = aggregate(padded, mask, mode, **options)
    got = aggregate(packed, mask[PADDED].view(shape), mode, cu_seqlens=CUTS.to(cuts), **options)
    torch.testing.assert_close(got, want, rtol=1e-14, atol=1e-14)
    got.backward(), want.backward()
    torch.testing.assert_close(packed.grad.flatten(), padded.grad[PADDED], rtol=1e-14, atol=1e-14)


def test_a_sequence_that_is_not_finite_leaves_the_others_of_its_row_alone() -> None:
    losses = torch.tensor([1.0, 2, torch.nan, torch.inf, 3, 4], requires_grad=True)
    cuts, mask = torch.tensor([0, 2, 4, 6]), torch.tensor([1.0, 1, 0, 0, 1, 1])
    assert aggregate(losses, mask, "seq-mean-token-mean", cu_seqlens=cuts) == (1.5 + 3.5) / 2
    assert return_to_go(losses, cu_seqlens=cuts)[[0, 1, 4, 5]].tolist() == [3, 2, 7, 4]


@pytest.mark.parametrize("occurrences", ["first", "all"])
@pytest.mark.parametrize("shape", [(-1,), (1, -1), (3, -1)])
def test_special_tokens_of_packed_responses_are_those_of_padded_ones(occurrences, shape: tuple) -> None:
    ids = torch.randint(3, PADDED.shape).masked_fill(~PADDED, -100)
    want = special_token_mask(ids, [0, 2], occurrences)[PADDED]
    got = special_token_mask(ids[PADDED].view(shape), [0, 2], occurrences, cu_seqlens=CUTS)
    assert torch.equal(got, want.view(shape)) and not want.all()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(-1,), (1, -1), (3, -1)])
def test_returns_end_with_their_own_packed_sequence(gamma: float, shape: tuple, masked: bool) -> None:
    rewards = torch.randn(PADDED.shape, dtype=torch.float64)
    mask = (torch.rand(PADDED.shape) < 0.6) & PADDED if masked else PADDED
    want = return_to_go(rewards, mask, gamma=gamma)[PADDED]
    got = return_to_go(rewards[PADDED].view(shape), mask[PADDED].view(shape), gamma=gamma, cu_seqlens=CUTS)
    torch.testing.assert_close(got, want.view(shape), rtol=1e-13, atol=1e-13)


def test_what_lies_outside_the_cuts_is_a_sequence_of_its_own() -> None:
    rewards = torch.ones(6)
    for cuts in ([0, 2, 5], [2, 5], [0, 2, 5, 6], [0, 2, 2, 5, 6, 6]):
        assert return_to_go(rewards, cu_seqlens=torch.tensor(cuts)).tolist() == [2, 1, 3, 2, 1, 1]


def test_no_host_sync_around_the_loss() -> None:
    losses, teacher = torch.rand(12, device=DEVICE, requires_grad=True), torch.randn(12, 30, device=DEVICE)
    cuts, ids = CUTS.to(DEVICE), torch.randint(30, (12,), device=DEVICE)
    support, zero = teacher_topk(teacher, 5, normalize=True), torch.zeros(12, device=DEVICE)
    leaf = torch.randn_like(teacher).requires_grad_()
    with NoHostSync():
        kept = special_token_mask(ids, torch.tensor([1, 3], device=DEVICE), cu_seqlens=cuts)
        returns = return_to_go(losses, kept, gamma=0.5, cu_seqlens=cuts)
        for mode in MEANS:
            options = {"norm": 9} if mode.endswith("norm") else {}
            aggregate(losses, kept, mode, cu_seqlens=cuts, **options).backward()
            aggregate(losses, kept, mode, cu_seqlens=cuts, denominator=zero[0], **options).backward()
        sampled = sample_top_p(teacher, 0.9)
        sampled_token_loss(leaf, teacher, sampled, weights=kept, temperature=0.7, denominator=3).backward()
        mixed = mixture([support, fixed_ids(teacher, support.ids, normalize=True)], [1, zero])
        topk_divergence(leaf, mixed, mass="tail")
        topk_diagnostics(leaf, mixed, ("teacher_mass", "overlap_token_advantage", "max_log_ratio"))
    assert returns.isfinite().all() and losses.grad.isfinite().all() and leaf.grad.isfinite().all()


@pytest.mark.slow
def test_packed_sequences_compile_at_most_twice_over_changing_n() -> None:
    counter = CompileCounter()

    def packed(losses, ids, cuts):
        kept = special_token_mask(ids, [3], cu_seqlens=cuts)
        returns = return_to_go(losses, kept, gamma=0.5, cu_seqlens=cuts)
        return aggregate(returns, kept, "seq-mean-token-mean", cu_seqlens=cuts)

    compiled = torch.compile(packed, fullgraph=True, backend=counter)
    for n in (8, 9, 10, 13):
        arguments = torch.rand(n), torch.randint(5, (n,)), torch.tensor([0, 3, 3, n])
        torch.testing.assert_close(compiled(*arguments), packed(*arguments))
    assert counter.frame_count <= 2


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


@pytest.mark.parametrize("beyond", [2**32 + 2, -(2**32) + 2, 2**31, 2**63 - 1])
@pytest.mark.parametrize("form", [list, torch.tensor])
def test_special_tokens_are_never_narrowed(beyond: int, form) -> None:
    ids = torch.tensor([[2, 5, -1]], dtype=torch.int32)
    assert special_token_mask(ids, form([beyond, 5])).tolist() == [[True, False, True]]
    assert special_token_mask(torch.tensor([[beyond, 5]]), torch.tensor([2, 5], dtype=torch.int32)).tolist() == [
        [True, False]
    ]
