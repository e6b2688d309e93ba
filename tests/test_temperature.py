"""Temperatures per position, and one of the teacher's own."""

import pytest
import torch
from conftest import DEVICE, EVERY_OBJECTIVE, LiveBytes, same_bits
from torch import Tensor

from topk_rkl import (
    JensenShannon,
    Support,
    TopKReverseKLLoss,
    linear_topk_reverse_kl,
    teacher_topk,
    topk_divergence,
    topk_reverse_kl,
)
from topk_rkl.diagnostics import topk_diagnostics

HAVE_IT = EVERY_OBJECTIVE
B, T, V, H, K = 2, 3, 40, 16, 6
Number = float | Tensor
PAIRS = {
    "numbers": (0.7, 1.3),
    "a teacher that is divided already": (0.7, 1.0),
    "one per sequence": (torch.tensor([[0.4], [1.9]]), None),
    "one per position": (torch.tensor([[0.3, 0.8, 2.5], [1.0, 1.1, 6.0]]), None),
    "one per position, a teacher that is divided already": (torch.tensor([[0.3, 0.8, 2.5], [1.0, 1.1, 6.0]]), 1.0),
    "both vary": (torch.tensor([[0.4], [1.9]]), torch.tensor([0.5, 1.0, 2.0])),
    "the teacher's varies": (0.7, torch.tensor([[0.5], [3.0]])),
    "a 0-d tensor": (torch.tensor(0.5), None),
}


def sides() -> tuple[Tensor, Tensor]:  # (B, T, V) twice
    z, w = 3 * torch.randn(2, B, T, V, device=DEVICE)
    return z, w


def at(pair: str) -> dict[str, Number | None]:
    both = [x.to(DEVICE) if isinstance(x, Tensor) else x for x in PAIRS[pair]]
    return dict(zip(("temperature", "teacher_temperature"), both))


def columns(x: Number) -> Tensor:  # (..., 1)
    return torch.as_tensor(x, device=DEVICE, dtype=torch.float64).expand(B, T)[..., None]


def plain(
    z: Tensor,  # (B, T, V) float64
    w: Tensor,  # (B, T, V)
    temperature: Number,
    teacher_temperature: Number | None,
) -> Tensor:  # (B, T)
    best, ids = w.double().topk(K)
    own = temperature if teacher_temperature is None else teacher_temperature
    log_p = (z.gather(-1, ids) / columns(temperature)).log_softmax(-1)
    log_q = (best / columns(own)).log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("given", ["logits", "support"])
