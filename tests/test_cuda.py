"""What only the CUDA kernels promise, on a GPU or on the host that stands in for one."""

import contextlib
import faulthandler
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import BACKENDS, DEVICE
from torch import Tensor

from tests import cases
from tests.direct import Direct, reference
from tests.linear_problem import Problem, assert_equals_the_reference, assert_weight_grad_equals_the_reference, draw
from tests.oracles import DTYPES, assert_selects
from topk_rkl import backends

pytestmark = pytest.mark.skipif("cuda" not in BACKENDS, reason="the CUDA kernels cannot run here")


@pytest.fixture
def cuda() -> Any:
    return Direct(backends._load("cuda"))


def test_cuda_has_the_renormalised_reverse_kl_alone() -> None:
    assert backends._objective_refusal("cuda", (0,), "renormalized") is None
    for divergence, mass in (((0,), "tail"), ((1, -1.0, 1.0), "renormalized"), ((2, 0, 0, 1, 1), "renormalized")):
        assert "renormalised ReverseKL() alone" in backends._objective_refusal("cuda", divergence, mass)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 7, 8, 9, 2_047, 2_049, 8_191, 8_200])
def test_exact_selection_of_rows_that_start_anywhere(cuda, vocab: int, dtype: torch.dtype) -> None:
    """Within 16 bytes, at which a row is cut into packs; and of so few rows that each is split over blocks."""
    k = min(vocab, 9)
    buffer = cases.rows(vocab + 17, k, dtype, ["two_valued", "nans_of_both_signs"], DEVICE)
    for start in (0, 1, 3, 8):
        assert_selects(cuda, buffer[:, start : start + vocab], k)
        assert_selects(cuda, buffer[1:, start : start + vocab], k)


@pytest.mark.parametrize("k", [1, 2, 16, 33, 64, 256, 1_024])
def test_exact_selection_of_a_split_row(cuda, k: int) -> None:
    for name in ("random", "ascending", "all_equal", "fewer_than_k_finite"):
        assert_selects(cuda, cases.rows(40_003, k, torch.bfloat16, [name], DEVICE), k)


def test_exact_selection_of_split_rows_in_slabs(cuda) -> None:
    logits = cases.rows(40_003, 9, torch.bfloat16, ["random", "two_valued"], DEVICE)
    far = torch.full((2, 3, 40_003), 99.0, dtype=logits.dtype, device=DEVICE)[:, 1:2]
    far[:, 0] = logits
    assert all(map(torch.equal, cuda.select(far, 9), cuda.select(logits, 9)))


@pytest.mark.parametrize("name", ["ascending", "descending", "all_equal", "two_valued"])
def test_no_list_is_too_short(cuda, name: str) -> None:
    """Rows of which thousands of elements are candidates when they are met, at the K that leaves the least room."""
    for dtype in (torch.bfloat16, torch.float32):
        assert_selects(cuda, cases.rows(20_000, 1_024, dtype, [name], DEVICE).expand(9, -1), 1_024)


