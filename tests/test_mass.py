"""The mass outside S: every mass on every backend that has it, from logits and from hidden states."""

import pytest
import torch
from conftest import DEVICE, EVERY_OBJECTIVE, LiveBytes, same_bits
from torch import Tensor, nn

from tests import cases
from tests.formulas import FORMULAS, RAW, UNCLAMPED, both, gradient, kl, log_probs, plain
from tests.linear_problem import small_blocks
from tests.probes import NoHostSync
from topk_rkl import (
    AlphaBeta,
    ForwardKL,
    JensenShannon,
    ReverseKL,
    Support,
    linear_topk_divergence,
    ops,
    teacher_topk,
    topk_divergence,
    use_backend,
)
from topk_rkl.mass import classes
from topk_rkl.objective import pack
from topk_rkl.temperature import Temperatures

HAVE_IT = EVERY_OBJECTIVE
MASSES = ["tail", "raw", "raw_stop_grad"]
AT_1 = Temperatures(1.0, None, None, 1.0)


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
    assert loss.abs().max() <= 1e-11 and grad.abs().max() <= 1e-6


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
    ids, values = teacher_topk(torch.randn(6, 100, device=DEVICE), 12, normalize=True).tensors
    ids[0, 2], values[0, 4], ids[0, 6], ids[1] = -1, -torch.inf, 95, -1
    want = mass_gradient(z, Support(ids, values))
    mixed = torch.tensor([7, 3, 11, 0, 1, 5, 2, 9, 4, 8, 10, 6, 3, 0, 5], device=DEVICE)
    outside = torch.cat((values[:, mixed[:12]], values[:, mixed[12:]] - 3), 1)
    for row_ids in (ids[:, mixed], ids[:, mixed].long()):
        got = mass_gradient(z, Support(row_ids, outside))
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
    assert same_bits(found, again)
    (twice,) = torch.autograd.grad(loss.sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        twice.sum().backward()
    source = z.clone().requires_grad_()
    logits = source * 1
    topk_divergence(logits, w, k=8, mass="tail", reduction="sum", overwrite_student_logits=True).backward()
    assert torch.equal(source.grad, want[1]) and torch.equal(logits, want[1])


@pytest.mark.parametrize("given", ["logits", "support"])
@pytest.mark.parametrize("mass", MASSES)
def test_mass_that_overwrites_is_refused_to_who_would_read_the_logits(backend, mass: str, given: str) -> None:
    """A second backward pass, and the one of an operation that saved them."""
    z, w = torch.randn(2, 3, 40, device=DEVICE)
    target, k = (w, 5) if given == "logits" else (teacher_topk(w, 5, normalize=True), None)
    for operation in (torch.clone, torch.exp):
        logits = operation(z.clone().requires_grad_())
        loss = topk_divergence(logits, target, k=k, mass=mass, overwrite_student_logits=True)
        if operation is torch.clone:
            loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.parametrize("given", ["logits", "support"])
@pytest.mark.parametrize("mass", MASSES)
def test_repeatable_row_by_row_with_a_mass(backend, mass: str, given: str) -> None:
    z, w = torch.randn(2, 6, 200, device=DEVICE) * 3
    z[1], z[2, 7], z[3, ::2], w[4, 100:] = w[1], torch.nan, -torch.inf, -torch.inf
    weights = torch.tensor([1.0, 2.0, 1.0, -0.5, 1.0, 0.0], device=DEVICE)
    support = teacher_topk(w, 17, normalize=True)

    def run_rows(rows: slice) -> tuple[Tensor, Tensor]:
        target, k = (w[rows], 17) if given == "logits" else (support[rows], None)
        return mass_gradient(z[rows], target, k=k, mass=mass, weights=weights[rows])

    loss, grad = run_rows(slice(None))
    for i in range(6) if backend in ("reference", "native") or DEVICE == "cuda" else (0, 3):
        row = slice(i, i + 1)
        alone = run_rows(row)
        assert same_bits(alone[0], loss[row]) and same_bits(alone[1], grad[row]), i


def test_inputs_untouched_by_a_mass(backend) -> None:
    z, w, weights = torch.randn(4, 90, device=DEVICE), torch.randn(4, 90, device=DEVICE), torch.rand(4, device=DEVICE)
    support = teacher_topk(w, 9, normalize=True)
    inputs = [z, w, weights, *support.tensors]
    before = [x.clone() for x in inputs]
    mass_gradient(z, w, k=9, weights=weights)
    mass_gradient(z, support, weights=weights)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


def test_memory_of_what_is_compared() -> None:
    """N K 20 bytes for a Support, whichever its ids; of int64 they would be 38."""
    n, k = 50, 1_000
    ids, values = torch.arange(k).expand(n, k).contiguous(), torch.randn(n, k).log_softmax(1)
    with LiveBytes() as memory:
        classes(Support(ids, values), None, k, AT_1, None, "reference")
    assert 0 < memory.peak <= 21 * n * k


def test_mass_with_one_slot_does_not_warn(recwarn) -> None:
    z, w = torch.randn(2, 3, 20, device=DEVICE)
    assert topk_divergence(z, w, k=1, mass="tail") > 0
    assert not [warning for warning in recwarn if "K = 1" in str(warning.message)]


def test_mass_does_not_read_the_device_on_the_host(module) -> None:
    if DEVICE == "cpu" and module.__name__.endswith("triton"):
        pytest.skip("the interpreter itself reads values")
    z, w = torch.randn(2, 4, 90, device=DEVICE)
    ids, values = teacher_topk(w, 6).tensors
    ids = ids.sort(1).values
    with NoHostSync():
        tail = module.tail_logit(w, ids, 1.0)
        _, g, outside = module.mass_loss(z, ids, values, tail, None, 1.0, JensenShannon().code, "tail")
        module.mass_grad(g, ids, outside, torch.ones(4, device=DEVICE), None, 1.0, z)
        topk_divergence(z.requires_grad_(), w, k=6, mass="tail").backward()
    torch.testing.assert_close(z.grad.sum(1), torch.zeros(4, device=DEVICE))  # and it has written a gradient
    assert z.grad.abs().sum() > 0


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_expected_gradient_of_the_sampled_masses(dtype: torch.dtype, bound: float) -> None:
    """Over the student's own samples "ema_pg_corrected" is the full KL; as published, "ema_pg" has grad P besides.

    The reference alone has these masses. In float32 the teacher's rest is by the backend of the device.
    """
    z, w = torch.randn(2, 1, 12, dtype=torch.float64).to(dtype)
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
            torch.testing.assert_close(loss, full, rtol=bound, atol=bound)
            torch.testing.assert_close(torch.autograd.grad(loss, leaf)[0], want, rtol=bound, atol=bound)


BEYOND = [2**31 - 1, 2**31, 2**32 + 2, -(2**32) + 2, 2**63 - 1, -(2**63)]  # which 32 bits take for ids, or for nothing


def outside(w: Tensor, ids: Tensor, temperature: float) -> Tensor:
    """The rest of each row as a logit, in float64, of ids in any order."""
    vocab = w.shape[1]
    named = torch.where((ids < 0) | (ids >= vocab), vocab, ids).long()
    kept = torch.ones(len(w), vocab + 1, dtype=torch.bool, device=w.device).scatter(1, named, False)[:, :-1]
    return temperature * (w.double() / temperature).masked_fill(~kept, -torch.inf).logsumexp(1)


def test_the_rest_of_ids_in_any_order(backend) -> None:
    w = torch.randn(4, 3_000, device=DEVICE) * 4
    ids = torch.rand(4, 3_000).argsort(1)[:, :20].to(DEVICE)
    w.scatter_(1, ids, 15.0)  # so that each counts
    ids[0, 3], ids[1, 0], ids[1, 9], ids[2, 5] = -1, -1, 3_000, ids[2, 17]
    ids[3, 2 : 2 + len(BEYOND)] = torch.tensor(BEYOND, device=DEVICE)
    for given in (ids, ids[:3].int()):
        got = ops.tail_logit(w[: len(given)], given, pack(0.7), backend)
        torch.testing.assert_close(got, outside(w[: len(given)], given, 0.7), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("where", ["before", "among", "behind", "in it", -1, 4_000, 4_500, *BEYOND])
def test_the_sampled_token_may_stand_anywhere(backend, where: str | int) -> None:
    """Before, among and behind the best, in them, nowhere, beyond the student's vocabulary or the teacher's."""
    w = torch.randn(1, 4_200, device=DEVICE)
    best = [1_500, 1_600, 3_500]
    w[0, best] = torch.tensor([9.0, 7.0, 8.0], device=DEVICE)
    y = {"before": 10, "among": 1_550, "behind": 3_900, "in it": 3_500}.get(where, where)
    ids, values, tail = classes(w, 3, 4_000, AT_1, torch.tensor([y], device=DEVICE), backend)
    known = y not in best and 0 <= y < 4_000
    assert ids.tolist() == [[*best, y if known else -1]] and (values[0, 3] != -torch.inf) == known
    torch.testing.assert_close(tail, outside(w, ids, 1.0), rtol=2e-6, atol=2e-6)
    z = torch.randn(1, 4_000, device=DEVICE)
    options = {"k": 3, "mass": "ema_pg", "sampled_ids": torch.tensor([y], device=DEVICE), "reduction": "none"}
    with use_backend("reference"):
        want = mass_gradient(z.double(), w.double(), **options)
    with use_backend("auto"):
        loss, grad = mass_gradient(z, w, **options)
    torch.testing.assert_close((loss.double(), grad.double()), want, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("mass", MASSES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_of_the_teacher_is_never_lost(backend, mass: str, bad: float) -> None:
    """At ids that the student lacks, in a slot that repeats an id, and where the student has no probability on S."""
    z = torch.randn(5, 20, device=DEVICE)
    z[3, 4:8] = -torch.inf
    ids = torch.tensor([[4, 20, 7], [4, 4, 7], [4, -1, 7], [4, 5, 7], [4, 2**32 + 5, 7]]).to(DEVICE)
    values = torch.tensor([-2.0, bad, -3.0], device=DEVICE).expand(5, 3)
    loss, _ = mass_gradient(z, Support(ids, values), mass=mass)
    assert loss.isnan().tolist() == [True, True, False, True, True]
    weights = torch.zeros(5, device=DEVICE)
    assert all((x == 0).all() for x in mass_gradient(z, Support(ids, values), mass=mass, weights=weights))
    teacher = torch.randn(5, 25, device=DEVICE)
    teacher[:2, 22] = bad
    loss, _ = mass_gradient(z, teacher, k=3, mass=mass)
    assert loss[:2].isnan().all() and loss[[2, 4]].isfinite().all()


@pytest.mark.parametrize("far", BEYOND)
def test_ids_that_32_bits_cannot_hold_are_empty(backend, far: int) -> None:
    z, values = torch.randn(2, 20, device=DEVICE), torch.randn(2, 3, device=DEVICE) - 5
    ids = torch.tensor([[2, far, 7], [far, far, far]], device=DEVICE)
    want = mass_gradient(z, Support(ids.clamp(-1, 20).int(), values))
    got = mass_gradient(z, Support(ids, values))
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    ids[:, :2] = torch.tensor([2, 7], device=DEVICE)
    ids[:, 2] = far  # in order, as the op is given them
    tail = torch.zeros(2, device=DEVICE, dtype=torch.float64)
    got, want = (ops.mass_loss(z, x, values, tail, None, pack(mass="tail"), backend) for x in (ids, ids.clamp(-1, 20)))
    assert all(map(torch.equal, got, want)) and got[0].isfinite().all()
    out = torch.empty_like(z)
    ops.mass_grad(got[1], ids, got[2], torch.ones(2, device=DEVICE), z, out, None, backend)
    assert out.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_log_probs_and_weights_of_any_dtype(backend, dtype: torch.dtype) -> None:
    z, ids = torch.randn(3, 20, device=DEVICE), torch.tensor([[1, 2, 3]] * 3, device=DEVICE)
    values, weights = (
        torch.tensor([[-2.0, -1.5, -3.0]] * 3, device=DEVICE),
        torch.tensor([1.0, 0.0, -2.0], device=DEVICE),
    )
    want = mass_gradient(z, Support(ids, values), weights=weights)
    got = mass_gradient(z, Support(ids, values.to(dtype)), weights=weights.to(dtype))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


def test_ids_out_of_order_are_not_silent(backend) -> None:
    z = torch.randn(5, 50, device=DEVICE)
    ids = torch.tensor([[1, 4, 9], [1, 9, 4], [1, -1, 9], [4, 4, 9], [1, -1, -1]], device=DEVICE)
    tail = torch.zeros(5, device=DEVICE, dtype=torch.float64)
    loss, _, _ = ops.mass_loss(z, ids, z[:, :3] - 5, tail, None, pack(mass="tail"), backend)
    assert loss.isnan().tolist() == [False, True, True, True, False]


@pytest.mark.parametrize("mass", [*MASSES, "ema_pg", "ema_pg_corrected"])
@pytest.mark.parametrize("softcap", [None, 2.5])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_mass_from_hidden_states_is_that_of_the_logits(
    monkeypatch, dtype: torch.dtype, bound: float, mass: str, softcap: float | None
) -> None:
    """In float32 the teacher's side, and the loss of the logits where it has the mass, are by the device's backend."""
    small_blocks(monkeypatch, 2, 13 * dtype.itemsize // 4)
    leaves = [torch.randn(shape, dtype=dtype).to(DEVICE).requires_grad_() for shape in ((5, 6), (40, 6), (40,))]
    w, y = torch.randn(5, 40, device=DEVICE).to(dtype), torch.tensor([0, 5, 9, 20, 39], device=DEVICE)
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
        torch.testing.assert_close(got, want, rtol=bound, atol=bound)
        found = torch.autograd.grad(got, leaves)
        for a, b in zip(found, torch.autograd.grad(want, leaves, retain_graph=True), strict=True):
            torch.testing.assert_close(a, b, rtol=bound, atol=bound)


@pytest.mark.parametrize("divergence", [ReverseKL(), ForwardKL()], ids=str)
@pytest.mark.parametrize("mass", MASSES)
def test_a_support_of_logits_is_refused_or_nan_and_one_of_rounded_log_probs_is_not(
    backend, mass: str, divergence
) -> None:
    z, w = torch.randn(3, 60, device=DEVICE), torch.randn(3, 50, device=DEVICE)
    options = {"mass": mass, "divergence": divergence}
    told = teacher_topk(w + torch.tensor([[0.0], [2.0], [1e4]], device=DEVICE), 6)
    with pytest.raises(ValueError, match=f"teacher holds logits, .*mass='{mass}' needs true log-probs"):
        topk_divergence(z, told, **options)
    logits = Support(*told.tensors)
    assert mass_gradient(z, logits, **options)[0].isnan().all()
    hidden, head = torch.randn(3, 8, device=DEVICE), torch.randn(60, 8, device=DEVICE)
    with use_backend("auto"):
        assert linear_topk_divergence(hidden, head, logits, reduction="none", **options).isnan().all()
    ids, values = teacher_topk(w, 50, normalize=True).tensors
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert mass_gradient(z, Support(ids, values.to(dtype)), **options)[0].isfinite().all()
    alone = Support(ids[:, :1].expand(3, 9), values[:, :1].expand(3, 9))  # of an id given nine times one counts
    torch.testing.assert_close(
        mass_gradient(z, alone, **options), mass_gradient(z, Support(ids[:, :1], values[:, :1]), **options)
    )
