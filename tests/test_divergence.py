"""Every divergence, over S alone and with the mass outside it, on every backend that has it."""

import math
from collections.abc import Callable

import hypothesis.strategies as st
import pytest
import torch
from conftest import BACKENDS, DEVICE
from hypothesis import given
from test_properties import QUARTERS, SEARCH, SEEDS, SHAPES
from torch import Tensor, nn

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

Formula = Callable[[Tensor, Tensor], Tensor]


def kl(x: Tensor, y: Tensor) -> Tensor:
    """The terms of KL(x | y), both given as log-probs."""
    return x.exp() * (x - y)


def blend(share: float, x: Tensor, y: Tensor) -> Tensor:
    return torch.logaddexp(math.log(share) + x, math.log(1 - share) + y)


def alpha_beta(a: float, b: float) -> Formula:
    """The general formula, for none of the limits."""
    r = a + b
    return lambda p, q: -((a * q + b * p).exp() - a / r * (r * q).exp() - b / r * (r * p).exp()) / (a * b)


def jensen_shannon(b: float) -> Formula:
    return lambda p, q: b * kl(q, blend(b, q, p)) + (1 - b) * kl(p, blend(b, q, p))


# Each as its definition says it: a term a slot, of log p and log q.
FORMULAS: dict[object, Formula] = {
    ReverseKL(): kl,
    ReverseKL(clamp=(-1.0, 0.7)): lambda p, q: p.exp() * (p - q).clamp(-1, 0.7),
    ForwardKL(): lambda p, q: kl(q, p),
    JensenShannon(): jensen_shannon(0.5),
    JensenShannon(0.1): jensen_shannon(0.1),
    Mixture(0.3): lambda p, q: 0.3 * kl(q, p) + 0.7 * kl(p, q),
    SkewReverseKL(): lambda p, q: kl(p, blend(0.9, q, p)),
    SkewForwardKL(0.4): lambda p, q: kl(q, blend(0.4, q, p)),
    AlphaBeta(0.2, 0.7): alpha_beta(0.2, 0.7),
    AlphaBeta(1.5, -0.4): alpha_beta(1.5, -0.4),
    AlphaBeta(-0.5, 0.2): alpha_beta(-0.5, 0.2),
    AlphaBeta(2, 0): lambda p, q: ((2 * q).exp() * 2 * (q - p) - (2 * q).exp() + (2 * p).exp()) / 4,
    AlphaBeta(0, 2): lambda p, q: ((2 * p).exp() * 2 * (p - q) - (2 * p).exp() + (2 * q).exp()) / 4,
    AlphaBeta(2, -2): lambda p, q: ((2 * (q - p)).exp() - 1 - 2 * (q - p)) / 4,
    AlphaBeta(0, 0): lambda p, q: (p - q) ** 2 / 2,
}
DIVERGENCES = list(FORMULAS)
UNCLAMPED = [one for one in DIVERGENCES if one != ReverseKL(clamp=(-1.0, 0.7))]
RAW = [ReverseKL(), ForwardKL(), Mixture(0.3)]
MASSES = ["tail", "raw", "raw_stop_grad"]


def log_probs(
    z: Tensor,  # (N, V)
    w: Tensor,  # (N, V)
    ids: Tensor,  # (N, K)
    mass: str,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:  # (N, K), or (N, K + 1) with the rest
    """Of both sides' classes, in float64 and in as many steps as the definition has."""
    both = [x.double() / temperature for x in (z, w)]
    if mass == "renormalized":
        return tuple(x.gather(1, ids).log_softmax(1) for x in both)
    outside = torch.ones_like(z, dtype=torch.bool).scatter(1, ids, False)
    both = [x.log_softmax(1) for x in both]
    classes = [x.gather(1, ids) for x in both]
    if mass != "tail":
        return tuple(classes)
    rests = (x.masked_fill(~outside, -torch.inf).logsumexp(1, keepdim=True) for x in both)
    return tuple(torch.cat((x, rest), 1) for x, rest in zip(classes, rests, strict=True))


def plain(z: Tensor, w: Tensor, ids: Tensor, formula: Formula, mass: str, temperature: float = 1.0) -> Tensor:
    """The loss of each row in float64, from which autograd finds the gradient."""
    log_p, log_q = log_probs(z, w, ids, mass, temperature)
    if mass != "raw_stop_grad":
        return formula(log_p, log_q).sum(1)
    value = formula(log_p, log_q).sum(1)
    # What the gradient of sum [ terms ] would be if the probabilities on S had a constant sum.
    surrogate = value - (1 if formula is kl else -1 if formula is FORMULAS[ForwardKL()] else 0.4) * log_p.exp().sum(1)
    return surrogate + (value - surrogate).detach()


def chosen(w: Tensor, k: int) -> Support:
    """By the reference, since the selection is another test's."""
    with use_backend("reference"):
        return teacher_topk(w, k)


def gradient(loss: Tensor, leaf: Tensor) -> tuple[Tensor, Tensor]:
    return loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]


