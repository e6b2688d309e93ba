"""The promises about the entry from hidden states, each by its name, on every backend."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import DEVICE, same_bits
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.direct import Direct, reference
from tests.linear_problem import small_blocks
from tests.probes import NoHostSync, lazy_memory
from topk_rkl import (
    LinearTopKReverseKLLoss,
    Support,
    backends,
    linear_teacher_topk,
    linear_topk_divergence,
    linear_topk_reverse_kl,
    ops,
    rows,
    teacher_topk,
    topk_divergence,
    topk_reverse_kl,
    use_backend,
)

dense_linear = Direct(backends._load("dense_linear"))
LOW = [torch.bfloat16, torch.float16]
N, V, H, K = 6, 90, 24, 7


def inputs(dtype: torch.dtype = torch.float32, n: int = N) -> tuple[Tensor, Tensor, Tensor, Support]:
    """hidden (n, H), head (V, H), bias (V,), of which all three want a gradient, and a support (n, K)."""
    hidden, head, bias = torch.randn(n, H), torch.randn(V, H) / 3, torch.randn(V)
    ids = torch.rand(n, V).argsort(1)[:, :K]
    support = Support(ids.to(DEVICE), torch.randn(n, K).mul(3).to(DEVICE))
    return *(x.to(DEVICE, dtype).requires_grad_() for x in (hidden, head, bias)), support


def dense(
    hidden: Tensor, head: Tensor, bias: Tensor | None, scale: float = 1.0, softcap: float | None = None
) -> Tensor:
    """The logits as a model makes them."""
    z = nn.functional.linear(hidden, head, bias) * scale
    return z if softcap is None else softcap * (z / softcap).tanh()


def gradients(loss: Tensor, *leaves: Tensor) -> list[Tensor]:
    return [g.to_dense() for g in torch.autograd.grad(loss.sum(), leaves, retain_graph=True)]


@pytest.mark.parametrize("softcap", [None, 2.5])
@pytest.mark.parametrize("lead", [(N,), (2, 3), (1, N)], ids=str)
def test_it_is_the_loss_of_the_dense_logits(backend, lead: tuple[int, ...], softcap: float | None) -> None:
    """Within the rounding of H products in float32: here 2e-6 of the largest entry."""
    hidden, head, bias, support = inputs()
    support.ids[0, 2], support.ids[1, 0], support.log_probs[2, 3] = -1, V, -torch.inf
    support = support.reshape(*lead)
    weights = torch.tensor([1.0, 0.0, -2.0, 1.0, 0.5, 3.0], device=DEVICE).view(lead)
    options = {"temperature": 0.7, "weights": weights}
    got = linear_topk_reverse_kl(
        hidden.view(*lead, H), head, support, student_bias=bias, logit_scale=1.3, softcap=softcap, **options
    )
    exact = [x.detach().double().requires_grad_() for x in (hidden, head, bias)]
    with use_backend("reference"):
        want = topk_reverse_kl(dense(*exact, 1.3, softcap).view(*lead, V), support, **options)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=2e-6)
    for a, b in zip(gradients(got, hidden, head, bias), gradients(want, *exact), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=2e-6 * b.abs().max().item())


def test_teacher_logits_and_their_support_are_the_same_loss(backend) -> None:
    hidden, head, _, _ = inputs()
    teacher = torch.randn(N, V + 4, device=DEVICE)
    want = linear_topk_reverse_kl(hidden, head, teacher_topk(teacher, K))
    assert torch.equal(linear_topk_reverse_kl(hidden, head, teacher, k=K), want)


@pytest.mark.parametrize("dtype", LOW)
def test_accuracy_is_not_worse_than_that_of_the_low_precision_product(backend, dtype: torch.dtype) -> None:
    hidden, head, _, support = inputs(dtype, n=40)
    exact = [x.detach().double().requires_grad_() for x in (hidden, head)]
    with use_backend("reference"):
        want = topk_reverse_kl(dense(*exact, None), support, reduction="none")
        plain = topk_reverse_kl(dense(hidden, head, None), support, reduction="none")
    got = linear_topk_reverse_kl(hidden, head, support, reduction="none")
    assert (got - want).abs().max() <= 0.02 * (plain - want).abs().max()
    errors = []
    for loss in (got, plain):
        found = gradients(loss, hidden, head)
        errors.append([(a - b).abs().max() for a, b in zip(found, gradients(want, *exact), strict=True)])
        assert all(g.dtype == dtype for g in found)
    assert all(ours <= theirs for ours, theirs in zip(*errors, strict=True))


@pytest.mark.parametrize("dtype", [*LOW, torch.float32])
def test_a_long_sum_over_one_id_keeps_its_bits(module, dtype: torch.dtype) -> None:
    """An id on every row: 700 terms of which a float32 that takes one after the other would lose some."""
    n = 700
    g, hidden = torch.rand(n, 2, device=DEVICE), (torch.rand(n, 5, device=DEVICE) + 1).to(dtype)
    ids = torch.tensor([[3, 1]], device=DEVICE).repeat(n, 1)
    ids[1::2, 1] = -1
    dhead, dbias = torch.full((6, 5), torch.nan, device=DEVICE, dtype=dtype), torch.empty(6, device=DEVICE, dtype=dtype)
    module.linear_weight_grad(g, ids, hidden, dhead, dbias)
    live = torch.zeros(n, 6, dtype=torch.float64, device=DEVICE).scatter_add_(
        1, ids.clamp(min=0), torch.where(ids < 0, 0, g).double()
    )
    rounding = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2e-6}[dtype]
    torch.testing.assert_close(dhead.double(), live.T @ hidden.double(), rtol=1.01 * rounding, atol=0)
    torch.testing.assert_close(dbias.double(), live.sum(0), rtol=1.01 * rounding, atol=0)


@pytest.mark.parametrize("asked", [(True, False, False), (False, True, False), (False, False, True)], ids=str)
def test_only_what_asks_gets_a_gradient(backend, monkeypatch, asked: tuple[bool, ...]) -> None:
    *leaves, support = inputs()
    want = gradients(linear_topk_reverse_kl(*leaves[:2], support, student_bias=leaves[2]), *leaves)
    for leaf, wanted in zip(leaves, asked, strict=True):
        leaf.requires_grad_(wanted)
    if not any(asked[1:]):
        monkeypatch.setattr(ops, "linear_weight_grad", None)
    linear_topk_reverse_kl(*leaves[:2], support, student_bias=leaves[2]).backward()
    for leaf, wanted, grad in zip(leaves, asked, want, strict=True):
        assert torch.equal(leaf.grad, grad) if wanted else leaf.grad is None


DTYPES = [(torch.bfloat16, torch.float32), (torch.float32, torch.float16), (torch.float16, torch.bfloat16)]


@pytest.mark.parametrize("vocab", [V, 20], ids=["gathered", "dense"])
@pytest.mark.parametrize("mass", ["renormalized", "tail"])
@pytest.mark.parametrize(("of_hidden", "of_head"), DTYPES, ids=str)
def test_hidden_states_and_head_of_different_dtypes(backend, vocab: int, mass: str, of_hidden, of_head) -> None:
    """Their own numbers are multiplied, neither rounded to the other's dtype, under autocast too."""
    if backend != "reference" and (mass, vocab) != ("renormalized", V):
        pytest.skip("the dense product and the tail are plain PyTorch, whatever the backend")
    hidden, head, bias, support = inputs()
    hidden = hidden.detach().to(of_hidden).requires_grad_()
    head, bias = (x.detach()[:vocab].to(of_head).requires_grad_() for x in (head, bias))
    support = Support(support.ids, support.log_probs.log_softmax(1) - 0.1)
    exact = [x.detach().double().requires_grad_() for x in (hidden, head, bias)]
    with use_backend("reference"):
        want = topk_divergence(dense(*exact), support, mass=mass)
    found = torch.autograd.grad(want, exact)
    with torch.autocast(DEVICE, torch.bfloat16), use_backend("auto" if vocab == 20 else backend):
        for weight_grad in ("dense", "sparse") if mass == "renormalized" else ("dense",):
            got = linear_topk_divergence(hidden, head, support, student_bias=bias, mass=mass, weight_grad=weight_grad)
            torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=2e-6)
            for a, b, x in zip(gradients(got, hidden, head, bias), found, (hidden, head, bias), strict=True):
                assert a.dtype == x.dtype
                off = max(2e-6, torch.finfo(x.dtype).eps / 2) * b.abs().max().item()
                torch.testing.assert_close(a.double(), b, rtol=0, atol=1.01 * off)


