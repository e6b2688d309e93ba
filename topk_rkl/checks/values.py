"""Refusals of single values and tensors, which the others are made of."""

import operator
from collections.abc import Iterable, Mapping
from fractions import Fraction
from numbers import Real
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
INTEGERS = (torch.int32, torch.int64)
LARGEST = torch.iinfo(torch.int64).max
LARGEST_FLOAT = torch.finfo(torch.float64).max
NUMBERS = (torch.uint8, torch.int8, torch.int16, *INTEGERS, *FLOATS)
TEMPERATURES = (1e-30, 1e30)
NO_CAP = 1e30  # from here on softcap * tanh(z / softcap) is z to the last bit, for every |z| below 1e22


def constant(name: str, x: Tensor) -> None:
    if x.requires_grad:
        raise ValueError(f"{name} requires grad, but is a constant of this loss; pass {name}.detach()")


def temperature(value: float) -> None:
    number("temperature", value)
    low, high = TEMPERATURES
    if not low <= float(value) <= high:
        raise ValueError(f"temperature is {value}; it must be positive, between {low} and {high}")


def top_p(value: float, name: str = "top_p") -> None:
    number(name, value)
    if not 0 < value <= 1:
        raise ValueError(
            f"{name} is {value}; it must be above 0 and at most 1; 1 keeps every token, 1e-9 only the best"
        )


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


def one_of(name: str, value: object, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} is {value!r}; use one of {', '.join(choices)}")


def flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} is {seen(value)}; it must be True or False")


def integer(name: str, value: object) -> int:
    """An int, or what stands for one, such as numpy.int64(3)."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    try:
        if isinstance(value, (bool, Tensor)):
            raise TypeError
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name} is {seen(value)}; it must be an int") from None


def integers(name: str, values: object) -> list[int]:
    try:
        if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Iterable):
            raise TypeError
        return [integer(name, x) for x in values]
    except TypeError:
        raise TypeError(f"{name} is {seen(values)}; it must be a sequence of ints or an integer tensor") from None


def count(name: str, value: object) -> int | None:
    """A positive int, or None."""
    if value is None:
        return None
    value = integer(name, value)
    if not 1 <= value <= LARGEST:
        raise ValueError(f"{name} is {value}; it must be a positive int of at most 64 bits, or None")
    return value


def top(k: object, vocab: int, name: str) -> int:
    if k is None:
        raise ValueError(f"k is None, but {name} holds logits; say how many tokens to compare, such as k=32")
    k = integer("k", k)
    if not 1 <= k <= vocab:
        raise ValueError(f"k is {k}; it must be between 1 and V = {vocab}, the last dimension of {name}")
    return k


def tensor(name: str, x: object, dtypes: tuple[torch.dtype, ...]) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is {kind(x)}; it must be a torch.Tensor")
    if hasattr(x, "full_tensor"):
        raise TypeError(f"{name} is sharded, a DTensor; pass {name}.full_tensor()")
    if x.is_nested:
        rows = f"{name}.values()" if x.layout == torch.jagged else f"torch.cat({name}.unbind())"
        raise TypeError(f"{name} is a nested tensor; pass {rows}, its positions in a row, and every other argument so")
    if x.dtype not in dtypes:
        raise TypeError(f"{name} is {x.dtype}; use one of {', '.join(str(d).removeprefix('torch.') for d in dtypes)}")
    if x.layout != torch.strided:
        raise TypeError(f"{name} has layout {x.layout}; pass a dense tensor, such as {name}.to_dense()")


def number(name: str, value: Any) -> None:
    if isinstance(value, (bool, Fraction)) or not isinstance(value, Real):
        raise TypeError(f"{name} is {kind(value)}; it must be a number, an int or a float")
    plain = value if type(value) in (int, float) else float(value)  # numpy's own may not hold the bounds
    if not -LARGEST_FLOAT <= plain <= LARGEST_FLOAT:
        raise ValueError(f"{name} is {value}; it must be finite")


def denominator_value(
    value: float | Tensor | None,
    like: Tensor | None,  # what it divides
) -> None:
    if isinstance(value, Tensor):
        tensor("denominator", value, NUMBERS)
        if value.dim() != 0:
            raise ValueError(f"denominator has shape {shape(value)}; it must be a number or a 0-d tensor")
        constant("denominator", value)
        if like is not None:
            same_reality("denominator", value, "the loss", like)
    elif value is not None:
        number("denominator", value)


def terms(
    x: object,
    of_constants: Tensor,
    log_p: Tensor,  # (..., K)
) -> None:
    """What a user's function gives, of log_p and of its copy without grad."""
    tensor("divergence's result", x, FLOATS)
    assert isinstance(x, Tensor)
    if x.shape != log_p.shape:
        raise ValueError(f"divergence gave {shape(x)}; it must give a term a slot, {shape(log_p)}")
    same_device("divergence's result", x, "log_p", log_p)
    if not x.requires_grad:
        raise ValueError(
            "divergence gave terms that do not depend on log_p, so that nothing is trained; compute them from log_p, "
            "not from log_p.detach() or under torch.no_grad()"
        )
    if of_constants.requires_grad:
        raise ValueError(
            "divergence depends on another tensor that requires grad, to which a loss gives none; detach that tensor, "
            "or write a loss that trains it in plain PyTorch"
        )


def same_reality(name: str, x: Tensor, other: str, y: Tensor) -> None:
    """A tensor that may lie on another device, but not on "meta" alone, where no values are."""
    if x.is_meta != y.is_meta:
        same_device(name, x, other, y)


def same_device(name: str, x: Tensor, other: str, y: Tensor) -> None:
    if x.device != y.device:
        raise ValueError(f"{name} is on {x.device} and {other} on {y.device}; move one: {name}.to({str(y.device)!r})")


def float64_alike(name: str, x: Tensor, other: str, y: Tensor) -> None:
    if (x.dtype == torch.float64) != (y.dtype == torch.float64):
        raise TypeError(
            f"{name} is {x.dtype} and {other} {y.dtype}; float64 goes with float64 alone, the others with each other: "
            f"cast one, such as {name}.to({y.dtype})"
        )


def shape(x: Tensor) -> str:
    return str(tuple(x.shape))


def seen(x: object) -> str:
    return kind(x) if isinstance(x, Tensor) else repr(x)


def kind(x: object) -> str:
    return f"a {type(x).__module__}.{type(x).__qualname__}".replace("builtins.", "")
