"""Refusals that several rooms share, and their messages: the argument, the value seen, and what to do.

Refusals of one caller stand beside that caller. Nothing here reads a device value.
"""

import operator
import sys
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import is_dataclass
from fractions import Fraction
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
INTEGERS = (torch.int32, torch.int64)
LARGEST = torch.iinfo(torch.int64).max
LARGEST_FLOAT = torch.finfo(torch.float64).max
NUMBERS = (torch.uint8, torch.int8, torch.int16, *INTEGERS, *FLOATS)
FACTORS = (torch.bool, *FLOATS)  # of positions: weights and masks
TEMPERATURES = (1e-30, 1e30)
NO_CAP = 1e30  # from here on softcap * tanh(z / softcap) is z to the last bit, for every |z| below 1e22


def require_constant(name: str, x: Tensor) -> None:
    if x.requires_grad:
        raise ValueError(f"{name} requires grad, but is a constant of this loss; pass {name}.detach()")


def require_temperature(value: float, name: str = "temperature") -> None:
    require_number(name, value)
    low, high = TEMPERATURES
    if not low <= float(value) <= high:
        raise ValueError(f"{name} is {value}; it must be positive, between {low} and {high}")


def require_top_p(value: float, name: str = "top_p") -> None:
    require_number(name, value)
    if not 0 < value <= 1:
        raise ValueError(
            f"{name} is {value}; it must be above 0 and at most 1; 1 keeps every token, 1e-9 only the best"
        )


def require_positive(name: str, value: float) -> None:
    require_number(name, value)
    if value <= 0:
        raise ValueError(f"{name} is {value}; it must be positive")


def require_not_negative(name: str, value: float) -> None:
    require_number(name, value)
    if value < 0:
        raise ValueError(f"{name} is {value}; it must not be negative")


def require_fraction(name: str, value: float) -> None:
    require_number(name, value)
    if not 0 <= value <= 1:
        raise ValueError(f"{name} is {value}; it must be from 0 to 1")


def require_one_of(name: str, value: object, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} is {value!r}; use one of {', '.join(choices)}")


def require_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} is {seen(value)}; it must be True or False")


def require_integer(name: str, value: object) -> int:
    """An int, or what stands for one, such as numpy.int64(3)."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    try:
        if isinstance(value, (bool, Tensor)):
            raise TypeError
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name} is {seen(value)}; it must be an int") from None


def require_integers(name: str, values: object) -> list[int]:
    try:
        if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Iterable):
            raise TypeError
        return [require_integer(name, x) for x in values]
    except TypeError:
        raise TypeError(f"{name} is {seen(values)}; it must be a sequence of ints or an integer tensor") from None


def require_positive_integer(name: str, value: object) -> int:
    value = require_integer(name, value)
    if not 1 <= value <= LARGEST:
        raise ValueError(f"{name} is {value}; it must be a positive int of at most 64 bits")
    return value


def require_count(name: str, value: object) -> int | None:
    """A positive int, or None."""
    return None if value is None else require_positive_integer(name, value)


def require_k(k: object, vocab: int, name: str) -> int:
    """K, as an int."""
    if k is None:
        raise ValueError(f"k is None, but {name} holds logits; say how many tokens to compare, such as k=32")
    k = require_integer("k", k)
    if not 1 <= k <= vocab:
        raise ValueError(f"k is {k}; it must be between 1 and V = {vocab}, the last dimension of {name}")
    return k


def require_number(name: str, value: Any) -> None:
    if isinstance(value, (bool, Fraction)) or not isinstance(value, Real):
        raise TypeError(f"{name} is {kind_of(value)}; it must be a number, an int or a float")
    plain = value if type(value) in (int, float) else float(value)  # a numpy number may not hold the bounds
    if not -LARGEST_FLOAT <= plain <= LARGEST_FLOAT:
        raise ValueError(f"{name} is {value}; it must be finite")


def require_denominator(
    value: float | Tensor | None,
    like: Tensor | None,  # what it divides, (...)
    name: str = "denominator",
) -> None:
    if isinstance(value, Tensor):
        require_tensor(name, value, NUMBERS)
        if value.dim() != 0:
            raise ValueError(f"{name} has shape {shape_of(value)}; it must be a number or a 0-d tensor")
        require_constant(name, value)
        if like is not None:
            require_same_reality(name, value, "the loss", like)
    elif value is not None:
        require_number(name, value)


def require_list(name: str, x: object, items: str) -> None:
    if not isinstance(x, (tuple, list)):
        raise TypeError(f"{name} is {kind_of(x)}; it must be a list of {items}")
    if not x:
        raise ValueError(f"{name} is empty; it must hold at least one of the {items}")


def require_tensor(name: str, x: object, dtypes: tuple[torch.dtype, ...], of_head: bool = False) -> None:
    """Of a head that is a DTensor, the numbers are gathered later."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is {kind_of(x)}; it must be a torch.Tensor")
    of_head &= hasattr(x, "device_mesh")
    if hasattr(x, "full_tensor") and not of_head:
        raise TypeError(f"{name} is a DTensor; pass {name}.full_tensor(), which every rank then has whole")
    if x.is_nested:
        rows = f"{name}.values()" if x.layout == torch.jagged else f"torch.cat({name}.unbind())"
        raise TypeError(f"{name} is a nested tensor; pass {rows}, its positions in a row, and every other argument so")
    if _without_memory(x) and not of_head:
        raise TypeError(
            f"{name} is {kind_of(x)}, which keeps its numbers in other tensors; pass a plain tensor, such as "
            f"{name}.dequantize() of a quantised one"
        )
    if x.dtype not in dtypes:
        raise TypeError(f"{name} is {x.dtype}; use one of {', '.join(str(d).removeprefix('torch.') for d in dtypes)}")
    if x.layout != torch.strided:
        raise TypeError(f"{name} has layout {x.layout}; pass a dense tensor, such as {name}.to_dense()")


