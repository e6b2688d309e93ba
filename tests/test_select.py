"""Promise: exact selection. The set and the order of a stable sort, on every backend, dtype and layout."""

import pytest
import torch
from conftest import DEVICE, same_bits, simulated

from tests import cases
from tests.oracles import DTYPES, assert_selects, stable_sort
from tests.probes import lazy_memory
from topk_rkl import teacher_topk
from topk_rkl.support import Support

# For a simulation: these rows where V or K is large, and where the padding of K or a layout is what matters.
CHOSEN = {
    torch.bfloat16: ["random", "many_ties_at_the_kth", "fewer_than_k_finite"],
    torch.float16: ["two_valued"],
    torch.float32: ["nans_of_both_signs"],
}
FEW = ["random", "two_valued", "many_ties_at_the_kth", "fewer_than_k_finite", "nans_of_both_signs"]
ALL_ROWS = (507, 16)  # the size at which a simulation, too, takes every row of every dtype
LARGE = [size for size in cases.SIZES if size[0] > 100_000]  # on a CPU in one dtype; test_native.py has all of them
TAKEN = [
    pytest.param(size, dtype, id=f"{size}-{dtype}", marks=[pytest.mark.slow] if size in LARGE else [])
    for size in cases.SIZES
    for i, dtype in enumerate(DTYPES)
    if DEVICE == "cuda" or size not in LARGE or LARGE.index(size) % len(DTYPES) == i
]


def row_names(module, size: tuple[int, int], dtype: torch.dtype) -> list[str]:
    """Every row. A simulation takes a third of them at each dtype, so that a size has them all."""
    names = list(cases.ROWS)
    if not simulated(module):
        return names
    if module.__name__.endswith("triton") and dtype == torch.bfloat16:
        names.remove("subnormals")  # which the interpreter of Triton 3.7 does not widen to what they are
    if max(size) > 5_000 or size[1] > 100:
        return CHOSEN[dtype]
    return names if size == ALL_ROWS else names[(DTYPES.index(dtype) + 1) % len(DTYPES) :: len(DTYPES)]


@pytest.mark.parametrize(("size", "dtype"), TAKEN)
def test_exact_selection(module, size: tuple[int, int], dtype: torch.dtype) -> None:
    logits = cases.rows(*size, dtype, row_names(module, size, dtype), DEVICE)
    assert_selects(module, logits, size[1])


