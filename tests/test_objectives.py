"""Promise: docs/objectives.md. Every call of its table is run against the formula beside it, in plain PyTorch."""

import ast
import math
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import EVERY_OBJECTIVE
from torch import Tensor

from topk_rkl import diagnostics, loss, use_backend
from topk_rkl.recipe import builders, composition, rewards, rollout, weighting

# Triton's interpreter takes seconds a call; test_divergence.py and test_mass.py have it.
HAVE_IT = [name for name in EVERY_OBJECTIVE if name != "triton"]
INF = math.inf
B, T, V, K = 2, 5, 12, 4
MODULES = (loss, diagnostics, builders, composition, rewards, rollout, weighting)
LEGEND, TABLE = (Path(__file__).parent.parent / "docs" / "objectives.md").read_text().split("| Objective |")
WORKS = [  # that cite the paper
    "2606.18810", "2606.18216", "2606.17199", "2606.11627", "2606.10385", "2606.07082", "2606.06021", "2605.16826",
    "2605.08741", "2605.08737", "2605.07396", "2605.05040", "2605.01347", "2604.03128", "2606.30518", "2606.11709",
    "2606.09076", "2606.07000", "2606.09887", "2605.30833", "2605.28396", "2605.22263", "2605.21834", "2606.30923",
]  # fmt: skip


def rows() -> dict[str, str]:
    """{name of the objective: what its third cell says}, the name of a sub-row behind that of its row."""
    found: dict[str, str] = {}
    parent = ""
    for line in TABLE.splitlines()[2:]:
        if not line.startswith("|"):
            break
        cells = [cell.strip() for cell in line[1:-1].split("|")]
        assert len(cells) == 4, line
        name = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", cells[0])
        parent = parent if name.startswith("- ") else name.split(",")[0]
        name = f"{parent} {name}" if name.startswith("- ") else name.split(",")[0]
        assert name not in found, name
        found[name] = cells[2]
    return found


ROWS = rows()
CALLS = {name: re.fullmatch(r"`(.*)`", cell).group(1) for name, cell in ROWS.items() if cell.startswith("`")}


def scope(dtype: torch.dtype) -> dict[str, Any]:
    """The names that the page explains: the same numbers in either dtype."""
    spread = torch.linspace(1, 4, T)[:, None]  # from flat to peaked
    z, w, w2, b, z2 = (spread * torch.randn(5, B, T, V)).to(dtype).unbind(0)
    z.requires_grad_(), z2.requires_grad_()
    y = torch.randint(V, (B, T))
    y[0, :3] = torch.stack([w[0, 0].argmax(), w[0, 1].argmin(), torch.tensor(3)])
    y[1, :2] = 3
    window = (torch.arange(T) < 3).expand(B, T).to(dtype)

    def at_y(logits: Tensor) -> Tensor:
        return logits.log_softmax(-1).gather(-1, y[..., None])[..., 0]

    def entropy(logits: Tensor) -> Tensor:
        return -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1).detach()

    given = {
        "z": z, "z2": z2, "w": w, "w2": w2, "b": b, "y": y, "K": K, "V": V, "math": math, "torch": torch,
        "mask": torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]]).to(dtype),
        "log_p": at_y(z), "log_q": at_y(w), "log_b": at_y(b), "log_q2": at_y(w2), "log_q3": at_y(b + w2),
        "log_p_old": at_y(z.detach() + 0.1 * w2), "advantage": torch.randn(B, T).to(dtype),
        "H": entropy(z), "H_teacher": entropy(w), "confidence": (0.3, 0.7), "own": (torch.rand(B, T) < 0.5).to(dtype),
        "n": 7.0, "failed": torch.tensor([[1.0] * T, [0.0] * T]), "window": window, "tau": 1.2, "sigma": 0.4,
        "w_next": torch.randn(B, T, K, V).to(dtype),
    }  # fmt: skip
    public = {name: x for module in MODULES for name, x in vars(module).items() if not name.startswith("_")}
    return public | given


def run(call: str, names: dict[str, Any]) -> Tensor:
    """Statements between semicolons, of which the last is an expression."""
    *first, last = ast.parse(call).body
    exec(compile(ast.Module(first, []), "objectives.md", "exec"), names)
    return eval(compile(ast.Expression(last.value), "objectives.md", "eval"), names)


