"""Which tokens are compared: the support S of each position."""

from typing import NamedTuple

import torch
from torch import Tensor

LARGEST_LOG_SUM = 1 / 16  # of true log-probs, 0 but for rounding: that of bfloat16 is 1/32 from -8 to -16


class Support(NamedTuple):
    """The tokens on which student and teacher are compared, with the teacher's word on them.

    A slot is empty, and outside S, when its id is negative or not in the student's vocabulary, or its log-prob is -inf.
    Ids may come in any order. An id given twice is two classes, each with its own share of probability; see `unique`.
    """

    ids: Tensor
    """(..., K) int32 or int64, vocabulary ids; negative where the slot is empty."""
    log_probs: Tensor
    """(..., K) float: the teacher's log-probs or logits there, since a constant a row cancels; -inf where empty.

    Where true log-probs are needed, a position whose probabilities add up to more than 1 gives NaN: it holds logits.
    """

    def unique(self) -> "Support":
        """Keeps the first slot of each id of a row and empties the others."""
        from topk_rkl import checks  # which imports this module

        checks.slots("support", self)
        ids, slots = self.ids.sort(dim=-1, stable=True)
        repeated = torch.zeros_like(ids, dtype=torch.bool)
        repeated[..., 1:] = ids[..., 1:] == ids[..., :-1]
        repeated = torch.zeros_like(repeated).scatter(-1, slots, repeated)
        return Support(self.ids.masked_fill(repeated, -1), self.log_probs.masked_fill(repeated, -torch.inf))


def true_log_probs(
    log_probs: Tensor,  # (..., K), -inf where empty
    distinct: Tensor,  # (..., K) the same without the later slots of an id
) -> Tensor:  # (..., K)
    """The log-probs, and NaN for a position where they are logits, since their probabilities add up to more than 1."""
    return log_probs.masked_fill(distinct.double().logsumexp(-1, keepdim=True) > LARGEST_LOG_SUM, torch.nan)


torch.serialization.add_safe_globals([Support])  # torch.load(weights_only=True) then takes a saved one
