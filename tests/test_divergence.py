"""Every divergence, over S alone and with the mass outside it, on every backend that has it."""

import itertools
import math

import hypothesis.strategies as st
import pytest
import torch
from conftest import DEVICE, EVERY_OBJECTIVE
from hypothesis import given
from mpmath import mp, mpf
from torch import Tensor, nn
from torch.autograd import forward_ad

from tests.formulas import (
    DIVERGENCES,
    FORMULAS,
    RAW,
    UNCLAMPED,
    alpha_beta,
    blend,
    both,
    gradient,
    jensen_shannon,
    kl,
    log_probs,
    plain,
)
from tests.search import QUARTERS, SEARCH, SEEDS, SHAPES
from topk_rkl import (
    AlphaBeta,
    ForwardKL,
    JensenShannon,
    LinearTopKDivergenceLoss,
    Mixture,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    Support,
    TopKDivergenceLoss,
    generalized_jsd,
    linear_topk_divergence,
    linear_topk_reverse_kl,
    teacher_topk,
    topk_divergence,
    topk_reverse_kl,
    use_backend,
)
from topk_rkl.divergence import MASSES
from topk_rkl.recipe.rollout import sampled_token_loss

HAVE_IT = EVERY_OBJECTIVE
LARGEST = torch.finfo(torch.float32).max
mp.dps = 50