# The formulas. P and Q are the log-probs of student and teacher over V; sets are boolean masks over V.


def kl(log_x: Tensor, log_y: Tensor, inside: Tensor | None = None) -> Tensor:
    terms = log_x.exp() * (log_x - log_y)
    return (terms if inside is None else torch.where(inside, terms, 0)).sum(-1)


def jsd(log_p: Tensor, log_q: Tensor, beta: float = 0.5) -> Tensor:
    log_m = (beta * log_q.exp() + (1 - beta) * log_p.exp()).log()
    return beta * kl(log_q, log_m) + (1 - beta) * kl(log_p, log_m)


def top(logits: Tensor, k: int = K) -> Tensor:
    return torch.zeros_like(logits, dtype=torch.bool).scatter(-1, logits.topk(k).indices, True)


def only(logits: Tensor, inside: Tensor) -> Tensor:
    """Log-probs over a set; -1e9 stands for -inf, which has no gradient."""
    return logits.masked_fill(~inside, -1e9).log_softmax(-1)


def renormalized(z: Tensor, w: Tensor, inside: Tensor) -> Tensor:
    return kl(only(z, inside), only(w, inside), inside)


def with_rest(log_x: Tensor, ranking: Tensor) -> Tensor:
    """The K best tokens of the ranking, and all others as one."""
    kept = log_x.gather(-1, ranking.topk(K).indices)
    return torch.cat([kept, (1 - kept.exp().sum(-1, keepdim=True)).log()], -1)


def mean(x: Tensor, mask: Tensor) -> Tensor:
    return (x * mask).sum() / mask.sum()


def sampled(s: SimpleNamespace, weights: Tensor) -> tuple[Tensor, Tensor]:
    ratio = s.log_p - s.log_q
    return mean(ratio, weights), mean(ratio.detach() * s.log_p, weights)


def special(s: SimpleNamespace) -> Tensor:
    weights = torch.ones(B, T, dtype=torch.float64)
    for row in range(B):
        for token in (3, 7):
            if token in s.y[row].tolist():
                weights[row, s.y[row].tolist().index(token)] = 0
    assert 0 < weights.sum() < B * T - 1
    return mean(renormalized(s.z, s.w, top(s.w)), weights)


def clipped(s: SimpleNamespace) -> Tensor:
    inside = top(s.w)
    log_p, log_q = only(s.z, inside), only(s.w, inside)
    assert ((log_p - log_q).abs() > 5)[inside].any()
    return torch.where(inside, log_p.exp() * (log_p - log_q).clamp(-5, 5), 0).sum(-1).mean()


def discounted(s: SimpleNamespace) -> Tensor:
    total = 0.0
    for row in range(B):
        for t in range(T):
            to_come = sum(0.5 ** (u - t) * s.mask[row, u] * (s.log_q - s.log_p)[row, u].detach() for u in range(t, T))
            total = total - s.mask[row, t] * to_come * s.log_p[row, t]
    return total


def plus_sampled(s: SimpleNamespace, ranking: Tensor) -> Tensor:
    return renormalized(s.z, s.w, top(ranking).scatter(-1, s.y[..., None], True)).mean()


def ema_pg(s: SimpleNamespace, ranking: Tensor, corrected: bool = False) -> tuple[Tensor, Tensor]:
    inside = top(ranking)
    outside = ~inside.gather(-1, s.y[..., None])[..., 0]
    assert 0 < outside.sum() < B * T
    ratio, a = (s.log_p - s.log_p.detach()).exp(), s.P - s.Q
    tail = outside * ratio * (s.log_p - s.log_q).detach()
    head = torch.where(inside, s.P.exp() * (a.detach() if corrected else a), 0).sum(-1)
    return head + tail, head + tail


def residual_target(s: SimpleNamespace) -> Tensor:
    partial, full = s.w.log_softmax(-1), s.w2.log_softmax(-1)
    assert ((full - partial).abs() > 5).any()
    return kl((partial + (full - partial).clamp(-5, 5)).log_softmax(-1), s.P).mean()