def test_exact_selection_in_float64(backend) -> None:
    if backend != "reference":
        with pytest.raises(RuntimeError, match="float64"):
            teacher_topk(torch.randn(2, 9, dtype=torch.float64, device=DEVICE), 3)
        return
    logits = cases.rows(507, 16, torch.float64, device=DEVICE)
    logits[0, 100:140] = 9 + torch.arange(40) % 3 * 1e-12
    support = teacher_topk(logits, 16)
    ids, values = stable_sort(logits, 16)
    assert torch.equal(support.ids, ids) and support.log_probs.dtype == torch.float64
    torch.testing.assert_close(support.log_probs, values, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_exact_selection_of_any_layout(module, layout: str) -> None:
    names = FEW if simulated(module) else None
    logits = cases.LAYOUTS[layout](cases.rows(1_000, 20, torch.bfloat16, names, DEVICE))
    assert_selects(module, logits, 20)


def test_exact_selection_of_an_expanded_row(module) -> None:
    logits = cases.rows(507, 16, torch.float32, ["two_valued"], DEVICE).expand(3, -1)
    assert_selects(module, logits, 16)


@pytest.mark.parametrize("k", [1, 15, 16, 17, 63, 64, 65, 100])
def test_exact_selection_around_powers_of_two(module, k: int) -> None:
    """Where the padding of K ends, and ties fill whole groups of columns."""
    logits = cases.rows(2_049, k, torch.bfloat16, FEW if simulated(module) else None, DEVICE)
    assert_selects(module, logits, k)


def test_exact_selection_when_one_group_holds_every_winner(module) -> None:
    """A maximum a group says nothing of how many of its columns win; here all of one group do, and none of the next."""
    logits = torch.randn(2, 33_000).clamp(max=3.0)
    logits[0, 4_096:4_128] = torch.linspace(10, 20, 32)
    logits[1, -32:] = 10
    assert_selects(module, logits.to(DEVICE), 32)


def test_empty_slots(backend) -> None:
    logits = torch.full((1, 40), -torch.inf, device=DEVICE)
    logits[0, [30, 7]] = torch.tensor([1.0, 2.0], device=DEVICE)
    support = teacher_topk(logits, 4)
    assert support.ids.tolist() == [[7, 30, -1, -1]]
    assert support.log_probs.tolist() == [[2.0, 1.0, -torch.inf, -torch.inf]]


def test_zeros_are_equal_and_the_lower_id_wins(backend) -> None:
    logits = torch.tensor([[-1.0, -0.0, 0.0, -0.0, -2.0]], device=DEVICE)
    assert teacher_topk(logits, 3).ids.tolist() == [[1, 2, 3]]


def test_nan_of_either_sign_ranks_above_everything(backend) -> None:
    logits = torch.tensor([[torch.inf, 5.0, torch.nan, 1.0, torch.nan]], device=DEVICE)
    logits.view(torch.int32)[0, 2] |= -(2**31)
    support = teacher_topk(logits, 3)
    assert support.ids.tolist() == [[2, 4, 0]]
    assert support.log_probs.isnan().tolist() == [[True, True, False]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_normalize_gives_true_log_probs(backend, dtype: torch.dtype) -> None:
    names = ["random", "peaked", "all_equal", "padded_vocabulary", "fewer_than_k_finite", "subnormals"]
    logits = cases.rows(5_003, 20, dtype, names, DEVICE)
    support = teacher_topk(logits, 20, normalize=True)
    plain = teacher_topk(logits, 20)
    assert torch.equal(support.ids, plain.ids)
    want = plain.log_probs.double() - logits.double().logsumexp(-1, keepdim=True)
    torch.testing.assert_close(support.log_probs.double(), want, rtol=1e-6, atol=4e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_normalize_keeps_its_bits_at_any_offset(backend, dtype: torch.dtype) -> None:
    names = ["random", "peaked"] if backend in ("triton", "cuda") and DEVICE == "cpu" else None
    rows = cases.rows(5_003, 8, torch.float32, names or ["random", "peaked", "all_equal", "two_valued"], DEVICE)
    for offset in (0.0, 1e2, 1e3, 1e4, -6e4):
        logits = (rows + offset).to(dtype)
        support = teacher_topk(logits[:, : None if offset == 0 else 300], 8, normalize=True)
        x = logits[:, : None if offset == 0 else 300].double()
        want = (x - x.logsumexp(1, keepdim=True)).gather(1, support.ids.long())
        torch.testing.assert_close(support.log_probs.double(), want, rtol=1e-7, atol=1e-6)


def test_normalize_of_rows_without_a_distribution(backend) -> None:
    logits = torch.randn(4, 100, device=DEVICE)
    logits[0, 50] = torch.nan
    logits[1, 50] = torch.inf
    logits[2] = -torch.inf
    support = teacher_topk(logits, 4, normalize=True)
    assert support.log_probs[:2].isnan().all() and support.log_probs[3].isfinite().all()
    assert support.ids[2].tolist() == [-1] * 4 and (support.log_probs[2] == -torch.inf).all()


@pytest.mark.parametrize("lead", [(), (0,), (3,), (2, 3), (1, 7), (2, 0, 3)], ids=str)
def test_leading_dimensions_are_free(backend, lead: tuple[int, ...]) -> None:
    logits = torch.randn(*lead, 77, device=DEVICE)
    support = teacher_topk(logits, 5)
    want_ids, want_values = stable_sort(logits.view(-1, 77), 5)
    assert support.ids.shape == support.log_probs.shape == (*lead, 5)
    assert torch.equal(support.ids, want_ids.view(*lead, 5))
    assert torch.equal(support.log_probs, want_values.view(*lead, 5))


def test_a_view_without_the_last_position_is_not_copied(backend) -> None:
    logits = torch.randn(3, 5, 77, device=DEVICE)
    cut = logits[:, :-1]
    want = teacher_topk(cut.contiguous(), 5)
    got = teacher_topk(cut, 5)
    assert torch.equal(got.ids, want.ids) and torch.equal(got.log_probs, want.log_probs)


def test_row_i_alone_gives_the_bits_of_row_i_in_a_batch(module) -> None:
    logits = cases.rows(4_099, 20, torch.bfloat16, device=DEVICE)
    ids, values = module.select(logits, 20, True)
    for row in (0, 7, 13):
        alone = module.select(logits[row : row + 1], 20, True)
        assert torch.equal(alone[0][0], ids[row]) and same_bits(alone[1][0], values[row])


@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU test_gpu.py does this with memory that is really there")
@pytest.mark.parametrize("stride", [(2**31 + 11, 1), (1, 2**27 + 3)], ids=["far rows", "far columns"])
def test_big_offsets_are_64_bit(module, stride: tuple[int, int]) -> None:
    logits = lazy_memory(2**32 + 4_096, torch.bfloat16).as_strided((2, 33), stride)
    logits.copy_(torch.randn(2, 33))
    assert_selects(module, logits, 5)


def test_unique_support_keeps_the_first_of_each_id() -> None:
    support = Support(torch.tensor([[5, 3, 5, -1, 3, 9]]), torch.tensor([[0.1, 0.2, 0.3, -torch.inf, 0.4, 0.5]]))
    unique = support.unique()
    assert unique.ids.tolist() == [[5, 3, -1, -1, -1, 9]]
    assert torch.equal(unique.log_probs, torch.tensor([[0.1, 0.2, -torch.inf, -torch.inf, -torch.inf, 0.5]]))
