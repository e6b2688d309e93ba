"""How the Triton kernels are launched, and what their programs agree on in memory."""

import importlib
from itertools import product

import pytest

pytest.importorskip("triton", reason="Triton is not installed, so there is no kernel to run")

import torch
import triton
import triton.language as tl
from conftest import DEVICE
from torch import Tensor

from tests.direct import Direct
from tests.oracles import assert_selects, stable_sort
from topk_rkl.backends.triton import launch
from topk_rkl.divergence import ALPHA_BETA, REVERSE

file = importlib.import_module("topk_rkl.backends.triton.select")  # whose name in the package is its function
scatter = importlib.import_module("topk_rkl.backends.triton.scatter")
backend = Direct(importlib.import_module("topk_rkl.backends.triton"))
claim = file._claim
pytestmark = pytest.mark.interpreter


@triton.jit
def claim_kernel(
    taken,  # (places,)
    places,
    out,  # (programs,)
):
    tl.store(out + tl.program_id(0), claim(taken, places))


VOCABS = sorted({v for bits in range(21) for v in (2**bits - 1, 2**bits, 2**bits + 1) if 1 <= v <= launch.MAX_VOCAB})
KS = sorted({k for bits in range(11) for k in (2**bits - 1, 2**bits, 2**bits + 1) if 1 <= k <= launch.MAX_K})
FAMILIES = range(REVERSE, ALPHA_BETA + 1)


def is_power_of_two(*sizes: int) -> bool:
    return all(size > 0 and size & (size - 1) == 0 for size in sizes)


@pytest.mark.parametrize("itemsize", [2, 4])
def test_every_selection_has_a_plan_that_a_gpu_takes(itemsize: int) -> None:
    """65,536 registers are all that a core has. A count of keys has 16 bits."""
    for vocab, k, wide, normalize, family in product(VOCABS, KS, (False, True), (False, True), FAMILIES):
        plan = launch.plan_select(vocab, min(k, vocab), itemsize, wide, normalize, family)
        assert is_power_of_two(plan.k_pad, plan.picked_pad, plan.group, plan.groups_pad, plan.block, plan.num_warps)
        assert plan.registers * 32 * plan.num_warps <= 65_536 and plan.num_warps <= 16, (vocab, k, plan)
        assert max(plan.groups_pad, plan.picked_pad * plan.group) <= 32_768, (vocab, k, plan)
        assert plan.group <= plan.block and vocab <= plan.groups_pad * plan.group, (vocab, k, plan)
        assert plan.picked_pad >= min(k, -(-vocab // plan.group)), (vocab, k, plan)


@pytest.mark.parametrize("itemsize", [2, 4])
def test_every_width_has_plans_that_a_gpu_takes(itemsize: int) -> None:
    for width in (*range(1, 70), *(2**bits + few for bits in range(7, 15) for few in (-1, 0, 1))):
        block, warps = launch.plan_scale_rows(width)
        gradient = launch.plan_linear_weight_grad(width)
        assert is_power_of_two(block, warps, gradient.block, gradient.num_warps) and block <= 1_024 * warps
        for k, family in product(KS, FAMILIES):
            plan = launch.plan_linear_loss(k, width, itemsize, family)
            assert is_power_of_two(plan.slots, plan.block, plan.terms, plan.span, plan.num_warps), (k, width, plan)
            assert plan.slots * plan.block <= 2_048 * plan.num_warps and plan.num_warps <= 16, (k, width, plan)


@pytest.fixture
def two_places(monkeypatch) -> list[Tensor]:
    """Scratch for two programs at a time -> the tensors that said which of it is taken."""
    made: list[Tensor] = []
    zeros = torch.zeros

    def kept(*args, **kwargs) -> Tensor:
        made.append(zeros(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(file, "cores", lambda _device: 1)
    monkeypatch.setattr(file, "RESIDENT_WARPS", 8)
    monkeypatch.setattr(file.torch, "zeros", kept)
    return made


def test_a_program_claims_the_next_place_that_is_free() -> None:
    taken = torch.tensor([1, 1, 0, 1, 0], dtype=torch.int32, device=DEVICE)
    out = torch.full((2,), -1, dtype=torch.int32, device=DEVICE)
    claim_kernel[(2,)](taken, 5, out)
    assert sorted(out.tolist()) == [2, 4] and taken.tolist() == [1] * 5


def test_every_place_is_given_back(two_places: list[Tensor]) -> None:
    """If one were not, the fifth row would wait for ever. A row of weight 0 claims none."""
    logits = torch.randn(5, 700, device=DEVICE)
    assert_selects(backend, logits, 20)
    loss, ids, _ = backend.select_loss(logits.roll(1, 0), logits, 20, torch.arange(5.0, device=DEVICE), 1.0)
    assert torch.equal(ids[1:], stable_sort(logits, 20)[0][1:]) and (ids[0] == -1).all()
    assert loss[0] == 0 and (loss[1:] > 0).all()
    assert [taken.tolist() for taken in two_places] == [[0, 0], [0, 0]]


def test_few_rows_claim_nothing(two_places: list[Tensor]) -> None:
    assert_selects(backend, torch.randn(2, 700, device=DEVICE), 20)
    assert two_places == []


def test_slots_of_one_id_are_merged_into_the_first() -> None:
    """An id of more than 32 bits is no other's."""
    ids = torch.tensor([[5, 2**32 + 5, 5, -1, 9, 5]], device=DEVICE)
    g = torch.tensor([[1.0, 2.0, 4.0, 8.0, 16.0, 32.0]], device=DEVICE)
    sums, firsts = scatter.merged(g, ids)
    assert firsts.tolist() == [[5, 2**32 + 5, -1, -1, 9, -1]]
    assert [x for x, id_ in zip(sums[0].tolist(), firsts[0].tolist(), strict=True) if id_ >= 0] == [37.0, 2.0, 16.0]


@pytest.mark.parametrize(("k", "programs", "most"), [(64, 8, 6 << 20), (1_024, 8, 21 << 20)])
def test_one_launch_of_little_scratch_whatever_the_number_of_rows(
    monkeypatch, k: int, programs: int, most: int
) -> None:
    """On a GPU of 132 cores."""
    launched = []

    class Recorder:
        def __getitem__(self, grid):
            return lambda *args, **_: launched.append((grid, args))

    monkeypatch.setattr(file, "select_kernel", Recorder())
    monkeypatch.setattr(file, "cores", lambda _device: 132)
    row = torch.empty(1, 151_936, dtype=torch.bfloat16, device=DEVICE)
    backend.select(row.expand(100_000, -1), k)
    ((grid, args),) = launched
    scratch = [x for x in args if isinstance(x, Tensor) and x.dtype == torch.bfloat16 and x.shape[0] == 132 * programs]
    assert grid == (100_000,) and len(scratch) == 1 and 0 < scratch[0].nbytes < most