@pytest.mark.parametrize("dtype", LOW)
def test_a_16_bit_model_is_its_own_teacher_through_float32_logits(backend, dtype: torch.dtype) -> None:
    hidden, head, bias, _ = (x if isinstance(x, Support) else x.detach() for x in inputs(dtype, n=12))
    options = {"logit_scale": 1.5, "softcap": 4.0}
    losses = []
    with torch.autocast(DEVICE, torch.bfloat16):
        for logits_dtype in (torch.float32, None):
            support = linear_teacher_topk(hidden, head, K, bias=bias, logits_dtype=logits_dtype, **options)
            loss = linear_topk_reverse_kl(hidden, head, support, student_bias=bias, reduction="none", **options)
            losses.append(loss.abs().max())
    assert losses[0] <= 1e-11 < 1e-8 < losses[1]
    wanted = dense(*(x.double() for x in (hidden, head, bias)), scale=1.5, softcap=4.0)
    with use_backend("reference"):
        want = teacher_topk(wanted, K, normalize=True)
    got = linear_teacher_topk(
        hidden, head, K, bias=bias, chunk_rows=7, normalize=True, logits_dtype=torch.float32, **options
    )
    assert torch.equal(got.ids, want.ids)
    torch.testing.assert_close(got.log_probs.double(), want.log_probs, rtol=2e-6, atol=2e-6)


