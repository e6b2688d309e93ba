"""The harness of several ranks: a rank that fails does not leave the test waiting for the others."""

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests import ranks
from tests.ranks import Failed, on_ranks, together

pytestmark = together


def one_fails(group: Any) -> None:
    if dist.get_rank(group) == 0:
        raise ValueError("as it must")
    dist.all_reduce(torch.ones(1), group=group)


def first(group: Any) -> int:
    return dist.get_rank(group)


@pytest.mark.slow
def test_a_rank_that_fails_ends_the_wait_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "AFTER_A_FAILURE", 1)
    with pytest.raises(Failed, match=r"(?s)rank 0: ValueError: as it must.*rank 1 waits for others"):
        on_ranks(2, one_fails)
    assert on_ranks(2, first) == [0, 1]


def test_one_worker_has_the_ranks(request: pytest.FixtureRequest) -> None:
    """pytest-xdist writes the group into the name, and pytest 9.2 dropped it: every worker then started the ranks."""
    given = getattr(request.config, "workerinput", {}).get("mainargv", [])
    if "loadgroup" in given:  # as `make test` asks
        assert request.node.nodeid.endswith("@ranks") and os.environ["PYTEST_XDIST_WORKER"]
