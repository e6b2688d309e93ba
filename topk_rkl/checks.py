"""Every refusal and its message: the argument, the value seen, and what to do. Nothing here reads a device value."""

import math
import sys
import warnings
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from topk_rkl.diagnostics import NAMES as DIAGNOSTICS
from topk_rkl.diagnostics import OF_SAMPLED, OF_TEACHER_LOGITS
from topk_rkl.divergence import (
    MASSES,
    AlphaBeta,
    Divergence,
    ForwardKL,
    JensenShannon,
    Mixture,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
)
from topk_rkl.support import Support

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
INTEGERS = (torch.int32, torch.int64)
REDUCTIONS = ("none", "sum", "mean")
MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
TEMPERATURES = (1e-30, 1e30)


def logits(
    name: str,
    x: Tensor,  # (..., V)
) -> None:
    _tensor(name, x, FLOATS)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"{name} has shape {_shape(x)}; it must be (..., V) with V of at least 1")


def constant_logits(
    name: str,
    x: Tensor,  # (..., V)
) -> None:
    logits(name, x)
    constant(name, x)


def teacher_logits(
    name: str,
    x: Tensor,  # (..., V)
    k: int | None,
    renormalized: bool = True,
) -> None:
    constant_logits(name, x)
    k = _top(k, x.shape[-1], name)
    if renormalized:
        single_slot(k)


def ranking(
    name: str,
    x: Tensor,  # (..., V)
    k: int | None,
) -> None:
    logits(name, x)
    _top(k, x.shape[-1], name)


def support(
    teacher: Support,
    k: int | None,
    renormalized: bool = True,
) -> None:
    if k is not None:
        raise ValueError(f"k is {k}, but teacher is a Support, whose last dimension is K; leave k out")
    slots("teacher", teacher)
    if renormalized:
        single_slot(teacher.ids.shape[-1])


def slots(name: str, x: Support) -> None:
    """The two tensors of a support."""
    if not isinstance(x, tuple) or not hasattr(x, "ids"):
        raise TypeError(f"{name} is {_kind(x)}; it must be a Support(ids, log_probs)")
    ids, log_probs = x
    _tensor(f"{name}.ids", ids, INTEGERS)
    _tensor(f"{name}.log_probs", log_probs, FLOATS)
    constant(f"{name}.log_probs", log_probs)
    if ids.shape != log_probs.shape or ids.dim() == 0 or ids.shape[-1] == 0:
        raise ValueError(
            f"{name}.ids has shape {_shape(ids)} and {name}.log_probs {_shape(log_probs)}; "
            "both must be (..., K) with K of at least 1"
        )
    _same_device(f"{name}.log_probs", log_probs, f"{name}.ids", ids)


def head(
    hidden_name: str,
    hidden: Tensor,  # (..., H)
    weight_name: str,
    weight: Tensor,  # (V, H)
    bias_name: str,
    bias: Tensor | None,  # (V,)
) -> None:
    _tensor(hidden_name, hidden, FLOATS)
    if hidden.dim() == 0 or hidden.shape[-1] == 0:
        raise ValueError(f"{hidden_name} has shape {_shape(hidden)}; it must be (..., H) with H of at least 1")
    if hasattr(weight, "full_tensor"):
        raise TypeError(f"{weight_name} is sharded, a DTensor; pass {weight_name}.full_tensor()")
    if hasattr(weight, "ds_id") and weight.numel() == 0:
        raise ValueError(
            f"{weight_name} is partitioned by DeepSpeed ZeRO-3 and holds nothing here; call the loss inside "
            "deepspeed.zero.GatheredParameters"
        )
    if isinstance(weight, Tensor) and not weight.is_floating_point():
        raise TypeError(f"{weight_name} is {weight.dtype}; a quantised head must be given dequantised, (V, H) floats")
    _tensor(weight_name, weight, FLOATS)
    if weight.dim() != 2 or weight.shape[0] == 0 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{weight_name} has shape {_shape(weight)} and {hidden_name} {_shape(hidden)}; the head must be (V, H), "
            f"one row of H = {hidden.shape[-1]} a token, as nn.Linear keeps it (a sharded one: gathered first)"
        )
    _same_dtype(weight_name, weight, hidden_name, hidden)
    _same_device(weight_name, weight, hidden_name, hidden)
    if bias is None:
        return
    _tensor(bias_name, bias, FLOATS)
    if bias.shape != weight.shape[:1]:
        raise ValueError(f"{bias_name} has shape {_shape(bias)}; it must be (V,), here ({weight.shape[0]},)")
    _same_dtype(bias_name, bias, hidden_name, hidden)
    _same_device(bias_name, bias, hidden_name, hidden)


