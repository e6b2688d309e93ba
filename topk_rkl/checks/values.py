"""Refusals of single values and tensors, which the others are made of."""

import math
from numbers import Real

import torch
from torch import Tensor

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
INTEGERS = (torch.int32, torch.int64)
TEMPERATURES = (1e-30, 1e30)


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


def is_int(x: object) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)


def top(k: int | None, vocab: int, name: str) -> int:
    if k is None:
        raise ValueError(f"k is None, but {name} holds logits; say how many tokens to compare, such as k=32")
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"k is {k!r}; it must be an int")
    if not 1 <= k <= vocab:
        raise ValueError(f"k is {k}; it must be between 1 and V = {vocab}, the last dimension of {name}")
    return k


def tensor(name: str, x: object, dtypes: tuple[torch.dtype, ...]) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is {kind(x)}; it must be a torch.Tensor")
    if x.dtype not in dtypes:
        raise TypeError(f"{name} is {x.dtype}; use one of {', '.join(str(d).removeprefix('torch.') for d in dtypes)}")
    if x.layout != torch.strided:
        raise TypeError(f"{name} has layout {x.layout}; pass a dense tensor, such as {name}.to_dense()")


def number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} is {kind(value)}; it must be a number")
    if not -math.inf < value < math.inf:  # math.isfinite ends a trace of torch.compile
        raise ValueError(f"{name} is {value}; it must be finite")


def denominator_value(value: float | Tensor | None) -> None:
    if isinstance(value, Tensor):
        if value.dim() != 0:
            raise ValueError(f"denominator has shape {shape(value)}; it must be a number or a 0-d tensor")
        constant("denominator", value)
    elif value is not None:
        number("denominator", value)


def same_device(name: str, x: Tensor, other: str, y: Tensor) -> None:
    if x.device != y.device:
        raise ValueError(f"{name} is on {x.device} and {other} on {y.device}; move one: {name}.to({str(y.device)!r})")


def same_dtype(name: str, x: Tensor, other: str, y: Tensor) -> None:
    if x.dtype != y.dtype:
        raise TypeError(f"{name} is {x.dtype} and {other} {y.dtype}; cast one, such as {name}.to({y.dtype})")


def shape(x: Tensor) -> str:
    return str(tuple(x.shape))


def kind(x: object) -> str:
    return f"a {type(x).__module__}.{type(x).__qualname__}".replace("builtins.", "")
