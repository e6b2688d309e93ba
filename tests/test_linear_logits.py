"""A head that several ranks share: the products of one shard, the gradient they send back, and the shard's tail."""

import sys
from collections.abc import Iterator

import pytest
import torch
from conftest import BACKENDS, DEVICE, EVERY_OBJECTIVE, same_bits, simulated
from torch import Tensor

from tests.cases import LAYOUTS
from tests.direct import reference
from tests.linear_problem import BF16, FP16, FP32, Problem, assert_halves_equal_the_reference, draw, small_blocks
from topk_rkl import backends, ops, use_backend
from topk_rkl.divergence import capped
from topk_rkl.objective import pack

FP64 = torch.float64
HAVE_IT = EVERY_OBJECTIVE


def products(module, x: Problem) -> Tensor:  # (N, K)
    return module.linear_logits(x.hidden, x.head, x.bias, x.ids)


@pytest.mark.parametrize(
    ("k", "width", "dtype", "others"),
    [
        (5, 70, FP32, {}),
        (1, 64, FP32, {"biased": True}),
        (33, 300, BF16, {"biased": True}),
        (33, 70, FP16, {}),
        (5, 1100, BF16, {}),
        (5, 1, FP32, {"biased": True}),
        (600, 16, FP32, {"n": 2, "vocab": 700}),
        (300, 1030, FP32, {"n": 9, "vocab": 900}),  # a chain of 75 sums for each number of the gradient
    ],
)
def test_within_the_rounding_of_float32(module, k: int, width: int, dtype, others) -> None:
    problem = draw(k=k, width=width, dtype=dtype, **others)
    problem.ids[:, ::3] += len(problem.head) // 3  # some of them outside
    problem.ids[-1, 0] = -1
    assert_halves_equal_the_reference(module, problem)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize(("k", "width"), [(17, 70), (40, 300)])
def test_the_products_are_those_of_linear_loss(module, dtype, k: int, width: int) -> None:
    """The loss of the products, as logits, has the bits of linear_loss, and so has the gradient of the hidden state."""
    problem = draw(n=3, k=k, width=width, dtype=dtype, biased=True, weighted=True, temperature=0.5)
    loss, g, dhidden = problem.run(module)
    raw = products(module, problem)
    places = torch.arange(k, dtype=torch.int32, device=DEVICE).expand(3, k).contiguous()
    got = module.support_loss(raw, places, problem.values, problem.weights, problem.temperature)
    assert same_bits(got[0], loss) and same_bits(got[1], g)
    assert same_bits(module.linear_hidden_grad(g, problem.ids, problem.head), dhidden)


def test_the_reference_of_float64() -> None:
    problem = draw(biased=True).double()
    want = (problem.head[problem.ids.long()] * problem.hidden[:, None]).sum(-1) + problem.bias[problem.ids.long()]
    got = products(reference, problem)
    assert got.dtype == FP64
    torch.testing.assert_close(got, want, rtol=1e-14, atol=1e-14)
    _, g, dhidden = problem.run(reference)
    assert same_bits(reference.linear_hidden_grad(g, problem.ids, problem.head), dhidden)


def shards(vocab: int, *ends: int) -> Iterator[slice]:
    starts = (0, *ends)
    return (slice(start, end) for start, end in zip(starts, (*ends, vocab), strict=True))


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_the_products_of_all_shards_have_the_bits_of_the_whole(backend, dtype) -> None:
    """One term of each sum is not 0. Shards are of any size, the empty one included, and views of the whole head."""
    problem = draw(n=4, k=20, biased=True, dtype=dtype)
    hidden, head, bias, ids = problem.hidden, problem.head, problem.bias, problem.ids
    hidden, ids = hidden.view(2, 2, -1), ids.view(2, 2, -1)
    want = ops.linear_logits(hidden, head, bias, ids, backend)
    g = torch.randn_like(want)
    whole, found, parts = torch.empty_like(hidden, dtype=FP32), torch.zeros_like(want), []
    ops.linear_hidden_grad(g, ids, head, whole, backend)
    for shard in shards(60, 7, 7, 41):
        local = ids.long() - shard.start
        found += ops.linear_logits(hidden, head[shard], bias[shard], local, backend)
        parts.append(torch.full_like(whole, 99.0))
        ops.linear_hidden_grad(g, local, head[shard], parts[-1], backend)
    assert same_bits(found, want)
    assert (parts[1] == 0).all() and found.any()
    torch.testing.assert_close(sum(parts), whole, rtol=1e-5, atol=1e-5)


