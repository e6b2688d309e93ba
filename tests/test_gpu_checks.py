"""The checks of the smoke test on a CPU: they pass the reference, and fail it with one wrong number."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from gpu import checks
from topk_rkl import backends

GROUPS = [name for name in checks.GROUPS if name not in ("graph", "threads")]  # which need a GPU


@pytest.mark.parametrize("group", GROUPS)
def test_the_checks_pass_what_is_right(group: str) -> None:
    found = list(checks.GROUPS[group]("reference", True))
    assert found
    for _, check in found:
        check()


FAULTS = {
    "selection bfloat16": "select",
    "selection float16": "select",
    "selection float32": "select",
    "loss": "select_loss support_loss",
    "scatter": "scatter",
    "head": "linear_loss linear_weight_grad linear_logits linear_hidden_grad",
    "mass": "tail_logit mass_loss mass_grad",
    "stress": "select_loss scatter",
    "slabs": "select select_loss scatter",
}


WRITTEN = {"select": 2, "support_loss": 2, "select_loss": 3, "mass_loss": 3, "linear_loss": 3, "linear_weight_grad": 2}
OFF = [
    (group, name, last)
    for group in GROUPS
    for name in FAULTS[group].split()
    for last in range(1, 1 + WRITTEN.get(name, 1))
]


@pytest.mark.parametrize(("group", "name", "last"), OFF)
def test_the_checks_fail_what_is_wrong(group: str, name: str, last: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One number of what a backend writes is off from the second call on, in each of its outputs."""
    module = backends._load("reference")
    wrong = type("Wrong", (), {})()
    vars(wrong).update({**vars(module), name: off(getattr(module, name), last)})
    monkeypatch.setattr(checks.backends, "_load", lambda _: wrong)
    assert any(fails(check) for _, check in checks.GROUPS[group]("reference", True))


def off(right: Callable[..., None], last: int) -> Callable[..., None]:
    calls = 0

    def wrong(*arguments: Any) -> None:
        nonlocal calls
        right(*arguments)
        calls += 1
        written = [x for x in arguments if isinstance(x, torch.Tensor)][-last]
        if calls > 1:
            written[(0,) * written.dim()] += 1

    return wrong


def fails(check: Callable[[], object]) -> bool:
    try:
        check()
    except AssertionError:
        return True
    return False
