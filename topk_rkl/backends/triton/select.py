"""Exact row-wise top-K in one read of the row, and the loss on those K slots in the same launch.

One program serves one row. It keeps the maximum of every group of neighbouring columns. The K best groups, the earlier
first among equals, hold the K best columns: one column of each precedes every column outside them, in the order (value
descending, id ascending). K groups are therefore read again, and the K best of their columns are the answer. No buffer
exists that an input could overflow.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from topk_rkl.backends.triton.divergence import encoded
from topk_rkl.backends.triton.launch import (
    IDLE_BITS,
    RESIDENT_WARPS,
    compile_options,
    cores,
    float32_halves,
    plan_select,
)
from topk_rkl.backends.triton.memory import INTERPRETED, fence, layout_of, on_device_of, row_of
from topk_rkl.backends.triton.sums import sum_rows
from topk_rkl.backends.triton.support_loss import store_loss_row
from topk_rkl.objective import PLAIN, Objective

LOWEST = tl.constexpr(-(2**31))
HIGHEST = tl.constexpr(2**31 - 1)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _group_max(x):
    """[GROUPS, G] -> [GROUPS] float32; NaN wins. Two 16-bit values per instruction once compiled."""
    x = x.to(tl.float32)
    if INTERPRETED:  # where a reduction of our own would run element by element, and tl.max drops NaN
        return tl.where(tl.sum((x != x).to(tl.int32), 1) > 0, float("nan"), tl.max(tl.where(x != x, 0.0, x), 1))
    else:
        return tl.reduce(x, 1, _larger)


@triton.jit
def _order_key(x, IDLE: tl.constexpr):
    """Float -> int32 in the same order: -inf is LOWEST, -0.0 equals +0.0, every NaN is above +inf."""
    x = x.to(tl.float32)
    bits = x.to(tl.int32, bitcast=True)
    key = tl.where(x == 0.0, 0, bits ^ ((bits >> 31) & 0x7FFFFFFF))
    key = tl.where(x == float("-inf"), LOWEST, tl.where(x != x, HIGHEST, key))
    return key >> IDLE << IDLE


@triton.jit
def _of_order_key(key, IDLE: tl.constexpr):
    """The float32 whose key it is, of LOWEST none."""
    return ((key ^ ((key >> 31) & 0x7FFFFFFF)) >> IDLE << IDLE).to(tl.float32, bitcast=True)


@triton.jit
def _halves(x):
    """Two counts up to 2^15, packed in one uint32: as int32 their sum would overflow, which the interpreter refuses."""
    return (x & 0xFFFF).to(tl.int32), (x >> 16).to(tl.int32)


@triton.jit
def _kth_largest(
    key,  # [R, 16], no more than 2^15 numbers
    low,
    high,  # the largest key
    k,
    IDLE: tl.constexpr,
):
    """The largest number up to high that k keys reach; low if none above it is reached by k.

    A turn counts the keys that reach two numbers, since the waits of a reduction take longer than the comparisons. The
    search ends as soon as exactly k keys reach a number: behind it they are the same k.
    """
    low = low >> IDLE
    high = high >> IDLE
    while low < high:
        span = (high - low).to(tl.uint32, bitcast=True)
        third = span // 3 + (span % 3 != 0).to(tl.uint32)
        first = low + third.to(tl.int32, bitcast=True)
        second = high - ((span - third) >> 1).to(tl.int32, bitcast=True)  # from first to high
        reached = (key >= (first << IDLE)).to(tl.uint32) + ((key >= (second << IDLE)).to(tl.uint32) << 16)
        of_first, of_second = _halves(tl.sum(reached))
        below = tl.where(of_first > k, second - 1, tl.where(of_first == k, first, first - 1))
        high = tl.where(of_second > k, high, tl.where(of_second == k, second, below))
        low = tl.where(of_second >= k, second, tl.where(of_first >= k, first, low))
    return low << IDLE


@triton.jit
def _ones(x):
    """The bits of an int32 that are set, counted in each half -> uint32."""
    x -= (x >> 1) & 0x55555555
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x + (x >> 8)) & 0x001F001F).to(tl.uint32, bitcast=True)


@triton.jit
def _store_largest(
    key,  # [R, 16]
    threshold,  # that at least k keys reach, unless there are fewer above LOWEST; none above it is reached by k
    k,
    out,
    R: tl.constexpr,
):
    """Writes the indices of the k largest keys to out, ascending, and returns how many they are.

    Equal keys go by their row-major index, the lower first; LOWEST is never taken.
    """
    # A row in one integer: a bit per column above the threshold in the low half, per tied one in the high half.
    bit = (1 << tl.arange(0, 16))[None, :]
    threshold = tl.maximum(threshold, LOWEST + 1)  # which no key is
    row = tl.sum(tl.where(key > threshold, bit, tl.where(key == threshold, bit << 16, 0)), 1)  # [R]
    # The identity, in a layout of its own: keys loaded from odd addresses leave sixteen copies of every row.
    row = tl.gather(row, tl.arange(0, R), 0)
    ones = _ones(row)
    taken, ties = _halves(tl.sum(ones, 0))
    taken_before, tied_before = _halves(tl.cumsum(ones, 0) - ones)  # [R] each
    taken_row, tied_row = _halves(ones)  # [R] each
    allowed = k - taken  # of the ties
    tied_before = tl.minimum(tied_before, allowed)
    room = tl.minimum(allowed - tied_before, tied_row)  # [R] the ties this row may take
    place = taken_before + tied_before
    above = row & 0xFFFF
    tied = (row >> 16) & 0xFFFF
    for i in range(tl.max(taken_row + room, 0)):  # a row seldom holds more than two or three
        left = above | tl.where(room > 0, tied, 0)
        lowest = left & -left
        first = (lowest.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127
        tl.store(out + place + i, tl.arange(0, R) * 16 + first, mask=left != 0)
        room -= ((tied & lowest) != 0).to(tl.int32)
        above &= ~lowest
        tied &= ~lowest
    return taken + tl.minimum(ties, allowed)


@triton.jit
def _scan_tile(x, tile, peak, mass, group_max, mask, NORMALIZE: tl.constexpr):
    """Stores the tile's group maxima and carries on the running sum of exponentials of each lane."""
    top = _group_max(x)  # [TILE]
    tl.store(group_max + tile, top, mask=mask, eviction_policy="evict_last")
    if NORMALIZE:
        x = x.to(tl.float32)
        higher = tl.maximum(peak, top)
        base = tl.where(higher == float("-inf"), 0.0, higher)
        mass = mass * tl.exp(peak - base) + sum_rows(tl.exp(x - base[:, None]))
        peak = higher
    return peak, mass


