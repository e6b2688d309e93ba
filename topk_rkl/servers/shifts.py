"""Whether a support speaks of the tokens that it should: a check on any new server, or version of one."""

import torch
from torch import Tensor

from topk_rkl import checks
from topk_rkl.support import Support, require_support

SHIFTS = (0, 1, 2)
REMEDIES = {
    0: "mend it with support[..., 1:].pad(support.shape[-1])",
    2: "mend it with support[..., :-1].pad(support.shape[-1], side='left')",
}


def alignment(
    support: Support,  # (T, K) or (B, T, K)
    input_ids: Tensor,  # (T,) or (B, T)
    *,
    at_least: int = 16,
) -> dict[int, float]:
    """The share of positions t whose support holds the token at t + shift, per shift of 0, 1 and 2.

    A right support has by far the largest share at shift 1, since it speaks of the next token. Empty positions and
    negative ids do not count.

    Args:
        support: (T, K) or (B, T, K), of tokens that the teacher is good at, such as text or its own answers.
        input_ids: (T,) or (B, T) int32 or int64, the tokens that the server read.
        at_least: how many positions must count at each shift.

    Returns:
        {0: share, 1: share, 2: share}, each from 0 to 1.

    Raises:
        ValueError: another shift has a larger share than 1, with the slice that mends the support; all shares are 0;
            too few positions count to tell; the shapes differ.
    """
    require_support("support", support)
    checks.require_tensor("input_ids", input_ids, checks.INTEGERS)
    at_least = checks.require_positive_integer("at_least", at_least)
    if support.shape != input_ids.shape or input_ids.dim() not in (1, 2) or input_ids.is_meta or support.ids.is_meta:
        raise ValueError(
            f"input_ids has shape {checks.shape_of(input_ids)} and support positions {tuple(support.shape)}; both must "
            "be (T,) or both (B, T), with numbers"
        )
    counts = hits(support, input_ids.to(support.device)).tolist()
    for shift, (_, count) in zip(SHIFTS, counts):
        if count < at_least:
            raise ValueError(
                f"support has {count} positions that count at a shift of {shift}, but at_least is {at_least}; pass "
                "more tokens, or a smaller at_least where chance matters little"
            )
    shares = {shift: hit / count for shift, (hit, count) in zip(SHIFTS, counts)}
    if not any(shares.values()):
        raise ValueError(
            "support holds no token of input_ids at any shift; pass the input_ids that the server was asked for, of "
            "its own tokenizer"
        )
    found = max(SHIFTS, key=lambda shift: (shares[shift], shift == 1))
    if found != 1:
        seen = ", ".join(f"{share:.2f} at a shift of {shift}" for shift, share in shares.items())
        raise ValueError(
            f"support speaks of the token {found} positions after its own instead of the next one: the share of tokens "
            f"inside it is {seen}; {REMEDIES[found]}"
        )
    return shares


def hits(
    support: Support,  # (T, K) or (B, T, K)
    input_ids: Tensor,  # (T,) or (B, T)
) -> Tensor:  # (3, 2) int64
    """Per shift of 0, 1 and 2, how many positions hold the token so far after them, and how many count."""
    found = []
    for shift in SHIFTS:
        here, then = support[..., : max(input_ids.shape[-1] - shift, 0)], input_ids[..., shift:]
        live = (here.ids >= 0) & (here.log_probs != -torch.inf)
        counts = live.any(-1) & (then >= 0)
        inside = (live & (here.ids == then[..., None])).any(-1)
        found.append(torch.stack([(inside & counts).sum(), counts.sum()]))
    return torch.stack(found)