def test_a_head_without_rows_is_not_read(backend) -> None:
    hidden, ids = torch.full((3, 8), torch.nan, device=DEVICE), torch.zeros(3, 2, dtype=torch.int32, device=DEVICE)
    head, bias, dhidden = hidden[:0], hidden[:0, 0], torch.full((3, 8), 99.0, device=DEVICE)
    assert (ops.linear_logits(hidden, head, bias, ids, backend) == 0).all()
    ops.linear_hidden_grad(torch.ones(3, 2, device=DEVICE), ids, head, dhidden, backend)
    assert (dhidden == 0).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_any_strides(module, layout: str, dtype) -> None:
    problem = draw(n=3, width=40, vocab=12, dtype=dtype)
    raw, dhidden = assert_halves_equal_the_reference(module, problem)
    head = LAYOUTS[layout](problem.head)
    got = module.linear_logits(LAYOUTS[layout](problem.hidden), head, None, problem.ids)
    torch.testing.assert_close(got, raw, rtol=1e-5, atol=1e-6)
    if module.__name__.endswith("triton"):  # whose order of sums is not that of a layout
        assert same_bits(got, raw)
    got = module.linear_hidden_grad(problem.values.float(), problem.ids, head)
    torch.testing.assert_close(got, dhidden, rtol=1e-5, atol=1e-6)


def test_slabs_of_hidden_states(backend) -> None:
    """The positions of `hidden[:, :-1]` have no single stride."""
    problem = draw(n=6, biased=True)
    hidden, ids = problem.hidden.view(2, 3, -1)[:, :-1], problem.ids.view(2, 3, -1)[:, :-1]
    got = ops.linear_logits(hidden, problem.head, problem.bias, ids, backend)
    want = ops.linear_logits(hidden.contiguous(), problem.head, problem.bias, ids.contiguous(), backend)
    assert same_bits(got, want)
    strided, outs = torch.randn_like(want).mT.contiguous().mT, (torch.empty_like(hidden), torch.empty_like(hidden))
    for g, out in zip((strided, strided.contiguous()), outs, strict=True):
        ops.linear_hidden_grad(g, ids, problem.head, out, backend)
    assert same_bits(*outs)


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
def test_rows_outside_the_support_are_not_read(module, ids_dtype) -> None:
    """Of the head and the bias only the rows that a slot names may be read: all others are NaN."""
    problem = draw(n=4, k=6, biased=True, width=40)
    ids = problem.ids.to(ids_dtype)
    ids[1] = torch.tensor([-1, -7, 60, 61, 2**31 - 1, -(2**31)])
    if ids_dtype == torch.int64:
        ids[2, :2] = torch.tensor([2**32 + 3, -(2**32) + 3])  # which would wrap into the head
    g = torch.randn(4, 6, device=DEVICE)
    known = (ids >= 0) & (ids < 60)
    unread = torch.ones(60, dtype=torch.bool, device=DEVICE)
    unread[ids[known].long()] = False
    problem.head[unread], problem.bias[unread] = torch.nan, torch.nan
    raw = module.linear_logits(problem.hidden, problem.head, problem.bias, ids)
    assert raw.isfinite().all() and (raw[~known] == 0).all() and (raw[known] != 0).all()
    g[~known] = torch.nan
    g[0, 2], unread[ids[0, 2].long()] = 0, True
    problem.head[ids[0, 2].long()] = torch.inf
    g[(ids == ids[0, 2]) & known] = 0
    dhidden = module.linear_hidden_grad(g, ids, problem.head)
    assert dhidden.isfinite().all() and (dhidden[1] == 0).all() and dhidden[0].all()


def test_what_is_not_finite_stays_in_its_slot_and_its_row(module) -> None:
    problem = draw(n=3, k=6)
    problem.hidden[0], problem.ids[0, 1] = torch.nan, -1
    problem.ids[1:][problem.ids[1:] == 9] = 8
    problem.ids[1, 3], problem.head[9] = 9, torch.inf
    raw = products(module, problem)
    assert raw[0].isnan().tolist() == [True, False, True, True, True, True] and raw[0, 1] == 0
    assert raw[1].isfinite().tolist() == [True, True, True, False, True, True] and raw[2].isfinite().all()
    g = torch.ones(3, 6, device=DEVICE)
    g[2, 0] = torch.nan
    dhidden = module.linear_hidden_grad(g, problem.ids, problem.head)
    assert not dhidden[1].isfinite().any() and dhidden[2].isnan().all()