def _without_memory(x: Tensor) -> bool:
    """Whether x is a tensor made of others; one that waits for a collective is what it will be."""
    return hasattr(x, "__tensor_flatten__") and not hasattr(x, "trigger_wait")


def require_same_reality(name: str, x: Tensor, other: str, y: Tensor) -> None:
    """The tensors may lie on two devices, but neither alone on "meta", which holds no values."""
    if x.is_meta != y.is_meta:
        require_same_device(name, x, other, y)


def require_same_device(name: str, x: Tensor, other: str, y: Tensor) -> None:
    if x.device != y.device:
        raise ValueError(f"{name} is on {x.device} and {other} on {y.device}; move one: {name}.to({str(y.device)!r})")


def require_logits(
    name: str,
    x: Tensor,  # (..., V)
    sharded: bool = False,  # a rank may have no token
) -> None:
    require_tensor(name, x, FLOATS)
    if x.dim() == 0 or (x.shape[-1] == 0 and not sharded):
        raise ValueError(f"{name} has shape {shape_of(x)}; it must be (..., V) with V of at least 1")


def require_positions(
    name: str,
    x: Any,  # (B, T, anything), plain or a DTensor
) -> None:
    if not (isinstance(x, Tensor) and hasattr(x, "device_mesh")):
        require_tensor(name, x, FLOATS)
    if x.dim() < 2:
        raise ValueError(f"{name} has shape {shape_of(x)}; it must be (B, T, ...), with a position for each label")


def require_constant_logits(
    name: str,
    x: Tensor,  # (..., V)
    sharded: bool = False,
) -> None:
    require_logits(name, x, sharded)
    require_constant(name, x)


def require_plain(**tensors: object) -> None:
    """Refuses what torch.func, vmap and forward mode make of tensors, or of those of a Support: no kernel takes it."""
    if torch.compiler.is_compiling():
        return
    for name, value in tensors.items():
        for x in vars(value).values() if is_dataclass(value) else (value,):
            if isinstance(x, Tensor) and (
                torch.func.debug_unwrap(x, recurse=False) is not x or forward_ad.unpack_dual(x).tangent is not None
            ):
                raise NotImplementedError(
                    f"{name} is under torch.func, vmap or forward mode, which no loss takes; use backward() or "
                    "torch.autograd.grad, once per sample on reduction='none' for the gradients of each sample"
                )