def lookahead(s: SimpleNamespace) -> Tensor:
    c = s.w_next.softmax(-1).amax(-1)
    spread = ((c - c.mean(-1, keepdim=True)) ** 2).sum(-1).div(K - 1).sqrt()
    gate = (s.H > 1).double()
    assert 0 < gate.sum() < B * T
    return (s.log_q - s.log_p).detach() + 1.5 * gate * (c[..., 0] - c.mean(-1)) / (spread + 1e-6)


def dasd(s: SimpleNamespace) -> Tensor:
    d = (s.log_q - s.log_p).detach()
    d = d / d.std()
    omega = ((s.tau - s.H) / s.sigma).tanh() / (1 + (1 - d.abs()).exp())
    return s.advantage + 0.5 * omega * d


def minillm(s: SimpleNamespace) -> tuple[Tensor, Tensor]:
    reward = (s.log_q - s.log_p).detach()
    later = torch.stack([reward[:, t + 1 :].sum(-1) for t in range(T)], -1)
    value = kl(s.P, s.Q).sum() - (later * s.log_p).sum()
    return value, value


def akl(s: SimpleNamespace) -> Tensor:
    p, q = s.P.exp().detach(), s.Q.exp()
    share = torch.zeros(B, T, dtype=torch.float64)
    for position in [(i, t) for i in range(B) for t in range(T)]:
        head, mass = [], 0.0
        for token in q[position].argsort(descending=True).tolist():
            if mass < 0.5:
                head.append(token)
                mass += q[position][token].item()
        gap = (q[position] - p[position]).abs()
        share[position] = gap[head].sum() / gap.sum()
    return share * kl(s.Q, s.P) + (1 - share) * kl(s.P, s.Q)


def alpha_beta(s: SimpleNamespace, alpha: float = 0.2, beta: float = 0.7) -> Tensor:
    p, q, r = s.P.exp(), s.Q.exp(), alpha + beta
    terms = q**alpha * p**beta - alpha / r * q**r - beta / r * p**r
    return -terms.sum(-1).mean() / (alpha * beta)


def raw(s: SimpleNamespace) -> Tensor:
    return torch.where(top(s.w), s.P.exp() * (s.P - s.Q), 0).sum(-1).mean()


def stop_gradient(s: SimpleNamespace) -> tuple[Tensor, Tensor]:
    inside, p, q = top(s.w), s.P.exp(), s.Q.exp()
    value = torch.where(inside, p * (s.P - s.Q).detach(), 0).sum(-1).mean()
    generalised = torch.where(inside, p * (s.P - s.Q) - p + q, 0).sum(-1).mean()
    held, whole = (torch.autograd.grad(x, s.z, retain_graph=True)[0] for x in (value, generalised))
    torch.testing.assert_close(held, whole)
    return value, generalised


def student_k(s: SimpleNamespace) -> tuple[Tensor, Tensor]:
    inside = top(s.z)
    weighted = torch.where(inside, only(s.z, inside).exp() * (s.P - s.Q).detach(), 0).sum(-1).mean()
    return renormalized(s.z, s.w, inside).mean(), weighted


def exactly_one(s: SimpleNamespace) -> Tensor:
    return renormalized(s.z, s.w, top(s.z) ^ top(s.w)).mean()


def nucleus(s: SimpleNamespace) -> Tensor:
    ranked, ids = s.Q.exp().sort(dim=-1, descending=True)
    above = ranked.cumsum(-1) - ranked
    inside = torch.zeros_like(above, dtype=torch.bool).scatter(-1, ids, above < 0.8) & top(s.w)
    assert 1 < inside.sum(-1).double().mean() < K
    return renormalized(s.z, s.w, inside).mean()


def renamed(s: SimpleNamespace) -> Tensor:
    """A token at a time, of each position: {student's id: teacher's mass}."""
    losses = []
    for z, w in zip(s.z.flatten(0, 1), s.w.flatten(0, 1), strict=True):
        mass: dict[int, Tensor] = {}
        for token in w.topk(K).indices.tolist():
            name = 7 if token == 3 else token
            mass[name] = mass.get(name, 0.0) + w[token].exp()
        q = torch.stack(list(mass.values()))
        losses.append(kl(z[list(mass)].log_softmax(-1), (q / q.sum()).log()))
    return torch.stack(losses).mean()


