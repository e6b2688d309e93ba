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
        pad_token_id: at padding of input_ids.
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
        self.pad_token_id = checks.require_integer("pad_token_id", pad_token_id)
        if not 0 <= self.pad_token_id <= checks.LARGEST:
            raise ValueError(f"pad_token_id is {pad_token_id}; it must be an id; where a tokenizer has none, use 0")
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
        slots = *shape, max(row.support.k for row in rows)
        ids, log_probs = torch.full(slots, -1, dtype=torch.int32), torch.full(slots, -torch.inf)
        for i, (row, n) in enumerate(zip(rows, lengths)):
            input_ids[i, :n] = row.input_ids[:n]
            attention_mask[i, :n] = 1
            labels[i, :n] = row.input_ids[:n]
            if row.loss_mask is not None:
                labels[i, :n].masked_fill_(~row.loss_mask[:n], self.label_pad)
            ids[i, :n, : row.support.k] = row.support.ids[:n]
            log_probs[i, :n, : row.support.k] = row.support.log_probs[:n]
        support = Support(ids, log_probs, all(row.support.normalized for row in rows))
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels, **support.as_dict()}