def require_teacher_logits(
    name: str,
    x: Tensor,  # (..., V)
    k: int | None,
    renormalized: bool = True,
    sharded: bool = False,
) -> int:
    """K, as an int. Of a shard, no rank knows V by itself."""
    require_constant_logits(name, x, sharded)
    k = require_k(k, LARGEST if sharded else x.shape[-1], name)
    if renormalized:
        warn_of_single_slot(k)
    return k


def require_same_positions(
    name: str,
    x: Tensor,  # (..., anything), or (...) with value_per_position
    student: Tensor,  # (..., V) or (..., H)
    value_per_position: bool = False,
    student_name: str = "student_logits",
) -> None:
    """Refuses other leading dimensions, or another device, than those of the student's logits or hidden states."""
    lead = x.shape if value_per_position else x.shape[:-1]
    if lead != student.shape[:-1]:
        want = tuple(student.shape[:-1]) if value_per_position else (*student.shape[:-1], "...")
        raise ValueError(
            f"{name} has shape {shape_of(x)} and {student_name} {shape_of(student)}; {name} must have one entry for "
            f"each position: shape {want}".replace("'...'", "any")
        )
    require_same_device(name, x, student_name, student)


def require_factors(name: str, x: object) -> None:
    """Refuses integers too: labels and ids given for a mask would train, each token by its number."""
    if isinstance(x, Tensor) and x.dtype not in FACTORS and x.dtype in NUMBERS:
        raise TypeError(
            f"{name} is {x.dtype}; it must be bool or float, since integers may be labels or ids: pass {name}.bool() "
            "for a mask of 0 and 1, or labels != -100 (an attention mask counts prompts too)"
        )
    require_tensor(name, x, FACTORS)


def require_weights(
    x: Tensor | None,  # (...)
    student: Tensor,  # (..., V) or (..., H)
    student_name: str = "student_logits",
) -> None:
    if x is None:
        return
    require_factors("weights", x)
    require_constant("weights", x)
    require_same_positions("weights", x, student, value_per_position=True, student_name=student_name)


def require_sampled_ids(
    ids: Tensor,  # (...)
    student: Tensor,  # (..., V) or (..., H)
    name: str = "ids",
    student_name: str = "student_logits",
) -> None:
    require_tensor(name, ids, INTEGERS)
    require_same_positions(name, ids, student, value_per_position=True, student_name=student_name)


def require_sampled_for_mass(
    ids: Tensor | None,  # (...)
    mass: str,
    student: Tensor,  # (..., V) or (..., H)
    student_name: str,
) -> None:
    """Refuses sampled tokens that `mass` does not use, and their absence where it does."""
    if mass.startswith("ema_pg") and ids is None:
        raise ValueError(f"sampled_ids is None, but {mass!r} needs the sampled tokens; pass them, (...)")
    if ids is None:
        return
    if not mass.startswith("ema_pg"):
        raise ValueError(
            f"sampled_ids is given, but mass={mass!r} does not use it; leave it out, or ask for mass='ema_pg' or "
            "'ema_pg_corrected'"
        )
    require_sampled_ids(ids, student, "sampled_ids", student_name)


