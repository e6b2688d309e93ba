"""Refusals of the arguments of the losses and of the selection."""

import math
import sys
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from topk_rkl.checks.values import (
    FLOATS,
    INTEGERS,
    NO_CAP,
    NUMBERS,
    TEMPERATURES,
    constant,
    count,
    denominator_value,
    flag,
    float64_alike,
    kind,
    number,
    one_of,
    same_device,
    shape,
    tensor,
    top,
)
from topk_rkl.diagnostics import NAMES as DIAGNOSTICS
from topk_rkl.diagnostics import OF_SAMPLED, OF_TEACHER_LOGITS, OF_TRUE_LOG_PROBS
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

REDUCTIONS = ("none", "sum", "mean")


def logits(
    name: str,
    x: Tensor,  # (..., V)
) -> None:
    tensor(name, x, FLOATS)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"{name} has shape {shape(x)}; it must be (..., V) with V of at least 1")


def constant_logits(
    name: str,
    x: Tensor,  # (..., V)
) -> None:
    logits(name, x)
    constant(name, x)


def plain(**tensors: Tensor | Support | None) -> None:
    """Refuses what torch.func, vmap and forward mode make of tensors: kernels take none of it."""
    if torch.compiler.is_compiling():
        return
    for name, value in tensors.items():
        for x in value if isinstance(value, Support) else (value,):
            if isinstance(x, Tensor) and (
                torch.func.debug_unwrap(x, recurse=False) is not x or forward_ad.unpack_dual(x).tangent is not None
            ):
                raise NotImplementedError(
                    f"{name} is under torch.func, vmap or forward mode, which no loss takes; use backward() or "
                    "torch.autograd.grad, once a sample on reduction='none' for gradients of each sample"
                )


def teacher_logits(
    name: str,
    x: Tensor,  # (..., V)
    k: int | None,
    renormalized: bool = True,
) -> int:
    """K, as an int."""
    constant_logits(name, x)
    k = top(k, x.shape[-1], name)
    if renormalized:
        single_slot(k)
    return k


def ranking(
    name: str,
    x: Tensor,  # (..., V)
    k: int | None,
) -> int:
    """K, as an int."""
    logits(name, x)
    return top(k, x.shape[-1], name)


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
    if not isinstance(x, Support):
        raise TypeError(f"{name} is {kind(x)}; it must be a Support(ids, log_probs)")
    ids, log_probs = x
    tensor(f"{name}.ids", ids, INTEGERS)
    tensor(f"{name}.log_probs", log_probs, FLOATS)
    constant(f"{name}.log_probs", log_probs)
    if ids.shape != log_probs.shape or ids.dim() == 0 or ids.shape[-1] == 0:
        raise ValueError(
            f"{name}.ids has shape {shape(ids)} and {name}.log_probs {shape(log_probs)}; "
            "both must be (..., K) with K of at least 1"
        )
    same_device(f"{name}.log_probs", log_probs, f"{name}.ids", ids)


def head(
    hidden_name: str,
    hidden: Tensor,  # (..., H)
    weight_name: str,
    weight: Tensor,  # (V, H)
    bias_name: str,
    bias: Tensor | None,  # (V,)
) -> None:
    tensor(hidden_name, hidden, FLOATS)
    if hidden.dim() == 0 or hidden.shape[-1] == 0:
        raise ValueError(f"{hidden_name} has shape {shape(hidden)}; it must be (..., H) with H of at least 1")
    if hasattr(weight, "ds_id") and weight.numel() == 0:
        raise ValueError(
            f"{weight_name} is partitioned by DeepSpeed ZeRO-3 and holds nothing here; call the loss inside "
            "deepspeed.zero.GatheredParameters"
        )
    if isinstance(weight, Tensor) and not weight.is_floating_point():
        raise TypeError(f"{weight_name} is {weight.dtype}; a quantised head must be given dequantised, (V, H) floats")
    tensor(weight_name, weight, FLOATS)
    if weight.dim() != 2 or weight.shape[0] == 0 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{weight_name} has shape {shape(weight)} and {hidden_name} {shape(hidden)}; the head must be (V, H), "
            f"one row of H = {hidden.shape[-1]} a token, as nn.Linear keeps it (a sharded one: gathered first)"
        )
    float64_alike(weight_name, weight, hidden_name, hidden)
    same_device(weight_name, weight, hidden_name, hidden)
    if bias is None:
        return
    tensor(bias_name, bias, FLOATS)
    if bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{bias_name} has shape {shape(bias)}; it must be (V,), here ({weight.shape[0]},) as "
            f"{weight_name} has shape {shape(weight)}"
        )
    float64_alike(bias_name, bias, hidden_name, hidden)
    same_device(bias_name, bias, hidden_name, hidden)