def k_pp(s: SimpleNamespace) -> Tensor:
    ratio = (s.log_q - s.log_p).exp()
    return (s.log_p - s.log_p.detach()).exp() * (ratio - 1 - (s.log_q - s.log_p))


def gated(s: SimpleNamespace) -> Tensor:
    inside = top(s.w)
    gate = (s.H_teacher > 0.8).double()
    assert 0 < gate.sum() < B * T
    return kl(s.P, s.Q) + gate * kl(only(s.w, inside), only(s.z, inside), inside)


def constant(x: Tensor) -> Tensor:
    return x.detach()


FORMULAS: dict[str, Callable[[SimpleNamespace], Any]] = {  # the value, or it and the loss whose gradient it has
    "Local support matching": lambda s: mean(renormalized(s.z, s.w, top(s.w)), s.mask),
    "Local support matching - as its code averages": lambda s: (
        (renormalized(s.z, s.w, top(s.w)) * s.mask).sum(-1) / s.mask.sum(-1)
    ).mean(),
    "Local support matching - special tokens masked": special,
    "Local support matching - log-ratio clipped": clipped,
    "Local support matching - sampled-token baseline, eq. 5": lambda s: sampled(s, s.mask),
    "Local support matching - discounted sum of rewards, eq. 3": discounted,
    "Local support matching - V2: the student's top K and y": lambda s: plus_sampled(s, s.z),
    "Local support matching - V3: the teacher's top K and y": lambda s: plus_sampled(s, s.w),
    "Local support matching - V4: EMA-PG on the student's top K": lambda s: ema_pg(s, s.z),
    "Local support matching - V5: EMA-PG on the teacher's top K, 2602.04417": lambda s: [
        x.mean() for x in ema_pg(s, s.w)
    ],
    "Local support matching - EMA-PG corrected": lambda s: [x.mean() for x in ema_pg(s, s.w, corrected=True)],
    "SC-GRPO": lambda s: (d := constant(kl(s.Q, s.P))) / (d + max(d.quantile(0.75).item(), 1e-4)),
    "PowerOPD": lambda s: -mean(constant(s.log_q.exp() ** 5 - s.log_p.exp() ** 5) * s.log_p, s.mask),
    "PowerOPD - as a Box-Cox family": lambda s: constant((s.log_q.exp().sqrt() - s.log_p.exp().sqrt()) / 0.5),
    "NCA": lambda s: (kl(s.P, s.Q) + 0.5 * kl(constant(s.P), s.z2.log_softmax(-1))).mean(),
    "AR-OPD": residual_target,
    "Decoupling KL direction": lambda s: (0.7 * kl(s.Q, s.P) + 0.3 * kl(s.P, s.Q)).mean(),
    "OPHSD": lambda s: kl(s.P, s.Q) * (s.H / math.log(V)) ** 2,
    "OPHSD - its other weight": lambda s: constant(jsd(s.P, s.Q) / math.log(2)),
    "Extrapolation cliff / ListOPD": lambda s: constant(1.25 * s.log_q - s.log_p - 0.25 * s.log_b),
    "MAD-OPD": lambda s: (0.3 * jsd(s.P, s.Q) + 0.7 * jsd(s.P, s.w2.log_softmax(-1))).mean(),
    "MAD-OPD - for code": lambda s: (0.3 * kl(s.P, s.Q) + 0.7 * kl(s.P, s.w2.log_softmax(-1))).mean(),
    "RLSD": lambda s: constant(
        s.advantage * (0.5 + 0.5 * ((s.log_q - s.log_p).exp() ** s.advantage.sign()).clamp(0.8, 1.2))
    ),
    "RAPS-DA": lambda s: (
        torch.where(s.own == 1, renormalized(s.z, s.w, top(s.w)), renormalized(s.z, s.w2, top(s.w2))).sum() / 7
    ),
    "RLCSD": lambda s: (0.1 * ((s.log_q - (0.5 * (s.log_q2.exp() + s.log_q3.exp())).log()) / 0.03).tanh()).clamp(
        -0.5, 0.5
    ),
    "Z-Reward": lambda s: kl(s.w[..., [3, 5, 8]].log_softmax(-1), s.z[..., [3, 5, 8]].log_softmax(-1)).mean(),
    "PTD-PO": lambda s: 0.5 * mean(jsd(with_rest(s.P, s.w), with_rest(s.Q, s.w)), s.failed),
    "Lookahead Group Reward": lookahead,
    "ADWIN": lambda s: sampled(s, s.window),
    "DASD": dasd,
    "OPCT": lambda s: kl(s.P, s.Q).mean(),
    "Sampled-token OPD": lambda s: (
        -((s.log_p.exp() / s.log_p_old.exp()) * constant(s.log_q - s.log_p_old) * s.mask).sum()
    ),
    "tinker-cookbook top K reversed": lambda s: renormalized(s.z, s.w, top(s.w)).sum(),
    "tinker-cookbook top K": lambda s: kl(only(s.w, top(s.w)), s.P, top(s.w)).sum(),
    "GKD": lambda s: jsd(s.P, s.Q, 0.3).mean(),
    "GKD - its ends, as libraries have them": lambda s: kl(s.Q, s.P).mean(),
    "GKD - the other end": lambda s: kl(s.P, s.Q).mean(),
    "DistiLLM js_distance(0.9)": lambda s: (
        0.9 * kl(s.P, m := (0.1 * s.Q.exp() + 0.9 * s.P.exp()).log()) + 0.1 * kl(s.Q, m)
    ).mean(),
    "DistiLLM js_distance(0.9) - skew forward KL": lambda s: kl(s.Q, (0.1 * s.Q.exp() + 0.9 * s.P.exp()).log()).mean(),
    "DistiLLM js_distance(0.9) - skew reverse KL": lambda s: kl(s.P, (0.9 * s.Q.exp() + 0.1 * s.P.exp()).log()).mean(),
    "MiniLLM": minillm,
    "AKL": akl,
    "ABKD": alpha_beta,
    "ABKD - at alpha = beta = 0": lambda s: ((s.P - s.Q) ** 2 / 2).sum(-1).mean(),
    "ABKD - at alpha = 0": lambda s: (
        (s.P.exp().sqrt() * (s.P - s.Q) / 2 - s.P.exp().sqrt() + s.Q.exp().sqrt()).sum(-1).mean() / 0.25
    ),
    "TAID": lambda s: kl((0.6 * s.z.detach() + 0.4 * s.w).log_softmax(-1), s.P).mean(),
    "Veto": lambda s: kl((s.Q.exp() * s.P.detach().exp().sqrt()).log().log_softmax(-1), s.P).mean(),
    "G-OPD / ExOPD": lambda s: constant(1.25 * (s.log_q - s.log_b) - (s.log_p - s.log_b)),
    "G-OPD / ExOPD - as a distribution": lambda s: kl(s.P, (1.25 * s.w - 0.25 * s.b).log_softmax(-1)).mean(),
    "EOPD": gated,
    "REOPOLD": lambda s: constant(s.log_q - s.log_p).clamp(-1, 1),
    "vOPD": lambda s: constant(s.log_q - s.log_p + kl(s.P, s.Q)),
    "OPSD": lambda s: (s.Q.exp() * (s.Q - s.P)).clamp(max=0.05).sum(-1).mean(),
    "SDPO": lambda s: jsd(with_rest(s.P, s.z), with_rest(s.Q, s.z)).mean(),
    "SDPO - renormalised": lambda s: jsd(
        s.z.topk(K).values.log_softmax(-1), s.w.gather(-1, s.z.topk(K).indices).log_softmax(-1)
    ).mean(),
    "Top K and tail": lambda s: kl(with_rest(s.P, s.w), with_rest(s.Q, s.w)).mean(),
    "Top K and tail - forward, verl forward_kl_topk_tail": lambda s: kl(
        with_rest(s.Q, s.w), with_rest(s.P, s.w)
    ).mean(),
    "Top K alone": raw,
    "MOPD": stop_gradient,
    "thunlp/OPD": student_k,
    "thunlp/OPD - union": lambda s: renormalized(s.z, s.w, top(s.z) | top(s.w)).mean(),
    "thunlp/OPD - intersection": lambda s: renormalized(s.z, s.w, top(s.z) & top(s.w)).mean(),
    "thunlp/OPD - union without intersection": exactly_one,
    "Nucleus of the teacher": nucleus,
    "Renamed special tokens": renamed,
    "Mixture of teachers": lambda s: kl(s.P, (0.7 * s.w.softmax(-1) + 0.3 * s.w2.softmax(-1)).log()).mean(),
    "k1": lambda s: constant(s.log_p - s.log_q),
    "k2": lambda s: constant((s.log_p - s.log_q) ** 2 / 2),
    "k3": lambda s: constant((s.log_q - s.log_p).exp() - 1 - (s.log_q - s.log_p)),
    "k3++": k_pp,
    "k4": lambda s: (s.log_p - s.log_p.detach()).exp() * constant(s.log_p - s.log_q),
    "k5": lambda s: constant((s.log_q - s.log_p).exp()) * (s.log_q - s.log_p) + s.log_p - s.log_p.detach(),
}