def chosen(w: Tensor, k: int) -> Support:
    """By the reference, since the selection is another test's."""
    with use_backend("reference"):
        return teacher_topk(w, k)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_each_is_its_formula(backend, divergence, temperature: float) -> None:
    z, w = torch.randn(2, 4, 50, device=DEVICE) * 2
    ids = w.topk(9).indices
    loss, grad, want_loss, want_grad = both(
        z, chosen(w, 9), divergence, lambda x: plain(x, w, ids, FORMULAS[divergence], "renormalized", temperature),
        temperature=temperature,
    )  # fmt: skip
    torch.testing.assert_close(loss, want_loss, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(grad, want_grad, rtol=2e-6, atol=2e-6 * want_grad.abs().max().item())


@pytest.mark.parametrize("given", ["logits", "hidden"])
def test_each_entry_takes_them(backend, given: str) -> None:
    """The selecting kernel and the one of the head, whose slots are those of the support's."""
    z, w = torch.randn(2, 3, 30, device=DEVICE)
    head = torch.randn(40, 30, device=DEVICE) / 5
    for divergence in (ReverseKL(clamp=(-1.0, 0.7)), JensenShannon(0.1), AlphaBeta(0.2, 0.7)):
        leaf = z.clone().requires_grad_()
        dense = nn.functional.linear(leaf, head) if given == "hidden" else leaf
        want = gradient(topk_divergence(dense, chosen(w, 8), divergence=divergence, reduction="none"), leaf)
        options = {"k": 8, "divergence": divergence, "reduction": "none"}
        got = (
            topk_divergence(leaf, w, **options)
            if given == "logits"
            else linear_topk_divergence(leaf, head, w, **options)
        )
        torch.testing.assert_close(gradient(got, leaf), want, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_gradcheck(divergence) -> None:
    """On the reference alone: it needs float64."""
    z = torch.randn(3, 20, dtype=torch.float64, device=DEVICE, requires_grad=True)
    w = torch.randn(3, 20, dtype=torch.float64, device=DEVICE)
    ids, weights = torch.randint(-1, 20, (3, 9), device=DEVICE), torch.tensor([1.0, -0.5, 0.0], device=DEVICE)
    support = Support(ids, torch.randn(3, 9, device=DEVICE).double() - 4)
    for mass in ["renormalized", "tail"] + (["raw"] if divergence in RAW else []):
        for teacher, k in ((w, 7), (support, None)):
            assert torch.autograd.gradcheck(
                lambda x, t=teacher, k=k, m=mass: topk_divergence(
                    x, t, k=k, divergence=divergence, mass=m, weights=weights, reduction="none"
                ),
                z,
            )


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
@pytest.mark.parametrize("temperature", [0.05, 1.0, 20.0])
def test_a_distribution_is_at_distance_zero_from_itself(backend, divergence, temperature: float) -> None:
    z = torch.randn(5, 60, device=DEVICE) * 4
    z[1, 5:] = -torch.inf
    z[2] = 0.25
    leaf = z.clone().requires_grad_()
    loss = topk_divergence(leaf, chosen(z, 12), divergence=divergence, temperature=temperature, reduction="none")
    loss, grad = gradient(loss, leaf)
    assert (loss == 0).all() and (grad == 0).all()


@pytest.mark.parametrize("name", HAVE_IT)
@given(shape=SHAPES, seed=SEEDS, spread=QUARTERS, divergence=st.sampled_from(UNCLAMPED))
@SEARCH
def test_no_divergence_is_negative_and_its_gradient_sums_to_0(name: str, shape, seed, spread, divergence) -> None:
    n, vocab, k = shape
    generator = torch.Generator().manual_seed(seed)
    z, w = (torch.randint(-spread, spread + 1, (2, n, vocab), generator=generator).float() / 4).to(DEVICE)
    w[:, ::3] = z[:, ::3] * (1 + 1e-7)
    leaf = z.clone().requires_grad_()
    with use_backend(name):
        loss, grad = gradient(topk_divergence(leaf, chosen(w, k), divergence=divergence, reduction="none"), leaf)
    assert (loss >= (0 if divergence != ReverseKL() else -1e-15)).all()
    finite = grad.isfinite().all(1)
    assert (grad[finite].double().sum(1).abs() <= 1e-6 * (1 + grad[finite].abs().sum(1))).all()


def test_limits(backend) -> None:
    """Each family at the ends of its range, and near them; closer in float64 than the results of kernels can tell."""
    dtype, least = (torch.float64, 0.0) if backend == "reference" else (torch.float32, 2e-6)
    n = 2 if backend == "triton" and DEVICE == "cpu" else 6
    z, w = torch.randn(2, n, 40, dtype=dtype, device=DEVICE)

    def close(one, other, factor: float = 1.0, tolerance: float = 1e-12) -> None:
        (a, ga), (b, gb) = (
            gradient(topk_divergence(leaf, w, divergence=d, k=10, reduction="none"), leaf)
            for d, leaf in ((one, z.clone().requires_grad_()), (other, z.clone().requires_grad_()))
        )
        tolerance = max(tolerance, least)
        torch.testing.assert_close(a / factor, b, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(ga / factor, gb, rtol=tolerance, atol=tolerance)

    tiny = 1e-7
    forward, reverse = ForwardKL(), ReverseKL()
    close(JensenShannon(tiny), forward, tiny, 1e-5)
    close(JensenShannon(1 - tiny), reverse, tiny, 1e-5)
    close(generalized_jsd(0), forward)
    close(generalized_jsd(1), reverse)
    close(generalized_jsd(0.3), JensenShannon(0.3))
    close(Mixture(0), reverse)
    close(Mixture(1), forward)
    close(SkewReverseKL(0), reverse)
    close(SkewForwardKL(0), forward)
    close(SkewReverseKL(tiny), reverse, tolerance=1e-5)
    close(SkewForwardKL(tiny), forward, tolerance=1e-5)
    close(AlphaBeta(1, 0), forward)
    close(AlphaBeta(0, 1), reverse)
    for a, b in ((1, 0), (0, 1), (0, 2), (2, 0), (0.5, -0.5), (0, 0)):
        for nearby in (tiny, 1e-13):
            close(AlphaBeta(a + nearby, b - 2 * nearby), AlphaBeta(a, b), tolerance=3e-5 if nearby == tiny else 1e-10)


@pytest.mark.parametrize("bounds", [(-1.0, 0.7), (-math.inf, 0.0), (0.2, 0.2), (-50.0, math.inf)])
def test_clamp_has_the_gradient_of_torch_clamp(backend, bounds: tuple[float, float]) -> None:
    z, w = torch.randn(2, 5, 30, device=DEVICE) * 2
    ids = w.topk(8).indices
    loss, grad, want_loss, want_grad = both(
        z, chosen(w, 8), ReverseKL(clamp=bounds),
        lambda x: plain(x, w, ids, lambda p, q: p.exp() * (p - q).clamp(*bounds), "renormalized"),
    )  # fmt: skip
    torch.testing.assert_close(loss, want_loss, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(grad, want_grad, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_student_minus_inf_inside_the_support(backend, divergence) -> None:
    """p = 0 there: the loss is that limit, which for some is +inf, and the slot has no gradient."""
    z, w = torch.randn(2, 1, 6, device=DEVICE)
    z[0, 2] = -torch.inf
    leaf = z.clone().requires_grad_()
    loss = topk_divergence(leaf, chosen(w, 6), divergence=divergence, reduction="none")
    loss, grad = gradient(loss, leaf)
    beyond = z.masked_fill(z == -torch.inf, -300.0).double().requires_grad_()
    with use_backend("reference"):
        want, want_grad = gradient(topk_divergence(beyond, w, divergence=divergence, k=6, reduction="none"), beyond)
    alpha, beta = (divergence.alpha, divergence.beta) if isinstance(divergence, AlphaBeta) else (1, 1)
    infinite = divergence in (ForwardKL(), Mixture(0.3)) or min(beta, alpha + beta) <= 0
    assert loss.isinf().all() if infinite else torch.allclose(loss.double(), want, rtol=2e-6)
    assert grad[0, 2] == 0
    if beta >= 0 and alpha + beta > 0:  # else the gradient of the others grows without bound as well
        kept = [0, 1, 3, 4, 5]
        torch.testing.assert_close(grad[:, kept].double(), want_grad[:, kept], rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_empty_slots_nan_and_weight_zero(backend, divergence) -> None:
    z = torch.randn(6, 30, device=DEVICE)
    ids = torch.rand(6, 30).argsort(1)[:, :9].to(DEVICE)
    values = torch.randn(6, 9, device=DEVICE)
    ids[0, 3], ids[0, 5], values[0, 7] = -1, 30, -torch.inf
    ids[1] = -1
    z[2, ids[2, 4]] = torch.nan
    values[3, 1] = torch.inf
    z[4] = torch.nan
    weights = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, -2.0], device=DEVICE)
    leaf = z.clone().requires_grad_()
    options = {"divergence": divergence, "reduction": "none"}
    loss, grad = gradient(topk_divergence(leaf, Support(ids, values), weights=weights, **options), leaf)
    kept = [0, 1, 2, 4, 6, 8]
    some = z[:1].clone().requires_grad_()
    want = gradient(topk_divergence(some, Support(ids[:1, kept], values[:1, kept]), **options), some)
    torch.testing.assert_close((loss[:1], grad[:1]), want, rtol=1e-6, atol=1e-7)
    assert loss[1] == 0 and (grad[1] == 0).all() and loss[4] == 0 and (grad[4] == 0).all()
    for row in (2, 3):
        assert loss[row].isnan() and grad[row, ids[row]].isnan().all()
    last = z[5:].clone().requires_grad_()
    alone = gradient(topk_divergence(last, Support(ids[5:], values[5:]), **options), last)
    torch.testing.assert_close((loss[5:], grad[5:]), (alone[0] * -2, alone[1] * -2), rtol=1e-6, atol=1e-7)


def test_the_largest_ratios_keep_their_accuracy(backend) -> None:
    """At temperature 0.05 probabilities underflow, and their logarithms do not."""
    z, w = torch.randn(2, 8, 60, device=DEVICE) * 5
    ids = w.topk(16).indices
    for divergence in (ForwardKL(), JensenShannon(0.2), Mixture(0.5), SkewForwardKL(), AlphaBeta(0.3, 0.6)):
        formula = (
            FORMULAS.get(divergence)
            or {
                JensenShannon(0.2): jensen_shannon(0.2),
                Mixture(0.5): lambda p, q: 0.5 * kl(q, p) + 0.5 * kl(p, q),
                SkewForwardKL(): lambda p, q: kl(q, blend(0.1, q, p)),
                AlphaBeta(0.3, 0.6): alpha_beta(0.3, 0.6),
            }[divergence]
        )
        want = lambda x, f=formula: plain(x, w, ids, f, "renormalized", 0.05)  # noqa: E731
        loss, grad, want_loss, want_grad = both(z, chosen(w, 16), divergence, want, temperature=0.05)
        log_p, log_q = log_probs(z, w, ids, "renormalized", 0.05)
        bound = 2e-6 * (1 + (log_p - log_q).abs().amax(1))
        assert ((loss - want_loss).abs() <= bound).all()
        assert ((grad - want_grad).abs().amax(1) <= bound).all()


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_of_the_teacher_is_never_lost(backend, divergence, bad: float) -> None:
    """At an id that the student lacks, and where the student has no probability on all of S."""
    z = torch.randn(4, 20, device=DEVICE)
    z[1] = -torch.inf
    ids = torch.tensor([[4, 20, 7], [4, 5, 7], [20, 21, 22], [4, -1, 7]], device=DEVICE)
    values = torch.tensor([0.5, bad, -1.0], device=DEVICE).expand(4, 3)
    leaf = z.clone().requires_grad_()
    options = {"divergence": divergence, "reduction": "none"}
    loss, grad = gradient(topk_divergence(leaf, Support(ids, values), **options), leaf)
    assert loss.isnan().tolist() == [True, True, True, False]
    assert grad[:2, [4, 7]].isnan().all() and grad[2:].isfinite().all()


def test_a_function_spoils_its_row_and_no_other() -> None:
    """Also one that does not look at the teacher, and one that has no derivative where a slot is empty."""
    z, w = torch.randn(2, 3, 12, device=DEVICE)
    w[0, 11], z[1] = torch.nan, -torch.inf
    ids = torch.tensor([[0, 11, 2], [0, 11, 2], [0, -1, 2]], device=DEVICE)
    values = torch.tensor([[0.0, torch.nan, 1.0], [0.0, torch.nan, 1.0], [0.0, 0.5, 1.0]], device=DEVICE)
    leaf = z.clone().requires_grad_()
    for function in (lambda p, _: p.exp() * p, lambda p, q: (p - q).abs().sqrt()):
        loss = topk_divergence(leaf, Support(ids, values), divergence=function, reduction="none")
        loss, grad = gradient(loss, leaf)
        assert loss.isnan().tolist() == [True, True, False] and grad[2].isfinite().all()


def terms_and_slope(divergence: object, p: mpf, q: mpf) -> tuple[mpf, mpf]:
    """A term of the definition, and its derivative with respect to p."""
    d = mp.log(p) - mp.log(q)
    if isinstance(divergence, ReverseKL):
        low, high = divergence.clamp or (-mp.inf, mp.inf)
        bounded = min(max(d, low), high)
        return p * bounded, bounded + (low <= d <= high)
    if isinstance(divergence, AlphaBeta):
        a, b = mpf(divergence.alpha), mpf(divergence.beta)
        r = a + b
        if a == b == 0:
            return d * d / 2, d / p
        if a == 0:
            return (b * p**b * d - p**b + q**b) / b**2, p ** (b - 1) * d
        if b == 0:
            return (p**a - q**a - a * q**a * d) / a**2, (p ** (a - 1) - q**a / p) / a
        if r == 0:
            return ((q / p) ** a - 1 + a * d) / a**2, (1 - (q / p) ** a) / (a * p)
        return -(q**a * p**b - a / r * q**r - b / r * p**r) / (a * b), (p ** (r - 1) - q**a * p ** (b - 1)) / a
    # c KL(p | s p + (1 - s) q) + e KL(q | t q + (1 - t) p)
    share = mpf(getattr(divergence, "lam", getattr(divergence, "beta", 0)))
    c, s, e, t = {
        ForwardKL: (0, 1, 1, 0), JensenShannon: (1 - share, 1 - share, share, share),
        Mixture: (1 - share, 0, share, 0), SkewReverseKL: (1, share, 0, 1), SkewForwardKL: (0, 1, 1, share),
    }[type(divergence)]  # fmt: skip
    of_p, of_q = s * p + (1 - s) * q, t * q + (1 - t) * p
    slope = c * (mp.log(p / of_p) + 1 - s * p / of_p) - e * (1 - t) * q / of_q
    return c * p * mp.log(p / of_p) + e * q * mp.log(q / of_q), slope


def exact(
    z: list[float],  # (V,)
    w: list[float],  # (V,)
    ids: list[int],  # (K,)
    divergence: object,
    mass: str,
    temperature: float,
    sampled: int,
) -> tuple[mpf, list[mpf], mpf]:  # loss, gradient (V,), the largest |log ratio|
    """Every mass by its definition, in 50 digits whose exponents have no bounds."""
    z, w = ([mpf(y) / mpf(temperature) for y in x] for x in (z, w))
    among = range(len(z)) if mass != "renormalized" else ids
    p, q = ([mp.exp(y) / mp.fsum(mp.exp(x[v]) for v in among) for y in x] for x in (z, w))
    classes = [[v] for v in ids] + [[v for v in among if v not in ids]] * (mass == "tail")
    p_of, q_of = ([mp.fsum(x[v] for v in tokens) for tokens in classes] for x in (p, q))
    loss, slopes = zip(*(terms_and_slope(divergence, *pair) for pair in zip(p_of, q_of, strict=True)), strict=True)
    loss = mp.fsum(loss)
    forward = isinstance(divergence, ForwardKL)
    if mass == "raw_stop_grad" or (mass == "ema_pg_corrected" and not forward):
        shift = 0.4 if isinstance(divergence, Mixture) else -1 if forward else 1
        slopes = [slope - shift for slope in slopes]
    weights = [mpf(0)] * len(z)
    for tokens, slope in zip(classes, slopes, strict=True):
        for v in tokens:
            weights[v] = p[v] * slope
    ratios = [abs(mp.log(a / b)) for a, b in zip(p_of, q_of, strict=True)]
    if mass.startswith("ema_pg") and sampled not in ids:
        d = mp.log(p[sampled] / q[sampled])
        loss += -mp.exp(-d) * d if forward else d
        weights[sampled] = (mass == "ema_pg") - mp.exp(-d) if forward else d
        ratios.append(abs(d))
    total = mp.fsum(weights)
    gradient = [(x - y * total) / mpf(temperature) for x, y in zip(weights, p, strict=True)]
    return loss, [g if v in among else mpf(0) for v, g in enumerate(gradient)], max(ratios)


ENDS = [
    JensenShannon(1e-20), JensenShannon(1 - 1e-15), Mixture(1e-25), Mixture(1.0), SkewReverseKL(1e-25),
    SkewReverseKL(1 - 1e-12), SkewForwardKL(1e-25), ReverseKL(clamp=(-1e39, 1e39)), ReverseKL(clamp=(-math.inf, 2.0)),
    AlphaBeta(-1.5, 0.5), AlphaBeta(-0.5, 2.0), AlphaBeta(1.0, -1.0), AlphaBeta(-1.0, -1.0),
]  # fmt: skip


def extreme_rows() -> tuple[Tensor, Tensor]:  # (N, V), (N, V)
    """Gaps of up to a million logits on one slot or several, on either side or on both."""
    rows = []
    for gap in (40.0, 1e4, 1e6):
        for of_z, of_w in ((1, 0), (0, 1), (0.5, 1)):
            z, w = torch.randn(2, 7)
            lower = torch.rand(7) < 0.4
            rows.append((z - of_z * gap * lower, w - of_w * gap * lower))
    return tuple(torch.stack(side).to(DEVICE) for side in zip(*rows, strict=True))


@pytest.mark.parametrize("divergence", [*DIVERGENCES, *ENDS], ids=str)
def test_extremes_are_exact_or_infinite_and_never_nan(backend, divergence) -> None:
    interpreted = backend == "triton" and DEVICE == "cpu"  # where a few rows have to do
    z, w = (x[:: 4 if interpreted else 1] for x in extreme_rows())
    masses = ["renormalized", "tail"]
    masses += ["raw", "raw_stop_grad"] * (divergence in RAW)
    if backend == "reference" and divergence in RAW[:2]:
        masses += ["ema_pg", "ema_pg_corrected"]
    y = torch.randint(7, (len(z),), device=DEVICE)
    for mass, temperature in itertools.product(masses, (0.05, 20.0)):
        options = {"sampled_ids": y} if mass.startswith("ema_pg") else {}
        if interpreted and mass != "renormalized" and temperature != 0.05:
            continue
        leaf, support = z.clone().requires_grad_(), chosen(w, 5)
        options |= {"divergence": divergence, "mass": mass, "temperature": temperature, "reduction": "none"}
        teacher = {"teacher": support} if mass == "renormalized" else {"teacher": w, "k": 5}
        loss, grad = gradient(topk_divergence(leaf, **teacher, **options), leaf)
        ids = support.ids
        for row in range(len(z)):
            seen = (mass, temperature, row, loss[row], grad[row])
            want, want_grad, ratio = exact(
                z[row].tolist(), w[row].tolist(), ids[row].tolist(), divergence, mass, temperature, int(y[row])
            )
            largest = max(map(abs, want_grad))
            assert not grad[row].isnan().any(), seen
            if abs(want) > LARGEST:
                assert loss[row].isinf(), (*seen, want)
                continue
            # A difference of float64 numbers as large as the loss is as exact as those.
            bound = 2e-6 * (1 + ratio) + 1e-14 * abs(want) / temperature
            assert abs(loss[row].item() - want) <= bound + 2e-7 * abs(want), (*seen, want)
            for got, wanted in zip(grad[row].tolist(), want_grad, strict=True):
                assert largest > LARGEST or abs(got - wanted) <= bound + 2e-6 * largest, (*seen, want, want_grad)


def test_a_function_is_its_formula() -> None:
    """The same numbers as the divergence that is built in, through autograd over the slots."""
    z, w = torch.randn(2, 4, 50, device=DEVICE)
    z[0, w[0].argmax()] = -torch.inf
    weights = torch.rand(4, device=DEVICE)
    for divergence, mass in ((ReverseKL(), "renormalized"), (JensenShannon(0.5), "tail")):
        options = {"k": 7, "weights": weights, "temperature": 0.8, "mass": mass, "reduction": "none"}
        results = []
        for one in (divergence, FORMULAS[divergence]):
            leaf = z.clone().requires_grad_()
            results.append(gradient(topk_divergence(leaf, w, divergence=one, **options), leaf))
        rows = slice(0 if mass == "renormalized" else 1, None)  # q log(q / M) of a token with p = 0 is not counted
        torch.testing.assert_close([x[rows] for x in results[0]], [x[rows] for x in results[1]], rtol=1e-6, atol=1e-7)


def test_a_function_from_hidden_states_and_without_grad() -> None:
    hidden, head = torch.randn(5, 8, device=DEVICE), torch.randn(40, 8, device=DEVICE)
    teacher = torch.randn(5, 40, device=DEVICE)
    want = linear_topk_reverse_kl(hidden, head, teacher, k=6)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            got = linear_topk_divergence(hidden, head, teacher, k=6, divergence=kl)
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    leaf = hidden.clone().requires_grad_()
    found = torch.autograd.grad(linear_topk_divergence(leaf, head, teacher, k=6, divergence=kl), leaf)
    torch.testing.assert_close(
        found, torch.autograd.grad(linear_topk_reverse_kl(leaf, head, teacher, k=6), leaf), rtol=1e-5, atol=1e-6
    )


LEARNT = torch.ones(3, dtype=torch.float64, device=DEVICE, requires_grad=True)
WRONG_FUNCTIONS = {
    "a term a row": (lambda p, q: kl(p, q).sum(1), r"divergence gave \(2,\); it must give a term per slot, \(2, 3\)"),
    "nothing": (lambda *_: None, "divergence's result is a NoneType; it must be a torch.Tensor"),
    "a number": (lambda *_: 1.0, "divergence's result is a float"),
    "bools": (lambda p, q: p > q, "divergence's result is torch.bool; use one of"),
    "complex": (lambda p, q: kl(p, q) * 1j, "divergence's result is torch.complex128"),
    "elsewhere": (lambda p, q: kl(p, q).to("meta"), "divergence's result is on meta"),
    "constants": (lambda _, q: q.exp(), "divergence gave terms that do not depend on log_p"),
    "detached": (lambda p, q: kl(p.detach(), q), "divergence gave terms that do not depend on log_p"),
    "what it learns": (lambda p, q: LEARNT.exp() * kl(p, q), "divergence depends on another tensor that requires grad"),
    "learnt alone": (lambda _, q: LEARNT * q, "divergence depends on another tensor that requires grad"),
}


@pytest.mark.parametrize("name", WRONG_FUNCTIONS)
@pytest.mark.parametrize("entry", ["logits", "hidden", "tail", "hidden tail"])
def test_a_function_must_give_a_term_a_slot_of_log_p_alone(name: str, entry: str) -> None:
    """On the reference alone: no kernel takes a function."""
    function, message = WRONG_FUNCTIONS[name]
    student = torch.randn(2, 9, device=DEVICE, requires_grad=True)
    teacher = torch.randn(2, 9, device=DEVICE)
    mass, k = ("tail", 2) if "tail" in entry else ("renormalized", 3)  # with a tail there is one slot more
    options = {"k": k, "mass": mass, "divergence": function}
    call, head = (
        (linear_topk_divergence, [torch.randn(9, 9, device=DEVICE)]) if "hidden" in entry else (topk_divergence, [])
    )
    with pytest.raises((TypeError, ValueError), match=message):
        call(student, *head, teacher, **options)


def test_a_module_that_learns_is_no_divergence() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones((), dtype=torch.float64, device=DEVICE))

        def forward(self, p: Tensor, q: Tensor) -> Tensor:
            return self.scale * kl(p, q)

    z, w, module = *torch.randn(2, 2, 9, device=DEVICE), Scaled()
    for call in (
        lambda: topk_divergence(z, w, k=3, divergence=module),
        lambda: TopKDivergenceLoss(3, divergence=module),
        lambda: LinearTopKDivergenceLoss(3, divergence=module),
    ):
        with pytest.raises(ValueError, match=r"divergence is a .*Scaled with parameters.*requires_grad_\(False\)"):
            call()
    module.requires_grad_(False)
    torch.testing.assert_close(topk_divergence(z, w, k=3, divergence=module), topk_divergence(z, w, k=3))


@pytest.mark.parametrize(("mass", "slots"), [("renormalized", 3), ("tail", 4)])
def test_a_function_sees_the_rest_of_the_vocabulary_as_a_slot(mass: str, slots: int) -> None:
    seen = []

    def divergence(p: Tensor, q: Tensor) -> Tensor:
        seen.extend((p.detach(), q.detach()))
        return kl(p, q)

    topk_divergence(*torch.randn(2, 2, 9, device=DEVICE), k=3, divergence=divergence, mass=mass)
    assert all(x.shape == (2, slots) and x.dtype == torch.float64 for x in seen)
    torch.testing.assert_close(
        torch.stack(seen).exp().sum(-1), torch.ones(len(seen), 2, dtype=torch.float64, device=DEVICE)
    )


@pytest.mark.parametrize("name", [name for name in HAVE_IT if name != "reference"])
def test_a_named_backend_says_what_it_does_not_have(name: str) -> None:
    z, w = torch.randn(2, 3, 20, device=DEVICE)
    with use_backend(name):
        with pytest.raises(RuntimeError, match="function; use 'auto' or 'reference'"):
            topk_divergence(z, w, k=3, divergence=kl)
        with pytest.raises(RuntimeError, match="use 'auto' or 'reference'"):
            topk_divergence(z, w, k=3, mass="ema_pg", sampled_ids=w.argmin(1))
        if name == "triton":
            with pytest.raises(RuntimeError, match="1e-40 is too small; use 'reference'"):
                topk_divergence(z, w, k=3, divergence=SkewReverseKL(1e-40))
        with pytest.raises(RuntimeError, match="no mass='tail' from hidden states"):
            linear_topk_divergence(z, torch.randn(9, 20, device=DEVICE), w, k=3, mass="tail")


@pytest.mark.parametrize("mass", MASSES)
def test_meta_tensors_give_shapes(mass: str) -> None:
    student, teacher = (torch.empty(2, 3, 40, device="meta", requires_grad=x) for x in (True, False))
    hidden, head = torch.empty(2, 3, 8, device="meta", requires_grad=True), torch.empty(50, 8, device="meta")
    options = {"k": 4, "mass": mass, "reduction": "none"}
    if mass.startswith("ema_pg"):
        options["sampled_ids"] = torch.empty(2, 3, device="meta", dtype=torch.long)
    for leaf, loss in (
        (student, topk_divergence(student, teacher, **options)),
        (hidden, linear_topk_divergence(hidden, head, teacher, **options)),
    ):
        loss.sum().backward()
        assert loss.is_meta and loss.shape == (2, 3) and leaf.grad.is_meta and leaf.grad.shape == leaf.shape
    support = teacher_topk(teacher, 4)
    assert support.ids.is_meta and support.ids.shape == support.log_probs.shape == (2, 3, 4)


@pytest.mark.parametrize("entry", ["logits", "hidden", "tail", "sampled"])
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_transforms_of_torch_func_and_forward_mode_are_refused_by_name(entry: str) -> None:
    teacher, head = torch.randn(2, 9, 9, device=DEVICE)

    def loss(student: Tensor, teacher: Tensor = teacher, head: Tensor = head) -> Tensor:  # (N,)
        if entry == "hidden":
            return linear_topk_divergence(student, head, teacher, k=3, reduction="none")
        if entry == "sampled":
            return sampled_token_loss(student, teacher, torch.arange(9, device=DEVICE), reduction="none")
        mass = "tail" if entry == "tail" else "renormalized"
        return topk_divergence(student, teacher, k=3, mass=mass, reduction="none")

    x = torch.randn(9, 9, device=DEVICE)
    batch = torch.stack((x, x))
    for transformed, name in (
        (lambda: torch.func.grad(lambda x: loss(x).sum())(x), "student_.*"),
        (lambda: torch.func.hessian(loss)(x), "student_.*"),
        (lambda: torch.func.jvp(loss, (x,), (x,)), "student_.*"),
        (lambda: torch.vmap(loss)(batch), "student_.*"),
        (lambda: torch.vmap(loss, in_dims=(None, 0))(x, batch), "teacher.*"),
    ):
        with pytest.raises(NotImplementedError, match=f"^{name} is under torch.func, vmap or forward mode"):
            transformed()
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=r"^student_.* forward mode"):
        loss(forward_ad.make_dual(x, x))
    rows = loss(x.requires_grad_())  # the advice
    each = torch.stack([torch.autograd.grad(row, x, retain_graph=True)[0] for row in rows])  # (N, N, V)
    torch.testing.assert_close(each.sum(0), torch.autograd.grad(rows.sum(), x)[0], rtol=0, atol=0)
    assert all((one != 0).any(1).nonzero().tolist() == [[i]] for i, one in enumerate(each))


def test_the_modules_are_the_functions() -> None:
    z, w = torch.randn(2, 4, 50, device=DEVICE)
    weights, y = torch.rand(4, device=DEVICE), torch.randint(50, (4,), device=DEVICE)
    options = {"divergence": ForwardKL(), "mass": "ema_pg", "temperature": 0.7}
    module = TopKDivergenceLoss(5, **options)
    want = topk_divergence(z, w, k=5, weights=weights, sampled_ids=y, **options)
    assert torch.equal(module(z, w, weights, sampled_ids=y), want)
    assert "divergence=ForwardKL(), mass='ema_pg', k=5, temperature=0.7" in repr(module)
    head = torch.randn(30, 50, device=DEVICE)
    options = {"divergence": JensenShannon(0.3), "mass": "tail", "softcap": 9.0}
    want = linear_topk_divergence(z, head, w, k=5, weights=weights, **options)
    assert torch.equal(LinearTopKDivergenceLoss(5, **options)(z, head, w, weights), want)
    assert torch.equal(TopKDivergenceLoss(5)(z, w), topk_reverse_kl(z, w, k=5))
