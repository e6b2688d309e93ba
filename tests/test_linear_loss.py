"""The loss from hidden states and K rows of the head: every backend that has it, against the reference in float64."""

import sys
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from cases import LAYOUTS
from conftest import DEVICE
from torch import Tensor

from tests.direct import reference
from topk_rkl.divergence import capped

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
U = 2.0**-24  # half the distance of 1.0 to the next float32


@dataclass(frozen=True)
class Problem:
    """The arguments of linear_loss."""

    hidden: Tensor  # (N, H)
    head: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    ids: Tensor  # (N, K)
    values: Tensor  # (N, K)
    weights: Tensor | None = None  # (N,)
    temperature: float = 1.0
    logit_scale: float = 1.0
    softcap: float | None = None
    want_dhidden: bool = True

    def run(self, module: Any) -> tuple[Tensor, Tensor, Tensor]:
        return module.linear_loss(*vars(self).values())

    def double(self) -> "Problem":
        return replace(self, **{k: x.double() for k, x in vars(self).items() if k != "ids" and torch.is_tensor(x)})

    def row(self, i: int) -> "Problem":
        each = ("hidden", "ids", "values", "weights")
        return replace(self, **{k: vars(self)[k][i : i + 1].clone() for k in each if vars(self)[k] is not None})


def draw(
    n: int = 5,
    k: int = 5,
    vocab: int = 60,
    width: int = 70,
    dtype: torch.dtype = FP32,
    biased: bool = False,
    weighted: bool = False,
    **others: Any,
) -> Problem:
    """Logits of about unit size, the ids of a row different from each other."""
    ids = torch.rand(n, vocab).topk(k).indices.int()
    problem = Problem(
        hidden=torch.randn(n, width).to(dtype).to(DEVICE),
        head=(torch.randn(vocab, width) / width**0.5).to(dtype).to(DEVICE),
        bias=torch.randn(vocab).to(dtype).to(DEVICE) if biased else None,
        ids=ids.to(DEVICE),
        values=(2 * torch.randn(n, k)).to(DEVICE),
        weights=torch.tensor([1.0, -0.5, 2.0, 0.25, 3.0])[torch.arange(n) % 5].to(DEVICE) if weighted else None,
    )
    return replace(problem, **others)


