"""Which tokens are compared: the ways to build a `Support` besides the teacher's top K.

from topk_rkl.recipe.builders import student_topk, union

teacher = union(teacher_topk(teacher_logits, 32), student_topk(student_logits, teacher_logits, 32))
loss = topk_reverse_kl(student_logits, teacher)

A support holds the teacher's logits, or with `normalize=True` true log-probs. Combine supports of one kind only: logits
with logits, log-probs with log-probs. No copy of the size of the logits is made, and the host reads no device value.
An argument that is not as a function says raises TypeError or ValueError.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from topk_rkl import checks, ops
from topk_rkl.backends import requested
from topk_rkl.divergence import capped
from topk_rkl.objective import pack
from topk_rkl.parallel.heads import whole_head
from topk_rkl.rows import add_repeats, result_dtype
from topk_rkl.support import Support, require_support


def student_topk(
    student_logits: Tensor,  # (..., V)
    teacher_logits: Tensor,  # (..., V_teacher)
    k: int,
    *,
    normalize: bool = False,
) -> Support:
    """The K tokens that the student ranks highest, with the teacher's logits or log-probs there.

    SDPO, OPCD and "only_stu" of thunlp/OPD compare on this support. The ids are a constant: no gradient flows through
    the choice. Without student logits it is `fixed_ids(teacher_logits, linear_teacher_topk(student_hidden.detach(),
    student_weight.detach(), k).ids)`, and without the teacher's `linear_fixed_ids`.

    Args:
        student_logits: (..., V) bfloat16, float16, float32 or float64, of any strides; detached here.
        teacher_logits: (..., V_teacher), where the same ids mean the same tokens; must not require grad.
        k: 1 <= k <= V.
        normalize: gives the teacher's true log-probs instead of its logits, which takes a pass over V_teacher; without
            it K numbers per position are read.

    Returns:
        Support with ids (..., K) int32 in the student's order, (value descending, id ascending), and log_probs (..., K)
        float32 (float64 from float64). A slot is empty where the student has no K-th logit above -inf, the teacher
        gives -inf, or the id is not in the teacher's vocabulary.
    """
    checks.require_logits("student_logits", student_logits)
    k = checks.require_k(k, student_logits.shape[-1], "student_logits")
    checks.require_constant_logits("teacher_logits", teacher_logits)
    checks.require_same_positions("teacher_logits", teacher_logits, student_logits)
    checks.require_flag("normalize", normalize)
    ids, _ = ops.select(student_logits.detach(), k, False, requested())
    return Support(ids, log_probs_at(teacher_logits, ids, normalize), normalize)


def teacher_top_p(
    teacher_logits: Tensor,  # (..., V)
    p: float,
    k: int,
    *,
    normalize: bool = False,
) -> Support:
    """The teacher's nucleus, at most K tokens of it: the fewest of its most probable tokens that hold mass `p`.

    A token is in S if and only if the tokens ranked above it hold less than `p`, so the best one always is. Rank is by
    (value descending, id ascending). The masses are those of the whole vocabulary: log-probs of float32 (float64 from
    float64), whose exponentials are added in float64.

    Args:
        teacher_logits: (..., V) bfloat16, float16, float32 or float64, of any strides; must not require grad.
        p: in (0, 1]; 1 keeps all K.
        k: the cap, 1 <= k <= V; where the nucleus is larger, its first K tokens.
        normalize: gives true log-probs instead of logits.

    Returns:
        Support with ids (..., K) int32 and log_probs (..., K), the slots outside the nucleus empty, at the end. A row
        that holds NaN or +inf is no distribution: its K slots are all kept, and make its loss NaN.
    """
    k = checks.require_teacher_logits("teacher_logits", teacher_logits, k, renormalized=False)
    checks.require_top_p(p, "p")
    checks.require_flag("normalize", normalize)
    ids, log_probs = ops.select(teacher_logits, k, True, requested())
    mass = log_probs.double().exp().cumsum(-1)[..., :-1]  # (..., K - 1)
    enough = float(p) if p < 1 else torch.inf  # a rounded sum could reach 1 early and cut the tail
    outside = pad(mass >= enough, (1, 0))  # (..., K), by rank: the best token stays however p is rounded
    if not normalize:
        log_probs = log_probs_at(teacher_logits, ids, normalize=False)
    return Support(ids, log_probs, normalize).without(outside)


def fixed_ids(
    teacher_logits: Tensor,  # (..., V)
    ids: Sequence[int] | Tensor,  # (K,) or (..., K)
    *,
    normalize: bool = False,
) -> Support:
    """The teacher's logits or log-probs on tokens that are known beforehand, such as the digits of a score.

    Args:
        teacher_logits: (..., V) bfloat16, float16, float32 or float64, of any strides; must not require grad.
        ids: a sequence of different ids of the vocabulary or a (K,) tensor, for all positions; or a (..., K) tensor,
            for each its own. Tensors are int32 or int64; an id that is negative, not below V or repeated makes an
            empty slot.
        normalize: gives true log-probs instead of logits, which takes a pass over V.

    Returns:
        Support with ids (..., K), in the given order, and log_probs (..., K) float32 (float64 from float64).
    """
    checks.require_constant_logits("teacher_logits", teacher_logits)
    ids = _require_ids(ids, teacher_logits, teacher_logits.shape[-1], "teacher_logits")
    checks.require_flag("normalize", normalize)
    ids = torch.as_tensor(ids, device=teacher_logits.device)
    ids = ids.expand(*teacher_logits.shape[:-1], ids.shape[-1])
    return Support(ids, log_probs_at(teacher_logits, ids, normalize), normalize).unique()


def linear_fixed_ids(
    teacher_hidden: Tensor,  # (..., H)
    teacher_weight: Tensor,  # (V, H)
    ids: Sequence[int] | Tensor,  # (K,) or (..., K)
    *,
    bias: Tensor | None = None,  # (V,)
    normalize: bool = False,
    chunk_rows: int | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Support:
    """`fixed_ids` of the logits teacher_hidden @ teacher_weight.T + bias, such as on the student's own top K.

    `linear_fixed_ids(teacher_hidden, teacher_weight, linear_teacher_topk(student_hidden.detach(),
    student_weight.detach(), k).ids)` is `student_topk` without anyone's logits.

    Args:
        teacher_hidden, teacher_weight, bias, chunk_rows, logit_scale, softcap: see `linear_teacher_topk`.
        ids: see `fixed_ids`.
        normalize: gives true log-probs instead of logits, which makes all logits of `chunk_rows` positions at a time;
            without it K rows of the head per position are read.

    Returns:
        Support with ids (..., K), in the given order, and log_probs (..., K) float32 (float64 from float64). The
        products are summed in that dtype, whatever that of the inputs.
    """
    chunk_rows = checks.require_linear_teacher(teacher_hidden, teacher_weight, bias, chunk_rows)
    ids = _require_ids(ids, teacher_hidden, len(teacher_weight), "teacher_hidden")
    checks.require_flag("normalize", normalize)
    logit_scale, softcap = checks.require_logit_options(logit_scale, softcap)
    options = logit_scale, softcap
    ids = torch.as_tensor(ids, device=teacher_hidden.device)
    ids = ids.expand(*teacher_hidden.shape[:-1], ids.shape[-1])
    head = teacher_hidden, *whole_head(teacher_weight, bias)[:2]
    log_probs = _linear_logits(*head, ids, *options)
    if normalize:
        packed = pack(logit_scale=logit_scale, softcap=softcap)
        best, log_prob, _ = ops.linear_select(*head, 1, chunk_rows, packed, True, True, False, requested())
        normal = _from_best(log_probs, _linear_logits(*head, best, *options), best, log_prob)
        log_probs = torch.where((ids >= 0) & (ids < len(teacher_weight)), normal, -torch.inf)
    return Support(ids, log_probs, normalize).unique()


def with_sampled(
    support: Support,
    sampled_ids: Tensor,  # (...)
    teacher: Tensor,  # (..., V) logits, or (...) at sampled_ids
) -> Support:
    """The support with the sampled token in one slot more, which is empty where the token is already there.

    Args:
        support: (..., K).
        sampled_ids: (...) int32 or int64; a negative one, as at padding, adds nothing.
        teacher: the teacher's (..., V) logits, from which log-probs are made if the support is `normalized`; or its
            (...) log-probs or logits at sampled_ids, whichever the support holds.

    Returns:
        Support of (..., K + 1).
    """
    _require_sampled(sampled_ids, teacher, support)
    ids = sampled_ids.unsqueeze(-1)  # (..., 1)
    is_logits = teacher.dim() > sampled_ids.dim()
    log_probs = log_probs_at(teacher, ids, support.normalized) if is_logits else teacher.unsqueeze(-1)
    return union(support, Support(ids, log_probs, support.normalized))


def union(first: Support, second: Support) -> Support:
    """The tokens of either: the slots of `first`, then those of `second`.

    A token that both hold keeps its slot, and its log-prob, of `first`; its slot in `second` is emptied. The later
    slots of a token that one of them repeats are emptied too.

    Args:
        first, second: (..., K1) and (..., K2), on the same positions; both hold logits, or both log-probs.

    Returns:
        Support of (..., K1 + K2), in which no id occurs twice.
    """
    _require_two_supports(first, second)
    if first.normalized != second.normalized:
        held, other = ("log-probs", "logits") if first.normalized else ("logits", "log-probs")
        raise ValueError(
            f"first holds {held} and second {other}, as their field `normalized` says; give both the same, such as "
            "those of teacher_topk(..., normalize=True)"
        )
    ids = torch.cat([_live_ids(first), _live_ids(second)], -1)
    log_probs = torch.cat([first.log_probs, second.log_probs], -1)
    return Support(ids, log_probs, first.normalized).without(ids < 0).unique()


def intersection(first: Support, second: Support) -> Support:
    """The tokens of both: the slots of `first`, in their places, with those that `second` lacks emptied.

    Args:
        first, second: (..., K1) and (..., K2), on the same positions.

    Returns:
        Support of (..., K1), with the log-probs of `first`, in which no id occurs twice.
    """
    _require_two_supports(first, second)
    return _kept(first, _occurs(first, second))


def difference(first: Support, second: Support) -> Support:
    """The tokens of `first` that `second` lacks, in their places; the other slots are emptied.

    `union(difference(a, b), difference(b, a))` is the union without the intersection.

    Args, Returns: see `intersection`.
    """
    _require_two_supports(first, second)
    return _kept(first, ~_occurs(first, second))


def remap(
    support: Support,
    mapping: Mapping[int, int] | Tensor,  # (V_teacher,)
    *,
    student_vocab: int | None = None,
) -> Support:
    """The support in the student's ids, for vocabularies that differ in a few special tokens or in padding.

    Teacher's tokens that become one token of the student share the slot of the first, with their probabilities added.

    Args:
        support: (..., K), with ids of the teacher's vocabulary.
        mapping: {teacher's id: student's id}, in which ids that are not named stay as they are; or a table, a
            (V_teacher,) int32 or int64 tensor whose entry v is the student's id of token v. A negative student's id, or
            an id beyond the table, makes the slot empty.
        student_vocab: the size of the student's vocabulary; ids from there on make empty slots. The losses do the same
            with ids beyond the student's logits.

    Returns:
        Support of (..., K) in at least float32, in which no id occurs twice.
    """
    require_support("support", support)
    mapping, student_vocab = _require_mapping(mapping, support), checks.require_count("student_vocab", student_vocab)
    live = _live_ids(support)
    if isinstance(mapping, Tensor):
        reached = (live >= 0) & (live < len(mapping))
        ids = torch.where(reached, mapping[torch.where(reached, live, 0).long()], -1)
    else:
        ids = live
        for old, new in mapping.items():  # no table, which would have to be copied to the device
            ids = ids.masked_fill(live == old, new)
    if student_vocab is not None:
        beyond = ids >= min(student_vocab, torch.iinfo(ids.dtype).max)  # an int above the ids' dtype would wrap
        ids = ids.masked_fill(beyond & (support.log_probs < torch.inf), -1)  # NaN still spoils the row
    log_probs = support.log_probs.to(result_dtype(support.log_probs)).masked_fill(ids < 0, -torch.inf)
    ordered, slots = ids.sort(dim=-1, stable=True)
    total = add_repeats(ordered, log_probs.gather(-1, slots), torch.logaddexp)
    return Support(ids, torch.empty_like(total).scatter(-1, slots, total), support.normalized).unique()


def log_probs_at(
    logits: Tensor,  # (..., V)
    ids: Tensor,  # (..., K)
    normalize: bool,
) -> Tensor:  # (..., K) float32 (float64 from float64)
    """The logits, or the log-probs, at ids; -inf at ids outside the vocabulary. Constant: no gradient."""
    logits = logits.detach()
    known = (ids >= 0) & (ids < logits.shape[-1])
    found = logits.gather(-1, torch.where(known, ids, 0).long()).to(result_dtype(logits))  # (..., K)
    return torch.where(known, normalized(found, logits) if normalize else found, -torch.inf)


def normalized(
    some: Tensor,  # (..., X) of the logits
    logits: Tensor,  # (..., V)
) -> Tensor:  # (..., X)
    """The log-probs of some logits: that of the best token, which the fused pass over V gives, and a difference."""
    best, log_prob = ops.select(logits, 1, True, requested())  # (..., 1), (..., 1)
    return _from_best(some, logits.gather(-1, best.clamp(min=0).long()).to(some.dtype), best, log_prob)


def _linear_logits(
    hidden: Tensor,  # (..., H)
    head: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    ids: Tensor,  # (..., K)
    logit_scale: float,
    softcap: float | None,
) -> Tensor:  # (..., K)
    """The logits at ids; -inf at ids outside the vocabulary."""
    logits, _ = capped(ops.linear_logits(hidden, head, bias, ids, requested()), logit_scale, softcap)
    return torch.where((ids >= 0) & (ids < len(head)), logits, -torch.inf)


def _from_best(
    some: Tensor,  # (..., X) of the logits
    top: Tensor,  # (..., 1) the logit of the best token
    best: Tensor,  # (..., 1)
    log_prob: Tensor,  # (..., 1) its log-prob
) -> Tensor:  # (..., X)
    """The log-probs: a difference of two logits first, so that large ones lose no bits."""
    return (some - top.masked_fill(best < 0, 0)).add_(log_prob.masked_fill(best < 0, 0))


def _live_ids(support: Support) -> Tensor:  # (..., K), -1 where the slot is empty
    ids, log_probs = support.tensors
    return ids.masked_fill((ids < 0) | (log_probs == -torch.inf), -1)


def _occurs(first: Support, second: Support) -> Tensor:  # (..., K1) bool
    wanted = _live_ids(first).long().contiguous()
    there = _live_ids(second).long().sort(dim=-1).values
    place = torch.searchsorted(there, wanted).clamp(max=there.shape[-1] - 1)
    return there.gather(-1, place) == wanted


def _kept(support: Support, keep: Tensor) -> Support:
    return support.without(~keep | (_live_ids(support) < 0)).unique()


def _require_ids(
    ids: Sequence[int] | Tensor,  # (K,) or (..., K)
    teacher: Tensor,  # (..., V) or (..., H)
    vocab: int,
    name: str,
) -> list[int] | Tensor:
    """The ids, as ints."""
    if isinstance(ids, Tensor):
        checks.require_tensor("ids", ids, checks.INTEGERS)
        if ids.dim() == 0 or ids.shape[-1] == 0 or (ids.dim() > 1 and ids.shape[:-1] != teacher.shape[:-1]):
            raise ValueError(
                f"ids has shape {checks.shape_of(ids)} and {name} {checks.shape_of(teacher)}; ids must be (K,), or "
                f"(..., K) with the positions of {name}, K at least 1"
            )
        checks.require_same_device("ids", ids, name, teacher)
        return ids
    ids = checks.require_integers("ids", ids)
    outside = [x for x in ids if not 0 <= x < vocab]
    if outside or len(set(ids)) < len(ids) or not ids:
        raise ValueError(f"ids is {ids!r}; it must hold different ids, at least one, from 0 to V - 1 = {vocab - 1}")
    return ids


def _require_sampled(
    ids: Tensor,  # (...)
    teacher: Tensor,  # (..., V) or (...)
    support: Support,
) -> None:
    require_support("support", support)
    checks.require_sampled_ids(ids, support.ids, "sampled_ids", "support.ids")
    checks.require_tensor("teacher", teacher, checks.FLOATS)
    checks.require_constant("teacher", teacher)
    at_ids = teacher.dim() == ids.dim()
    checks.require_same_positions("teacher", teacher, support.ids, at_ids, "support.ids")


def _require_two_supports(first: Support, second: Support) -> None:
    require_support("first", first)
    require_support("second", second)
    checks.require_same_positions("second.ids", second.ids, first.ids, student_name="first.ids")


def _require_mapping(
    x: object,  # a Mapping[int, int], or a Tensor (V_teacher,)
    support: Support,
) -> dict[int, int] | Tensor:
    """The mapping, of ints."""
    if isinstance(x, Tensor):
        checks.require_tensor("mapping", x, checks.INTEGERS)
        if x.dim() != 1 or len(x) == 0:
            shape = checks.shape_of(x)
            raise ValueError(f"mapping has shape {shape}; a table must be (V_teacher,), the student's id of each token")
        checks.require_same_device("mapping", x, "support.ids", support.ids)
        return x
    if not isinstance(x, Mapping):
        kind = checks.kind_of(x)
        raise TypeError(f"mapping is {kind}; it must be a dict from ids to ids or a (V_teacher,) integer tensor")
    try:
        olds, news = (checks.require_integers("mapping", ids) for ids in (x.keys(), x.values()))
    except TypeError:
        raise TypeError(f"mapping is {x!r}; it must be a dict from ids to ids") from None
    largest = torch.iinfo(support.ids.dtype).max
    for old, new in zip(olds, news):
        if not 0 <= old <= largest or abs(new) > largest:
            raise ValueError(
                f"mapping sends {old} to {new}; an id is from 0 to {largest}, that of {support.ids.dtype}, and a "
                "negative student's id leaves the token out"
            )
    return dict(zip(olds, news))