def both(z: Tensor, teacher: Tensor | Support, divergence, want: Callable[[Tensor], Tensor], **options):
    """Loss and gradient of ours, and those wanted, in float64."""
    leaf, exact = z.clone().requires_grad_(), z.double().requires_grad_()
    loss, grad = gradient(topk_divergence(leaf, teacher, divergence=divergence, reduction="none", **options), leaf)
    want_loss, want_grad = gradient(want(exact), exact)
    return loss.double(), grad.double(), want_loss, want_grad


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


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_gradcheck(divergence) -> None:
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


@pytest.mark.parametrize("name", BACKENDS)
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


def test_limits() -> None:
    """Each family at the ends of its range, and near them."""
    z, w = torch.randn(2, 6, 40, dtype=torch.float64, device=DEVICE)

    def close(one, other, factor: float = 1.0, tolerance: float = 1e-12) -> None:
        (a, ga), (b, gb) = (
            gradient(topk_divergence(leaf, w, divergence=d, k=10, reduction="none"), leaf)
            for d, leaf in ((one, z.clone().requires_grad_()), (other, z.clone().requires_grad_()))
        )
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


def test_a_function_must_give_a_term_a_slot() -> None:
    with pytest.raises(ValueError, match=r"divergence gave \(2,\); it must give a term a slot, \(2, 3\)"):
        topk_divergence(torch.randn(2, 9), torch.randn(2, 9), k=3, divergence=lambda p, q: kl(p, q).sum(1))


@pytest.mark.parametrize("name", [name for name in BACKENDS if name != "reference"])
def test_a_named_backend_says_what_it_does_not_have(name: str) -> None:
    z, w = torch.randn(2, 3, 20, device=DEVICE)
    with use_backend(name):
        with pytest.raises(RuntimeError, match="function; use 'auto' or 'reference'"):
            topk_divergence(z, w, k=3, divergence=kl)
        with pytest.raises(RuntimeError, match="use 'auto' or 'reference'"):
            topk_divergence(z, w, k=3, mass="ema_pg", sampled_ids=w.argmin(1))
        with pytest.raises(RuntimeError, match="no mass='tail' from hidden states"):
            linear_topk_divergence(z, torch.randn(9, 20, device=DEVICE), w, k=3, mass="tail")


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


@pytest.mark.parametrize("mass", MASSES)
@pytest.mark.parametrize("temperature", [1.0, 0.05])
def test_mass_is_that_of_the_whole_vocabulary(backend, mass: str, temperature: float) -> None:
    z, w = torch.randn(2, 3, 300, device=DEVICE) * 4
    ids = w.topk(9).indices
    log_p, log_q = log_probs(z, w, ids, mass, temperature)
    bound = 2e-6 * (1 + (log_p - log_q).abs().amax(1))
    for divergence in UNCLAMPED if mass == "tail" else RAW:
        if isinstance(divergence, AlphaBeta) and (min(divergence.alpha, divergence.beta) < 0 or temperature != 1):
            continue  # whose value grows like a power of the ratio
        want = lambda x, d=divergence: plain(x, w, ids, FORMULAS[d], mass, temperature)  # noqa: E731
        loss, grad, want_loss, want_grad = both(z, w, divergence, want, k=9, mass=mass, temperature=temperature)
        assert ((loss - want_loss).abs() <= bound).all(), divergence
        assert ((grad - want_grad).abs().amax(1) <= bound).all(), divergence


def mass_gradient(z: Tensor, teacher: Tensor | Support, **options) -> tuple[Tensor, Tensor]:
    leaf = z.detach().requires_grad_()
    return gradient(topk_divergence(leaf, teacher, **{"mass": "tail", "reduction": "none", **options}), leaf)


