"""The compiled backends write into outputs that they are given, and refuse each of which no pointer can be taken."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import BACKENDS, DEVICE
from torch import Tensor

from topk_rkl.objective import Objective

HAVE_IT = [name for name in ("native", "cuda") if name in BACKENDS]
OUTPUTS = {
    "select": ("ids", "log_probs"),
    "support_loss": ("loss", "g"),
    "select_loss": ("loss", "ids", "g"),
    "tail_logit": ("out",),
    "mass_loss": ("loss", "g", "outside"),
    "linear_loss": ("loss", "g", "dhidden"),
    "linear_logits": ("out",),
    "linear_hidden_grad": ("out",),
}
FAULTS: dict[str, tuple[Callable[[Tensor], Tensor], type[Exception], str]] = {
    "shape": (lambda x: torch.cat((x, x[:1])), ValueError, r"{} has shape \(4"),
    "dtype": (lambda x: x.half(), TypeError, r"{} is torch\.float16"),
    "strides": (lambda x: torch.stack((x, x), -1)[..., 0], ValueError, r"{} has strides .*; it must be contiguous"),
    "device": (lambda x: x.to("meta"), ValueError, "{} is on meta"),
}


def arguments(function: Callable[..., None]) -> dict[str, Any]:
    """Of three rows, two slots, nine tokens and width five, by the names that the function has for them."""
    outs = {"linear_logits": torch.zeros(3, 2, device=DEVICE), "linear_hidden_grad": torch.zeros(3, 5, device=DEVICE)}
    values = {
        **{name: torch.randn(3, 9, device=DEVICE) for name in ("logits", "student", "teacher")},
        **{name: torch.zeros(3, device=DEVICE) for name in ("tail", "loss")},
        **{name: torch.zeros(3, 2, device=DEVICE) for name in ("log_probs", "g")},
        "ids": torch.tensor([[0, 4]] * 3, dtype=torch.int32, device=DEVICE),
        "hidden": torch.randn(3, 5, device=DEVICE),
        "head": torch.randn(9, 5, device=DEVICE),
        "dhidden": torch.zeros(3, 5, device=DEVICE),
        "outside": torch.zeros(3, 2, dtype=torch.float64, device=DEVICE),
        "out": outs.get(function.__name__, torch.zeros(3, dtype=torch.float64, device=DEVICE)),
        "objective": Objective(),
        "normalize": False,
        "temperature": 1.0,
        "weights": None,
        "bias": None,
    }
    return {name: values[name] for name in inspect.signature(function).parameters}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(("op", "output"), [(op, output) for op, names in OUTPUTS.items() for output in names])
def test_an_output_that_does_not_fit_is_refused_by_name(module, op: str, output: str, fault: str) -> None:
    function = getattr(module.module, op, None)
    if function is None:
        pytest.skip("it has no such op")
    given = arguments(function)
    function(**given)
    spoil, error, message = FAULTS[fault]
    with pytest.raises(error, match=message.format(output)):
        function(**given | {output: spoil(given[output])})
