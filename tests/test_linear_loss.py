"""The loss from hidden states and K rows of the head: every backend that has it, against the reference in float64."""

import sys
from dataclasses import replace

import pytest
import torch
from conftest import DEVICE, simulated

from tests.cases import LAYOUTS
from tests.direct import reference
from tests.linear_problem import (
    BF16,
    FP16,
    FP32,
    assert_equals_the_reference,
    assert_weight_grad_equals_the_reference,
    assert_within,
    draw,
    weight_grad,
)


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
    if k < 600 or not simulated(module):  # adds up pairs, however many a row has
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
    if module.__name__.endswith("triton"):  # whose order of sums is not that of a layout
        assert torch.equal(outs[0], want[0])
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