def gradients(x: Tensor, names: dict[str, Any]) -> tuple[Tensor | None, ...]:
    return torch.autograd.grad(x.sum(), (names["z"], names["z2"]), allow_unused=True) if x.requires_grad else ()


@pytest.mark.parametrize("name", CALLS)
def test_every_call_is_its_formula(backend, name: str) -> None:
    """On the reference in float64 to its precision; in float32 on each backend, to that of the log-probs given."""
    torch.manual_seed(7)  # the same draws for all: some are asked to be of every kind that a formula tells apart
    draws = torch.get_rng_state()
    names = scope(torch.float64)
    want = FORMULAS[name](SimpleNamespace(**names, P=names["z"].log_softmax(-1), Q=names["w"].log_softmax(-1)))
    value, surrogate = want if isinstance(want, (tuple, list)) else (want, want)
    want_gradients = gradients(surrogate, names)
    bounds = {torch.float32: 1e-3 if name == "RLCSD" else 1e-4}
    if backend == "reference":
        bounds[torch.float64] = 1e-9
    for dtype, bound in bounds.items():
        torch.set_rng_state(draws)
        names = scope(dtype)
        try:
            got = run(CALLS[name], names)
        except RuntimeError as refusal:
            if "use 'auto' or 'reference'" not in str(refusal):
                raise
            with use_backend("auto"):
                got = run(CALLS[name], names)
        torch.testing.assert_close(got.double(), value, rtol=bound, atol=bound / 10)
        for mine, true in zip(gradients(got, names), want_gradients, strict=True):
            torch.testing.assert_close(mine, true, rtol=bound, atol=bound / 10, check_dtype=False)