def test_each_side_is_divided_by_its_own(backend, given: str, pair: str) -> None:
    z, w = sides()
    teacher, k = (w, K) if given == "logits" else (teacher_topk(w, K), None)
    leaf, wide = z.clone().requires_grad_(), z.double().requires_grad_()
    loss = topk_reverse_kl(leaf, teacher, k=k, reduction="none", **at(pair))
    want = plain(wide, w, **at(pair))
    loss.sum().backward(), want.sum().backward()
    torch.testing.assert_close(loss.double(), want, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(leaf.grad.double(), wide.grad, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("pair", PAIRS)
def test_from_hidden_states(backend, pair: str) -> None:
    _, w = sides()
    tensors = torch.randn(B, T, H, device=DEVICE), torch.randn(V, H, device=DEVICE)
    hidden, head = (x.clone().requires_grad_() for x in tensors)
    wide_hidden, wide_head = (x.double().requires_grad_() for x in tensors)
    loss = linear_topk_reverse_kl(hidden, head, w, k=K, reduction="none", logit_scale=0.5, softcap=4.0, **at(pair))
    want = plain(4 * torch.tanh(wide_hidden @ wide_head.T / 8), w, **at(pair))
    loss.sum().backward(), want.sum().backward()
    torch.testing.assert_close(loss.double(), want, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(hidden.grad.double(), wide_hidden.grad, rtol=5e-6, atol=5e-6)
    torch.testing.assert_close(head.grad.double(), wide_head.grad, rtol=5e-6, atol=5e-6)


@pytest.mark.parametrize("mass", ["tail", "raw", "ema_pg"])
def test_other_masses_take_numbers(mass: str) -> None:
    z, w = sides()
    sampled = torch.randint(V, (B, T), device=DEVICE) if mass == "ema_pg" else None
    options = {"mass": mass, "reduction": "none", "sampled_ids": sampled}
    want = topk_divergence(z.double() / 0.7, w.double() / 1.3, k=K, **options)  # the logits divided beforehand
    loss = topk_divergence(z, w, k=K, temperature=0.7, teacher_temperature=1.3, **options)
    torch.testing.assert_close(loss.double(), want, rtol=4e-6, atol=4e-6)


@pytest.mark.parametrize("mass", ["tail", "raw"])
def test_log_probs_of_a_server_are_compared_with_a_student_at_another_temperature(mass: str) -> None:
    z, w = sides()
    served = teacher_topk(w / 1.3, K, normalize=True)
    leaf, wide = z.clone().requires_grad_(), z.double().requires_grad_()
    loss = topk_divergence(leaf, served, mass=mass, temperature=0.7, teacher_temperature=1.0, reduction="none")
    want = topk_divergence(wide / 0.7, w.double() / 1.3, k=K, mass=mass, reduction="none")
    loss.sum().backward(), want.sum().backward()
    torch.testing.assert_close(loss.double(), want, rtol=4e-6, atol=4e-6)
    torch.testing.assert_close(leaf.grad.double(), wide.grad, rtol=4e-6, atol=4e-6)


def test_dividing_a_servers_log_probs_twice_is_another_loss() -> None:
    z, w = sides()
    served = teacher_topk(w / 0.2, K, normalize=True)
    once = topk_reverse_kl(z, served, temperature=0.2, teacher_temperature=1.0)
    twice = topk_reverse_kl(z, served, temperature=0.2)
    want = plain(z.double(), w, 0.2, None).mean()
    torch.testing.assert_close(once.double(), want, rtol=2e-6, atol=2e-6)
    assert (twice - once).abs() > 0.1 * once


@pytest.mark.parametrize("temperature", [0.03, 0.7, 11.0])
def test_a_distribution_is_at_distance_0_from_itself(backend, temperature: float) -> None:
    z, _ = sides()
    varying = torch.full((B, 1), temperature, device=DEVICE) * (1 + torch.rand(B, 1, device=DEVICE))
    assert (topk_reverse_kl(z, z, k=K, temperature=varying, reduction="none") == 0).all()
    assert (topk_reverse_kl(z, z, k=K, temperature=varying, teacher_temperature=varying, reduction="none") == 0).all()


def test_equal_temperatures_give_the_bits_of_one() -> None:
    z, w = sides()
    want = topk_reverse_kl(z, w, k=K, temperature=0.7)
    assert same_bits(topk_reverse_kl(z, w, k=K, temperature=0.7, teacher_temperature=0.7), want)


def test_large_logits_cost_no_accuracy(backend) -> None:
    z, w = sides()
    varying = torch.tensor([[0.3], [0.9]], device=DEVICE)
    far = 2.0**13  # at which the logits keep 10 bits behind the point
    z, w = (z * 1024).round() / 1024, (w * 1024).round() / 1024
    for options in ({"temperature": varying}, {"temperature": 0.3, "teacher_temperature": 0.9}):
        near = topk_reverse_kl(z, w, k=K, reduction="none", **options)
        torch.testing.assert_close(
            topk_reverse_kl(z + far, w - far, k=K, reduction="none", **options), near, rtol=2e-6, atol=2e-6
        )


def test_what_is_not_positive_is_nan_at_its_own_position(backend) -> None:
    z, w = sides()
    varying = torch.tensor([[0.5, 0.0, 1.0], [-1.0, torch.nan, 2.0]], device=DEVICE)
    loss = topk_reverse_kl(z, w, k=K, temperature=varying, reduction="none")
    assert loss.isnan().tolist() == [[False, True, False], [True, True, False]]
    weights, leaf = varying > 0, z.clone().requires_grad_()
    loss = topk_reverse_kl(leaf, w, k=K, temperature=varying, weights=weights)
    loss.backward()
    assert loss.isfinite() and leaf.grad.isfinite().all() and (leaf.grad[~weights] == 0).all()
    leaf.grad = None
    (topk_reverse_kl(leaf, w, k=K, temperature=varying, reduction="none").where(weights, 0)).sum().backward()
    assert leaf.grad.isfinite().all() and (leaf.grad[~weights] == 0).all()
    topk_reverse_kl(leaf, w, k=K, temperature=varying).backward()
    assert leaf.grad[~weights].isnan().any(-1).all()


def test_empty_slots_infinities_and_foreign_ids(backend) -> None:
    z, w = sides()
    z[0, 0, :3] = -torch.inf
    support = teacher_topk(w, K)
    support.ids[0, 0, :2] = torch.tensor([1, V + 5], device=DEVICE)
    support.log_probs[1, 2, 3:] = -torch.inf
    varying = torch.tensor([[0.4], [1.9]], device=DEVICE)
    options = {"reduction": "none", "weights": torch.ones(B, T, device=DEVICE)}
    for divergence in ({}, {"divergence": JensenShannon(0.3)}):
        got = topk_divergence(z, support, temperature=varying, **options, **divergence)
        for row, t in enumerate((0.4, 1.9)):
            one = topk_divergence(z, support, temperature=t, **options, **divergence)
            torch.testing.assert_close(got[row], one[row], rtol=2e-6, atol=2e-6)


def test_diagnostics_at_both_temperatures() -> None:
    z, w = sides()
    varying, own = torch.tensor([[0.4], [1.9]], device=DEVICE), torch.tensor([0.5, 1.0, 2.0], device=DEVICE)
    names = ["student_mass", "teacher_mass", "max_log_ratio", "overlap_token_advantage", "teacher_entropy"]
    got = topk_diagnostics(z, w, names, k=K, temperature=varying, teacher_temperature=own)
    divided = z.double() / columns(varying), w.double() / columns(own)
    for name, want in topk_diagnostics(*divided, names, k=K).items():
        torch.testing.assert_close(got[name].double(), want, rtol=4e-6, atol=4e-6)
    served = teacher_topk(w / 0.7, K, normalize=True)
    got = topk_diagnostics(z, served, ["teacher_mass"], temperature=0.7, teacher_temperature=1.0)["teacher_mass"]
    torch.testing.assert_close(got, served.log_probs.exp().sum(-1), rtol=1e-6, atol=0)


def test_memory_of_a_temperature_per_position(backend) -> None:
    if DEVICE == "cpu" and backend == "triton":
        pytest.skip("the interpreter copies every tensor of a launch")
    n, vocab, k = 20_000, 64, 50
    logits, teacher = torch.randn(2, n, vocab, device=DEVICE)
    logits, varying = logits.bfloat16().requires_grad_(), torch.rand(n, device=DEVICE) + 0.5
    with LiveBytes() as live:
        topk_reverse_kl(logits, teacher, k=k, temperature=varying).backward()
    assert live.peak - logits.grad.nbytes <= 32 * n * k


def test_modules_have_the_teachers_temperature() -> None:
    z, w = sides()
    served = teacher_topk(w / 0.2, K, normalize=True)
    module = TopKReverseKLLoss(temperature=0.2, teacher_temperature=1.0)
    assert same_bits(module(z, served), topk_reverse_kl(z, served, temperature=0.2, teacher_temperature=1.0))


@pytest.mark.slow
def test_compiled_with_temperatures_that_change() -> None:
    z, w = sides()
    compiled = torch.compile(topk_reverse_kl, fullgraph=True, backend="aot_eager")
    for step in range(3):
        for options in (
            {"temperature": torch.rand(B, 1, device=DEVICE) + 0.2},
            {"temperature": 0.5 + step / 4, "teacher_temperature": 1.0},
        ):
            leaf, eager = z.clone().requires_grad_(), z.clone().requires_grad_()
            loss, want = (f(x, w, k=K, **options) for f, x in ((compiled, leaf), (topk_reverse_kl, eager)))
            loss.backward(), want.backward()
            torch.testing.assert_close(loss, want, rtol=1e-6, atol=1e-7)
            torch.testing.assert_close(leaf.grad, eager.grad, rtol=1e-6, atol=1e-7)


SUPPORT = Support(torch.zeros(B, T, K).int(), torch.zeros(B, T, K))
REFUSALS = {
    "other positions": ({"temperature": torch.ones(B + 1, 1)}, ValueError, r"temperature has shape \(3, 1\).*\(B, 1\)"),
    "more dimensions": ({"temperature": torch.ones(1, B, T)}, ValueError, r"temperature has shape \(1, 2, 3\)"),
    "integers": ({"temperature": torch.ones(B, 1).int()}, TypeError, "temperature is torch.int32"),
    "trained": ({"teacher_temperature": torch.ones(B, 1, requires_grad=True)}, ValueError, "teacher_temperature requ"),
    "0": ({"teacher_temperature": 0.0}, ValueError, "teacher_temperature is 0.0; it must be positive"),
    "with a mass": ({"temperature": torch.ones(B, 1), "mass": "tail"}, ValueError, "a tensor with mass='tail'.*divide"),
    "a support at another": (
        {"temperature": 0.7, "mass": "tail", "k": None, "teacher": SUPPORT}, ValueError,
        "temperature is 0.7 with mass='tail' and a Support.*teacher_temperature=1.0",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name: str) -> None:
    change, kind, message = REFUSALS[name]
    call = {"student_logits": torch.randn(B, T, V), "teacher": torch.randn(B, T, V), "k": K}
    with pytest.raises(kind, match=message):
        topk_divergence(**(call | change))


def test_a_tensor_is_divided_out_beforehand_where_a_mass_refuses_it() -> None:
    z, w = sides()
    t = torch.tensor([[0.4], [1.9]], device=DEVICE)
    loss = topk_divergence(z / t[..., None], w / t[..., None], k=K, mass="tail", reduction="none")
    for row, number in enumerate((0.4, 1.9)):
        one = topk_divergence(z, w, k=K, mass="tail", temperature=number, reduction="none")
        torch.testing.assert_close(loss[row], one[row], rtol=4e-6, atol=4e-6)
