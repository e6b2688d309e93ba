"""Refusals of what stands around the losses: masks, supports, composed teachers, rewards."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from topk_rkl.checks.losses import logits, same_positions, slots
from topk_rkl.checks.values import (
    FLOATS,
    INTEGERS,
    LARGEST,
    NUMBERS,
    constant,
    count,
    denominator_value,
    flag,
    fraction,
    integer,
    integers,
    kind,
    not_negative,
    number,
    one_of,
    same_device,
    same_reality,
    seen,
    shape,
    tensor,
    top,
)
from topk_rkl.support import Support

MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")


def aggregation(
    per_token: Tensor,  # (B, T)
    mask: Tensor,  # (B, T)
    mode: str,
    denominator: float | Tensor | None,
    norm: float | None,
    cu_seqlens: Tensor | None,  # (sequences + 1,)
) -> None:
    tensor("per_token", per_token, FLOATS)
    tensor("mask", mask, (torch.bool, *NUMBERS))
    wanted = per_token.dim() == 2 if cu_seqlens is None else per_token.dim() > 0
    if not wanted or mask.shape != per_token.shape:
        raise ValueError(
            f"per_token has shape {shape(per_token)} and mask {shape(mask)}; both must be (B, T), or of one shape with "
            "cu_seqlens"
        )
    same_device("mask", mask, "per_token", per_token)
    cumulative_lengths(cu_seqlens, "per_token", per_token)
    one_of("mode", mode, MODES)
    if denominator is not None and mode == "token-sum":
        raise ValueError("denominator is given with mode='token-sum', which divides by nothing; leave it out")
    denominator_value(denominator, per_token)
    if norm is not None:
        if mode != "seq-mean-token-sum-norm":
            raise ValueError(f"norm is given with mode={mode!r}; it only belongs to 'seq-mean-token-sum-norm'")
        number("norm", norm)
        if norm <= 0:
            raise ValueError(f"norm is {norm}; it must be positive, such as the longest response")
    elif mode == "seq-mean-token-sum-norm" and cu_seqlens is not None:
        raise ValueError("norm is None with cu_seqlens, and the length of a packed row is no response's; pass norm")


def cumulative_lengths(
    x: Tensor | None,  # (sequences + 1,)
    name: str,
    positions: Tensor,  # (..., T)
) -> None:
    if x is None:
        return
    tensor("cu_seqlens", x, INTEGERS)
    if x.dim() != 1 or len(x) == 0:
        raise ValueError(
            f"cu_seqlens has shape {shape(x)}; it must be (sequences + 1,): 0, and where each sequence ends among the "
            f"flattened positions of {name}"
        )
    same_device("cu_seqlens", x, name, positions)


def special_tokens(
    response_ids: Tensor,  # (..., T)
    token_ids: object,  # an Iterable[int] or Tensor
    occurrences: str,
    cu_seqlens: Tensor | None,  # (responses + 1,)
) -> list[int] | Tensor:
    """The ids, as ints."""
    tensor("response_ids", response_ids, INTEGERS)
    if response_ids.dim() == 0:
        raise ValueError("response_ids has no dimension; it must be (..., T)")
    if isinstance(token_ids, Tensor):
        tensor("token_ids", token_ids, INTEGERS)
        same_reality("token_ids", token_ids, "response_ids", response_ids)
    elif isinstance(token_ids, str):
        raise TypeError("token_ids is a str; it must be a sequence of token ids")
    else:
        token_ids = integers("token_ids", token_ids)
        for x in token_ids:
            if abs(x) > LARGEST:
                raise ValueError(f"token_ids has {x}; a token id is at most {LARGEST}")
    if not isinstance(occurrences, str) or occurrences not in ("first", "all"):
        raise ValueError(f"occurrences is {occurrences!r}; use 'first' or 'all'")
    cumulative_lengths(cu_seqlens, "response_ids", response_ids)
    return token_ids


def id_set(
    ids: Sequence[int] | Tensor,  # (K,) or (..., K)
    teacher: Tensor,  # (..., V) or (..., H)
    vocab: int,
    name: str = "teacher_logits",
) -> list[int] | Tensor:
    """The ids, as ints."""
    if isinstance(ids, Tensor):
        tensor("ids", ids, INTEGERS)
        if ids.dim() == 0 or ids.shape[-1] == 0 or (ids.dim() > 1 and ids.shape[:-1] != teacher.shape[:-1]):
            raise ValueError(
                f"ids has shape {shape(ids)} and {name} {shape(teacher)}; ids must be (K,), or (..., K) with the "
                f"positions of {name}, K at least 1"
            )
        same_device("ids", ids, name, teacher)
        return ids
    ids = integers("ids", ids)
    outside = [x for x in ids if not 0 <= x < vocab]
    if outside or len(set(ids)) < len(ids) or not ids:
        raise ValueError(f"ids is {ids!r}; it must hold different ids, at least one, from 0 to V - 1 = {vocab - 1}")
    return ids


def sampled(
    ids: Tensor,  # (...)
    teacher: Tensor,  # (..., V) or (...)
    support: Support,
    normalize: bool,
) -> None:
    slots("support", support)
    tensor("sampled_ids", ids, INTEGERS)
    same_positions("sampled_ids", ids, support.ids, value_per_position=True, student_name="support.ids")
    tensor("teacher", teacher, FLOATS)
    constant("teacher", teacher)
    flag("normalize", normalize)
    values = teacher.dim() == ids.dim()
    same_positions("teacher", teacher, support.ids, value_per_position=values, student_name="support.ids")
    if values and normalize:
        raise ValueError("normalize is True, but teacher holds one value a position; it belongs to (..., V) logits")


def sampling(
    x: Tensor,  # (..., V)
    generator: torch.Generator | None,
) -> None:
    logits("logits", x)
    if generator is None:
        return
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator is {kind(generator)}; it must be a torch.Generator, or None")
    if generator.device.type != x.device.type:
        raise ValueError(f"generator is on {generator.device} and logits on {x.device}; make one there")


def two_supports(first: Support, second: Support) -> None:
    slots("first", first)
    slots("second", second)
    same_positions("second.ids", second.ids, first.ids, student_name="first.ids")


def mapping(
    x: Mapping[int, int] | Tensor,  # (V_teacher,)
    support: Support,
    student_vocab: int | None,
) -> tuple[dict[int, int] | Tensor, int | None]:
    """The mapping and the size of the vocabulary, as ints."""
    student_vocab = count("student_vocab", student_vocab)
    if isinstance(x, Tensor):
        tensor("mapping", x, INTEGERS)
        if x.dim() != 1 or len(x) == 0:
            raise ValueError(
                f"mapping has shape {shape(x)}; a table must be (V_teacher,), the student's id of each token"
            )
        same_device("mapping", x, "support.ids", support.ids)
        return x, student_vocab
    if not isinstance(x, Mapping):
        raise TypeError(f"mapping is {kind(x)}; it must be a dict from ids to ids or a (V_teacher,) integer tensor")
    try:
        pairs = {integer("mapping", old): integer("mapping", new) for old, new in x.items()}
    except TypeError:
        raise TypeError(f"mapping is {x!r}; it must be a dict from ids to ids") from None
    largest = torch.iinfo(support.ids.dtype).max
    for old, new in pairs.items():
        if not 0 <= old <= largest or abs(new) > largest:
            raise ValueError(
                f"mapping sends {old} to {new}; an id is from 0 to {largest}, that of {support.ids.dtype}, and a "
                "negative student's id leaves the token out"
            )
    return pairs, student_vocab


def teachers(name: str, x: Sequence[object]) -> None:
    if not isinstance(x, (tuple, list)) or isinstance(x, Support):
        raise TypeError(f"{name} is {kind(x)}; it must be a list of teachers")
    if not x:
        raise ValueError(f"{name} is empty; it must hold at least one teacher")


def composed(
    sources: Mapping[str, Tensor | Support],
    k: int | None,
    trained: str | None = None,
) -> int | None:
    """The sources of one teacher; that named `trained` is logits, and may require grad. Gives K, as an int."""
    supports = {name: x for name, x in sources.items() if isinstance(x, Support) and name != trained}
    leaves: dict[str, Any] = {name: supports[name].ids if name in supports else x for name, x in sources.items()}
    first_name, first = next(iter(leaves.items()))
    for name, x in leaves.items():
        if name in supports:
            slots(name, supports[name])
        else:
            logits(name, x)
            if name != trained:
                constant(name, x)
        same_positions(name, x, first, student_name=first_name)
    widths = {name: x.shape[-1] for name, x in leaves.items() if name in supports or not supports}
    if len(set(widths.values())) > 1:
        raise ValueError(
            f"the last dimensions differ: {', '.join(f'{name} {width}' for name, width in widths.items())}; "
            "cut logits to the common vocabulary, give supports on the same tokens"
        )
    if not supports:
        return top(k, widths[first_name], first_name)
    if k is not None:
        raise ValueError(f"k is {k}, but {next(iter(supports))} is a Support, whose last dimension is K; leave k out")
    return None


def shares(weights: Sequence[float | Tensor], teachers: Sequence[Tensor | Support]) -> None:
    if not isinstance(weights, (tuple, list)) or isinstance(weights, Support) or len(weights) != len(teachers):
        raise ValueError(f"weights is {seen(weights)}; it must be a list of {len(teachers)}, one a teacher")
    first = teachers[0].ids if isinstance(teachers[0], Support) else teachers[0]
    for i, x in enumerate(weights):
        if not isinstance(x, Tensor):
            not_negative(f"weights[{i}]", x)
            continue
        tensor(f"weights[{i}]", x, FLOATS)
        constant(f"weights[{i}]", x)
        if x.dim() > 0:
            same_positions(f"weights[{i}]", x, first, value_per_position=True, student_name="teachers[0]")
        same_reality(f"weights[{i}]", x, "teachers[0]", first)
    if not any(isinstance(x, Tensor) or x for x in weights):
        raise ValueError(f"weights is {weights!r}; at least one must be above 0")


def per_token(log_probs: Mapping[str, Tensor]) -> None:
    first_name, first = next(iter(log_probs.items()))
    for name, x in log_probs.items():
        tensor(name, x, FLOATS)
        if x.shape != first.shape:
            raise ValueError(
                f"{name} has shape {shape(x)} and {first_name} {shape(first)}; both must hold one value a token"
            )
        same_device(name, x, first_name, first)


def returns(
    rewards: Tensor,  # (..., T)
    mask: Tensor | None,  # (..., T)
    gamma: float,
    cu_seqlens: Tensor | None,  # (sequences + 1,)
) -> None:
    tensor("rewards", rewards, FLOATS)
    if rewards.dim() == 0:
        raise ValueError("rewards has no dimension; it must be (..., T)")
    if mask is not None:
        tensor("mask", mask, (torch.bool, *NUMBERS))
        if mask.shape != rewards.shape:
            raise ValueError(f"mask has shape {shape(mask)} and rewards {shape(rewards)}; both must be (..., T)")
        same_device("mask", mask, "rewards", rewards)
    fraction("gamma", gamma)
    cumulative_lengths(cu_seqlens, "rewards", rewards)