def linear_teacher(
    hidden: Tensor,  # (..., H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    k: int,
    chunk_rows: int | None,
) -> None:
    head("teacher_hidden", hidden, "teacher_weight", weight, "bias", bias)
    for name, x in (("teacher_hidden", hidden), ("teacher_weight", weight), ("bias", bias)):
        if x is not None:
            constant(name, x)
    k = _top(k, weight.shape[0], "teacher_hidden @ teacher_weight.T")
    if chunk_rows is not None and (isinstance(chunk_rows, bool) or not isinstance(chunk_rows, int) or chunk_rows < 1):
        raise ValueError(f"chunk_rows is {chunk_rows!r}; it must be a positive int, or None for a memory budget")
    single_slot(k)


def logit_options(logit_scale: float, softcap: float | None) -> None:
    number("logit_scale", logit_scale)
    if softcap is not None:
        number("softcap", softcap)
        if softcap <= 0:
            raise ValueError(f"softcap is {softcap}; it must be positive, or None for no cap")


def weight_grad(value: str) -> None:
    if value not in ("dense", "sparse"):
        raise ValueError(f"weight_grad is {value!r}; use 'dense' or 'sparse'")


def single_slot(k: int) -> None:
    if k == 1:
        warnings.warn(
            "K = 1: a distribution renormalised over one token is always 1, so loss and gradient are exactly 0; use a "
            "larger K",
            stacklevel=_callers_level(),
        )


def _callers_level() -> int:
    """The stacklevel, for the caller of this, of the first frame outside the package."""
    level = 1
    if torch.compiler.is_compiling():
        return level
    while sys._getframe(level).f_globals.get("__name__", "").startswith("topk_rkl."):
        level += 1
    return level


def teacher_kind(teacher: object) -> None:
    if isinstance(teacher, (tuple, list)):
        raise TypeError("teacher is a plain tuple or list; wrap it: Support(ids, log_probs)")
    if not isinstance(teacher, Tensor):
        raise TypeError(f"teacher is {_kind(teacher)}; it must be a (..., V) tensor of logits or a Support")


def same_positions(
    name: str,
    x: Tensor,  # (..., anything) or, for a value a position, (...)
    student: Tensor,  # (..., V) or (..., H)
    value_per_position: bool = False,
    student_name: str = "student_logits",
) -> None:
    """Leading dimensions and device are those of the student's logits, or hidden states."""
    lead = x.shape if value_per_position else x.shape[:-1]
    if lead != student.shape[:-1]:
        want = tuple(student.shape[:-1]) if value_per_position else (*student.shape[:-1], "...")
        raise ValueError(
            f"{name} has shape {_shape(x)} and {student_name} {_shape(student)}; {name} must have one entry for each "
            f"position: shape {want}".replace("'...'", "any")
        )
    _same_device(name, x, student_name, student)


def weights(
    x: Tensor | None,  # (...)
    student: Tensor,  # (..., V) or (..., H)
    student_name: str = "student_logits",
) -> None:
    if x is None:
        return
    _tensor("weights", x, (torch.bool, torch.uint8, torch.int8, torch.int16, *INTEGERS, *FLOATS))
    constant("weights", x)
    same_positions("weights", x, student, value_per_position=True, student_name=student_name)


def constant(name: str, x: Tensor) -> None:
    if x.requires_grad:
        raise ValueError(f"{name} requires grad, but is a constant of this loss; pass {name}.detach()")


def temperature(value: float) -> None:
    number("temperature", value)
    low, high = TEMPERATURES
    if not low <= value <= high:
        raise ValueError(f"temperature is {value}; it must be positive, between {low} and {high}")


def top_p(value: float, name: str = "top_p") -> None:
    number(name, value)
    if not 0 < value <= 1:
        raise ValueError(
            f"{name} is {value}; it must be above 0 and at most 1; 1 keeps every token, 1e-9 only the best"
        )


