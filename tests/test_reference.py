"""What only the reference has: chunks of rows; and its linear loss against autograd of the plain form."""

import pytest
import torch

from tests.direct import reference
from topk_rkl import rows


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("chunk_bytes", [1 << 10, 32 << 20])
def test_linear_loss_is_the_loss_of_the_dense_logits(monkeypatch, softcap, biased: bool, chunk_bytes: int) -> None:
    monkeypatch.setattr(rows, "CHUNK_BYTES", chunk_bytes)
    n, vocab, width, k, temperature, scale = 7, 30, 5, 6, 0.7, 1.3
    hidden, head = torch.randn(n, width).double().requires_grad_(), torch.randn(vocab, width).double().requires_grad_()
    bias = torch.randn(vocab).double().requires_grad_() if biased else None
    ids = torch.randint(-1, vocab, (n, k))
    ids[3] = -1
    values, weights = torch.randn(n, k).double(), torch.tensor([1.0, 0.0, 2.0, 1.0, -1.0, 0.5, 1.0]).double()

    logits = (hidden @ head.T if bias is None else hidden @ head.T + bias) * scale
    logits = logits if softcap is None else softcap * (logits / softcap).tanh()
    empty = ids < 0
    log_p = (logits.gather(1, ids.clamp(min=0)) / temperature).masked_fill(empty, -1e300).log_softmax(1)
    log_q = (values / temperature).masked_fill(empty, -1e300).log_softmax(1)
    want = (log_p.exp() * (log_p - log_q)).masked_fill(empty, 0).sum(1) * weights
    want.sum().backward()

    tensors = hidden.detach(), head.detach(), None if bias is None else bias.detach()
    loss, g, dhidden = reference.linear_loss(*tensors, ids, values, weights, temperature, scale, softcap, True)
    dhead, dbias = torch.full_like(tensors[1], torch.nan), torch.full((vocab,), torch.nan, dtype=torch.float64)
    reference.linear_weight_grad(g, ids, tensors[0], dhead, dbias)
    torch.testing.assert_close(loss, want.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dhidden, hidden.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dhead, head.grad, rtol=1e-12, atol=1e-12)
    if bias is not None:
        torch.testing.assert_close(dbias, bias.grad, rtol=1e-12, atol=1e-12)


def test_linear_loss_does_not_read_rows_outside_the_support() -> None:
    hidden, head = torch.randn(2, 4), torch.full((9, 4), torch.nan)
    head[[2, 5, 7]] = torch.randn(3, 4)
    ids = torch.tensor([[2, 5, -1], [7, 99, 2]])
    loss, g, dhidden = reference.linear_loss(hidden, head, None, ids, torch.randn(2, 3), None, 1.0, 1.0, None, True)
    assert loss.isfinite().all() and g.isfinite().all() and dhidden.isfinite().all()
    assert g[0, 2] == 0 and g[1, 1] == 0


def test_chunks_do_not_change_a_bit(monkeypatch) -> None:
    student, teacher = torch.randn(2, 9, 400)
    want = reference.select_loss(student, teacher, 20, None, 1.0)
    monkeypatch.setattr(rows, "CHUNK_BYTES", 1)
    assert all(
        torch.equal(a, b) for a, b in zip(reference.select_loss(student, teacher, 20, None, 1.0), want, strict=True)
    )
