"""The inputs that tests and benchmarks share: rows with a name, and the vocabularies and Ks they are drawn at."""

from collections.abc import Callable

import torch
from torch import Tensor

Row = Callable[[int, int], Tensor]

SIZES = [  # (V, K): every vocabulary and every K of the field at least once
    (1, 1),
    (2, 1),
    (2, 2),
    (33, 2),
    (33, 33),
    (507, 16),
    (507, 507),
    (4_099, 20),
    (4_099, 1_024),
    (32_000, 32),
    (49_152, 48),
    (50_257, 64),
    (128_256, 1),
    (151_936, 32),
    (151_936, 256),
    (262_144, 64),
]


def _random(vocab: int, k: int) -> Tensor:
    return torch.randn(vocab)


def _peaked(vocab: int, k: int) -> Tensor:
    return torch.randn(vocab) * 10


def _all_equal(vocab: int, k: int) -> Tensor:
    return torch.full((vocab,), 0.5)


def _two_valued(vocab: int, k: int) -> Tensor:
    return (torch.rand(vocab) < 0.5).float()


def _ascending(vocab: int, k: int) -> Tensor:
    return torch.linspace(-20, 20, vocab)


def _descending(vocab: int, k: int) -> Tensor:
    return torch.linspace(20, -20, vocab)


def _hot_block(vocab: int, k: int) -> Tensor:
    row = torch.randn(vocab)
    start = vocab // 2 // 64 * 64
    row[start : start + 64] += 30
    return row


def _many_ties_at_the_kth(vocab: int, k: int) -> Tensor:
    row = torch.zeros(vocab)
    row[torch.randperm(vocab)[: max(1, k // 2)]] = 1.0
    return row


def _padded_vocabulary(vocab: int, k: int) -> Tensor:
    row = torch.randn(vocab)
    row[vocab - vocab // 8 :] = -torch.inf
    return row


def _all_minus_inf(vocab: int, k: int) -> Tensor:
    return torch.full((vocab,), -torch.inf)


def _fewer_than_k_finite(vocab: int, k: int) -> Tensor:
    row = torch.full((vocab,), -torch.inf)
    kept = torch.randperm(vocab)[: max(1, k - 1)]
    row[kept] = torch.randn(len(kept))
    return row


def _signed_zeros(vocab: int, k: int) -> Tensor:
    return torch.where(torch.rand(vocab) < 0.5, -0.0, 0.0)


def _one_nan(vocab: int, k: int) -> Tensor:
    row = torch.randn(vocab)
    row[vocab // 3] = torch.nan
    return row


def _nans_of_both_signs(vocab: int, k: int) -> Tensor:
    row = torch.randn(vocab)
    places = torch.randperm(vocab)[: k + 3]
    nan = torch.tensor([0x7FC00000, -0x400000], dtype=torch.int32).view(torch.float32)
    row[places] = nan[torch.arange(len(places)) % 2]
    return row


def _infinities(vocab: int, k: int) -> Tensor:
    row = torch.randn(vocab)
    row[torch.randperm(vocab)[:2]] = torch.inf
    row[torch.randperm(vocab)[:2]] = -torch.inf
    return row


def _subnormals(vocab: int, k: int) -> Tensor:
    """Of bfloat16 and float32 in the even columns, of float16 in the odd ones."""
    unit = torch.tensor([2.0**-133, 2.0**-24])[torch.arange(vocab) % 2]
    return torch.randint(-50, 50, (vocab,)) * unit


ROWS: dict[str, Row] = {
    function.__name__.removeprefix("_"): function
    for function in (
        _random,
        _peaked,
        _all_equal,
        _two_valued,
        _ascending,
        _descending,
        _hot_block,
        _many_ties_at_the_kth,
        _padded_vocabulary,
        _all_minus_inf,
        _fewer_than_k_finite,
        _signed_zeros,
        _one_nan,
        _nans_of_both_signs,
        _infinities,
        _subnormals,
    )
}

FINITE = ["random", "peaked", "all_equal", "two_valued", "ascending", "hot_block", "subnormals"]


def rows(vocab: int, k: int, dtype: torch.dtype, names: list[str] | None = None, device: str = "cpu") -> Tensor:
    """(rows, V): one row of each name, in the order of ROWS. Draws from torch's global generator."""
    return torch.stack([ROWS[name](vocab, k) for name in names or ROWS]).to(dtype).to(device)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.clone(),
    "padded_rows": lambda x: _into(torch.full((x.shape[0], x.shape[1] + 5), 99.0), x, slice(0, -5)),
    "offset_view": lambda x: _into(torch.full((x.shape[0], x.shape[1] + 3), 99.0), x, slice(3, None)),
    "transposed": lambda x: x.t().contiguous().t(),
    "every_other_column": lambda x: _into(torch.full((x.shape[0], 2 * x.shape[1]), 99.0), x, slice(0, None, 2)),
}


def _into(buffer: Tensor, x: Tensor, columns: slice) -> Tensor:
    """x as a view of a larger buffer, whose other values are larger than any of x."""
    view = buffer.to(x.dtype).to(x.device)[:, columns]
    view.copy_(x)
    return view