def test_linear_teacher_topk_gives_log_probs_of_its_buffer(backend) -> None:
    hidden, head, bias, _ = (x if isinstance(x, Support) else x.detach() for x in inputs(n=11))
    got = linear_teacher_topk(hidden, head, 5, bias=bias, chunk_rows=4, normalize=True)
    parts = [teacher_topk(torch.addmm(bias, rows, head.T), 5, normalize=True) for rows in hidden.split(4)]
    want = Support.cat(parts)
    assert torch.equal(got.ids, want.ids) and torch.equal(got.log_probs, want.log_probs) and got.normalized


@pytest.mark.parametrize("softcap", [1e30, 1.7e308])
def test_a_softcap_that_changes_nothing_is_none(backend, softcap: float) -> None:
    hidden, head, bias, support = inputs()
    support = Support(support.ids, support.log_probs.log_softmax(1) - 0.1)
    for vocab, mass in ((V, "renormalized"), (20, "renormalized"), (V, "tail")):
        with use_backend("auto" if mass == "tail" else backend):
            losses = [
                linear_topk_divergence(
                    hidden, head[:vocab], support, student_bias=bias[:vocab], mass=mass, softcap=cap, logit_scale=0.5
                )
                for cap in (softcap, None, 9e29)
            ]
        assert torch.equal(losses[0], losses[1])
        torch.testing.assert_close(losses[2], losses[0], rtol=1e-5, atol=1e-6)
    constant = hidden.detach(), head.detach()
    found = [linear_teacher_topk(*constant, 5, softcap=cap).tensors for cap in (softcap, None)]
    assert all(map(torch.equal, *found))
    assert linear_topk_reverse_kl(hidden, head, support, softcap=1e-30, logit_scale=1e30).isfinite()
    assert linear_topk_reverse_kl(hidden, head, support, logit_scale=0.0).isfinite()


@pytest.mark.parametrize("dtype", LOW)
def test_a_softcap_of_16_bit_logits_is_taken_in_float32(dtype: torch.dtype) -> None:
    """In float16 the logits over a cap of 1e6 would have been 0, all of them."""
    hidden, head, _, _ = (x if isinstance(x, Support) else x.detach() for x in inputs(dtype))
    got, want = (linear_teacher_topk(hidden, head, K, softcap=softcap).tensors for softcap in (1e6, None))
    assert all(map(torch.equal, got, want))


def test_a_sparse_gradient_is_for_a_leaf() -> None:
    """What the refusal advises works, and what needs no gradient, or gives one to the bias alone, is not refused."""
    hidden, head, bias, support = inputs()
    for made in (head * 1, head.T.T, head[:50], head.to(torch.bfloat16)):
        with pytest.raises(ValueError, match=r"student_weight is no leaf .*use weight_grad='dense', or pass"):
            linear_topk_reverse_kl(hidden, made, support, weight_grad="sparse")
        linear_topk_reverse_kl(hidden, made, support, weight_grad="dense").backward()
    with torch.no_grad():
        linear_topk_reverse_kl(hidden, head * 1, support, weight_grad="sparse")
    for frozen in (head.detach() * 1, head):
        linear_topk_reverse_kl(hidden, frozen, support, student_bias=bias * 1, weight_grad="sparse").backward()
    assert bias.grad is not None and head.grad is not None


@pytest.mark.parametrize("optimiser", [torch.optim.SGD, torch.optim.SparseAdam])
def test_a_sparse_weight_gradient_has_the_touched_rows_and_trains(backend, optimiser) -> None:
    hidden, head, bias, support = inputs()
    support.ids[0, 2], support.ids[1, 0], support.ids[2] = -1, V, support.ids[3]
    want = gradients(linear_topk_reverse_kl(hidden, head, support, student_bias=bias), hidden, head, bias)
    linear_topk_reverse_kl(hidden, head, support, student_bias=bias, weight_grad="sparse").backward()
    indices = head.grad.coalesce().indices()[0]
    assert head.grad.layout == torch.sparse_coo and head.grad._nnz() == len(indices)
    touched = support.ids[(support.ids >= 0) & (support.ids < V)].unique()
    assert torch.equal(indices, touched)
    for leaf, grad in zip((hidden, head, bias), want, strict=True):
        assert torch.equal(leaf.grad.to_dense(), grad)
    before = head.detach().clone()
    optimiser([head], lr=0.1).step()
    changed = (head != before).any(1)
    assert torch.equal(changed.nonzero()[:, 0], indices)