def tolerances(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:  # (N,), (N, K), (N, H) for finite results
    """What the float32 products with the head may move each result by; the rest is float64, rounded once.

    The roundings of a sum have either sign: 16 u |x|, with |x| the root of the summed squares of its terms, is four
    standard deviations of a sum 48 additions deep. Let that, times the scale, be d, and D the largest log ratio. Then
    loss moves by sum |g| d <= 2 D d / T to first order, and g by p (6 D + 2) d / T^2, besides what the slope moves by.
    """
    x = problem.double()
    live = (x.ids >= 0) & (x.ids < len(x.head)) & (x.values != -torch.inf)
    columns = x.ids.where(live, 0).long()
    kept = x.head[columns]  # (N, K, H)
    terms = kept * x.hidden[:, None]
    raw, size = terms.sum(-1), (terms**2).sum(-1)
    if x.bias is not None:
        raw, size = raw + x.bias[columns], size + x.bias[columns] ** 2
    z, _ = capped(raw, x.logit_scale, x.softcap)
    d = (16 * U * abs(x.logit_scale) * size.sqrt()).where(live, 0).amax(1, keepdim=True)
    t = x.temperature
    log_p = (z / t).where(live, -torch.inf).log_softmax(1)
    log_q = (x.values / t).where(live, -torch.inf).log_softmax(1)
    ratio = 1 + (log_p - log_q).where(live, 0).abs().amax(1, keepdim=True)
    weight = 1 if x.weights is None else x.weights.abs()[:, None]
    loss, g, _ = problem.double().run(reference)
    loss_off = (2 * weight * ratio * d / t).squeeze(1) + 2e-6 * ratio.squeeze(1) * loss.abs()
    bend = 0 if x.softcap is None else 2 * d / x.softcap
    g_off = weight * abs(x.logit_scale) * log_p.exp() * 6 * ratio * d / t**2 + (2 * U + bend) * g.abs()
    g_off = g_off.where(live, 0)
    dhidden_off = torch.einsum("nkh,nk->nh", kept.abs(), g_off)
    return loss_off, g_off, dhidden_off + 16 * U * torch.einsum("nkh,nk->nh", kept**2, g**2).sqrt()


def assert_within(got: Tensor, want: Tensor, off: Tensor) -> None:
    assert got.shape == want.shape
    excess = (got.double() - want).abs() - off
    assert (excess <= 0).all(), f"{(excess > 0).sum()} numbers, by up to {excess.max()}; tolerance {off.max()}"


def assert_equals_the_reference(module: Any, problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    results = problem.run(module)
    assert all(x.dtype == FP32 for x in results)
    for got, want, off in zip(results, problem.double().run(reference), tolerances(problem), strict=True):
        assert_within(got, want, off)
    assert all(torch.equal(a, b) for a, b in zip(problem.run(module), results, strict=True))
    return results


def weight_grad(module: Any, g: Tensor, ids: Tensor, hidden: Tensor, vocab: int, dtype: torch.dtype) -> list[Tensor]:
    """[dhead, dbias]"""
    outs = [torch.full(shape, 99.0, dtype=dtype, device=DEVICE) for shape in ((vocab, hidden.shape[1]), (vocab,))]
    module.linear_weight_grad(g, ids, hidden, *outs)
    return outs


def assert_weight_grad_equals_the_reference(module: Any, g: Tensor, ids: Tensor, hidden: Tensor, vocab: int) -> None:
    """48 u, as a sum of hundreds of terms may be a chain; a low precision is that result rounded."""
    got = weight_grad(module, g, ids, hidden, vocab, FP32)
    want = weight_grad(reference, g.double(), ids, hidden.double(), vocab, torch.float64)
    squares = weight_grad(reference, g.double() ** 2, ids, hidden.double() ** 2, vocab, torch.float64)
    for x, y, square in zip(got, want, squares, strict=True):
        assert_within(x, y, 48 * U * square.sqrt())
    assert all(torch.equal(*pair) for pair in zip(weight_grad(module, g, ids, hidden, vocab, FP32), got, strict=True))
    for dtype in (BF16, FP16):
        for x, low in zip(got, weight_grad(module, g, ids, hidden, vocab, dtype), strict=True):
            # One unit in the last place, for the subnormal too.
            ulp = (torch.finfo(dtype).eps * x.abs()).clamp(min=torch.finfo(dtype).smallest_normal * 2.0**-7)
            assert low.dtype == dtype
            assert_within(low, x.to(dtype).double(), ulp.double())


@pytest.mark.parametrize(
    ("k", "width", "dtype", "others"),
    [
        (5, 70, FP32, {}),
        (1, 64, FP32, {"biased": True}),
        (33, 300, BF16, {"biased": True, "logit_scale": 0.3, "softcap": 5.0, "weighted": True}),
        (33, 70, FP16, {"temperature": 0.5, "weighted": True}),
        (5, 300, FP32, {"softcap": 0.7, "logit_scale": 2.0}),
        (5, 1100, BF16, {"temperature": 2.0}),
        (16, 16, FP16, {"biased": True, "softcap": 30.0}),
        (5, 1, FP32, {"logit_scale": -1.0}),
        (600, 16, FP32, {"n": 2, "vocab": 700, "softcap": 10.0}),
    ],
)
def test_the_reference_within_the_rounding_of_float32(module, k: int, width: int, dtype, others) -> None:
    problem = draw(k=k, width=width, dtype=dtype, **others)
    _, g, _ = assert_equals_the_reference(module, problem)
    assert_weight_grad_equals_the_reference(module, g, problem.ids, problem.hidden, len(problem.head))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_any_strides(module, layout: str, dtype) -> None:
    problem = draw(n=3, width=40, vocab=12, dtype=dtype)
    strided = replace(problem, hidden=LAYOUTS[layout](problem.hidden), head=LAYOUTS[layout](problem.head))
    _, g, _ = assert_equals_the_reference(module, strided)
    want = weight_grad(module, g, problem.ids, problem.hidden, 12, dtype)
    outs = [LAYOUTS[layout](torch.full_like(problem.head, 99.0)), torch.full((12, 2), 99.0, device=DEVICE).to(dtype)]
    module.linear_weight_grad(g, problem.ids, strided.hidden, outs[0], outs[1][:, 0])
    ulp = 2 * torch.finfo(dtype).eps * want[0].abs().double()
    assert_within(outs[0], want[0].double(), ulp)
    torch.testing.assert_close(outs[1][:, 0], want[1])
    assert (outs[1][:, 1] == 99).all()


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("values_dtype", [BF16, FP16, FP32, torch.float64])
def test_any_dtype_of_what_the_teacher_sent(module, ids_dtype, values_dtype) -> None:
    problem = draw(n=2, width=20, dtype=BF16, biased=True)
    others = {"ids": problem.ids.to(ids_dtype), "values": problem.values.to(values_dtype), "bias": problem.bias.float()}
    assert_equals_the_reference(module, replace(problem, **others))


def test_a_row_has_the_same_bits_alone(module) -> None:
    for problem in (draw(k=33, width=304, biased=True, weighted=True, softcap=4.0), draw(width=64, dtype=BF16)):
        batch = problem.run(module)
        for i in range(len(problem.ids)):
            alone = problem.row(i).run(module)
            assert all(torch.equal(x[0], y[i]) for x, y in zip(alone, batch, strict=True))


def test_the_gradient_of_the_hidden_state_is_left_out_unasked(module) -> None:
    problem = draw()
    loss, g, _ = problem.run(module)
    results = replace(problem, want_dhidden=False).run(module)
    assert torch.equal(results[0], loss) and torch.equal(results[1], g)
    assert results[2].shape == (0, 70) and results[2].dtype == FP32


def test_no_rows(module) -> None:
    problem = draw(n=0)
    loss, g, dhidden = problem.run(module)
    assert loss.shape == (0,) and g.shape == (0, 5) and dhidden.shape == (0, 70)
    for out in weight_grad(module, g, problem.ids, problem.hidden, 60, BF16):
        assert (out == 0).all()


def test_empty_slots_count_for_nothing_and_are_not_read(module) -> None:
    """Of the head and the bias only the rows of the support may be read: all others are NaN."""
    problem = draw(n=4, k=6, biased=True)
    problem.ids[0, 1], problem.ids[0, 4] = -1, 60
    problem.values[1, 2] = -torch.inf
    problem.ids[2] = torch.tensor([-1, -7, 60, 61, 2**31 - 1, -(2**31)])
    problem.values[3, 1:] = -torch.inf
    live = (problem.ids >= 0) & (problem.ids < 60) & (problem.values != -torch.inf)
    outside = torch.ones(60, dtype=torch.bool, device=DEVICE)
    outside[problem.ids[live].long()] = False
    problem.head[outside], problem.bias[outside] = torch.nan, torch.nan
    results = problem.run(module)
    clean = replace(problem, head=problem.head.nan_to_num(), bias=problem.bias.nan_to_num())
    assert all(torch.equal(a, b) for a, b in zip(results, assert_equals_the_reference(module, clean), strict=True))
    assert (results[1][~live] == 0).all() and results[1][0, [0, 2, 3, 5]].all()
    assert all((x[2] == 0).all() for x in results)
    assert_weight_grad_equals_the_reference(module, results[1], problem.ids, problem.hidden, 60)


def test_a_row_of_weight_zero_is_not_read(module) -> None:
    problem = draw(n=4, k=6, weights=torch.tensor([1.0, 0.0, -2.0, 0.0], device=DEVICE))
    problem.hidden[1], problem.values[3] = torch.nan, torch.nan
    results = problem.run(module)
    for row in (1, 3):
        assert all((x[row] == 0).all() for x in results)
    for row in (0, 2):
        assert_equals_the_reference(module, problem.row(row))
        assert all(torch.equal(x[row], y[0]) for x, y in zip(results, problem.row(row).run(module), strict=True))
    for out in weight_grad(module, results[1], problem.ids, problem.hidden, 60, FP32):
        assert out.isfinite().all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_row_of_the_head_spoils_the_rows_that_select_it(module, bad: float) -> None:
    problem = draw(n=4)
    problem.hidden.abs_()
    problem.ids[problem.ids == 7] = 8
    problem.ids[2, 3] = 7
    problem.head[7] = bad
    loss, g, dhidden = problem.run(module)
    assert loss.isnan().tolist() == g.isnan().all(1).tolist() == dhidden.isnan().all(1).tolist() == [0, 0, 1, 0]
    for row in (0, 1, 3):
        assert_equals_the_reference(module, problem.row(row))


def test_a_row_of_the_head_without_gradient_does_not_reach_the_hidden_state(module) -> None:
    """Probability 0 in the first row, a slope of 0 in the second, as tanh is flat at infinity."""
    problem = draw(n=1, k=4)
    problem.hidden.abs_()
    problem.ids[0, 1] = 9
    for sign, softcap in ((-1, None), (1, 3.0)):
        problem.head[9] = sign * torch.inf
        got = replace(problem, softcap=softcap).run(module)
        want = replace(problem.double(), softcap=softcap).run(reference)
        for x, y in zip(got, want, strict=True):
            assert x.isfinite().all()
            torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=1e-6)
        assert got[1][0, 1] == 0


def test_a_soft_cap_far_above_the_logits_is_none(module) -> None:
    """Where 1 - exp would have lost every digit of them; and one far below them bends all to the same."""
    problem = draw(biased=True)
    want, got = problem.run(module), replace(problem, softcap=1e12).run(module)
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-8)
    problem.values[:] = 0
    problem.hidden.mul_(1e4).abs_()
    problem.head.abs_()
    loss, g, _ = replace(problem, softcap=1e-3, bias=None).run(module)
    assert (loss.abs() < 1e-12).all() and (g.abs() < 1e-12).all()