def test_an_id_repeated_in_a_row(module) -> None:
    problem = draw(n=3, k=6)
    problem.ids[:, 3], problem.ids[1] = problem.ids[:, 0], 11
    raw, _ = assert_halves_equal_the_reference(module, problem)
    assert (raw[1] == raw[1, 0]).all()


def test_no_rows_and_a_row_alone(module) -> None:
    problem = draw(k=33, width=304, biased=True)
    raw, dhidden = assert_halves_equal_the_reference(module, problem)
    for i in range(5):
        alone = problem.row(i)
        assert same_bits(products(module, alone)[0], raw[i])
        assert same_bits(module.linear_hidden_grad(alone.values, alone.ids, alone.head)[0], dhidden[i])
    none = draw(n=0)
    assert products(module, none).shape == (0, 5)
    assert module.linear_hidden_grad(none.values, none.ids, none.head).shape == (0, 70)


@pytest.mark.skipif("native" not in BACKENDS, reason="the extension is not built")
def test_any_number_of_threads_gives_the_same_bits() -> None:
    problem, threads = draw(n=200, k=20, biased=True), torch.get_num_threads()
    results = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            dhidden = torch.empty_like(problem.hidden)
            ops.linear_hidden_grad(problem.values, problem.ids, problem.head, dhidden, "native")
            raw = ops.linear_logits(problem.hidden, problem.head, problem.bias, problem.ids, "native")
            results.append((raw, dhidden))
    finally:
        torch.set_num_threads(threads)
    assert all(map(same_bits, *results))


def test_a_backend_without_the_kernels_names_one_that_has_them(monkeypatch) -> None:
    """`auto` passes over it."""

    class Lacking:
        refusal = objective_refusal = staticmethod(lambda *_: None)

    class Having(Lacking):
        linear_logits = linear_hidden_grad = None

    monkeypatch.setattr(backends, "_load", {"cuda": Lacking, "native": Having}.__getitem__)
    monkeypatch.setattr(backends, "unavailable", lambda _: None)
    monkeypatch.setattr(backends, "_fastest", lambda *_: ("cuda", "native"))
    hidden = torch.randn(2, 8)
    for function in ("linear_logits", "linear_hidden_grad"):
        refusal = f"'cuda' backend cannot take these tensors: it has no kernel for {function}; use 'triton' or 'auto'"
        with pytest.raises(RuntimeError, match=refusal):
            backends.choose("cuda", 3, hidden, linear=True, function=function)
        assert backends.choose("auto", 3, hidden, linear=True, function=function) is Having
        assert backends.choose("auto", 3, hidden, linear=True) is Lacking


@pytest.mark.skipif("cuda" not in BACKENDS, reason="the CUDA part of the extension is not built")
def test_cuda_refuses_them_by_name() -> None:
    problem = draw()
    with pytest.raises(RuntimeError, match="no kernel for linear_logits; use 'triton'"):
        ops.linear_logits(problem.hidden, problem.head, None, problem.ids, "cuda")
    out = torch.empty_like(problem.hidden)
    with pytest.raises(RuntimeError, match="no kernel for linear_hidden_grad; use 'triton'"):
        ops.linear_hidden_grad(problem.values, problem.ids, problem.head, out, "cuda")


def tail_of(x: Problem) -> Tensor:  # (N,) float64
    """In float64, column by column."""
    y, known = x.double(), (x.ids >= 0) & (x.ids < len(x.head))
    raw = y.hidden @ y.head.T if y.bias is None else y.hidden @ y.head.T + y.bias
    z, _ = capped(raw, x.logit_scale, x.softcap)
    for row, named in enumerate(known):
        z[row, x.ids[row][named].long()] = -torch.inf
    return x.temperature * (z / x.temperature).logsumexp(1)


def packed(x: Problem) -> Tensor | None:
    return pack(x.temperature, mass="tail", logit_scale=x.logit_scale, softcap=x.softcap)