@pytest.mark.parametrize("weight_grad", ["dense", "sparse"])
def test_a_tied_embedding_gets_both_gradients(backend, weight_grad: str) -> None:
    _, head, _, support = inputs()
    tokens = torch.arange(N, device=DEVICE) * 3

    def loss(linear: bool) -> Tensor:
        hidden = nn.functional.embedding(tokens, head).tanh()
        if linear:
            return linear_topk_reverse_kl(hidden, head, support, weight_grad=weight_grad)
        return topk_reverse_kl(dense(hidden, head, None), support)

    torch.testing.assert_close(*(gradients(loss(linear), head)[0] for linear in (True, False)), rtol=1e-5, atol=1e-7)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that an operation makes, views of its inputs left out."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {x.untyped_storage()._cdata for x in self._strided((args, kwargs))}
        result = function(*args, **(kwargs or {}))
        for x in self._strided(result):
            if x.untyped_storage()._cdata not in given:
                self.numel = max(self.numel, x.untyped_storage().nbytes() // x.element_size())
        return result

    @staticmethod
    def _strided(tree) -> list[Tensor]:
        leaves = torch.utils._pytree.tree_leaves(tree)
        return [x for x in leaves if isinstance(x, Tensor) and x.layout == torch.strided]


@pytest.mark.parametrize("dtype", [torch.float32, *LOW])
@pytest.mark.parametrize("shape", [(3, 70), (2, 3, 5_000), (70,), (0, 70), (3, 0)], ids=str)
def test_hidden_gradients_are_scaled_to_the_bit_and_nothing_stays_nothing(backend, shape, dtype) -> None:
    g, scale = torch.randn(shape, device=DEVICE), torch.randn(shape[:-1], device=DEVICE)
    if g.numel() > 70:
        g[0, ..., 3], g[-1, ..., :3] = 0, torch.tensor([torch.inf, torch.nan, 0])
        scale[0], scale[-1] = torch.inf, 0
    want = rows.times(g, scale).to(dtype)
    got = ops.scale_rows(g, scale, dtype, backend)
    assert torch.equal(got.isnan(), want.isnan())
    assert same_bits(got.nan_to_num(nan=7), want.nan_to_num(nan=7))
    if g.numel() > 70:
        assert same_bits(got[-1], torch.zeros_like(got[-1])) and got[0].isinf().any()


def test_gradients_of_any_strides_are_scaled(backend) -> None:
    g, scale = torch.randn(5, 3, device=DEVICE).t(), torch.randn(1, device=DEVICE).expand(3)
    assert same_bits(ops.scale_rows(g, scale, torch.float32, backend), rows.times(g, scale).contiguous())


@pytest.mark.parametrize("weight_grad", ["dense", "sparse"])
def test_memory_never_holds_the_logits_nor_the_gathered_head(module, weight_grad: str) -> None:
    """N V is 360,000 elements here, N K H 5,760, and V H, the gradient of the head itself, 8,000."""
    n, vocab, width, k = 180, 2_000, 4, 8
    if module.module is reference.module:
        pytest.skip("it gathers, in chunks, which test_the_reference_gathers_in_chunks bounds")
    if DEVICE == "cpu" and module.__name__.endswith("triton"):
        pytest.skip("the interpreter copies every tensor of a launch")
    hidden, head = (torch.randn(size, width, device=DEVICE, requires_grad=True) for size in (n, vocab))
    ids = torch.rand(n, vocab).argsort(1)[:, :k].contiguous().to(DEVICE)
    values = torch.randn(n, k, device=DEVICE)
    h, w = hidden.detach(), head.detach()
    with Largest() as inside:  # an op hides what its backend allocates, so both are looked at
        _, g, _ = module.linear_loss(h, w, None, ids, values, None, 1.0, 1.0, None, True)
    assert 0 < inside.numel <= n * k
    dhead = torch.empty_like(head)
    with Largest() as inside:
        module.linear_weight_grad(g, ids, h, dhead, None)
    pairs, bounds = 2 * n * k, vocab + 1
    one_scratch = module.__name__.endswith("cuda")  # where others have a tensor for each
    assert inside.numel <= (pairs + bounds if one_scratch else max(pairs, bounds))
    with use_backend(module.__name__.rpartition(".")[2]), Largest() as outside:
        linear_topk_reverse_kl(hidden, head, Support(ids, values), weight_grad=weight_grad).backward()
    assert head.grad.to_dense().any()
    assert 0 < outside.numel <= (vocab * width if weight_grad == "dense" else len(ids.unique()) * width)


def test_the_largest_tensor_is_seen() -> None:
    hidden, head = torch.randn(10, 3), torch.randn(200, 3)
    with Largest() as largest:
        dense(hidden[:, :2], head[:20, :2], None)
    assert largest.numel == 200


def test_the_reference_gathers_in_chunks() -> None:
    hidden, head, _, support = inputs(n=200)
    with Largest() as largest, pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "CHUNK_BYTES", 200_000)
        reference.linear_loss(hidden.detach(), head.detach(), None, *support.tensors, None, 1.0, 1.0, None, True)
    assert 0 < largest.numel <= 200_000 // 8