def linear_teacher(
    hidden: Tensor,  # (..., H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    chunk_rows: int | None,
) -> int | None:
    """chunk_rows, as an int."""
    head("teacher_hidden", hidden, "teacher_weight", weight, "bias", bias)
    for name, x in (("teacher_hidden", hidden), ("teacher_weight", weight), ("bias", bias)):
        if x is not None:
            constant(name, x)
    return count("chunk_rows", chunk_rows)


def logits_dtype(value: torch.dtype | None, hidden: Tensor) -> None:
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    if value is not None and value is not wide:
        raise ValueError(f"logits_dtype is {value}; use None, or {wide} with teacher_hidden of {hidden.dtype}")


def logit_options(logit_scale: float, softcap: float | None) -> tuple[float, float | None]:
    """The two as the ops take them; a cap so high that it changes nothing is None."""
    number("logit_scale", logit_scale)
    low, high = TEMPERATURES
    if logit_scale != 0 and not low <= abs(logit_scale) <= high:
        raise ValueError(f"logit_scale is {logit_scale}; its size must be 0, or between {low} and {high}")
    if softcap is None:
        return float(logit_scale), None
    number("softcap", softcap)
    if softcap < low:
        raise ValueError(f"softcap is {softcap}; it must be positive, at least {low}, or None for no cap")
    return float(logit_scale), None if softcap >= NO_CAP else float(softcap)


def weight_grad(value: str) -> None:
    if not isinstance(value, str) or value not in ("dense", "sparse"):
        raise ValueError(f"weight_grad is {value!r}; use 'dense' or 'sparse'")


def options(
    k: int | None,
    diagnostics: object,
    overwrite_student_logits: bool = False,
) -> tuple[int | None, tuple[str, ...] | None]:
    """What a module can check before it sees a tensor: k and diagnostics, as they are kept."""
    flag("overwrite_student_logits", overwrite_student_logits)
    return count("k", k), None if diagnostics is None else diagnostic_names(diagnostics)


def sparse_leaf(
    value: str,
    weight: Tensor,  # (V, H)
) -> None:
    """What made the head of others would be given a row-sparse gradient, which few operations can take further."""
    if value == "sparse" and not torch.compiler.is_compiling() and torch.is_grad_enabled() and weight.grad_fn:
        raise ValueError(
            f"student_weight is no leaf but the result of {weight.grad_fn.name()} (a merged adapter, a view, a cast?) "
            "with weight_grad='sparse', whose gradient a leaf alone can hold; use weight_grad='dense', or pass the "
            "parameter itself"
        )


def single_slot(k: int) -> None:
    if k == 1 and not torch.compiler.is_compiling():  # which traces no warning
        warnings.warn(
            "K = 1: a distribution renormalised over one token is always 1, so loss and gradient are exactly 0; use a "
            "larger K",
            stacklevel=_callers_level(),
        )


def _callers_level() -> int:
    """The stacklevel, for the caller of this, of the first frame outside the package."""
    level = 1
    while sys._getframe(level).f_globals.get("__name__", "").startswith("topk_rkl."):
        level += 1
    return level


