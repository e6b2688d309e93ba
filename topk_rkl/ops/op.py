"""What an op is: a generator that makes its outputs, yields them, and fills them. A fake goes as far as the yield.

The schema is read from the annotations. Logits have any leading dimensions and strides; rows are never copied.

`backend` is a name, so that a backward pass takes the backend of its forward pass, on whatever thread it runs.
`objective` is what `objective.pack` makes. An op reads its numbers on the host, which a CUDA graph would not do again.
The overload of a call with an objective is therefore one that Inductor leaves out of its graphs.

`terms` is a divergence that is a function: a call with one passes by torch.library, whose schemas know no functions.
"""

import inspect
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, TypeAlias, get_args

import torch
from torch import Tensor

from topk_rkl.divergence import Terms
from topk_rkl.rows import result_dtype, row_views

NOT_CAPTURED = (torch.Tag.cudagraph_unsafe,) if hasattr(torch.Tag, "cudagraph_unsafe") else ()  # torch 2.7 has none

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
        schema = torch.library.infer_schema(prototype, mutates_args=writes)
        parts = schema, real, lambda *args: next(body(*args))
        plain, place = _define(body.__name__, *parts), None
        if "objective" in signature.parameters:
            place = list(signature.parameters).index("objective")
            with_objective = _define(f"{body.__name__}.objective", *parts, tags=NOT_CAPTURED)

        def call(*args: Any, terms: Terms | None = None) -> Any:
            if terms is not None:
                return real(*args, terms=terms)
            return plain(*args) if place is None or args[place] is None else with_objective(*args)

        return call

    return register


def _define(
    name: str, schema: str, real: Callable[..., Any], fake: Callable[..., Any], tags: tuple[torch.Tag, ...] = ()
) -> Any:
    """The op of that name, or its overload after a dot."""
    torch.library.define(f"topk_rkl::{name}", schema, tags=tags)
    torch.library.impl(f"topk_rkl::{name}", "default", real)
    torch.library.register_fake(f"topk_rkl::{name}", fake)
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.topk_rkl, packet), overload or "default")


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
