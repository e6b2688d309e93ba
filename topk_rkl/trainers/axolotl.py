"""axolotl: its knowledge-distillation plugin with this loss, taken within the head.

plugins: [topk_rkl.trainers.axolotl.TopKPlugin]  # in the place of axolotl.integrations.kd.KDPlugin

Written after axolotl 0.19.0, in whose trainer it ran on a CPU.
"""

from typing import Any

from axolotl.integrations.kd import KDPlugin
from axolotl.integrations.kd.trainer import AxolotlKDTrainer
from torch import Tensor

from topk_rkl.loss import Support, generalized_jsd
from topk_rkl.trainers.head_loss import HeadLoss

FIELDS = "target_token_ids", "target_logprobs", "target_mask"  # (B, T, K) each, of axolotl's collators


class TopKPlugin(KDPlugin):
    """axolotl's arguments, collators and callbacks, with another trainer where `kd_trainer` is true.

    Raises:
        ValueError: axolotl would change the teacher's temperature between steps, and not the student's.
    """

    def get_trainer_cls(self, cfg: Any) -> type[AxolotlKDTrainer] | None:
        if cfg.kd_trainer and cfg.kd_temperature_min is not None:
            raise ValueError(
                f"kd_temperature_min is {cfg.kd_temperature_min}: the collator's temperature would follow it, and the "
                "student's stay at kd_temperature; leave it out"
            )
        return TopKTrainer if cfg.kd_trainer else None


class TopKTrainer(AxolotlKDTrainer):
    """kd_alpha * kd_temperature**2 times the loss that `kd_beta` names: 0 forward KL, 1 reverse KL, between JSD.

    The factor multiplies value and gradient alike, where axolotl's loss multiplies the value alone. The student is
    renormalised on the teacher's tokens, which `kd_normalize_topk` must say. Ranks have the gradient of one process.

    Raises:
        ValueError: an argument of axolotl asks for more than this loss.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        given = self.args
        if given.kd_ce_alpha:
            raise ValueError(
                f"kd_ce_alpha is {given.kd_ce_alpha}, but the head makes no logits for a cross-entropy; set it to 0"
            )
        if not given.kd_normalize_topk:
            raise ValueError(
                f"kd_normalize_topk is {given.kd_normalize_topk}: the student's mass outside the teacher's tokens "
                "would be left out of the loss, which is unstable; set it to true"
            )
        self._factor = given.kd_alpha * given.kd_temperature**2  # axolotl refuses None for either
        self._options: dict[str, Any] = {
            "divergence": generalized_jsd(given.kd_beta or 0),
            "temperature": given.kd_temperature,
            "teacher_temperature": 1.0,  # axolotl's collators give log-probs at kd_temperature
        }
        self._head_loss: HeadLoss | None = None

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:  # (), or with outputs
        """Position t counts where labels[:, t + 1] does, on the tokens that `target_mask` names.

        The Trainer counts the items of all ranks, and leaves it to this function that their gradients are averaged.
        """
        inputs = {name: value for name, value in inputs.items() if name != "num_items_in_batch"}
        labels, teacher = inputs.pop("labels"), support_of(*map(inputs.pop, FIELDS))
        if self._head_loss is None:
            require_next_tokens(teacher, labels)
        if self._head_loss is None or self._head_loss.model is not model:
            self._head_loss = HeadLoss(model, **self._options)
        ranks = 1
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            ranks = self.accelerator.num_processes // self.get_tp_size()
        counted = {"num_items_in_batch": num_items_in_batch, "world_size": ranks}
        loss = self._factor * self._head_loss(teacher, labels, **counted, **inputs)
        return (loss, {"loss": loss}) if return_outputs else loss


def support_of(
    ids: Tensor,  # (B, T, K) int64
    log_probs: Tensor,  # (B, T, K)
    mask: Tensor,  # (B, T, K), 0 where the slot is padding
) -> Support:  # of (B, T, K)
    """What axolotl's collators give, which pad with any id and with -1e9 or -inf."""
    return Support(ids.masked_fill(mask == 0, -1), log_probs)


def require_next_tokens(
    teacher: Support,  # of (B, T, K)
    labels: Tensor,  # (B, T)
) -> None:
    """Refuses a teacher whose tokens at position t are those of label t and not of label t + 1."""
    own = (teacher.ids == labels[..., None]).any(-1).sum()
    following = (teacher.ids[:, :-1] == labels[:, 1:, None]).any(-1).sum()
    if own > following:
        raise ValueError(
            f"the teacher's tokens have {int(own)} labels of their own position and {int(following)} of the next, "
            "which a position predicts; shift target_token_ids, target_logprobs and target_mask left by one position"
        )