def sampled_ids(
    ids: Tensor,  # (...)
    student: Tensor,  # (..., V) or (..., H)
    name: str = "ids",
    student_name: str = "student_logits",
) -> None:
    _tensor(name, ids, INTEGERS)
    same_positions(name, ids, student, value_per_position=True, student_name=student_name)


def reduction(value: str, denominator: float | Tensor | None) -> None:
    if value not in REDUCTIONS:
        raise ValueError(f"reduction is {value!r}; use one of {', '.join(REDUCTIONS)}")
    if denominator is not None and value != "mean":
        raise ValueError(f"denominator is given with reduction={value!r}; it only belongs to reduction='mean'")
    _denominator(denominator)


def objective(value: object, mass: str) -> None:
    """The divergence, the mass, and whether they go together."""
    if mass not in MASSES:
        raise ValueError(f"mass is {mass!r}; use one of {', '.join(MASSES)}")
    if isinstance(value, type):
        raise TypeError(f"divergence is the class {value.__name__}; pass an instance, such as {value.__name__}(...)")
    if isinstance(value, Divergence):
        _numbers_of(value)
    elif not callable(value):
        raise TypeError(
            f"divergence is {_kind(value)}; use ReverseKL(), another of topk_rkl.divergence, or a function "
            "(log_p, log_q) -> terms"
        )
    plain = value == ReverseKL() or isinstance(value, ForwardKL)
    if mass.startswith("ema_pg") and not plain:
        raise ValueError(f"mass={mass!r} is for ReverseKL() without clamp and ForwardKL(), but divergence is {value}")
    if mass.startswith("raw") and not plain and not isinstance(value, Mixture):
        raise ValueError(
            f"mass={mass!r} is for ReverseKL() without clamp, ForwardKL() and Mixture, but divergence is {value}; use "
            "mass='tail' or 'renormalized'"
        )


def diagnostics(names: object, mass: str, sampled: object, teacher_is_support: bool) -> None:
    """The names, and whether what they and the mass need is there."""
    if names is None:
        names = ()
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise TypeError(f"diagnostics is {names!r}; it must be a sequence of names, such as ('student_mass',)")
    for name in names:
        if name not in DIAGNOSTICS:
            raise ValueError(f"diagnostics has {name!r}; use some of {', '.join(DIAGNOSTICS)}")
        if name in OF_TEACHER_LOGITS and teacher_is_support:
            raise ValueError(f"diagnostics has {name!r}, but teacher is a Support; pass teacher logits")
    takers = [name for name in names if name in OF_SAMPLED] + [mass] * mass.startswith("ema_pg")
    if takers and sampled is None:
        raise ValueError(f"sampled_ids is None, but {takers[0]!r} needs the sampled tokens; pass them, (...)")
    if sampled is not None and not takers:
        raise ValueError(
            f"sampled_ids is given, but mass={mass!r} and the diagnostics do not use it; leave it out, or ask for "
            f"mass='ema_pg', 'ema_pg_corrected' or one of {', '.join(OF_SAMPLED)}"
        )


def _numbers_of(value: Divergence) -> None:
    if isinstance(value, ReverseKL) and value.clamp is not None:
        if not isinstance(value.clamp, (tuple, list)) or len(value.clamp) != 2:
            raise TypeError(f"divergence.clamp is {value.clamp!r}; it must be (low, high), or None")
        low, high = value.clamp
        if not low <= high:
            raise ValueError(f"divergence.clamp is {value.clamp}; it must be (low, high) with low <= high")
    elif isinstance(value, AlphaBeta):
        number("divergence.alpha", value.alpha)
        number("divergence.beta", value.beta)
    elif isinstance(value, JensenShannon):
        number("divergence.beta", value.beta)
        if not 0 < value.beta < 1:
            raise ValueError(
                f"divergence.beta is {value.beta}; it must be between 0 and 1; at the ends that divergence is 0, and "
                "generalized_jsd gives forward and reverse KL there"
            )
    elif isinstance(value, Mixture):
        number("divergence.lam", value.lam)
        if not 0 <= value.lam <= 1:
            raise ValueError(f"divergence.lam is {value.lam}; it must be from 0, reverse KL, to 1, forward KL")
    elif isinstance(value, (SkewReverseKL, SkewForwardKL)):
        number("divergence.lam", value.lam)
        if not 0 <= value.lam < 1:
            raise ValueError(f"divergence.lam is {value.lam}; it must be at least 0 and below 1, where it would be 0")