@pytest.mark.parametrize("dtype", [BF16, FP32, FP64])
@pytest.mark.parametrize("others", [{}, {"softcap": 3.0, "logit_scale": 1.5, "temperature": 0.6, "biased": True}])
def test_the_tail_of_a_shard(dtype, others, monkeypatch) -> None:
    small_blocks(monkeypatch, 2, 17)
    problem = draw(dtype=dtype, k=7, **others)
    problem.ids[0] = torch.tensor([-1, 60, -5, 70, 3, 3, 2**31 - 1])
    hidden, ids, objective = problem.hidden[:4].view(2, 2, -1), problem.ids[:4].view(2, 2, -1), packed(problem)
    got = ops.linear_tail_logit(hidden, problem.head, problem.bias, ids, objective, "auto")
    want = tail_of(problem)[:4].view(2, 2)
    rounding = 1e-13 if dtype == FP64 else 2e-6
    assert got.dtype == FP64
    torch.testing.assert_close(got, want, rtol=rounding, atol=rounding)
    parts = [
        ops.linear_tail_logit(
            hidden, problem.head[shard], problem.bias if problem.bias is None else problem.bias[shard],
            ids.long() - shard.start, objective, "auto",
        )
        for shard in shards(60, 7, 7, 41)
    ]  # fmt: skip
    assert (parts[1] == -torch.inf).all()  # the empty shard
    t = problem.temperature
    torch.testing.assert_close(t * (torch.stack(parts) / t).logsumexp(0), want, rtol=rounding, atol=rounding)


def test_a_tail_of_no_token_and_one_that_is_not_finite() -> None:
    problem = draw(n=2, k=3, vocab=3, width=4)
    head = (problem.hidden, problem.head, None)
    problem.hidden[1] = torch.nan
    assert ops.linear_tail_logit(*head, problem.ids, None, "auto")[0] == -torch.inf
    tails = ops.linear_tail_logit(*head, problem.ids - 1, None, "auto")
    assert tails.isfinite().tolist() == [True, False] and tails[1].isnan()


def test_the_tail_takes_no_kernel_by_name() -> None:
    problem = draw()
    with pytest.raises(RuntimeError, match="'triton' backend has no mass='tail' from hidden states; use 'auto'"):
        ops.linear_tail_logit(problem.hidden, problem.head, None, problem.ids, packed(problem), "triton")
    ops.linear_tail_logit(problem.hidden, problem.head, None, problem.ids, packed(problem), "auto")


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_a_selection_with_the_total_of_each_row(backend, dtype, full: bool, monkeypatch) -> None:
    monkeypatch.setattr(sys.modules["topk_rkl.ops.linear"], "LOGITS", 1_000)
    problem = draw(n=6, dtype=dtype, width=16, biased=True)
    hidden, head = problem.hidden.view(2, 3, -1)[:, :2], (problem.head, problem.bias)
    objective = pack(logit_scale=1.5, softcap=3.0)
    options = (4, 2, objective, False, full)
    ids, values, total = ops.linear_select(hidden, *head, *options, True, backend)
    x = hidden.double() @ problem.head.double().T + problem.bias.double()
    want = capped(x, 1.5, 3.0)[0].logsumexp(-1)
    rounding = 2e-6 if full or dtype == FP32 else 4e-2
    assert total.dtype == FP64 and total.shape == (2, 2)
    torch.testing.assert_close(total, want, rtol=rounding, atol=rounding)
    without = ops.linear_select(hidden, *head, *options, False, backend)
    assert torch.equal(without[0], ids) and same_bits(without[1], values)
    assert without[2].shape == (0,) and without[2].dtype == FP64


def test_the_total_of_a_row_with_infinity_is_nan() -> None:
    """As `ops.tail_logit` has it: such a row is no distribution."""
    hidden, bias = torch.ones(2, 4), torch.zeros(5)
    bias[3] = torch.inf
    hidden[1] = -torch.inf
    *_, total = ops.linear_select(hidden[:1], torch.ones(5, 4), bias, 2, None, None, False, True, True, "reference")
    assert total.isnan().all()
    with use_backend("reference"):
        assert ops.tail_logit(bias[None], torch.full((1, 1), -1), None, "reference").isnan().all()
    *_, total = ops.linear_select(hidden[1:], torch.ones(5, 4), None, 2, None, None, False, True, True, "reference")
    assert total.item() == -torch.inf


def test_sizes_one_past_a_block(module) -> None:
    """Of slots, of columns and of terms."""
    n = 1 if simulated(module) else 9
    for k, width in ((17, 257), (16, 16), (65, 129)):
        assert_halves_equal_the_reference(module, draw(n=n, k=k, width=width, vocab=90, dtype=BF16, biased=True))