def teacher_kind(teacher: object) -> None:
    if isinstance(teacher, (tuple, list)):
        raise TypeError("teacher is a plain tuple or list; wrap it: Support(ids, log_probs)")
    if not isinstance(teacher, Tensor):
        raise TypeError(f"teacher is {kind(teacher)}; it must be a (..., V) tensor of logits or a Support")


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
            f"{name} has shape {shape(x)} and {student_name} {shape(student)}; {name} must have one entry for each "
            f"position: shape {want}".replace("'...'", "any")
        )
    same_device(name, x, student_name, student)


def weights(
    x: Tensor | None,  # (...)
    student: Tensor,  # (..., V) or (..., H)
    student_name: str = "student_logits",
) -> None:
    if x is None:
        return
    tensor("weights", x, (torch.bool, *NUMBERS))
    constant("weights", x)
    same_positions("weights", x, student, value_per_position=True, student_name=student_name)


def sampled_ids(
    ids: Tensor,  # (...)
    student: Tensor,  # (..., V) or (..., H)
    name: str = "ids",
    student_name: str = "student_logits",
) -> None:
    tensor(name, ids, INTEGERS)
    same_positions(name, ids, student, value_per_position=True, student_name=student_name)


def sampled_within(
    ids: Tensor,  # (...)
    weights: Tensor | None,  # (...)
    vocab: int,
) -> None:
    """Of ids on a CPU alone, where a value is read without waiting for a device."""
    if not ids.is_cpu or torch.compiler.is_compiling():
        return
    outside = (ids < 0) | (ids >= vocab)
    if weights is not None:
        outside &= weights != 0
    if outside.any().tolist():
        raise ValueError(
            f"ids has {ids[outside][0].tolist()}; where the weight is not 0 it must be from 0 to {vocab - 1}, a token "
            "of student_logits and teacher_logits"
        )


def reduction(
    value: str,
    denominator: float | Tensor | None,
    student: Tensor | None = None,  # (..., V) or (..., H)
) -> None:
    one_of("reduction", value, REDUCTIONS)
    if denominator is not None and value != "mean":
        raise ValueError(f"denominator is given with reduction={value!r}; it only belongs to reduction='mean'")
    denominator_value(denominator, student)


