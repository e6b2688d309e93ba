"""What the Triton selection is made of: keys in the order of floats, the K-th largest, and the K largest in order."""

import itertools

import pytest
import torch
from conftest import BACKENDS, DEVICE
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed, so there is no kernel")
if "triton" not in BACKENDS:
    pytest.skip("the Triton backend cannot run here", allow_module_level=True)

import triton
import triton.language as tl

from topk_rkl.backends.triton.launch import IDLE_BITS
from topk_rkl.backends.triton.select import _kth_largest, _of_order_key, _order_key, _store_largest

pytestmark = pytest.mark.interpreter
LOWEST, HIGHEST = -(2**31), 2**31 - 1
MOST = 32_768  # keys of a program, as many as V = 2^20 and K = 1,024 give
UNTOUCHED = -7


@triton.jit
def largest_kernel(
    keys,  # (16 R,) int32
    limits,  # (2,) int32: between which the threshold is
    k,
    out,  # (K + 1,) int32, written
    count,  # (1,) int32, written
    R: tl.constexpr,
    IDLE: tl.constexpr,
):
    key = tl.load(keys + tl.arange(0, R)[:, None] * 16 + tl.arange(0, 16)[None, :])
    threshold = _kth_largest(key, tl.load(limits), tl.load(limits + 1), k, IDLE)
    tl.store(count, _store_largest(key, threshold, k, out, R))


@triton.jit
def round_trip_kernel(
    x,  # (N,) N a multiple of 1,024
    keys,  # (N,) int32, written
    back,  # (N,) float32, written
    IDLE: tl.constexpr,
):
    at = tl.program_id(0) * 1024 + tl.arange(0, 1024)
    key = _order_key(tl.load(x + at), IDLE)
    tl.store(keys + at, key)
    tl.store(back + at, _of_order_key(key, IDLE))


KEYS = {
    "all tied": lambda n: torch.full((n,), 5),
    "all the lowest": lambda n: torch.full((n,), LOWEST),
    "all the highest": lambda n: torch.full((n,), HIGHEST),
    "a few above the lowest": lambda n: torch.where(torch.arange(n) % max(1, n // 3) == 0, 9, LOWEST),
    "any": lambda n: torch.randint(LOWEST, HIGHEST + 1, (n,)),
    "ties": lambda n: torch.randint(-3, 3, (n,)),
    "both ends": lambda n: torch.where(torch.rand(n) < 0.5, HIGHEST, LOWEST + (1 << 16)),
    "one above ties": lambda n: torch.where(torch.arange(n) == n - 1, HIGHEST, -1),
}
SIZES = [(16, 1), (16, 16), (1_024, 100), (MOST, 1_024)]


@pytest.mark.parametrize("idle", sorted(IDLE_BITS.values()))
@pytest.mark.parametrize(("n", "k"), SIZES)
@pytest.mark.parametrize("name", KEYS)
def test_the_k_largest_keys_in_order(name: str, n: int, k: int, idle: int) -> None:
    keys = (KEYS[name](n) >> idle << idle).to(torch.int32)
    taken = torch.argsort(-keys.long(), stable=True)[: min(k, int((keys > LOWEST).sum()))]
    lowest = keys[keys > LOWEST].min() if (keys > LOWEST).any() else HIGHEST
    for low, high in ((lowest, keys.max()), (LOWEST, keys.max()), (LOWEST, HIGHEST)):
        out, count = torch.full((k + 1,), UNTOUCHED, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        limits = torch.tensor([low, high], dtype=torch.int32)
        on_device = [x.to(DEVICE) for x in (keys, limits, out, count)]
        largest_kernel[(1,)](*on_device[:2], k, *on_device[2:], R=n // 16, IDLE=idle)
        out, count = on_device[2].cpu(), on_device[3].item()
        assert count == len(taken)
        assert out[:count].tolist() == sorted(taken.tolist())
        assert set(out[count:].tolist()) == {UNTOUCHED}


def of_every_kind(dtype: torch.dtype) -> Tensor:  # (N,) N a multiple of 1,024: all of 16 bits, or random ones and edges
    if dtype.itemsize == 2:
        return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    edges = [0, 1, 2**23 - 1, 2**23, 0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7FC00000, 0x7FFFFFFF]
    edges = torch.tensor([*edges, *(x - 2**31 for x in edges)])
    bits = torch.cat((edges, torch.randint(LOWEST, HIGHEST + 1, (8_192 - len(edges),))))
    return bits.to(torch.int32).view(torch.float32)


@pytest.mark.parametrize("dtype", IDLE_BITS)
def test_keys_are_in_the_order_of_their_floats_and_give_them_back(dtype: torch.dtype) -> None:
    x = of_every_kind(dtype)
    if DEVICE == "cpu" and dtype == torch.bfloat16:  # whose subnormals the interpreter of Triton 3.7 widens wrongly
        x = torch.where(x.abs() < torch.finfo(dtype).tiny, 0, x)
    keys, back = torch.empty(len(x), dtype=torch.int32), torch.empty(len(x))
    keys, back, on_device = keys.to(DEVICE), back.to(DEVICE), x.to(DEVICE)
    round_trip_kernel[(len(x) // 1024,)](on_device, keys, back, IDLE=IDLE_BITS[dtype])
    keys, back, wide = keys.cpu(), back.cpu(), x.float()
    nan, lowest = wide.isnan(), wide == -torch.inf
    assert (keys[lowest] == LOWEST).all() and (keys[~lowest] > LOWEST + 1).all()
    assert len({*keys[nan].tolist()}) == 1 and keys[nan][0] == keys.max()
    assert back[nan].isnan().all()
    number = ~nan & ~lowest
    unsigned_zeros = wide[number] + 0.0  # -0.0 comes back as +0.0
    assert torch.equal(back[number].view(torch.int32), unsigned_zeros.view(torch.int32))
    order = wide[number].argsort()
    for (a, b), (key_a, key_b) in zip(
        itertools.pairwise(wide[number][order].tolist()), itertools.pairwise(keys[number][order].tolist())
    ):
        assert (key_a < key_b) if a < b else (key_a == key_b)