def full_vocabulary_support(mass: str, temperature: float) -> None:
    """What K log-probs do not tell of the teacher, and a mass other than "renormalized" must know."""
    if temperature != 1:
        raise ValueError(
            f"temperature is {temperature} with mass={mass!r} and a Support, whose log-probs do not tell the teacher's "
            "normaliser at that temperature; pass teacher logits, or divide both sides' logits beforehand, as in "
            "teacher_topk(teacher_logits / temperature, k, normalize=True)"
        )
    if mass.startswith("ema_pg"):
        raise ValueError(
            f"teacher is a Support with mass={mass!r}, which needs the teacher's log-prob of every sampled token; pass "
            "teacher logits"
        )


def dense_weight_grad(value: str, mass: str) -> None:
    if value != "dense":
        raise ValueError(
            f"weight_grad is {value!r} with mass={mass!r}, which gives every row of the head a gradient; use 'dense'"
        )


def overwritable(student: Tensor) -> None:
    """Two elements at one address could not both hold their gradient."""
    reach = 1
    for stride, size in sorted((s, n) for s, n in zip(student.stride(), student.shape, strict=True) if n > 1):
        if stride < reach:
            raise ValueError(
                f"overwrite_student_logits=True, but student_logits of shape {_shape(student)} and strides "
                f"{student.stride()} overlap themselves (an expanded view?); pass a copy, or leave the option off"
            )
        reach = stride * (size - 1) + reach


def aggregation(
    per_token: Tensor,  # (B, T)
    mask: Tensor,  # (B, T)
    mode: str,
    denominator: float | Tensor | None,
    norm: float | None,
) -> None:
    _tensor("per_token", per_token, FLOATS)
    _tensor("mask", mask, (torch.bool, torch.uint8, torch.int8, torch.int16, *INTEGERS, *FLOATS))
    if per_token.dim() != 2 or mask.shape != per_token.shape:
        raise ValueError(f"per_token has shape {_shape(per_token)} and mask {_shape(mask)}; both must be (B, T)")
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}; use one of {', '.join(MODES)}")
    if denominator is not None and mode == "token-sum":
        raise ValueError("denominator is given with mode='token-sum', which divides by nothing; leave it out")
    _denominator(denominator)
    if norm is not None:
        if mode != "seq-mean-token-sum-norm":
            raise ValueError(f"norm is given with mode={mode!r}; it only belongs to 'seq-mean-token-sum-norm'")
        number("norm", norm)
        if norm <= 0:
            raise ValueError(f"norm is {norm}; it must be positive, such as the longest response")


def special_tokens(
    response_ids: Tensor,  # (..., T)
    token_ids: Sequence[int] | Tensor,
    occurrences: str,
) -> None:
    _tensor("response_ids", response_ids, INTEGERS)
    if response_ids.dim() == 0:
        raise ValueError("response_ids has no dimension; it must be (..., T)")
    if isinstance(token_ids, (int, str)) or (isinstance(token_ids, Tensor) and token_ids.is_floating_point()):
        raise TypeError(f"token_ids is {_kind(token_ids)}; it must be a sequence of token ids")
    if occurrences not in ("first", "all"):
        raise ValueError(f"occurrences is {occurrences!r}; use 'first' or 'all'")


def id_set(
    ids: Sequence[int] | Tensor,  # (K,) or (..., K)
    teacher: Tensor,  # (..., V)
) -> None:
    if isinstance(ids, Tensor):
        _tensor("ids", ids, INTEGERS)
        if ids.dim() == 0 or ids.shape[-1] == 0 or (ids.dim() > 1 and ids.shape[:-1] != teacher.shape[:-1]):
            raise ValueError(
                f"ids has shape {_shape(ids)} and teacher_logits {_shape(teacher)}; ids must be (K,), or (..., K) with "
                "the positions of teacher_logits, K at least 1"
            )
        return _same_device("ids", ids, "teacher_logits", teacher)
    if not isinstance(ids, Sequence) or not all(_is_int(x) for x in ids):
        raise TypeError(f"ids is {ids!r}; it must be a sequence of ints or an integer tensor")
    outside = [x for x in ids if not 0 <= x < teacher.shape[-1]]
    if outside or len(set(ids)) < len(ids) or not ids:
        raise ValueError(
            f"ids is {ids!r}; it must hold different ids, at least one, from 0 to V - 1 = {teacher.shape[-1] - 1}"
        )
    return None


