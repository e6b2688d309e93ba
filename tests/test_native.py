"""What only the compiled extension promises: each instruction set, many threads, and refusals before a pointer."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import BACKENDS

from tests import cases
from tests.direct import Direct, reference
from tests.oracles import DTYPES, assert_selects
from topk_rkl import backends
from topk_rkl.backends.pointers import check_extent

pytestmark = pytest.mark.skipif("native" not in BACKENDS, reason="the extension was not built here")

ISAS = ["portable", "avx2", "avx512"]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest):
    from topk_rkl import _native

    if request.param not in _native.isas():
        pytest.skip("this machine lacks the instruction set")
    before = _native.isa()
    _native.set_isa(request.param)
    yield request.param
    _native.set_isa(before)


@pytest.fixture
def native():
    return Direct(backends._load("native"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "size",
    [(1, 1), (33, 33), (4_099, 20), (4_099, 1_024), (50_257, 64), pytest.param((151_936, 256), marks=pytest.mark.slow)],
    ids=str,
)
def test_exact_selection_with_each_instruction_set(native, isa: str, size: tuple[int, int], dtype: torch.dtype) -> None:
    assert_selects(native, cases.rows(*size, dtype), size[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_normalize_with_each_instruction_set(native, isa: str, dtype: torch.dtype) -> None:
    logits = cases.rows(50_257, 20, dtype, [*cases.FINITE, "padded_vocabulary"])
    logits[0] *= 5
    ids, values = native.select(logits, 20, True)
    want = logits.double().log_softmax(-1).gather(1, ids.long())
    torch.testing.assert_close(values.double(), want, rtol=1e-6, atol=4e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [40, 1_024, 5_001])
def test_the_mass_outside_with_each_instruction_set(native, isa: str, vocab: int, dtype: torch.dtype) -> None:
    student, teacher = (torch.randn(2, 7, vocab) * 6).to(dtype)
    student[0, 3], student[1, 5], student[2] = torch.nan, torch.inf, -torch.inf
    ids = torch.rand(7, vocab).argsort(1)[:, :30].sort(1).values
    values = teacher.float().gather(1, ids)
    kinds = (native, student, teacher), (reference, student.double(), teacher.double())
    results = []
    for module, z, w in kinds:
        tail = module.tail_logit(w, ids, 0.7)
        loss, g, outside = module.mass_loss(z, ids, values, tail, None, 0.7, (2, 0.4, 0.3, 0.6, 0.7), "tail")
        out = torch.empty_like(z)
        module.mass_grad(g, ids, outside, torch.linspace(-1, 2, 7), z, 0.7, out)
        results.append((tail, loss.double(), g.double(), out.double()))
    for got, want in zip(*results, strict=True):
        rounding = 2e-6 if got.dim() < 2 or dtype == torch.float32 else 2**-8
        torch.testing.assert_close(got, want, rtol=rounding, atol=2e-6, equal_nan=True)


@pytest.mark.parametrize("temperature", [0.05, 1.0, 20.0])
@pytest.mark.parametrize("k", [1, 7, 8, 33, 300])
def test_the_loss_with_each_instruction_set(native, isa: str, k: int, temperature: float) -> None:
    """Of K that fill whole vectors and that do not; -inf and empty slots among them, up to a row without any."""
    student, values = torch.randn(2, 12, 300) * 9
    values = values[:, :k].contiguous()
    ids = torch.stack([torch.randperm(300)[:k] for _ in range(12)])
    student[1:, ids[1:, 0]] = -torch.inf
    values[2, -1] = -torch.inf
    ids[3] = -1
    ids[4, : k // 2] = 300
    values[5] = student[5, ids[5]]
    got = native.support_loss(student, ids, values, torch.linspace(-1, 2, 12), temperature)
    want = reference.support_loss(
        student.double(), ids, values.double(), torch.linspace(-1, 2, 12).double(), temperature
    )
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b.float(), rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 63, 64, 200])
def test_the_sparse_head_with_each_instruction_set(native, isa: str, width: int, dtype: torch.dtype) -> None:
    """Within float32's rounding of sums of `width` terms; rows of the head that are infinite, NaN or subnormal."""
    hidden, head, bias = (x.to(dtype) for x in (torch.randn(9, width), torch.randn(40, width), torch.randn(40)))
    head[3], head[4], head[5] = torch.inf, torch.nan, 1e-7
    ids, values = torch.rand(9, 40).argsort(1)[:, :13], torch.randn(9, 13)
    ids[2:][(ids[2:] == 3) | (ids[2:] == 4)] = -1
    ids[0, 0], ids[1, 0], ids[2, 0] = 3, 4, 5
    arguments = (bias, ids, values, torch.linspace(-1, 2, 9), 0.9, 0.1, 3.0, True)
    got = native.linear_loss(hidden, head, *arguments)
    want = reference.linear_loss(hidden.double(), head.double(), bias.double(), *arguments[1:])
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-5, atol=1e-5, equal_nan=True)
    outs = [torch.full(shape, torch.nan, dtype=dtype) for shape in ((40, width), (40,))]
    native.linear_weight_grad(got[1][2:], ids[2:], hidden[2:], *outs)
    exact = [torch.empty(out.shape, dtype=torch.float64) for out in outs]
    reference.linear_weight_grad(got[1][2:].double(), ids[2:], hidden[2:].double(), *exact)
    rounding = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 1e-6}[dtype]
    for a, b in zip(outs, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1.01 * rounding, atol=1e-6)