def require_head(
    hidden_name: str,
    hidden: Tensor,  # (..., H)
    weight_name: str,
    weight: Tensor,  # (V, H)
    bias_name: str,
    bias: Tensor | None,  # (V,)
    sharded: bool = False,  # a rank may have no token
) -> None:
    require_tensor(hidden_name, hidden, FLOATS)
    if hidden.dim() == 0 or hidden.shape[-1] == 0:
        raise ValueError(f"{hidden_name} has shape {shape_of(hidden)}; it must be (..., H) with H of at least 1")
    if hasattr(weight, "ds_id") and weight.numel() == 0:
        raise ValueError(
            f"{weight_name} is partitioned by DeepSpeed ZeRO-3 and holds nothing here; take the loss within the "
            "forward of the head's module, where the head is whole"
        )
    if _quantised(weight):
        kind = kind_of(weight) if weight.dtype in FLOATS else weight.dtype
        raise TypeError(
            f"{weight_name} is {kind}; a quantised head must be given dequantised, (V, H) floats, or its module's "
            "logits to topk_reverse_kl"
        )
    require_tensor(weight_name, weight, FLOATS, of_head=True)
    if weight.dim() != 2 or (weight.shape[0] == 0 and not sharded) or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{weight_name} has shape {shape_of(weight)} and {hidden_name} {shape_of(hidden)}; the head must be "
            f"(V, H), a row of H = {hidden.shape[-1]} per token, as nn.Linear keeps it; one that FSDP flattened is "
            "whole within the forward of its module: take the loss there"
        )
    _require_float64_alike(weight_name, weight, hidden_name, hidden)
    require_same_device(weight_name, weight, hidden_name, hidden)
    if bias is None:
        return
    require_tensor(bias_name, bias, FLOATS, of_head=True)
    if bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{bias_name} has shape {shape_of(bias)}; it must be (V,), here ({weight.shape[0]},) as "
            f"{weight_name} has shape {shape_of(weight)}"
        )
    _require_float64_alike(bias_name, bias, hidden_name, hidden)
    require_same_device(bias_name, bias, hidden_name, hidden)


def _quantised(x: object) -> bool:
    """By its dtype; or as bitsandbytes marks it, by quant_state; or as torchao makes it, of other tensors."""
    if not isinstance(x, Tensor) or hasattr(x, "full_tensor") or x.is_nested:
        return False
    return x.dtype not in FLOATS or getattr(x, "quant_state", None) is not None or _without_memory(x)


def require_linear_teacher(
    hidden: Tensor,  # (..., H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    chunk_rows: int | None,
    sharded: bool = False,
) -> int | None:
    """chunk_rows, as an int."""
    require_head("teacher_hidden", hidden, "teacher_weight", weight, "bias", bias, sharded)
    for name, x in (("teacher_hidden", hidden), ("teacher_weight", weight), ("bias", bias)):
        if x is not None:
            require_constant(name, x)
    return require_count("chunk_rows", chunk_rows)


def require_logit_options(logit_scale: float, softcap: float | None) -> tuple[float, float | None]:
    """Both as the ops take them; a cap so high that it changes nothing is None."""
    require_number("logit_scale", logit_scale)
    low, high = TEMPERATURES
    if logit_scale != 0 and not low <= abs(logit_scale) <= high:
        raise ValueError(f"logit_scale is {logit_scale}; its size must be 0, or between {low} and {high}")
    if softcap is None:
        return float(logit_scale), None
    require_number("softcap", softcap)
    if softcap < low:
        raise ValueError(f"softcap is {softcap}; it must be positive, at least {low}, or None for no cap")
    return float(logit_scale), None if softcap >= NO_CAP else float(softcap)


def warn_of_single_slot(k: int) -> None:
    if k == 1 and not torch.compiler.is_compiling():  # torch.compile traces no warning
        warnings.warn(
            "K = 1: a distribution renormalised over one token is always 1, so loss and gradient are exactly 0; use a "
            "larger K",
            stacklevel=callers_level(),
        )


def callers_level() -> int:
    """The stacklevel of the first frame outside the package and torch, as the caller of this function counts."""
    level = 1
    while (frame := sys._getframe(level)).f_back is not None and frame.f_globals.get("__name__", "").startswith(
        ("topk_rkl.", "torch.")
    ):
        level += 1
    return level


def _require_float64_alike(name: str, x: Tensor, other: str, y: Tensor) -> None:
    if (x.dtype == torch.float64) != (y.dtype == torch.float64):
        raise TypeError(
            f"{name} is {x.dtype} and {other} {y.dtype}; float64 goes with float64 alone, the others with each other: "
            f"cast one, such as {name}.to({y.dtype})"
        )


def shape_of(x: Tensor) -> str:
    return str(tuple(x.shape))


def seen(x: object) -> str:
    return kind_of(x) if isinstance(x, Tensor) else repr(x)


def kind_of(x: object) -> str:
    return f"a {type(x).__module__}.{type(x).__qualname__}".replace("builtins.", "")