def test_linear_teacher_topk_gives_the_ids_of_its_own_products(backend) -> None:
    hidden, head, bias, _ = (x if isinstance(x, Support) else x.detach() for x in inputs(n=11))
    got = linear_teacher_topk(hidden, head, 5, bias=bias, chunk_rows=4, logit_scale=0.5, softcap=1.5)
    parts = [1.5 * (torch.addmm(bias, rows, head.T) * 0.5 / 1.5).tanh() for rows in hidden.split(4)]
    want = teacher_topk(torch.cat(parts), 5)
    assert torch.equal(got.ids, want.ids) and torch.equal(got.log_probs, want.log_probs)
    assert linear_teacher_topk(hidden[:0], head, 5).ids.shape == (0, 5)
    batch = torch.randn(2, 5, H, device=DEVICE)[:, :-1]
    assert torch.equal(
        linear_teacher_topk(batch, head, 5).ids.flatten(0, 1), linear_teacher_topk(batch.reshape(-1, H), head, 5).ids
    )


@pytest.mark.parametrize("dtype", LOW)
def test_linear_teacher_topk_in_low_precision(backend, dtype: torch.dtype) -> None:
    hidden, head, _, _ = (x if isinstance(x, Support) else x.detach() for x in inputs(dtype))
    assert torch.equal(linear_teacher_topk(hidden, head, K).ids, teacher_topk(hidden @ head.T, K).ids)


def test_linear_teacher_topk_holds_one_buffer(backend, monkeypatch) -> None:
    hidden, head, _, _ = (x if isinstance(x, Support) else x.detach() for x in inputs(n=50))
    module = backends._load(backend)
    seen = []

    def select(logits: Tensor, *others) -> None:
        seen.append((len(logits), logits.data_ptr()))
        original(logits, *others)

    original = module.select
    monkeypatch.setattr(module, "select", select)
    linear_teacher_topk(hidden, head, 5, chunk_rows=7)
    assert [rows for rows, _ in seen] == [7] * 7 + [1]
    assert len({address for _, address in seen}) == 1


@pytest.mark.parametrize("what", ["no rows", "no weight", "no slots"])
def test_nothing_to_compare_gives_zero_gradients_attached_to_the_graph(backend, what: str) -> None:
    hidden, head, bias, support = inputs(n=0 if what == "no rows" else N)
    weights = torch.zeros(N, device=DEVICE) if what == "no weight" else None
    if what == "no slots":
        support = Support(torch.full_like(support.ids, V), support.log_probs)
    if what == "no weight":
        hidden.data.fill_(torch.nan)
    for weight_grad in ("dense", "sparse"):
        loss = linear_topk_reverse_kl(
            hidden, head, support, student_bias=bias, weights=weights, reduction="sum", weight_grad=weight_grad
        )
        assert loss == 0
        for leaf, grad in zip((hidden, head, bias), gradients(loss, hidden, head, bias), strict=True):
            assert grad.shape == leaf.shape and (grad == 0).all()
    assert torch.autograd.grad(loss, head)[0]._nnz() == 0  # of the sparse one: nothing was touched


@pytest.mark.parametrize("dtype", LOW)
def test_a_low_precision_gradient_is_rounded_once(backend, dtype: torch.dtype) -> None:
    """After grad_output is known, and not before it as well; to nearest."""
    hidden, head, bias, support = inputs(dtype, n=40)
    given = torch.rand(40, device=DEVICE) + 0.5
    loss = linear_topk_reverse_kl(hidden, head, support, student_bias=bias, reduction="none")
    exact = [x.detach().double().requires_grad_() for x in (hidden, head, bias)]
    with use_backend("reference"):
        want = topk_reverse_kl(dense(*exact), support, reduction="none")
    half = {torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]  # of the last bit, at most
    found = torch.autograd.grad(loss, (hidden, head, bias), given)
    for a, b in zip(found, torch.autograd.grad(want, exact, given.double()), strict=True):
        assert ((a.double() - b).abs() <= half * b.abs() + 3e-6 * b.abs().max()).all()


def test_nan_stays_in_its_row_and_what_is_not_named_is_not_read(backend) -> None:
    hidden, head, _, support = inputs()
    named = torch.zeros(V, dtype=torch.bool, device=DEVICE).index_fill_(0, support.ids.flatten(), True)
    named[:5] = True
    head.data[~named] = torch.nan
    hidden.data[2] = torch.nan
    loss = linear_topk_reverse_kl(hidden, head, support, reduction="none")
    dhidden, dhead = gradients(loss, hidden, head)
    bad = torch.arange(N, device=DEVICE) == 2
    assert torch.equal(loss.isnan(), bad) and torch.equal(dhidden.isnan().any(1), bad)
    clean = torch.ones(V, dtype=torch.bool, device=DEVICE).index_fill_(0, support.ids[2], False)
    assert dhead[clean].isfinite().all() and dhead[~clean].isnan().all()