def sampled(
    ids: Tensor,  # (...)
    teacher: Tensor,  # (..., V) or (...)
    support: Support,
    normalize: bool,
) -> None:
    slots("support", support)
    _tensor("sampled_ids", ids, INTEGERS)
    same_positions("sampled_ids", ids, support.ids, value_per_position=True, student_name="support.ids")
    _tensor("teacher", teacher, FLOATS)
    constant("teacher", teacher)
    values = teacher.dim() == ids.dim()
    same_positions("teacher", teacher, support.ids, value_per_position=values, student_name="support.ids")
    if values and normalize:
        raise ValueError("normalize is True, but teacher holds one value a position; it belongs to (..., V) logits")


def two_supports(first: Support, second: Support) -> None:
    slots("first", first)
    slots("second", second)
    same_positions("second.ids", second.ids, first.ids, student_name="first.ids")


def mapping(
    x: Mapping[int, int] | Tensor,  # (V_teacher,)
    support: Support,
    student_vocab: int | None,
) -> None:
    if isinstance(x, Tensor):
        _tensor("mapping", x, INTEGERS)
        if x.dim() != 1 or len(x) == 0:
            raise ValueError(
                f"mapping has shape {_shape(x)}; a table must be (V_teacher,), the student's id of each token"
            )
        _same_device("mapping", x, "support.ids", support.ids)
    elif not isinstance(x, Mapping) or not all(_is_int(y) for pair in x.items() for y in pair):
        raise TypeError(f"mapping is {_kind(x)}; it must be a dict from ids to ids or a (V_teacher,) integer tensor")
    if student_vocab is not None and (not _is_int(student_vocab) or student_vocab < 1):
        raise ValueError(f"student_vocab is {student_vocab!r}; it must be a positive int, or None")


def teachers(name: str, x: Sequence[object]) -> None:
    if not isinstance(x, (tuple, list)) or isinstance(x, Support):
        raise TypeError(f"{name} is {_kind(x)}; it must be a list of teachers")
    if not x:
        raise ValueError(f"{name} is empty; it must hold at least one teacher")


def composed(
    sources: Mapping[str, Tensor | Support],
    k: int | None,
    trained: str | None = None,
) -> None:
    """The sources of one teacher; that named `trained` is logits, and may require grad."""
    supports = {name: x for name, x in sources.items() if isinstance(x, Support) and name != trained}
    leaves: dict[str, Any] = {name: supports[name].ids if name in supports else x for name, x in sources.items()}
    first_name, first = next(iter(leaves.items()))
    for name, x in leaves.items():
        if name in supports:
            slots(name, supports[name])
        else:
            logits(name, x)
            if name != trained:
                constant(name, x)
        same_positions(name, x, first, student_name=first_name)
    widths = {name: x.shape[-1] for name, x in leaves.items() if name in supports or not supports}
    if len(set(widths.values())) > 1:
        raise ValueError(
            f"the last dimensions differ: {', '.join(f'{name} {width}' for name, width in widths.items())}; "
            "cut logits to the common vocabulary, give supports on the same tokens"
        )
    if not supports:
        _top(k, widths[first_name], first_name)
    elif k is not None:
        raise ValueError(f"k is {k}, but {next(iter(supports))} is a Support, whose last dimension is K; leave k out")


def shares(weights: Sequence[float | Tensor], teachers: Sequence[Tensor | Support]) -> None:
    if not isinstance(weights, (tuple, list)) or len(weights) != len(teachers):
        raise ValueError(f"weights is {weights!r}; it must be a list of {len(teachers)}, one a teacher")
    if not any(isinstance(x, Tensor) or x for x in weights):
        raise ValueError(f"weights is {weights!r}; at least one must be above 0")
    first = teachers[0].ids if isinstance(teachers[0], Support) else teachers[0]
    for i, x in enumerate(weights):
        if not isinstance(x, Tensor):
            not_negative(f"weights[{i}]", x)
            continue
        _tensor(f"weights[{i}]", x, FLOATS)
        constant(f"weights[{i}]", x)
        if x.dim() > 0:
            same_positions(f"weights[{i}]", x, first, value_per_position=True, student_name="teachers[0]")


