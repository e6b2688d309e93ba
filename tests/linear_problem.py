"""A loss from hidden states, and by how much of the reference's result in float64 another may be off."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from conftest import DEVICE
from torch import Tensor

from tests.direct import reference
from topk_rkl.backends import products
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


def rounding(
    squares: Tensor,  # the sums of the squared terms
    deep: int,
) -> Tensor:
    """What float32 sums may be off by, of which no term takes part in more than so many additions.

    An addition rounds by at most u times what it gives, in either direction. The terms have either sign too, so the
    squares of what each layer of additions gives add up to those of the terms. Were every rounding as large as it can
    be, the deviation would be u sqrt(deep squares). These are four of that, seven with roundings of mean size.
    """
    return 4 * U * (deep * squares).sqrt()


def deep_product(width: int) -> int:
    """The lanes of a warp add every 32nd term at the least, and then each other's sums, the blocks', and the bias."""
    return width // 32 + 16


def deep_gradient(k: int) -> int:
    """At least 4 and at most 32 terms one after the other, and then such sums."""
    return min(k, 32) + k // 4 + 2


def deep_segment(pairs: int) -> int:
    """Fewer than 256 pairs at each end one after the other, and between them sums of 256."""
    return min(pairs, 512) + pairs // 256 + 16


def tolerances(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:  # (N,), (N, K), (N, H) for finite results
    """What the float32 products with the head may move each result by; the rest is float64, rounded once.

    Let d be the `rounding` of a product, times the scale, and D the largest log ratio. Then loss moves by
    sum |g| d <= 2 D d / T to first order, and g by p (6 D + 2) d / T^2, besides what the slope moves by.
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
    d = abs(x.logit_scale) * rounding(size, deep_product(x.hidden.shape[1])).where(live, 0).amax(1, keepdim=True)
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
    added = rounding(torch.einsum("nkh,nk->nh", kept**2, g**2), deep_gradient(g.shape[1]))
    return loss_off, g_off, dhidden_off + added


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


def assert_halves_equal_the_reference(module: Any, problem: Problem) -> tuple[Tensor, Tensor]:  # (N, K), (N, H)
    """linear_logits and linear_hidden_grad, with the values as gradients: float32 sums, the same bits every time."""
    x, given = problem.double(), (problem.hidden, problem.head, problem.bias, problem.ids)
    raw, dhidden = module.linear_logits(*given), module.linear_hidden_grad(problem.values, problem.ids, problem.head)
    known = (x.ids >= 0) & (x.ids < len(x.head))
    columns = x.ids.where(known, 0).long()
    rows = x.head[columns]  # (N, K, H)
    terms = rows * x.hidden[:, None]
    want, size = terms.sum(-1), (terms**2).sum(-1)
    if x.bias is not None:
        want, size = want + x.bias[columns], size + x.bias[columns] ** 2
    assert raw.dtype == dhidden.dtype == FP32
    assert_within(raw, want.where(known, 0), rounding(size, deep_product(x.hidden.shape[1])).where(known, 0))
    terms = rows * x.values.where(known, 0)[..., None]
    assert_within(dhidden, terms.sum(1), rounding((terms**2).sum(1), deep_gradient(x.ids.shape[1])))
    assert torch.equal(module.linear_logits(*given), raw)
    assert torch.equal(module.linear_hidden_grad(problem.values, problem.ids, problem.head), dhidden)
    return raw, dhidden


def weight_grad(module: Any, g: Tensor, ids: Tensor, hidden: Tensor, vocab: int, dtype: torch.dtype) -> list[Tensor]:
    """[dhead, dbias]"""
    outs = [torch.full(shape, 99.0, dtype=dtype, device=DEVICE) for shape in ((vocab, hidden.shape[1]), (vocab,))]
    module.linear_weight_grad(g, ids, hidden, *outs)
    return outs


def assert_weight_grad_equals_the_reference(module: Any, g: Tensor, ids: Tensor, hidden: Tensor, vocab: int) -> None:
    """A low precision is the result in float32, rounded."""
    got = weight_grad(module, g, ids, hidden, vocab, FP32)
    want = weight_grad(reference, g.double(), ids, hidden.double(), vocab, torch.float64)
    squares = weight_grad(reference, g.double() ** 2, ids, hidden.double() ** 2, vocab, torch.float64)
    for x, y, square in zip(got, want, squares, strict=True):
        assert_within(x, y, rounding(square, deep_segment(ids.numel())))
    assert all(torch.equal(*pair) for pair in zip(weight_grad(module, g, ids, hidden, vocab, FP32), got, strict=True))
    for dtype in (BF16, FP16):
        for x, low in zip(got, weight_grad(module, g, ids, hidden, vocab, dtype), strict=True):
            # One unit in the last place, for the subnormal too.
            ulp = (torch.finfo(dtype).eps * x.abs()).clamp(min=torch.finfo(dtype).smallest_normal * 2.0**-7)
            assert low.dtype == dtype
            assert_within(low, x.to(dtype).double(), ulp.double())


def small_blocks(monkeypatch: pytest.MonkeyPatch, rows: int, tokens: int) -> None:
    """For products of so many positions and tokens at a time, and losses of 50 slots."""
    for name, value in (("ROWS", rows), ("LOGITS", 4 * rows * tokens), ("SOLVED", 50)):
        monkeypatch.setattr(products, name, value)