def test_entropies_and_log_probs_are_diagnostics() -> None:
    """In float64, and so on the reference; test_diagnostics.py has them in float32."""
    names = scope(torch.float64)
    (call,) = re.findall(r"diagnostics:\s`([^`]*)`", LEGEND)
    found = run(call, names)
    for got, name in zip(found.values(), ("H", "H_teacher", "log_p", "log_q"), strict=True):
        torch.testing.assert_close(got, names[name].detach(), rtol=1e-12, atol=1e-12)


def test_every_row_has_a_formula_or_says_why_none_is_needed() -> None:
    assert set(CALLS) == set(FORMULAS)
    assert all(cell.startswith("none: ") for name, cell in ROWS.items() if name not in CALLS)


def test_every_work_that_cites_the_paper_has_a_row() -> None:
    assert [work for work in WORKS if f"abs/{work})" not in TABLE] == []


def test_every_name_in_a_call_is_public_or_explained() -> None:
    explained = {name for line in LEGEND.splitlines() if line.startswith("|") for name in re.findall(r"`(\w+)`", line)}
    for call in CALLS.values():
        tree = list(ast.walk(ast.parse(call)))
        made = {x.id for x in tree if isinstance(x, ast.Name) and isinstance(x.ctx, ast.Store)}
        used = {x.id for x in tree if isinstance(x, ast.Name)}
        made |= {x.arg for x in tree if isinstance(x, ast.arg)} | {"sum", "zip", "math", "torch"}
        unknown = used - made - explained
        assert all(any(hasattr(module, name) for module in MODULES) for name in unknown), (call, unknown)
