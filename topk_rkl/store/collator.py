"""Rows of a set as a padded batch, with the names that the losses and the adapters take."""

from collections.abc import Sequence

import torch
from torch import Tensor

from topk_rkl import checks
from topk_rkl.store.rows import Row
from topk_rkl.support import Support


class Collator:
    """A `collate_fn` of a DataLoader, or `data_collator` of the Trainer: rows become tensors, padded on the right.

    The batch is for `distill(student)` without a teacher, and for `causal_topk_reverse_kl(logits,
    Support.from_dict(batch), batch["labels"])`.

    Args:
        pad_token_id: at padding of input_ids. Where a tokenizer has none, any id does, such as its eos_token_id.
        label_pad: the label at padding, and where a row's loss_mask is False.
        max_length: longer rows lose what comes after it.
        pad_to_multiple_of: the length of a batch is a multiple of it.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """

    def __init__(
        self,
        pad_token_id: int,
        *,
        label_pad: int = -100,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
    ) -> None:
        if pad_token_id is None or not 0 <= checks.require_integer("pad_token_id", pad_token_id) <= checks.LARGEST:
            raise ValueError(
                f"pad_token_id is {pad_token_id}; it must be an id: where a tokenizer has none, any does, such as 0, "
                "since padding has no label"
            )
        self.pad_token_id = int(pad_token_id)
        self.label_pad = checks.require_integer("label_pad", label_pad)
        if not -checks.LARGEST <= self.label_pad < 0:
            raise ValueError(f"label_pad is {label_pad}; it must be negative, such as -100: an id would be a label")
        self.max_length = checks.require_count("max_length", max_length)
        self.pad_to_multiple_of = checks.require_count("pad_to_multiple_of", pad_to_multiple_of)

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """The batch of B rows.

        Returns:
            input_ids, attention_mask and labels (B, T) int64; teacher_ids (B, T, K) int32, and teacher_log_probs
            (B, T, K) float32, or teacher_logits where the set holds logits. Slots at padding are empty.
        """
        checks.require_list("rows", rows, "rows")
        cut = self.max_length
        lengths = [len(row.input_ids[:cut]) for row in rows]
        multiple = self.pad_to_multiple_of or 1
        shape = len(rows), -(-max(lengths) // multiple) * multiple
        input_ids = torch.full(shape, self.pad_token_id)
        attention_mask, labels = torch.zeros_like(input_ids), torch.full(shape, self.label_pad)
        slots = *shape, _require_one_k(rows)
        ids, log_probs = torch.empty(slots, dtype=torch.int32), torch.empty(slots)
        for i, (row, n) in enumerate(zip(rows, lengths)):
            input_ids[i, :n] = row.input_ids[:n]
            attention_mask[i, :n] = 1
            labels[i, :n] = row.input_ids[:n]
            if row.loss_mask is not None:
                labels[i, :n].masked_fill_(~row.loss_mask[:n], self.label_pad)
            ids[i, :n], log_probs[i, :n] = (x[:n] for x in row.support.tensors)
            ids[i, n:], log_probs[i, n:] = -1, -torch.inf
        support = Support(ids, log_probs, all(row.support.normalized for row in rows))
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels, **support.as_dict()}


def _require_one_k(rows: Sequence[Row]) -> int:
    found = sorted({row.support.k for row in rows})
    if len(found) > 1:
        raise ValueError(f"rows have supports of K = {', '.join(map(str, found))}; a batch is of rows of one set")
    return found[0]