@triton.jit
def _scan(
    logits,  # (V,) one row
    column_stride,
    vocab,
    group_max,  # (groups,)
    groups,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    NORMALIZE: tl.constexpr,
):
    """The only full read of the row: one maximum per group -> the largest of all, and log(sum of exp(x - it)) if
    NORMALIZE. The two stay apart, since their sum would be rounded like the largest.

    The row passes through the second-level cache, and the maxima stay in it: writing them to memory would take time.
    """
    TILE: tl.constexpr = BLOCK // GROUP
    tile = tl.arange(0, TILE)  # [TILE]
    column = tile[:, None] * GROUP + tl.arange(0, GROUP)[None, :]  # [TILE, GROUP]
    peak = tl.full([TILE], float("-inf"), tl.float32)
    mass = tl.zeros([TILE], tl.float32)
    whole = vocab // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        at = logits + (start + column).to(tl.int64) * column_stride
        x = tl.load(at, eviction_policy="evict_first")  # [TILE, GROUP]
        peak, mass = _scan_tile(x, tile, peak, mass, group_max + start // GROUP, None, NORMALIZE)
    if whole < vocab:
        inside = whole + column < vocab
        at = logits + (whole + column).to(tl.int64) * column_stride
        x = tl.load(at, mask=inside, other=float("-inf"), eviction_policy="evict_first")
        first = whole // GROUP
        peak, mass = _scan_tile(x, tile, peak, mass, group_max + first, first + tile < groups, NORMALIZE)
    highest, log_total = 0.0, 0.0
    if NORMALIZE:
        highest = tl.max(peak, 0)
        log_total = tl.log(tl.sum((mass * tl.exp(peak - highest)).to(tl.float64), 0))
    return highest, log_total


@triton.jit
def _in_order(
    column,  # [K] int32, ascending
    x,  # [K] their logits
    filled,  # [K]: the slots that have one, before all others
    slot,  # [K]
    K_PAD: tl.constexpr,
    IDLE: tl.constexpr,
):
    """-> columns [K] and values [K], value descending, column ascending; -1 and -inf where there is none.

    The key holds the value, and in its idle bits or below them the slot, which goes up with the column.
    """
    order = _order_key(x, IDLE)
    if IDLE == 0:
        order = order.to(tl.int64) << 32
    order = tl.sort(order | (K_PAD - 1 - slot), descending=True)  # [K]
    column = tl.where(filled, tl.gather(column, K_PAD - 1 - (order & (K_PAD - 1)).to(tl.int32), 0), -1)
    if IDLE == 0:
        order >>= 32
    return column, tl.where(filled, _of_order_key(order.to(tl.int32), IDLE), float("-inf"))


@triton.jit
def _claim(
    taken,  # (places,) int32: 1 where a running program has the place
    places,
):
    """A place that no other running program has."""
    place = tl.program_id(0) % places
    before = tl.atomic_cas(taken + place, 0, 1, sem="acquire")
    while before != 0:
        place = (place + 1) % places
        before = tl.atomic_cas(taken + place, 0, 1, sem="acquire")
    return place


@triton.jit(do_not_specialize=["places"])  # which goes with N where rows are few
def select_kernel(
    logits,  # (N, V)
    layout,
    vocab,
    k,
    group_max,  # (places, groups) scratch, in the dtype of the logits
    groups,  # ceil(V / GROUP), rounded up to a multiple of 16
    taken,  # (places,) int32 zeros, or None: a place for every row
    places,
    ids,  # (N, K) int32
    log_probs,  # (N, K) float32
    student,  # (N, V_student), or None: select only
    student_layout,
    student_vocab,
    weights,  # (N,) or None
    inv_t_high,
    inv_t_low,
    parameters,
    loss,  # (N,)
    g,  # (N, K)
    K_PAD: tl.constexpr,
    PICKED_PAD: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    IDLE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    FAMILY: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits = row_of(logits, layout, tl.program_id(0))
    column_stride = layout[3]
    ids += row * k
    log_probs += row * k
    slot = tl.arange(0, K_PAD)  # [K]
    weight = 1.0
    if student is not None:
        loss += row
        g += row * k
        if weights is not None:
            weight = tl.load(weights + row)
            if weight == 0.0:
                tl.store(loss, 0.0)
                tl.store(g + slot, 0.0, mask=slot < k)
                tl.store(ids + slot, -1, mask=slot < k)
                return
    place = tl.program_id(0)
    if taken is not None:
        place = _claim(taken, places)
    group_max += place.to(tl.int64) * groups

    # 1. The only full read of the row: one maximum per group.
    highest, log_total = _scan(logits, column_stride, vocab, group_max, groups, GROUP, BLOCK, NORMALIZE)
    fence()

    # 2. The K best groups. Until the end the output rows hold what was picked: groups in log_probs, columns in ids.
    picked = log_probs.to(tl.pointer_type(tl.int32), bitcast=True)
    group = tl.arange(0, GROUPS_PAD // 16)[:, None] * 16 + tl.arange(0, 16)[None, :]  # [GROUPS / 16, 16]
    x = tl.load(group_max + group, mask=group < groups, other=float("-inf"))
    key = _order_key(x, IDLE)
    high = tl.max(key)
    low = tl.min(tl.where(key > LOWEST, key, HIGHEST))
    threshold = _kth_largest(key, low, high, k, IDLE)
    count = _store_largest(key, threshold, k, picked, GROUPS_PAD // 16)
    fence()
    if taken is not None:  # all have read their maxima
        tl.atomic_xchg(taken + place, 0, sem="release")

    # 3. The K best columns of those groups. If there are K groups, K columns reach the threshold of the groups.
    low = tl.where(count < k, LOWEST, threshold)
    PARTS: tl.constexpr = GROUP // 16
    part = tl.arange(0, PICKED_PAD * PARTS)  # sixteen columns each
    group = tl.load(picked + part // PARTS, mask=part // PARTS < count, other=groups)  # [PICKED * PARTS]
    column = (group * GROUP + part % PARTS * 16)[:, None] + tl.arange(0, 16)[None, :]  # [PICKED * PARTS, 16]
    x = tl.load(logits + column.to(tl.int64) * column_stride, mask=column < vocab, other=float("-inf"))
    key = _order_key(x, IDLE)
    threshold = _kth_largest(key, low, high, k, IDLE)
    count = _store_largest(key, threshold, k, ids, PICKED_PAD * PARTS)
    fence()

    # 4. In order: value descending, id ascending.
    candidate = tl.load(ids + slot, mask=slot < count, other=0)
    column = tl.load(picked + candidate // GROUP, mask=slot < count, other=0) * GROUP + candidate % GROUP
    x = tl.load(logits + column.to(tl.int64) * column_stride, mask=slot < count, other=float("-inf"))
    fence()
    filled = slot < count
    column, w = _in_order(column, x, filled, slot, K_PAD, IDLE)
    if NORMALIZE:
        w = tl.where(filled, w.to(tl.float64) - highest - log_total, float("-inf")).to(tl.float32)
    tl.store(ids + slot, column, mask=slot < k)
    tl.store(log_probs + slot, w, mask=slot < k)

    # 5. The loss on those slots.
    if student is not None:
        student = row_of(student, student_layout, tl.program_id(0))
        inv_t = tl.cast(inv_t_high, tl.float64) + tl.cast(inv_t_low, tl.float64)
        store_loss_row(
            student, student_layout[3], student_vocab, column.to(tl.int64), w, weight, inv_t, parameters, loss, g, slot,
            k, FAMILY,
        )  # fmt: skip


def select(
    logits: Tensor,  # (N, V)
    normalize: bool,
    ids: Tensor,  # (N, K) int32, written
    log_probs: Tensor,  # (N, K), written
) -> None:
    _launch(logits, normalize, ids, log_probs)


def select_loss(
    student: Tensor,  # (N, V_student)
    teacher: Tensor,  # (N, V)
    weights: Tensor | None,  # (N,)
    objective: Objective,
    loss: Tensor,  # (N,), written
    ids: Tensor,  # (N, K) int32, written
    g: Tensor,  # (N, K), written
) -> None:
    _launch(teacher, False, ids, torch.empty_like(g), student, weights, objective, loss, g)


def _launch(
    logits: Tensor,  # (N, V)
    normalize: bool,
    ids: Tensor,  # (N, K)
    log_probs: Tensor,  # (N, K)
    student: Tensor | None = None,  # (N, V_student)
    weights: Tensor | None = None,  # (N,)
    objective: Objective = PLAIN,
    loss: Tensor | None = None,  # (N,)
    g: Tensor | None = None,  # (N, K)
) -> None:
    (n, k), vocab = ids.shape, logits.shape[-1]
    if n == 0:
        return
    layout = layout_of(logits)
    whole_vectors = layout[3] == 1 and all(x % 16 == 0 for x in (*layout[1:3], logits.data_ptr()))
    family, parameters = encoded(objective.divergence)
    plan = plan_select(vocab, k, logits.element_size(), whole_vectors, normalize, family)
    groups = triton.cdiv(vocab, 16 * plan.group) * 16
    places = min(n, RESIDENT_WARPS // plan.num_warps * cores(logits.device))
    group_max = torch.empty((places, groups), dtype=logits.dtype, device=logits.device)
    taken = None if places == n else torch.zeros(places, dtype=torch.int32, device=logits.device)
    student_layout, student_vocab = (None, 0) if student is None else (layout_of(student), student.shape[-1])
    with on_device_of(logits):
        select_kernel[(n,)](
            logits, layout, vocab, k, group_max, groups, taken, places, ids, log_probs,
            student, student_layout, student_vocab, weights,
            *float32_halves(1.0 / objective.temperature), parameters, loss, g,
            K_PAD=plan.k_pad, PICKED_PAD=plan.picked_pad, GROUP=plan.group, GROUPS_PAD=plan.groups_pad,
            BLOCK=plan.block, IDLE=IDLE_BITS[logits.dtype], NORMALIZE=normalize, FAMILY=family,
            num_warps=plan.num_warps, **compile_options(torch.version.hip is not None, plan.registers),
        )  # fmt: skip