def test_an_id_repeated_in_a_row(module) -> None:
    problem = draw(n=3, k=6)
    problem.ids[:, 3] = problem.ids[:, 0]
    problem.ids[1] = 11
    _, g, _ = assert_equals_the_reference(module, problem)
    assert_weight_grad_equals_the_reference(module, g, problem.ids, problem.hidden, 60)


@pytest.mark.parametrize("width", [3, 70])
def test_an_id_in_hundreds_of_rows(module, monkeypatch, width: int) -> None:
    """Id 4 has a slot of every row, id 1 many; rows without gradient hold NaN; scratch for a block of H at a time."""
    n, vocab = 520, 6
    hidden, g = torch.randn(n, width, device=DEVICE), torch.randn(n, 3, device=DEVICE)
    ids = torch.randint(-1, vocab + 1, (n, 3), device=DEVICE).int()
    ids[:, 1] = 4
    ids[100:450, 2] = 1
    g[ids == vocab], g[ids == 2] = 0, 0
    g[300:310], hidden[300:310] = 0, torch.nan
    assert_weight_grad_equals_the_reference(module, g, ids, hidden, vocab)
    outs = weight_grad(module, g, ids, hidden, vocab, FP32)
    assert all((x[2] == 0).all() for x in outs)
    file = sys.modules[module.linear_weight_grad.__module__]
    if hasattr(file, "SCRATCH_BYTES"):
        plan = replace(file.plan_linear_weight_grad(width), block=16)
        monkeypatch.setattr(file, "plan_linear_weight_grad", lambda _width: plan)
        monkeypatch.setattr(file, "SCRATCH_BYTES", 1)
        assert all(map(torch.equal, weight_grad(module, g, ids, hidden, vocab, FP32), outs))


def test_either_gradient_of_the_head_alone(module) -> None:
    problem = draw()
    _, g, _ = problem.run(module)
    both = weight_grad(module, g, problem.ids, problem.hidden, 60, FP32)
    alone = [torch.full_like(x, 99.0) for x in both]
    module.linear_weight_grad(g, problem.ids, problem.hidden, alone[0], None)
    module.linear_weight_grad(g, problem.ids, problem.hidden, None, alone[1])
    assert all(map(torch.equal, alone, both))


def test_the_hidden_state_follows_the_loss(module) -> None:
    """A step along the gradient changes the loss by what the gradient says."""
    problem = draw(n=2, k=20, biased=True, softcap=4.0, logit_scale=1.5)
    _, _, dhidden = problem.run(module)
    step = 1e-4 * torch.randn_like(problem.hidden).double()
    there, back = (replace(problem.double(), hidden=problem.hidden.double() + s * step) for s in (0.5, -0.5))
    moved = there.run(reference)[0] - back.run(reference)[0]
    torch.testing.assert_close((dhidden.double() * step).sum(1), moved, rtol=1e-4, atol=1e-10)