def per_token(log_probs: Mapping[str, Tensor]) -> None:
    first_name, first = next(iter(log_probs.items()))
    for name, x in log_probs.items():
        _tensor(name, x, FLOATS)
        if x.shape != first.shape:
            raise ValueError(
                f"{name} has shape {_shape(x)} and {first_name} {_shape(first)}; both must hold one value a token"
            )
        _same_device(name, x, first_name, first)


def returns(
    rewards: Tensor,  # (..., T)
    mask: Tensor | None,  # (..., T)
    gamma: float,
) -> None:
    _tensor("rewards", rewards, FLOATS)
    if rewards.dim() == 0:
        raise ValueError("rewards has no dimension; it must be (..., T)")
    if mask is not None:
        _tensor("mask", mask, (torch.bool, torch.uint8, torch.int8, torch.int16, *INTEGERS, *FLOATS))
        if mask.shape != rewards.shape:
            raise ValueError(f"mask has shape {_shape(mask)} and rewards {_shape(rewards)}; both must be (..., T)")
        _same_device("mask", mask, "rewards", rewards)
    fraction("gamma", gamma)


def interval(name: str, value: tuple[float, float]) -> None:
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f"{name} is {value!r}; it must be a pair (low, high)")
    for x in value:
        number(name, x)
    if value[0] > value[1]:
        raise ValueError(f"{name} is {value!r}; low must not be above high")


def positive(name: str, value: float) -> None:
    number(name, value)
    if value <= 0:
        raise ValueError(f"{name} is {value}; it must be positive")


def not_negative(name: str, value: float) -> None:
    number(name, value)
    if value < 0:
        raise ValueError(f"{name} is {value}; it must not be negative")


def fraction(name: str, value: float) -> None:
    number(name, value)
    if not 0 <= value <= 1:
        raise ValueError(f"{name} is {value}; it must be from 0 to 1")


def _is_int(x: object) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)


def _top(k: int | None, vocab: int, name: str) -> int:
    if k is None:
        raise ValueError(f"k is None, but {name} holds logits; say how many tokens to compare, such as k=32")
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"k is {k!r}; it must be an int")
    if not 1 <= k <= vocab:
        raise ValueError(f"k is {k}; it must be between 1 and V = {vocab}, the last dimension of {name}")
    return k


def _tensor(name: str, x: object, dtypes: tuple[torch.dtype, ...]) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is {_kind(x)}; it must be a torch.Tensor")
    if x.dtype not in dtypes:
        raise TypeError(f"{name} is {x.dtype}; use one of {', '.join(str(d).removeprefix('torch.') for d in dtypes)}")
    if x.layout != torch.strided:
        raise TypeError(f"{name} has layout {x.layout}; pass a dense tensor, such as {name}.to_dense()")


def number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} is {_kind(value)}; it must be a number")
    if not math.isfinite(value):
        raise ValueError(f"{name} is {value}; it must be finite")


def _denominator(value: float | Tensor | None) -> None:
    if isinstance(value, Tensor):
        if value.dim() != 0:
            raise ValueError(f"denominator has shape {_shape(value)}; it must be a number or a 0-d tensor")
        constant("denominator", value)
    elif value is not None:
        number("denominator", value)


def _same_device(name: str, x: Tensor, other: str, y: Tensor) -> None:
    if x.device != y.device:
        raise ValueError(f"{name} is on {x.device} and {other} on {y.device}; move one: {name}.to({str(y.device)!r})")


def _same_dtype(name: str, x: Tensor, other: str, y: Tensor) -> None:
    if x.dtype != y.dtype:
        raise TypeError(f"{name} is {x.dtype} and {other} {y.dtype}; cast one, such as {name}.to({y.dtype})")


def _shape(x: Tensor) -> str:
    return str(tuple(x.shape))


def _kind(x: object) -> str:
    return f"a {type(x).__module__}.{type(x).__qualname__}".replace("builtins.", "")
