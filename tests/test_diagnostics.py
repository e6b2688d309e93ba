"""The diagnostics: each against its definition, over whole rows and in float64."""

import pytest
import torch
from conftest import DEVICE, LiveBytes
from torch import Tensor

import topk_rkl.rows
from topk_rkl import Support, diagnostics, teacher_topk
from topk_rkl.diagnostics import linear_topk_diagnostics, topk_diagnostics

K, T = 5, 0.7


def wanted(z: Tensor, w: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Row by row, as one would say it."""
    results: dict[str, list] = {name: [] for name in diagnostics.NAMES}
    for log_p, log_q, token in zip(*((x.double() / T).log_softmax(1) for x in (z, w)), y.tolist(), strict=True):
        best_q, best_p = (sorted(range(len(x)), key=lambda v, x=x: -x[v])[:K] for x in (log_q, log_p))
        p, q = log_p.exp(), log_q.exp()
        both = [v for v in best_q if v in best_p]
        inside = [log_p[best_q].log_softmax(0), log_q[best_q].log_softmax(0)]
        row = {
            "student_mass": p[best_q].sum(),
            "teacher_mass": q[best_q].sum(),
            "overlap_count": len(both),
            "overlap_token_advantage": (-q[both] * (log_q - log_p)[both]).mean() if both else 0.0,
            "top1_agreement": best_p[0] == best_q[0],
            "student_entropy": -(p * log_p).sum(),
            "teacher_entropy": -(q * log_q).sum(),
            "sampled_log_prob": log_p[token],
            "teacher_sampled_log_prob": log_q[token],
            "sampled_in_support": token in best_q,
            "max_log_ratio": (inside[0] - inside[1]).abs().max(),
        }
        for name, value in row.items():
            results[name].append(torch.as_tensor(value))
    return {name: torch.stack(column) for name, column in results.items()}


@pytest.fixture
def rows() -> tuple[Tensor, Tensor, Tensor]:
    z, w = torch.randn(2, 12, 40) * 2
    w[:6] += z[:6]
    return z.to(DEVICE), w.to(DEVICE), torch.randint(40, (12,), device=DEVICE)


def test_each_is_its_definition(rows, monkeypatch) -> None:
    z, w, y = rows
    want = wanted(z.cpu(), w.cpu(), y.cpu())
    assert 0 < want["overlap_count"].float().mean() < K and want["top1_agreement"].float().mean() not in (0, 1)
    options = {"k": K, "temperature": T, "sampled_ids": y.view(3, 4)}
    for chunk_bytes in (1, 32 << 20):
        monkeypatch.setattr(topk_rkl.rows, "CHUNK_BYTES", chunk_bytes)
        found = topk_diagnostics(z.view(3, 4, 40).requires_grad_(), w.view(3, 4, 40), diagnostics.NAMES, **options)
        assert list(found) == list(diagnostics.NAMES)
        for name, value in found.items():
            assert value.shape == (3, 4) and not value.requires_grad
            torch.testing.assert_close(value.flatten().cpu().double(), want[name].double(), rtol=1e-5, atol=1e-6)


def test_a_support_of_log_probs_serves_what_needs_no_teacher_logits(rows) -> None:
    z, w, y = rows
    support = teacher_topk(w, K, normalize=True)
    names = [name for name in diagnostics.NAMES if name not in diagnostics.OF_TEACHER_LOGITS]
    want = topk_diagnostics(z, w, names, k=K, sampled_ids=y)
    found = topk_diagnostics(z, support, names, sampled_ids=y)
    assert found.keys() == want.keys()
    for name in names:
        torch.testing.assert_close(found[name], want[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_logits_and_a_support_tell_the_same_however_often_an_id_is_given(rows, offset: float) -> None:
    z, w, y = rows
    z, w = z + offset, w - offset
    z[0, 3:] = -torch.inf  # fewer tokens than K on the student's side, and 0 is among them
    z[1, :37] = -torch.inf
    names = [name for name in diagnostics.NAMES if name not in diagnostics.OF_TEACHER_LOGITS]
    ids, values = teacher_topk(w, K, normalize=True).tensors
    want = topk_diagnostics(z, w, names, k=K, sampled_ids=y)
    again = torch.tensor([0, 0, 3, 1, 3], device=DEVICE)
    worse = values[:, again] - 1  # the first slot is the one that counts
    for slots in (Support(ids, values), Support(torch.cat((ids, ids[:, again]), 1), torch.cat((values, worse), 1))):
        for dtype in (torch.int32, torch.int64):
            support = Support(slots.ids.to(dtype), slots.log_probs)
            found = topk_diagnostics(z, support, names, sampled_ids=y)
            for name in names:
                torch.testing.assert_close(found[name], want[name], rtol=1e-5, atol=1e-5, equal_nan=True, msg=name)


@pytest.mark.parametrize("temperature", [0.05, 20.0])
def test_large_logits_cost_no_accuracy(temperature: float, monkeypatch: pytest.MonkeyPatch, rows) -> None:
    z, w, y = (x.cpu() for x in rows)
    z, w = (z * temperature).float() + 1e4, (w * temperature).float() - 1e4
    monkeypatch.setitem(globals(), "T", temperature)
    want = wanted(z, w, y)
    found = topk_diagnostics(z, w, diagnostics.NAMES, k=K, temperature=temperature, sampled_ids=y)
    for name, value in found.items():
        torch.testing.assert_close(value.double(), want[name].double(), rtol=1e-5, atol=1e-5, msg=name)


def test_a_support_of_logits_is_refused_or_nan_where_log_probs_are_needed(rows) -> None:
    z, w, _ = rows
    logits = teacher_topk(w + 3, K)
    for name in diagnostics.OF_TRUE_LOG_PROBS:
        with pytest.raises(ValueError, match=f"teacher holds logits, .*'{name}' needs true log-probs"):
            topk_diagnostics(z, logits, [name])
    of_logits = topk_diagnostics(z, Support(*logits.tensors), diagnostics.OF_TRUE_LOG_PROBS)
    assert of_logits["teacher_mass"].isnan().all() and of_logits["overlap_token_advantage"].isnan().any()
    for dtype in (torch.bfloat16, torch.float16):
        ids, values = teacher_topk(w, 40, normalize=True).tensors
        mass = topk_diagnostics(z, Support(ids, values.to(dtype)), ("teacher_mass",))["teacher_mass"]
        torch.testing.assert_close(mass, torch.ones_like(mass), rtol=0.02, atol=0)


@pytest.mark.parametrize("beyond", [2**32 + 2, -(2**32) + 2, 2**31, 2**63 - 1])
def test_ids_are_never_narrowed(rows, beyond: int) -> None:
    z, w, _ = rows
    y = torch.full((12,), beyond, device=DEVICE)
    ids, values = teacher_topk(w, K, normalize=True).tensors
    stranger = Support(torch.cat((ids.long(), y[:, None]), 1), torch.cat((values, values[:, :1]), 1))
    names = [name for name in diagnostics.NAMES if name not in diagnostics.OF_TEACHER_LOGITS]
    want = topk_diagnostics(z, Support(ids, values), names, sampled_ids=y)
    found = topk_diagnostics(z, stranger, names, sampled_ids=y)
    assert not found["sampled_in_support"].any() and (found["sampled_log_prob"] == -torch.inf).all()
    for name in names:
        torch.testing.assert_close(found[name], want[name], msg=name)


def test_empty_slots_count_for_nothing(rows) -> None:
    z, w, y = rows
    y = torch.where(torch.arange(12, device=DEVICE) < 6, -100, y)
    ids, values = teacher_topk(w, K, normalize=True).tensors
    names = [name for name in diagnostics.NAMES if name not in diagnostics.OF_TEACHER_LOGITS]
    want = topk_diagnostics(z, Support(ids, values), names, sampled_ids=y)
    ids, values = (torch.cat((x, x[:, :2]), 1) for x in (ids, values))
    ids[:, -2], values[:, -1] = -1, -torch.inf
    found = topk_diagnostics(z, Support(ids, values), names, sampled_ids=y)
    for name in set(names) - {"overlap_count", "overlap_token_advantage"}:  # which have a larger K now
        torch.testing.assert_close(found[name], want[name], rtol=1e-5, atol=1e-6)
    assert (found["sampled_log_prob"][:6] == -torch.inf).all() and not found["sampled_in_support"][:6].any()
    nothing = topk_diagnostics(z, Support(ids.fill_(-1), values), names, sampled_ids=y)
    for name in ("student_mass", "overlap_count", "overlap_token_advantage", "top1_agreement", "max_log_ratio"):
        assert (nothing[name] == 0).all(), name


def test_from_hidden_states_they_are_those_of_the_logits(rows) -> None:
    _, w, y = rows
    hidden, head, bias = (torch.randn(shape, device=DEVICE) for shape in ((12, 6), (40, 6), (40,)))
    z = 3 * ((hidden @ head.T + bias) * 1.2 / 3).tanh()
    options = {"names": diagnostics.NAMES, "k": K, "temperature": T, "sampled_ids": y}
    want = topk_diagnostics(z, w, **options)
    found = linear_topk_diagnostics(hidden, head, w, student_bias=bias, logit_scale=1.2, softcap=3.0, **options)
    assert found.keys() == want.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, want[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("asked", [(), ["student_mass"], ("overlap_count", "student_mass")])
def test_they_are_those_asked_for_in_that_order(rows, asked) -> None:
    z, w, _ = rows
    hidden, head = torch.randn(12, 6, device=DEVICE), torch.randn(40, 6, device=DEVICE)
    for found in (topk_diagnostics(z, w, asked, k=K), linear_topk_diagnostics(hidden, head, w, asked, k=K)):
        assert list(found) == list(asked)


@pytest.mark.slow
def test_memory_holds_some_rows_alone(monkeypatch) -> None:
    monkeypatch.setattr(topk_rkl.rows, "CHUNK_BYTES", 1 << 19)
    z, w = torch.randn(2, 500, 5_000, device=DEVICE).bfloat16()
    with LiveBytes() as memory:
        topk_diagnostics(z, w, ("student_entropy", "overlap_token_advantage"), k=8)
    assert 0 < memory.peak < 500 * 5_000 * 4
