"""Teachers made of several distributions: each function gives the `Support` that a loss compares the student with.

from topk_rkl.recipe.composition import mixture

teacher = mixture([math_logits, code_logits], [0.7, 0.3], k=32)
loss = topk_reverse_kl(student_logits, teacher)

A source is a model's (..., V) logits or a `Support`.

- All logits: the K best tokens of the composed distribution, exactly, with its true log-probs. Rows are taken some at a
  time, so that no float32 copy of the logits exists.
- One or more supports: the formula is evaluated on their slots, where the logits are read too. They must name the same
  tokens; a slot in which two name different ones makes its position NaN. One teacher on the tokens of another is
  `fixed_ids(teacher_logits, other.ids, normalize=True)`. The mixture and the clamp of the residual depend on the
  normalisers, and take supports with true log-probs alone.

Sources are constants: the student's own logits, in `taid` and `veto`, are detached. The loss's temperature divides the
composed log-probs. An argument that is not as a function says raises TypeError or ValueError.

The sum of losses, instead of the loss of a sum, needs nothing from here: add one loss per teacher, each with its own
`weights`, which may be 0 where a position is another teacher's.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from topk_rkl import checks, ops
from topk_rkl.backends import requested
from topk_rkl.recipe.builders import log_probs_at, normalized
from topk_rkl.rows import chunks, finite_max, result_dtype, row_views
from topk_rkl.support import Support, require_normalized, require_support, true_log_probs
from topk_rkl.traced import clamped


def mixture(
    teachers: Sequence[Tensor | Support],
    weights: Sequence[float | Tensor],
    *,
    k: int | None = None,
) -> Support:
    """The mixture of probabilities, sum_i weight_i q_i.

    Args:
        teachers: (..., V) logits or supports with true log-probs.
        weights: for each teacher a number or a (...) float tensor, not negative; divided by their sum. A teacher of
            weight 0 is absent there, whatever it holds or names.
        k: how many tokens, where all teachers are logits.

    Returns:
        Support of (..., K) with true log-probs.
    """
    checks.require_list("teachers", teachers, "teachers")
    named = {f"teachers[{i}]": x for i, x in enumerate(teachers)}
    k = _require_sources(named, k)
    _require_shares(weights, teachers)
    _require_normalized("mixture", named)
    given = [x if isinstance(x, Tensor) else x.log_probs for x in teachers]  # (..., V) or (..., K) each
    blank = given[0].new_zeros(given[0].shape[:-1], dtype=torch.float64)
    log_shares = torch.stack([blank + (x if isinstance(x, Tensor) else float(x)) for x in weights], -1).log()
    dtype = torch.float64 if any(x.dtype == torch.float64 for x in given) else torch.float32
    log_shares = log_shares.log_softmax(-1).to(dtype)  # (..., teachers)
    absent = log_shares == -torch.inf  # a teacher that is NaN there, or names other tokens, does not matter

    def mixed(log_shares: Tensor, *log_q: Tensor) -> Tensor:
        total = torch.full_like(log_q[0], -torch.inf)
        for i, x in enumerate(log_q):  # not a stack of all, of this size
            share = log_shares[..., i, None]  # (..., 1)
            total = total.logaddexp((x + share).masked_fill(share == -torch.inf, -torch.inf))
        return total

    present = [x if isinstance(x, Tensor) else x.without(absent[..., i, None]) for i, x in enumerate(teachers)]
    return replace(_compose(mixed, present, k, normalize=True, extras=[log_shares]), normalized=True)


def residual(
    partial: Tensor | Support,
    full: Tensor | Support,
    *,
    lam: float = 1.0,
    clip: float = 5.0,
    k: int | None = None,
) -> Support:
    """log q_partial + lam clamp(log q_full - log q_partial, -clip, clip), normalised: the target of AR-OPD.

    The target is what the full context adds to the partial one, bounded (arXiv 2606.10385). lam = 1 is the full teacher
    wherever the clamp does not bite, less is conservative, more extrapolates. A token of probability 0 in `partial`
    keeps it.

    Args:
        partial, full: (..., V) logits or supports with true log-probs.
        lam: any number.
        clip: positive.
        k: how many tokens, where both are logits.

    Returns:
        Support of (..., K); from logits with true log-probs, from supports up to a constant per position.
    """
    checks.require_number("lam", lam)
    checks.require_positive("clip", clip)
    k = _require_sources({"partial": partial, "full": full}, k)
    _require_normalized("residual", {"partial": partial, "full": full})

    def corrected(log_partial: Tensor, log_full: Tensor) -> Tensor:
        added = _times(float(lam), clamped(log_full - log_partial, -float(clip), float(clip)))
        return _where_live(log_partial, log_partial + added)

    return _compose(corrected, (partial, full), k, normalize=True)


def extrapolation(
    teacher: Tensor | Support,
    base: Tensor | Support,
    *,
    lam: float = 1.25,
    k: int | None = None,
) -> Support:
    """The distribution q^lam b^(1 - lam), normalised: beyond the teacher q, away from the base model b, for lam > 1.

    The rewards of G-OPD / ExOPD (arXiv 2602.12125) and ListOPD (arXiv 2605.08737) lead to this distribution. A token of
    probability 0 in the teacher keeps it. For lam > 1, one that only the base excludes makes its position NaN.

    Args:
        teacher, base: (..., V) logits or supports.
        lam: any number; 1 is the teacher.
        k: how many tokens, where both are logits.

    Returns:
        Support of (..., K); from logits with true log-probs, from supports up to a constant per position.
    """
    checks.require_number("lam", lam)
    k = _require_sources({"teacher": teacher, "base": base}, k)

    def extrapolated(w: Tensor, b: Tensor) -> Tensor:
        return _where_live(w, _times(float(lam), w) + _times(1 - float(lam), b))

    return _compose(extrapolated, (teacher, base), k)


def taid(
    student_logits: Tensor,  # (..., V)
    teacher: Tensor | Support,
    *,
    t: float,
    k: int | None = None,
) -> Support:
    """softmax((1 - t) student's logits + t teacher's logits): the target of TAID (arXiv 2501.16937), student detached.

    Args:
        student_logits: (..., V); no gradient flows through the target.
        teacher: (..., V) logits, or a support.
        t: from 0, the student itself, to 1, the teacher. TAID raises it from 0.4 to 1 during training.
        k: how many tokens, where the teacher is logits.

    Returns:
        Support of (..., K); from logits with true log-probs, from a support up to a constant per position. A token of
        probability 0 in the teacher keeps that, for t > 0.
    """
    checks.require_fraction("t", t)
    k = _require_sources({"student_logits": student_logits, "teacher": teacher}, k, trained="student_logits")

    def between(z: Tensor, w: Tensor) -> Tensor:
        return _times(float(t), w) + _times(1 - float(t), z)

    return _compose(between, (student_logits, teacher), k)


def veto(
    student_logits: Tensor,  # (..., V)
    teacher: Tensor | Support,
    *,
    beta: float,
    k: int | None = None,
) -> Support:
    """The distribution q p^beta, normalised: the geometric bridge of Veto, the student p detached.

    Args:
        student_logits: (..., V); no gradient flows through the target.
        teacher: (..., V) logits, or a support.
        beta: not negative; 0 is the teacher.
        k: how many tokens, where the teacher is logits.

    Returns:
        Support of (..., K); from logits with true log-probs, from a support up to a constant per position. A token of
        probability 0 in the teacher keeps that.
    """
    checks.require_not_negative("beta", beta)
    k = _require_sources({"student_logits": student_logits, "teacher": teacher}, k, trained="student_logits")

    def bridged(z: Tensor, w: Tensor) -> Tensor:
        return w + _times(float(beta), z)

    return _compose(bridged, (student_logits, teacher), k)


def _compose(
    formula: Callable[..., Tensor],
    sources: Sequence[Tensor | Support],
    k: int | None,
    normalize: bool = False,
    extras: Sequence[Tensor] = (),  # (..., X) each
) -> Support:
    """The formula of `extras` and each source: its log-probs if `normalize`, else its logits less their best.

    It is evaluated on slots where a source is a Support, or on whole rows.
    """
    if any(isinstance(x, Support) for x in sources):
        return _on_slots(formula, sources, normalize, extras)
    logits = [x.detach() for x in sources if isinstance(x, Tensor)]  # (..., V) each
    found = []
    for views in row_views(*logits, *extras):  # (n, V) and (n, X) each
        for rows in chunks(len(views[0]), bytes_per_row=8 * logits[0].shape[-1]):  # two float32 rows of each source
            part = [x[rows] for x in views]
            log_probs = [x.to(result_dtype(x)) for x in part[: len(logits)]]
            log_probs = [normalized(x, x) for x in log_probs] if normalize else [_relative(x) for x in log_probs]
            found.append(ops.select(formula(*part[len(logits) :], *log_probs), k, True, requested()))
    shape = (*logits[0].shape[:-1], k)
    return Support(torch.cat([ids for ids, _ in found]).view(shape), torch.cat([x for _, x in found]).view(shape))


def _on_slots(
    formula: Callable[..., Tensor],
    sources: Sequence[Tensor | Support],
    normalize: bool,
    extras: Sequence[Tensor],  # (..., X) each
) -> Support:
    named = torch.stack([x.ids for x in sources if isinstance(x, Support)])  # (supports, ..., K)
    ids = named.amax(0)  # (..., K)
    at_odds = ((named >= 0) & (named != ids)).any(0)  # (..., K)
    log_probs = [
        _slot_log_probs(x, normalize) if isinstance(x, Support) else log_probs_at(x, ids, normalize) for x in sources
    ]
    log_probs = log_probs if normalize else [_relative(x) for x in log_probs]
    return Support(ids, formula(*extras, *log_probs).masked_fill(at_odds, torch.nan), normalized=False)


def _slot_log_probs(support: Support, normalize: bool) -> Tensor:  # (..., K) at least float32
    support = support.to(result_dtype(support.log_probs)).without(support.ids < 0)
    return true_log_probs(support.log_probs, support.unique().log_probs) if normalize else support.log_probs


def _relative(
    logits: Tensor,  # (..., X)
) -> Tensor:  # (..., X) a constant per row cancels, and products of small numbers are rounded less
    return logits - finite_max(logits)


def _where_live(
    log_q: Tensor,  # (..., K)
    composed: Tensor,  # (..., K)
) -> Tensor:  # (..., K)
    return torch.where(log_q == -torch.inf, -torch.inf, composed)


def _times(factor: float, x: Tensor) -> Tensor:
    """factor * x, with 0 times infinity 0."""
    return torch.zeros_like(x) if factor == 0 else factor * x


def _require_sources(
    sources: Mapping[str, Tensor | Support],
    k: int | None,
    trained: str | None = None,
) -> int | None:
    """K of logits, as an int. The source named `trained` is logits and may require grad."""
    supports = {name: x for name, x in sources.items() if isinstance(x, Support) and name != trained}
    leaves: dict[str, Any] = {name: supports[name].ids if name in supports else x for name, x in sources.items()}
    first_name, first = next(iter(leaves.items()))
    for name, x in leaves.items():
        if name in supports:
            require_support(name, supports[name])
        elif name == trained:
            checks.require_logits(name, x)
        else:
            checks.require_constant_logits(name, x)
        checks.require_same_positions(name, x, first, student_name=first_name)
    widths = {name: x.shape[-1] for name, x in leaves.items() if name in supports or not supports}
    if len(set(widths.values())) > 1:
        raise ValueError(
            f"the last dimensions differ: {', '.join(f'{name} {width}' for name, width in widths.items())}; "
            "cut logits to the common vocabulary, give supports on the same tokens"
        )
    if not supports:
        return checks.require_k(k, widths[first_name], first_name)
    if k is not None:
        raise ValueError(f"k is {k}, but {next(iter(supports))} is a Support, whose last dimension is K; leave k out")
    return None


def _require_normalized(asked: str, sources: Mapping[str, Tensor | Support]) -> None:
    for name, x in sources.items():
        if isinstance(x, Support):
            require_normalized(name, x, asked)


def _require_shares(weights: Sequence[float | Tensor], teachers: Sequence[Tensor | Support]) -> None:
    if not isinstance(weights, (tuple, list)) or len(weights) != len(teachers):
        raise ValueError(
            f"weights is {checks.seen(weights)}; it must be a list of {len(teachers)}, one for each teacher"
        )
    first = teachers[0].ids if isinstance(teachers[0], Support) else teachers[0]
    for i, x in enumerate(weights):
        name = f"weights[{i}]"
        if not isinstance(x, Tensor):
            checks.require_not_negative(name, x)
            continue
        checks.require_tensor(name, x, checks.FLOATS)
        checks.require_constant(name, x)
        if x.dim() > 0:
            checks.require_same_positions(name, x, first, value_per_position=True, student_name="teachers[0]")
        checks.require_same_reality(name, x, "teachers[0]", first)
    if not any(isinstance(x, Tensor) or x for x in weights):
        raise ValueError(f"weights is {weights!r}; at least one must be above 0")
