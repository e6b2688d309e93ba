"""What the run decides: constants under trial, and the sentence that says what to change where another form wins.

An override replaces what a plan function returns, in the module that calls it. A renamed function is an AttributeError
and a renamed field a TypeError, so that an experiment that has lost its object is an error in the results.
"""

import importlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

SELECT = "topk_rkl.backends.triton.select"
LINEAR_LOSS = "topk_rkl.backends.triton.linear_loss"
WEIGHT_GRAD = "topk_rkl.backends.triton.linear_weight_grad"

DECISIONS = {
    "backend of a selection": "CUDA_FROM_K becomes the least K from which the CUDA backend wins: "
    "topk_rkl/backends/__init__.py.",
    "backend of the head": "CUDA_LINEAR_FROM_K becomes the least K from which the CUDA backend wins: "
    "topk_rkl/backends/__init__.py.",
    "backend of the head's gradient": "CUDA_LINEAR_FROM_K counts both passes together: topk_rkl/backends/__init__.py.",
    "warps and registers of a selection": "plan_select() gives this K the warps and registers of the form that wins: "
    "topk_rkl/backends/triton/launch.py.",
    "warps of the head": "plan_linear_loss() takes the warps, terms and columns of the form that wins, if it loses "
    "neither for spread nor for hot ids: topk_rkl/backends/triton/launch.py.",
    "block of the head's gradient": "plan_linear_weight_grad() takes the columns and warps of the winning form, "
    "if it loses neither for spread nor for hot ids: topk_rkl/backends/triton/launch.py.",
}

Override = Callable[[], AbstractContextManager[object]]
AS_PLANNED = "as planned"


@contextmanager
def returning(module: str, function: str, change: Callable[[Any], Any]) -> Iterator[None]:
    """The function as this module sees it, with its result changed."""
    place = importlib.import_module(module)
    plain = getattr(place, function)
    with mock.patch.object(place, function, lambda *args, **kwargs: change(plain(*args, **kwargs))):
        yield


def selection(warps: int, registers: int) -> AbstractContextManager[object]:
    """As many bytes in flight per thread as planned."""

    def plan(planned: Any) -> Any:
        block = planned.block * warps // planned.num_warps
        return replace(planned, num_warps=warps, registers=registers, block=block)

    return returning(SELECT, "plan_select", plan)


def head(**sizes: int) -> AbstractContextManager[object]:
    return returning(LINEAR_LOSS, "plan_linear_loss", lambda planned: replace(planned, **sizes))


def weight_grad(**sizes: int) -> AbstractContextManager[object]:
    return returning(WEIGHT_GRAD, "plan_linear_weight_grad", lambda planned: replace(planned, **sizes))


def named(overrides: list[tuple[int, int]]) -> dict[str, Override]:
    forms = {
        f"{warps} warps, {registers} registers": partial(selection, warps, registers) for warps, registers in overrides
    }
    return {AS_PLANNED: nullcontext, **forms}


# By the place of K in Sizes.ks, with no form that spills by hundreds (Triton 3.6, sm_90).
SELECTIONS: dict[int, dict[str, Override]] = {
    1: named([(4, 80), (8, 48)]),
    2: named([(4, 128), (8, 64)]),
    3: named([(16, 64)]),
}
HEADS: dict[str, Override] = {
    AS_PLANNED: nullcontext,
    "4 warps, 2,048 columns": partial(head, num_warps=4, span=2_048, slots=16),
    "8 warps, 4,096 columns": partial(head, num_warps=8, span=4_096, slots=16),
}
WEIGHT_GRADS: dict[str, Override] = {
    AS_PLANNED: nullcontext,
    "4 warps, 1,024 columns": partial(weight_grad, num_warps=4, block=1_024),
    "1 warp": partial(weight_grad, num_warps=1),
}