@pytest.mark.parametrize("k", [1, 64, 65, 256, 257, 1_024])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_sample_leaves_out_none_of_the_k_best(cuda, k: int, dtype: torch.dtype) -> None:
    """The first tile sets the first threshold: at the most K of each size of sample, and one more."""
    tile, rows = 1_024 * 16 // dtype.itemsize, torch.randn(6, 20_000)
    rows[0, :tile] = -torch.inf
    rows[1, :tile] = torch.nan
    rows[2, :tile] = rows[2].max()
    rows[3] = -9.0
    rows[3, :tile][torch.arange(tile) % 2_048 < k // 4 + 1] = 1.0  # of some threads alone
    rows[4] = -torch.inf
    rows[4, torch.randperm(tile)[:k]] = -torch.arange(k).float()  # as many as are wanted, and all of them sampled
    rows[5, :tile] = -3e38 + torch.zeros(tile)
    rows = rows.to(dtype).to(DEVICE)
    assert_selects(cuda, rows, k)  # whole
    for row in rows:
        assert_selects(cuda, row[None], k)  # split


def test_a_selection_does_not_depend_on_the_rows_beside_it(cuda) -> None:
    """The loss of a row whose selection is split over blocks has the bits of the same row in a batch."""
    student, teacher = torch.randn(2, 12, 30_000, device=DEVICE)
    batch = cuda.select_loss(student, teacher, 50, None, 0.5)
    for row in (0, 11):
        alone = cuda.select_loss(student[row : row + 1], teacher[row : row + 1], 50, None, 0.5)
        assert all(torch.equal(a[0], b[row]) for a, b in zip(alone, batch, strict=True))
    weights = torch.tensor([0.0], device=DEVICE)
    loss, ids, g = cuda.select_loss(student[:1], teacher[:1] * torch.nan, 50, weights, 0.5)
    assert loss.tolist() == [0] and (ids == -1).all() and (g == 0).all()


CLUSTERS = [(size, dtype) for size in ((40, 1_500), (200, 1_030), (100, 4_096)) for dtype in DTYPES]


@pytest.mark.parametrize(("size", "dtype"), CLUSTERS if DEVICE == "cuda" else CLUSTERS[::4])
def test_a_head_that_a_cluster_shares(cuda, size: tuple[int, int], dtype: torch.dtype) -> None:
    """Of several slices of H, the last one shorter or of odd length; with rows for which there is no room."""
    k, width = size
    problem = draw(n=2, k=k, vocab=300, width=width, dtype=dtype, biased=True, weighted=True, softcap=9.0)
    results = assert_equals_the_reference(cuda, problem)
    apart = replace(problem, head=cases.LAYOUTS["every_other_column"](problem.head))
    assert all(map(torch.equal, apart.run(cuda), results))
    dropped = replace(problem, weights=torch.tensor([0.0, 1.0], device=DEVICE))
    assert all((x[0] == 0).all() for x in dropped.run(cuda))


@pytest.mark.gpu
def test_two_threads_launch_the_head_with_little_and_with_much_shared_memory(cuda) -> None:
    problems = [draw(n=8, k=k, vocab=500, width=1_024, dtype=torch.bfloat16) for k in (8, 64)]
    end = time.monotonic() + 2

    def calls(problem: Problem) -> int:
        want, count = problem.run(cuda), 0
        while count == 0 or time.monotonic() < end:
            for got in [problem.run(cuda) for _ in range(50)]:
                assert all(map(torch.equal, got, want))
                count += 1
        return count

    with ThreadPoolExecutor(2) as pool:
        assert min(pool.map(calls, problems)) >= 50


def test_the_gradient_of_a_wide_head(cuda) -> None:
    """More columns than a block adds up, and ids with several windows of pairs."""
    n, vocab, width = 700, 5, 519
    hidden, g = torch.randn(n, width, device=DEVICE), torch.randn(n, 2, device=DEVICE)
    ids = torch.randint(-1, vocab, (n, 2), device=DEVICE)
    ids[:, 0] = 3
    assert_weight_grad_equals_the_reference(cuda, g, ids, hidden, vocab)


def test_what_it_cannot_take_is_refused_by_name(cuda) -> None:
    x = torch.randn(3, 2_000, device=DEVICE)
    ids, values = cuda.select(x, 2)
    for k in (0, 1_025):
        with pytest.raises(ValueError, match=rf"k is {k}; it must be between 1 and .* = 1024"):
            cuda.select(x, k)
    with pytest.raises(ValueError, match="student has shape"):
        cuda.select_loss(x[:2], x, 2, None, 1.0)
    with pytest.raises(ValueError, match="log_probs has shape"):
        cuda.support_loss(x, ids, values[:, :1], None, 1.0)
    with pytest.raises(ValueError, match="out has shape"):
        cuda.scatter(values, ids, torch.ones(3, device=DEVICE), x[:2], True)
    with pytest.raises(ValueError, match="weights is on meta"):
        cuda.support_loss(x, ids, values, torch.ones(3, device="meta"), 1.0)
    with pytest.raises(RuntimeError, match=r"K = 1025; it takes K up to 1024"):
        backends.choose("cuda", 1_025, x)


host = pytest.mark.skipif(
    "cuda" not in BACKENDS or not backends._load("cuda").HOST, reason="only the build for the host has such switches"
)


@pytest.fixture
def simt(cuda) -> Iterator[Any]:
    """The switches of the host that stands in for a GPU: order of threads, barriers, length of shared memory."""
    yield cuda._cuda
    cuda._cuda.drop("")
    cuda._cuda.shorten(0)


def selection(cuda: Any) -> list[Tensor]:
    student, teacher = (cases.rows(9_000, 300, torch.bfloat16, ["random", "two_valued", "one_nan"]) for _ in range(2))
    return [*cuda.select(teacher, 300, True), *cuda.select_loss(student[:1], teacher[:1], 300, None, 1.0)]


def head(cuda: Any) -> list[Tensor]:
    problem = draw(n=2, k=100, vocab=120, width=1_030, biased=True)
    loss, g, dhidden = problem.run(cuda)
    dhead = torch.empty_like(problem.head)
    cuda.linear_weight_grad(g, problem.ids, problem.hidden, dhead, None)
    cuda.scatter(g, problem.ids, loss, out := torch.empty(2, 9_000), False)
    return [loss, g, dhidden, dhead, out]


@host
@pytest.mark.parametrize("step", [selection, head])
def test_the_order_of_the_threads_changes_no_bit(cuda, simt, step: Callable[[Any], list[Tensor]]) -> None:
    results = []
    for seed in range(4):
        simt.seed(seed)
        torch.manual_seed(0)
        results.append(step(cuda))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def is_seen(cuda: Any, simt: Any, step: Callable[[Any], list[Tensor]], want: list[Tensor]) -> bool:
    """Whether one of some orders of the threads gives another result, an error or a crash: in a process of its own."""
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        faulthandler.disable()
        for seed in range(8):
            simt.seed(seed)
            torch.manual_seed(0)
            with contextlib.suppress(RuntimeError):
                got = step(cuda)
                if all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(got, want, strict=True)):
                    continue
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1] != 0


@host
@pytest.mark.parametrize("step", [selection, head])
def test_no_barrier_can_be_left_out(cuda, simt, step: Callable[[Any], list[Tensor]]) -> None:
    """Each of them, one at a time: the result changes, or threads that met there wait in vain."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # those of a pool would be missed in a child
    simt.seed(0)
    torch.manual_seed(0)
    want = step(cuda)
    sites, unseen = simt.sites(), []
    assert len(sites) > 3 and not is_seen(cuda, simt, step, want)
    for site in sites:
        simt.drop(site)
        if not is_seen(cuda, simt, step, want):
            unseen.append(site)
    torch.set_num_threads(threads)
    assert not unseen, unseen


@host
def test_the_reference_agrees_with_what_the_barriers_guard(cuda, simt) -> None:
    torch.manual_seed(0)
    ids, values, *_ = selection(cuda)
    torch.manual_seed(0)
    want_ids, want_values, *_ = selection(reference)
    assert torch.equal(ids, want_ids)
    torch.testing.assert_close(values, want_values, rtol=1e-6, atol=4e-6, equal_nan=True)
