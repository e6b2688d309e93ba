"""A vocabulary split over the ranks of a group: how it is split, and what each rank holds."""

import torch.distributed as dist
from torch import Tensor

# The lengths of the shards of 1 to 4 ranks, V = 23 in each.
SPLITS = {
    "as equal as can be": {1: (23,), 2: (12, 11), 3: (8, 8, 7), 4: (6, 6, 6, 5)},
    "unequal": {1: (23,), 2: (3, 20), 3: (9, 1, 13), 4: (1, 2, 15, 5)},
    "empty shards": {1: (23,), 2: (0, 23), 3: (11, 0, 12), 4: (0, 12, 11, 0)},
}
VOCAB = 23


def mine(split: str, group: dist.ProcessGroup) -> slice:
    """The ids of this rank."""
    lengths = SPLITS[split][dist.get_world_size(group)]
    start = sum(lengths[: dist.get_rank(group)])
    return slice(start, start + lengths[dist.get_rank(group)])


def same_everywhere(x: Tensor, group: dist.ProcessGroup) -> None:
    """The tensor has the same bits on every rank."""
    import torch

    found = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, x.contiguous(), group=group)
    for other in found:
        torch.testing.assert_close(other, found[0], rtol=0, atol=0, equal_nan=True)