def objective(value: object, mass: str) -> None:
    """The divergence, the mass, and whether they go together."""
    one_of("mass", mass, MASSES)
    if isinstance(value, type):
        raise TypeError(f"divergence is the class {value.__name__}; pass an instance, such as {value.__name__}(...)")
    if isinstance(value, Divergence) and type(value).code is not Divergence.code:
        _numbers_of(value)
    elif isinstance(value, nn.Module) and any(x.requires_grad for x in value.parameters()):
        raise ValueError(
            f"divergence is {kind(value)} with parameters that require grad, to which a loss gives none; pass "
            "divergence.requires_grad_(False), or write a loss that trains them in plain PyTorch"
        )
    elif not callable(value):
        raise TypeError(
            f"divergence is {kind(value)}; use ReverseKL(), another of topk_rkl.divergence, or a function "
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


def diagnostics(names: object, mass: str, sampled: object, teacher_is_support: bool, temperature: float) -> None:
    """The names, and whether what they and the mass need is there."""
    names = () if names is None else diagnostic_names(names)
    for name in names:
        if name in OF_TEACHER_LOGITS and teacher_is_support:
            raise ValueError(f"diagnostics has {name!r}, but teacher is a Support; pass teacher logits")
        if name in OF_TRUE_LOG_PROBS and teacher_is_support:
            support_at_temperature_1(f"{name!r} of the diagnostics", temperature)
    takers = [name for name in names if name in OF_SAMPLED] + [mass] * mass.startswith("ema_pg")
    if takers and sampled is None:
        raise ValueError(f"sampled_ids is None, but {takers[0]!r} needs the sampled tokens; pass them, (...)")
    if sampled is not None and not takers:
        raise ValueError(
            f"sampled_ids is given, but mass={mass!r} and the diagnostics do not use it; leave it out, or ask for "
            f"mass='ema_pg', 'ema_pg_corrected' or one of {', '.join(OF_SAMPLED)}"
        )


def diagnostic_names(names: object) -> tuple[str, ...]:
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise TypeError(f"diagnostics is {names!r}; it must be a sequence of names, such as ('student_mass',)")
    for name in names:
        if name not in DIAGNOSTICS:
            raise ValueError(f"diagnostics has {name!r}; use some of {', '.join(DIAGNOSTICS)}")
    return tuple(names)


def _numbers_of(value: Divergence) -> None:
    if isinstance(value, ReverseKL) and value.clamp is not None:
        if not isinstance(value.clamp, (tuple, list)) or len(value.clamp) != 2:
            raise TypeError(f"divergence.clamp is {value.clamp!r}; it must be (low, high), or None")
        low, high = value.clamp
        for x in value.clamp:
            if not (isinstance(x, float) and abs(x) == math.inf):
                number("divergence.clamp", x)
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
    support_at_temperature_1(f"mass={mass!r}", temperature)
    if mass.startswith("ema_pg"):
        raise ValueError(
            f"teacher is a Support with mass={mass!r}, which needs the teacher's log-prob of every sampled token; pass "
            "teacher logits"
        )


def support_at_temperature_1(asked: str, temperature: float) -> None:
    if temperature != 1:
        raise ValueError(
            f"temperature is {temperature} with {asked} and a Support, whose log-probs do not tell the teacher's "
            "normaliser at that temperature; pass teacher logits, or divide both sides' logits beforehand, as in "
            "teacher_topk(teacher_logits / temperature, k, normalize=True)"
        )


def dense_weight_grad(value: str, mass: str) -> None:
    if value != "dense":
        raise ValueError(
            f"weight_grad is {value!r} with mass={mass!r}, which gives every row of the head a gradient; use 'dense'"
        )


def overwritable(student: Tensor) -> None:
    """A leaf's `.grad` would be its own memory; two elements at one address could not both hold their gradient."""
    if (leaf := _leaf_of(student)) is not None and leaf.untyped_storage()._cdata == student.untyped_storage()._cdata:
        raise ValueError(
            "overwrite_student_logits=True, but student_logits is a leaf that requires grad, or a view of one, whose "
            ".grad would be its own memory; pass a non-leaf, such as the model's output, or leave the option off"
        )
    if student.numel() and _overlaps(student):
        raise ValueError(
            f"overwrite_student_logits=True, but student_logits of shape {shape(student)} and strides "
            f"{student.stride()} overlap themselves (an expanded view?); pass a copy, or leave the option off"
        )


def _overlaps(x: Tensor) -> bool:
    """Whether steps along one dimension lead where steps along those of smaller strides do."""
    dims = sorted(((s, n) for s, n in zip(x.stride(), x.shape) if n > 1), reverse=True)
    if any(stride == 0 for stride, _ in dims):
        return True
    for i, (stride, size) in enumerate(dims):
        smaller = dims[i + 1 :]
        common = math.gcd(*(s for s, _ in smaller))
        every = max(1, common // math.gcd(stride, common))  # other numbers of steps cannot lead there
        most = min(size - 1, _reach(smaller) // stride)
        if any(_leads(stride * steps, smaller) for steps in range(every, most + 1, every)):
            return True
    return False


def _leads(distance: int, dims: Sequence[tuple[int, int]]) -> bool:
    """Whether steps along dims, (stride, size) each, back or forth, add up to the distance."""
    if not dims:
        return distance == 0
    (stride, size), *smaller = dims
    reach = _reach(smaller)
    fewest, most = -((reach - distance) // stride), (distance + reach) // stride
    return any(
        _leads(distance - stride * steps, smaller) for steps in range(max(fewest, 1 - size), min(most, size - 1) + 1)
    )


def _reach(dims: Sequence[tuple[int, int]]) -> int:
    return sum(stride * (size - 1) for stride, size in dims)


def _leaf_of(x: Tensor) -> Tensor | None:
    """The leaf that requires grad of which x is made without any other input, as its views are."""
    if x.grad_fn is None:
        return x if x.requires_grad else None
    node = x.grad_fn
    while len(node.next_functions) == 1 and node.next_functions[0][0] is not None:
        node = node.next_functions[0][0]
    return getattr(node, "variable", None)
