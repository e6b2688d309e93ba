"""Every refusal and its message: the argument, the value seen, and what to do. Nothing here reads a device value."""

import math
import sys
import warnings
from collections.abc import Sequence
from numbers import Real

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


def teacher_logits(
    name: str,
    x: Tensor,  # (..., V)
    k: int | None,
    renormalized: bool = True,
) -> None:
    logits(name, x)
    constant(name, x)
    k = _top(k, x.shape[-1], name)
    if renormalized:
        single_slot(k)


def support(
    teacher: Support,
    k: int | None,
    renormalized: bool = True,
) -> None:
    ids, log_probs = teacher
    _tensor("teacher.ids", ids, INTEGERS)
    _tensor("teacher.log_probs", log_probs, FLOATS)
    constant("teacher.log_probs", log_probs)
    if k is not None:
        raise ValueError(f"k is {k}, but teacher is a Support, whose last dimension is K; leave k out")
    if ids.shape != log_probs.shape or ids.dim() == 0 or ids.shape[-1] == 0:
        raise ValueError(
            f"teacher.ids has shape {_shape(ids)} and teacher.log_probs {_shape(log_probs)}; "
            "both must be (..., K) with K of at least 1"
        )
    _same_device("teacher.log_probs", log_probs, "teacher.ids", ids)
    if renormalized:
        single_slot(ids.shape[-1])


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
    _number("logit_scale", logit_scale)
    if softcap is not None:
        _number("softcap", softcap)
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
    _number("temperature", value)
    low, high = TEMPERATURES
    if not low <= value <= high:
        raise ValueError(f"temperature is {value}; it must be positive, between {low} and {high}")


def top_p(value: float) -> None:
    _number("top_p", value)
    if not 0 < value <= 1:
        raise ValueError(f"top_p is {value}; it must be above 0 and at most 1; 1 keeps every token, 1e-9 only the best")


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
        _number("divergence.alpha", value.alpha)
        _number("divergence.beta", value.beta)
    elif isinstance(value, JensenShannon):
        _number("divergence.beta", value.beta)
        if not 0 < value.beta < 1:
            raise ValueError(
                f"divergence.beta is {value.beta}; it must be between 0 and 1; at the ends that divergence is 0, and "
                "generalized_jsd gives forward and reverse KL there"
            )
    elif isinstance(value, Mixture):
        _number("divergence.lam", value.lam)
        if not 0 <= value.lam <= 1:
            raise ValueError(f"divergence.lam is {value.lam}; it must be from 0, reverse KL, to 1, forward KL")
    elif isinstance(value, (SkewReverseKL, SkewForwardKL)):
        _number("divergence.lam", value.lam)
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
        _number("norm", norm)
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


def _number(name: str, value: object) -> None:
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
        _number("denominator", value)


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