@pytest.mark.parametrize("weight_grad", ["dense", "sparse"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("vocab", [12, 90])  # K at and below a quarter of V
def test_nan_of_the_teacher_is_never_lost(backend, vocab: int, bad: float, weight_grad: str) -> None:
    """At an id that the head lacks; a slot without an id is empty, and far ids of 64 bits are beyond the head."""
    hidden, head, _, _ = inputs(n=4)
    head = head[:vocab].detach().requires_grad_()
    ids = torch.tensor([[4, vocab, 7], [vocab, vocab + 1, 2**32 + 1], [4, -1, 7], [4, -(2**32) + 5, 7]], device=DEVICE)
    values = torch.tensor([0.5, bad, -1.0], device=DEVICE).expand(4, 3)
    for name in {backend, "auto"}:
        with use_backend(name):
            loss = linear_topk_reverse_kl(hidden, head, Support(ids, values), reduction="none", weight_grad=weight_grad)
            assert loss.isnan().tolist() == [True, True, False, False]
            dhidden, dhead = gradients(loss, hidden, head)
        assert dhidden.isnan().all(1).tolist() == [True, False, False, False] and (dhidden[1] == 0).all()
        assert dhead[[4, 7]].isnan().all() and dhead[:4].isfinite().all()


@pytest.mark.parametrize("dtype", [*LOW, torch.float64])
def test_a_support_and_weights_of_any_dtype(backend, dtype: torch.dtype) -> None:
    hidden, head, bias, support = inputs()
    values, weights = (support.log_probs * 4).round() / 4, torch.tensor([1.0, 0.0, -2.0, 0.5, 1.0, 1.0], device=DEVICE)
    want, got = (
        linear_topk_reverse_kl(
            hidden, head, Support(support.ids, values.to(to)), student_bias=bias, weights=weights.to(to)
        )
        for to in (torch.float32, dtype)
    )
    assert torch.equal(got, want)
    assert all(map(torch.equal, gradients(got, hidden, head, bias), gradients(want, hidden, head, bias)))


def test_a_token_of_probability_zero_is_not_multiplied(backend) -> None:
    """A bias of -inf masks a token; its row of the head may hold anything."""
    hidden, head, bias, support = inputs()
    masked = support.ids[:, 1]
    bias.data[masked] = -torch.inf
    loss = linear_topk_reverse_kl(hidden, head, support, student_bias=bias)
    found = gradients(loss, hidden, head, bias)
    assert loss.isfinite() and all(g.isfinite().all() for g in found)
    logits = dense(hidden.detach().double(), head.detach().double(), bias.detach().double())
    with use_backend("reference"):
        torch.testing.assert_close(loss.double(), topk_reverse_kl(logits, support), rtol=2e-6, atol=2e-6)


def test_repeatable_and_row_by_row(backend) -> None:
    hidden, head, _, support = inputs(n=30)
    loss = linear_topk_reverse_kl(hidden, head, support, reduction="none")
    found = gradients(loss, hidden, head)
    again = linear_topk_reverse_kl(hidden, head, support, reduction="none")
    assert same_bits(loss, again)
    assert all(same_bits(a, b) for a, b in zip(found, gradients(again, hidden, head), strict=True))
    for i in (0, 7, 29):
        row = hidden[i : i + 1].detach().requires_grad_()
        alone = linear_topk_reverse_kl(row, head, support[i : i + 1], reduction="none")
        assert same_bits(alone[0], loss[i]) and same_bits(gradients(alone, row)[0][0], found[0][i])


def test_strides_and_inputs_untouched(backend) -> None:
    hidden, head, bias, support = (x if isinstance(x, Support) else x.detach() for x in inputs())
    want = linear_topk_reverse_kl(hidden, head, support, student_bias=bias, reduction="none")
    wide = torch.full((2, N // 2 + 1, 2 * H), 7.0, device=DEVICE)
    wide[:, :-1, ::2] = hidden.view(2, N // 2, H)
    transposed = head.t().contiguous().t()
    batch = support.reshape(2, N // 2)
    kept = [x.clone() for x in (wide, transposed, bias, *support.tensors)]
    strided = wide[:, :-1, ::2].requires_grad_()
    got = linear_topk_reverse_kl(strided, transposed.requires_grad_(), batch, student_bias=bias, reduction="none")
    got.sum().backward()
    assert torch.equal(got.flatten(), want)
    assert all(torch.equal(a, b) for a, b in zip(kept, (wide, transposed, bias, *support.tensors), strict=True))


@pytest.mark.parametrize("kind", ["expanded", "strided", "per row"])
def test_gradient_for_any_grad_output(backend, kind: str) -> None:
    hidden, head, bias, support = inputs()
    given = {
        "expanded": torch.full((), 3.0, device=DEVICE).expand(N),
        "strided": torch.randn(2 * N, device=DEVICE)[::2],
        "per row": torch.randn(N, device=DEVICE),
    }[kind]
    loss = linear_topk_reverse_kl(hidden, head, support, student_bias=bias, reduction="none")
    exact = [x.detach().double().requires_grad_() for x in (hidden, head, bias)]
    with use_backend("reference"):
        want = topk_reverse_kl(dense(*exact), support, reduction="none")
    found, again = (torch.autograd.grad(loss, (hidden, head, bias), given, retain_graph=True) for _ in range(2))
    for a, b, c in zip(found, torch.autograd.grad(want, exact, given.double()), again, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=3e-6 * b.abs().max().item())
        assert torch.equal(a, c)


def test_a_second_derivative_raises(backend) -> None:
    hidden, head, _, support = inputs()
    (grad,) = torch.autograd.grad(linear_topk_reverse_kl(hidden, head, support), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


def test_no_host_sync(module) -> None:
    if DEVICE == "cpu" and module.__name__.endswith("triton"):
        pytest.skip("the interpreter itself reads values; test_gpu.py captures the compiled kernels in a CUDA graph")
    hidden, head, bias, support = (x if isinstance(x, Support) else x.detach() for x in inputs())
    dhead, dbias = torch.empty_like(head), torch.empty_like(bias)
    with NoHostSync():
        loss, g, dhidden = module.linear_loss(hidden, head, bias, *support.tensors, None, 1.0, 1.0, 2.0, True)
        module.linear_weight_grad(g, support.ids, hidden, dhead, dbias)
    assert loss.isfinite().all() and dhidden.any() and dhead.any() and dbias.any()


@pytest.mark.skipif(DEVICE != "cpu", reason="address space without memory behind it is to be had on the host alone")
@pytest.mark.parametrize("stride", [(2**31, 1), (1, 2**27)], ids=str)
def test_big_offsets_are_64_bit(module, stride: tuple[int, int]) -> None:
    """Rows, or columns, of hidden states and head that lie further apart than 2^31 elements reach."""
    far = [lazy_memory(2**32 + 4_096, torch.bfloat16).as_strided((3, 30), stride) for _ in range(3)]
    near = [torch.randn(3, 30).bfloat16() for _ in range(2)]
    for x, y in zip(far, near, strict=False):
        x.copy_(y)
    ids, values = torch.tensor([[2, 0], [1, 2], [0, 1]]), torch.randn(3, 2)
    results = []
    for hidden, head, dhead in (far, [*near, torch.full((3, 30), torch.nan).bfloat16()]):
        loss, g, dhidden = module.linear_loss(hidden, head, None, ids, values, None, 1.0, 1.0, None, True)
        module.linear_weight_grad(g, ids, hidden, dhead, None)
        results.append((loss, g, dhidden, dhead.clone()))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2 if a.dtype == torch.bfloat16 else 1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [(5, 30, 4, 11), (7, 300, 20, 80)], ids=str)
def test_the_dense_product_is_the_same_loss(monkeypatch, size: tuple[int, ...]) -> None:
    n, vocab, width, k = size
    small_blocks(monkeypatch, 3, 64)
    hidden, head, bias = torch.randn(n, width), torch.randn(vocab, width), torch.randn(vocab)
    ids, values = torch.randint(-2, vocab + 3, (n, k)), torch.randn(n, k)
    weights = torch.randn(n)
    weights[1], hidden[1] = 0, torch.nan
    arguments = (hidden, head, bias, ids, values, weights, 0.7, 1.3, 3.0, True)
    want = reference.linear_loss(*arguments)
    for a, b in zip(dense_linear.linear_loss(*arguments), want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=3e-6 * b.abs().max().item())
    out = [torch.full(shape, torch.nan) for shape in ((vocab, width), (vocab,)) for _ in range(2)]
    for kind, dhead, dbias in ((dense_linear, out[0], out[2]), (reference, out[1], out[3])):
        kind.linear_weight_grad(want[1], ids, hidden, dhead, dbias)
    for a, b in zip(out[::2], out[1::2], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=3e-6 * b.abs().max().item())


def test_the_dense_product_keeps_nan_where_it_belongs() -> None:
    """Rows of the head that nobody names, and a position whose hidden state is bad, spoil nothing else."""
    hidden, head, ids = torch.randn(6, 8), torch.randn(40, 8), torch.rand(6, 30).argsort(1)[:, :12]
    values = torch.randn(6, 12)
    head[30:34], head[34:] = torch.nan, torch.inf
    hidden[2], hidden[4, 0] = torch.nan, torch.inf
    results = []
    for module in (dense_linear, reference):
        loss, g, dhidden = module.linear_loss(hidden, head, None, ids, values, None, 1.0, 1.0, None, True)
        dhead, dbias = torch.empty(40, 8), torch.empty(40)
        module.linear_weight_grad(g, ids, hidden, dhead, dbias)
        results.append((loss, g, dhidden, dhead, dbias))
    assert results[0][2].isfinite().all(1).tolist() == [True, True, False, True, False, True]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.skipif(DEVICE != "cpu", reason="the dense product is chosen on CPUs alone")
def test_autocast_does_not_take_the_dense_product_in_16_bits() -> None:
    hidden, head, _, support = inputs()
    head = head[:20].detach().requires_grad_()
    assert backends.choose_linear("auto", K, hidden, 20) is dense_linear.module
    want = linear_topk_reverse_kl(hidden, head, support)
    with torch.autocast("cpu", torch.bfloat16):
        got = linear_topk_reverse_kl(hidden, head, support)
        assert torch.equal(got, want)
        assert all(map(torch.equal, gradients(got, hidden, head), gradients(want, hidden, head)))


def test_the_dense_product_is_chosen_by_one_rule() -> None:
    hidden = torch.randn(3, 8)
    assert backends.choose_linear("auto", 25, hidden, 100) is dense_linear.module
    assert backends.choose_linear("auto", 24, hidden, 100) is not dense_linear.module
    assert backends.choose_linear("reference", 25, hidden, 100) is reference.module
    assert backends.choose_linear("auto", 25, hidden.double(), 100) is reference.module


SETTINGS = """
import torch
from topk_rkl import linear_topk_reverse_kl
from topk_rkl.backends import choose_linear
hidden, head, teacher = torch.randn(3, 8), torch.randn(20, 8), torch.randn(3, 20)
def took_dense():
    linear_topk_reverse_kl(hidden, head, teacher, k=10)
    return choose_linear("auto", 10, hidden, 20).__name__.endswith("dense_linear")
for setting, dense in SETTINGS:
    exec(setting)
    assert took_dense() == dense, setting
"""


def run(code: str, **environment: str) -> str:
    """What the code prints, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_dense_product_is_not_taken_where_it_has_fewer_bits() -> None:
    """By torch's old setting and, in any mixture, its newer ones, which make the reading of the old one raise."""
    settings = [(f"torch.set_float32_matmul_precision({x!r})", x == "highest") for x in ("high", "medium", "highest")]
    if hasattr(torch.backends.mkldnn, "matmul"):
        settings += [
            ("torch.backends.cuda.matmul.fp32_precision = 'tf32'", True),
            ("torch.backends.mkldnn.matmul.fp32_precision = 'bf16'", False),
            ("torch.backends.mkldnn.matmul.fp32_precision = 'ieee'", True),
            ("torch.backends.mkldnn.matmul.fp32_precision = 'none'", True),
            ("torch.backends.mkldnn.conv.fp32_precision = 'bf16'", True),
            ("torch.backends.fp32_precision = 'tf32'", False),
            ("torch.backends.fp32_precision = 'ieee'", True),
        ]
    run(SETTINGS.replace("SETTINGS", repr(settings)))


PEAK = """
import torch
from topk_rkl import Support, linear_topk_divergence
def status(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) / 1024
n, vocab, width, k, dtype, mass = ARGUMENTS
ids = torch.arange(k, dtype=torch.int32).expand(n, k).contiguous()
values = torch.randn(n, k).log_softmax(1) - 0.1
hidden, head = torch.randn(n, width).to(dtype), torch.randn(vocab, width).to(dtype).requires_grad_()
def step(n):
    rows = hidden[:n].requires_grad_()
    loss = linear_topk_divergence(rows, head, Support(ids[:n], values[:n]), mass=mass)
    torch.autograd.grad(loss, (rows, head))
step(2)
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
step(n)
print(status("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(DEVICE != "cpu" or sys.platform != "linux", reason="reads the peak of a process on Linux")
@pytest.mark.parametrize(
    ("mass", "n", "vocab", "width", "k", "dtype"),
    [
        ("renormalized", 768, 2_048, 64, 2_048, torch.float32),
        ("tail", 768, 2_048, 64, 2_048, torch.float32),
        ("tail", 16, 16_384, 2_048, 16, torch.bfloat16),
    ],
)
def test_memory_of_dense_products(mass: str, n: int, vocab: int, width: int, k: int, dtype: torch.dtype) -> None:
    """N K 16 bytes and 64 MiB beyond the gradients, counted as the system does, that of the hidden states twice."""
    arguments = f"{(n, vocab, width, k)} + ({dtype}, {mass!r})"
    peak = float(run(PEAK.replace("ARGUMENTS", arguments), MALLOC_MMAP_THRESHOLD_="65536"))
    gradients = (vocab * width + n * width) * dtype.itemsize + 4 * n * width
    assert 0 < peak <= (16 * n * k + gradients) / 2**20 + 64


def test_the_module_is_the_function() -> None:
    hidden, head, bias, support = inputs()
    weights, denominator = torch.rand(N, device=DEVICE), torch.tensor(4.0, device=DEVICE)
    options = {"temperature": 0.7, "logit_scale": 1.2, "softcap": 3.0, "weight_grad": "sparse"}
    want = linear_topk_reverse_kl(
        hidden, head, support, student_bias=bias, weights=weights, denominator=denominator, **options
    )
    module = LinearTopKReverseKLLoss(**options)
    assert torch.equal(module(hidden, head, support, weights, denominator, bias), want)
    assert "reduction='mean', logit_scale=1.2, softcap=3.0, weight_grad='sparse'" in repr(module)