def test_an_unknown_instruction_set_is_refused() -> None:
    from topk_rkl import _native

    with pytest.raises(ValueError, match="no instruction set 'sse9'"):
        _native.set_isa("sse9")


def test_many_threads_at_once(native) -> None:
    student, teacher = torch.randn(2, 64, 5_000)
    want = native.select_loss(student, teacher, 16, None, 1.0)

    def once(_: int) -> bool:
        got = native.select_loss(student, teacher, 16, None, 1.0)
        out = torch.empty_like(student)
        native.scatter(got[2], got[1], got[0], out, True)
        return all(torch.equal(a, b) for a, b in zip(got, want, strict=True)) and not out.isnan().any()

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(once, range(64)))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_scatter_of_a_large_gradient(native, dtype: torch.dtype) -> None:
    """Large enough to be written past the caches; rows that begin and end inside a line."""
    n, vocab, k = 121, 151_937, 33
    buffer = torch.full((n, vocab + 3), 7.0, dtype=dtype)
    out = buffer[:, 1:-2]
    ids = torch.stack([torch.randperm(vocab)[:k] for _ in range(n)]).int()
    ids[:, 0], ids[:, 1] = 0, vocab - 1
    g = torch.randn(n, k) * torch.logspace(-9, 4, k)  # float16's subnormals and its overflow
    native.scatter(g, ids, torch.ones(n), out, True)
    want = torch.zeros(n, vocab).scatter_(1, ids.long(), g).to(dtype)
    want_ids = torch.zeros(n, vocab, dtype=torch.bool).scatter_(1, ids.long(), True)
    assert torch.equal(out[want_ids], want[want_ids]) and (out[~want_ids] == 0).all()
    assert (buffer[:, [0, -2, -1]] == 7).all()


def test_every_bfloat16_and_float16_rounds_to_nearest(native) -> None:
    bits = torch.randint(-(2**31), 2**31 - 1, (1, 200_000), dtype=torch.int64).int()
    g = bits.view(torch.float32)
    g[0, :4] = torch.tensor([65519.996, 65520.0, 2.0**-25, 2.0**-24 * 1.5])
    ids = torch.arange(g.shape[1], dtype=torch.int32)[None]
    for dtype in (torch.bfloat16, torch.float16):
        out = torch.empty(g.shape, dtype=dtype)
        native.scatter(g, ids, torch.ones(1), out, True)
        torch.testing.assert_close(out, g.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("shape", "strides", "message"),
    [
        ((2, 5), (-5, 1), "strides"),
        ((2, 5), (2**62, 1), "reaches past"),
        ((2**40, 5), (2**40, 1), "reaches past"),
        ((2, 3, 5), (-15, 5, 1), "strides"),
        ((2, 3, 5), (2**62, 5, 1), "reaches past"),
        ((2**31, 2**30, 5), (5 * 2**30, 5, 1), "reaches past"),
        ((1, 2**31), (1, 0), "at most 2147483647"),
    ],
)
def test_an_extent_out_of_reach_is_refused_by_name(shape, strides, message: str) -> None:
    with pytest.raises(ValueError, match=f"teacher .*{message}"):
        check_extent("teacher", shape, strides, 4)


def test_shapes_that_do_not_fit_are_refused_by_name(native) -> None:
    x = torch.randn(3, 9)
    ids, values = native.select(x, 2)
    with pytest.raises(ValueError, match="k is 10"):
        native.select(x, 10)
    with pytest.raises(ValueError, match="student has shape"):
        native.select_loss(x[:2], x, 2, None, 1.0)
    with pytest.raises(
        ValueError, match=r"student has shape \(2, 2, 9\); it must be \(3, 9\), or slabs of so many rows"
    ):
        native.select_loss(torch.randn(2, 2, 9), x, 2, None, 1.0)
    with pytest.raises(ValueError, match=r"hidden has shape \(1, 3, 9\); it must be \(3, 8\)"):
        native.linear_loss(x[None], x[:, :8], None, ids, values, None, 1.0, 1.0, None, True)
    with pytest.raises(ValueError, match=r"logits has shape \(1, 1, 3, 9\); it must be rows"):
        native.select(x[None, None], 2)
    with pytest.raises(ValueError, match="log_probs has shape"):
        native.support_loss(x, ids, values[:, :1], None, 1.0)
    with pytest.raises(ValueError, match="weights has shape"):
        native.support_loss(x, ids, values, torch.ones(2), 1.0)
    with pytest.raises(ValueError, match="out has shape"):
        native.scatter(values, ids, torch.ones(3), x[:2], True)
    with pytest.raises(ValueError, match="grad_output has shape"):
        native.scatter(values, ids, torch.ones(2), x, True)
    with pytest.raises(TypeError, match=r"weights is torch\.bool"):
        native.support_loss(x, ids, values, torch.ones(3, dtype=torch.bool), 1.0)


def test_weights_and_grad_output_of_any_stride(native) -> None:
    student, teacher = torch.randn(2, 6, 90)
    weights = torch.tensor([[2.0, 0.0, -1.0, 1.0, 0.5, 3.0]] * 2).t().double()[:, 0]
    loss, ids, g = native.select_loss(student, teacher, 5, weights, 1.0)
    want = native.select_loss(student, teacher, 5, weights.float().contiguous(), 1.0)
    assert torch.equal(loss, want[0]) and torch.equal(ids, want[1]) and torch.equal(g, want[2])
    out, one = torch.empty(2, 6, 90)
    native.scatter(g, ids, weights, out, True)
    native.scatter(g, ids, weights.contiguous(), one, True)
    assert torch.equal(out, one)
