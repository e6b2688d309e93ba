"""What an op is: a generator that makes its outputs, yields them, and fills them. A fake goes as far as the yield.

The schema is read from the annotations. Logits have any leading dimensions and strides; rows are never copied.

`backend` is a name, so that a backward pass takes the backend of its forward pass, on whatever thread it runs.
`objective` is what `objective.pack` makes. `terms` is a divergence that is a function: a call with one passes by
torch.library, whose schemas know no functions.
"""

import inspect
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, TypeAlias, get_args

import torch
from torch import Tensor

from topk_rkl.divergence import Terms
from topk_rkl.rows import result_dtype, row_views

Pair: TypeAlias = tuple[Tensor, Tensor]
Triple: TypeAlias = tuple[Tensor, Tensor, Tensor]


def op(*writes: str) -> Callable[[Callable[..., Iterator[Any]]], Callable[..., Any]]:
    """Registers a generator as the op of its name, for every device. `writes` names the arguments it writes to."""

    def register(body: Callable[..., Iterator[Any]]) -> Callable[..., Any]:
        def real(*args: Any, **terms: Terms) -> Any:
            steps = body(*args, **terms)
            outputs = next(steps)
            next(steps, None)
            return outputs

        def prototype() -> None: ...

        signature = inspect.signature(body)
        (returned,) = get_args(signature.return_annotation)
        prototype.__signature__ = signature.replace(  # type: ignore[attr-defined]
            parameters=[x for name, x in signature.parameters.items() if name != "terms"],
            return_annotation=None if returned is type(None) else returned,
        )
        name = f"topk_rkl::{body.__name__}"
        torch.library.define(name, torch.library.infer_schema(prototype, mutates_args=writes))
        torch.library.impl(name, "default", real)
        torch.library.register_fake(name, lambda *args: next(body(*args)))
        registered = getattr(torch.ops.topk_rkl, body.__name__).default

        def call(*args: Any, terms: Terms | None = None) -> Any:
            return registered(*args) if terms is None else real(*args, terms=terms)

        return call

    return register


def new(
    like: Tensor,  # (..., X)
    columns: int | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:  # (..., columns) or (...), of the result's dtype if none is given
    shape = like.shape[:-1] if columns is None else (*like.shape[:-1], columns)
    return like.new_empty(shape, dtype=result_dtype(like) if dtype is None else dtype)


def contiguous(*tensors: Tensor | None) -> Iterator[Tensor | None]:
    return (None if x is None else x.contiguous() for x in tensors)


def rows_of(
    module: ModuleType,
    inputs: tuple[Tensor | None, ...],  # (..., X) each
    outputs: tuple[Tensor | None, ...],  # (..., X) each
) -> Iterator[tuple[tuple[Any, ...], tuple[Any, ...]]]:
    """Views of the same rows, as the backend takes them."""
    for views in row_views(*inputs, *outputs, slabs=getattr(module, "SLABS", False)):
        yield views[: len(inputs)], views[len(inputs) :]