@pytest.mark.parametrize("size", [(1, 1), (33, 33), (300, 15), (300, 16), (9_001, 40), (300, 200)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_tail_over_rows_of_any_length(backend, size: tuple[int, int], dtype: torch.dtype) -> None:
    """Blocks that are whole and that are not, S in all of them, a block of slots that is full; and none outside S."""
    vocab, k = size
    z, w = (torch.randn(2, 3, vocab, device=DEVICE) * 2).to(dtype)
    ids = torch.rand(3, vocab, device=DEVICE).argsort(1)[:, :k]
    with use_backend("reference"):
        log_probs = w.double().log_softmax(1).gather(1, ids)
        want = mass_gradient(z.double(), Support(ids, log_probs.float()))
    loss, grad = mass_gradient(z, Support(ids, log_probs.float()))
    torch.testing.assert_close(loss.double(), want[0], rtol=2e-6, atol=2e-6)
    rounding = {torch.bfloat16: 2**-8, torch.float16: 2**-10, torch.float32: 2e-6}[dtype]
    torch.testing.assert_close(grad.double(), want[1], rtol=rounding, atol=2e-6)


def test_tail_of_itself_is_zero(backend) -> None:
    """By the same sums on both sides; a Support has rounded log-probs, and is as close as those."""
    z = torch.randn(4, 700, device=DEVICE) * 3
    loss, grad = mass_gradient(z, z, k=20, temperature=0.7)
    assert (loss == 0).all() and (grad == 0).all()
    loss, grad = mass_gradient(z, teacher_topk(z, 20, normalize=True))
    assert loss.abs().max() <= 1e-12 and grad.abs().max() <= 1e-6


def test_tail_that_nearly_vanishes_keeps_its_accuracy(backend) -> None:
    """1 - P of 1e-9 and of 1e-40: the sum outside S is taken on its own, not as a difference."""
    z, w = torch.randn(2, 4, 500, device=DEVICE)
    w[:, :8] += 5
    z[:2, :8] += 28
    z[2:, :8] += 98
    ids = w.topk(8).indices
    for divergence in (ForwardKL(), ReverseKL(), JensenShannon()):
        want = lambda x, d=divergence: plain(x, w, ids, FORMULAS[d], "tail")  # noqa: E731
        loss, grad, want_loss, want_grad = both(z, w, divergence, want, k=8, mass="tail")
        torch.testing.assert_close(loss, want_loss, rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(grad, want_grad, rtol=2e-6, atol=2e-6)


def test_tail_of_any_support(backend) -> None:
    """Empty slots, ids in any order and twice, ids that the student lacks, rows of weight 0, NaN outside S."""
    z = torch.randn(6, 90, device=DEVICE)
    ids, values = teacher_topk(torch.randn(6, 100, device=DEVICE), 12, normalize=True)
    ids[0, 2], values[0, 4], ids[0, 6], ids[1] = -1, -torch.inf, 95, -1
    want = mass_gradient(z, Support(ids, values))
    mixed = torch.tensor([7, 3, 11, 0, 1, 5, 2, 9, 4, 8, 10, 6, 3, 0, 5], device=DEVICE)
    others = torch.cat((values[:, mixed[:12]], values[:, mixed[12:]] - 3), 1)
    for row_ids in (ids[:, mixed], ids[:, mixed].long()):
        got = mass_gradient(z, Support(row_ids, others))
        torch.testing.assert_close(got, want, rtol=2e-6, atol=1e-7)
    assert want[0][1] == 0 and (want[1][1].sum() == 0)  # all of it is the rest, on both sides
    z[2, 89 - ids[2].max() % 2] = torch.nan
    z[3, :] = torch.nan
    weights = torch.tensor([1.0, 1.0, 1.0, 0.0, -2.0, 1.0], device=DEVICE)
    loss, grad = mass_gradient(z, Support(ids, values), weights=weights)
    assert loss[2].isnan() and grad[2].isnan().all() and loss[3] == 0 and (grad[3] == 0).all()
    torch.testing.assert_close((loss[4], grad[4]), (want[0][4] * -2, want[1][4] * -2), rtol=1e-6, atol=1e-8)
    kept = [0, 1, 5]
    assert torch.equal(loss[kept], want[0][kept]) and torch.equal(grad[kept], want[1][kept])


def test_tail_where_either_side_leaves_nothing(backend) -> None:
    """Teacher logits of -inf outside S are outside the comparison; a student's there make forward KL infinite."""
    z, w = torch.randn(2, 2, 40, device=DEVICE)
    w[:, 6:] = -torch.inf
    got, want = mass_gradient(z, w, k=6), mass_gradient(z, w, k=6, mass="renormalized")
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)
    w = torch.randn(2, 40, device=DEVICE)
    z[:, w.topk(6).indices.amax() + 1 :] = -torch.inf
    z.scatter_(1, w.topk(40).indices[:, 6:], -torch.inf)
    loss, grad = mass_gradient(z, w, k=6)
    assert loss.isfinite().all() and grad.isfinite().all()
    loss, grad = mass_gradient(z, w, k=6, divergence=ForwardKL())
    assert (loss == torch.inf).all() and grad.isfinite().all() and (grad.gather(1, w.topk(6).indices) != 0).all()


def test_mass_with_strides_grad_output_and_overwriting(backend) -> None:
    from tests import cases

    z, w = torch.randn(2, 6, 70, device=DEVICE)
    want = mass_gradient(z, w, k=8)
    for name, layout in cases.LAYOUTS.items():
        got = mass_gradient(layout(z), layout(w), k=8)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7, msg=name)
    batch = z.view(2, 3, 70)
    given = torch.randn(6, 2, device=DEVICE)[:, 0].view(2, 3)
    leaf = batch.clone().requires_grad_()
    loss = topk_divergence(leaf, w.view(2, 3, 70), k=8, mass="tail", reduction="none")
    found, again = (torch.autograd.grad(loss, leaf, given, retain_graph=True)[0] for _ in range(2))
    torch.testing.assert_close(found, want[1].view(2, 3, 70) * given[..., None], rtol=1e-6, atol=1e-7)
    assert torch.equal(found, again)
    (twice,) = torch.autograd.grad(loss.sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        twice.sum().backward()
    source = z.clone().requires_grad_()
    logits = source * 1
    topk_divergence(logits, w, k=8, mass="tail", reduction="sum", overwrite_student_logits=True).backward()
    assert torch.equal(source.grad, want[1]) and torch.equal(logits, want[1])


def test_mass_with_one_slot_does_not_warn(recwarn) -> None:
    z, w = torch.randn(2, 3, 20, device=DEVICE)
    assert topk_divergence(z, w, k=1, mass="tail") > 0
    assert not [warning for warning in recwarn if "K = 1" in str(warning.message)]


def test_mass_does_not_read_the_device_on_the_host(module) -> None:
    from test_loss import NoHostSync

    if DEVICE == "cpu" and module.__name__.endswith("triton"):
        pytest.skip("the interpreter itself reads values")
    z, w = torch.randn(2, 4, 90, device=DEVICE)
    ids, values = teacher_topk(w, 6)
    ids = ids.sort(1).values
    with NoHostSync():
        tail = module.rest(w, ids, 1.0)
        _, g, others = module.mass_loss(z, ids, values, tail, None, 1.0, JensenShannon().code, "tail")
        module.spread(g, ids, others, torch.ones(4, device=DEVICE), None, z, 1.0)
        topk_divergence(z.requires_grad_(), w, k=6, mass="tail").backward()


def test_expected_gradient_of_the_sampled_masses() -> None:
    """Over the student's own samples "ema_pg_corrected" is the full KL; as published, "ema_pg" has grad P besides."""
    z, w = torch.randn(2, 1, 12, dtype=torch.float64)
    ids = w.topk(4).indices
    for divergence, formula, sign in ((ReverseKL(), kl, 1), (ForwardKL(), lambda p, q: kl(q, p), -1)):
        leaf = z.clone().requires_grad_()
        full = formula(leaf.log_softmax(1), w.log_softmax(1)).sum()
        (of_full,) = torch.autograd.grad(full, leaf, retain_graph=True)
        (of_mass,) = torch.autograd.grad(leaf.softmax(1).gather(1, ids).sum(), leaf)
        p = z.softmax(1)[0].detach()
        for mass, want in (("ema_pg", of_full + sign * of_mass), ("ema_pg_corrected", of_full)):
            loss = topk_divergence(
                leaf.expand(12, 12), w.expand(12, 12), k=4, divergence=divergence, mass=mass,
                sampled_ids=torch.arange(12), weights=p, reduction="sum",
            )  # fmt: skip
            torch.testing.assert_close(loss, full, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(torch.autograd.grad(loss, leaf)[0], want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mass", [*MASSES, "ema_pg", "ema_pg_corrected"])
@pytest.mark.parametrize("softcap", [None, 2.5])
def test_mass_from_hidden_states_is_that_of_the_logits(monkeypatch, mass: str, softcap: float | None) -> None:
    from topk_rkl.backends import linear_mass

    monkeypatch.setattr(linear_mass, "ROWS", 2)
    monkeypatch.setattr(linear_mass, "TOKENS", 13)
    leaves = [torch.randn(shape, dtype=torch.float64).to(DEVICE).requires_grad_() for shape in ((5, 6), (40, 6), (40,))]
    w, y = torch.randn(5, 40, device=DEVICE).double(), torch.tensor([0, 5, 9, 20, 39], device=DEVICE)
    weights = torch.tensor([1.0, 0.0, 2.0, -1.0, 0.5], device=DEVICE)
    leaves[0].data[1] = torch.nan
    options = {"mass": mass, "k": 6, "temperature": 0.7, "weights": weights, "reduction": "sum"}
    if mass.startswith("ema"):
        options["sampled_ids"] = y
    z = nn.functional.linear(leaves[0].nan_to_num(0), *leaves[1:]) * 1.2
    z = z if softcap is None else softcap * (z / softcap).tanh()
    for divergence in (ReverseKL(), ForwardKL()):
        got = linear_topk_divergence(
            leaves[0], leaves[1], w, student_bias=leaves[2], divergence=divergence, logit_scale=1.2, softcap=softcap,
            **options,
        )  # fmt: skip
        want = topk_divergence(z, w, divergence=divergence, **options)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
        found = torch.autograd.grad(got, leaves)
        for a, b in zip(found, torch.autograd.grad(want, leaves, retain_graph=True), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
