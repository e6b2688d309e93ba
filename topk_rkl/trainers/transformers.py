"""The loss in the Trainer of transformers, through its `compute_loss_func`.

trainer = Trainer(student, args, train_dataset=data, compute_loss_func=distill(student, teacher, k=32))
"""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from topk_rkl import checks
from topk_rkl.causal import as_weighted
from topk_rkl.divergence import REVERSE_KL
from topk_rkl.linear_loss import linear_causal_topk_reverse_kl
from topk_rkl.loss import causal_topk_reverse_kl
from topk_rkl.objective import require_objective
from topk_rkl.recipe.weighting import aggregate
from topk_rkl.support import Support
from topk_rkl.trainers.head_loss import HeadTopK, require_told, require_unrounded, within_head
from topk_rkl.trainers.heads import Head, head_of, unwrapped

Entry = Literal["hidden", "logits"]
Inputs = dict[str, Any]  # what a model is called with, by name
Asked = Callable[[Inputs], Support | Tensor]
COLUMNS = "teacher_ids", "teacher_log_probs", "teacher_logits"  # of a batch with a stored teacher: Support.as_dict()
NOT_OF_A_TEACHER = "num_items_in_batch", "use_cache", "past_key_values"
HOOKS = "_topk_rkl_hooks"


def distill(
    student: nn.Module,
    teacher: nn.Module | Asked | None = None,
    *,
    k: int | None = None,
    entry: Entry = "hidden",
    weights: Callable[[Tensor], Tensor] | None = None,  # (B, T) labels -> (B, T)
    **options: Any,
) -> "Distillation":
    """A `compute_loss_func` for the Trainer: `causal_topk_reverse_kl` between the student it trains and a teacher.

    The Trainer gives such a function no inputs. A forward pre-hook on the student sees them, and asks the teacher.

    Args:
        student: the model that the Trainer is given. A second call with the same model replaces the first.
        teacher: a causal language model with the student's tokens; it is frozen, put into eval mode, and moved to the
            device of the inputs. Or a function that gives a Support of (B, T, K) or (B, T - 1, K), or logits
            (B, T, V_teacher), for the student's inputs; it runs under torch.no_grad. None takes the Support from the
            batch, as `Support.from_dict` does: columns teacher_ids and teacher_log_probs, or teacher_logits.
        k: how many tokens to compare, where the teacher has logits.
        entry: "hidden" takes the loss of a training step within the student's head, and no logits are made. "logits"
            takes it from the logits, as evaluation always does.
        weights: gives a factor per label, bool or float. The loss is divided by the number of labels all the same.
        **options: those of `topk_divergence`: divergence, mass, temperature, teacher_temperature.

    Raises:
        TypeError, ValueError: an argument is not as above, or a head has logits that its weight does not tell.
    """
    checks.require_one_of("entry", entry, get_args(Entry))
    k, mass = checks.require_count("k", k), options.get("mass", "renormalized")
    require_objective(options.get("divergence", REVERSE_KL), mass)
    if getattr(getattr(unwrapped(student), "config", None), "is_encoder_decoder", False):
        raise TypeError("student is an encoder-decoder, whose labels are not shifted; the loss is for decoders alone")
    if entry == "hidden":
        _head_of_student(student)
    if isinstance(teacher, nn.Module):
        asked, k = _asked_of_model(teacher, k, normalize=mass != "renormalized"), None
    elif teacher is None:
        if k is not None:
            raise ValueError(f"k is {k} without a teacher, whose columns in the batch have K tokens; leave k out")
        asked = _stored
    elif callable(teacher):
        asked = torch.no_grad()(teacher)
    else:
        raise TypeError(f"teacher is {checks.kind_of(teacher)}; it must be a model, a function of its inputs, or None")
    loss = Distillation(asked, entry, weights, {"k": k, **options})
    for hook in vars(student).pop(HOOKS, ()):
        hook.remove()
    before = student.register_forward_pre_hook(loss.before, with_kwargs=True)
    vars(student)[HOOKS] = before, student.register_forward_hook(loss.after, always_call=True)
    return loss


class Distillation:
    """What `distill` gives: loss = distillation(outputs, labels, num_items_in_batch), after a call of the student."""

    def __init__(
        self,
        asked: Asked,
        entry: Entry,
        weights: Callable[[Tensor], Tensor] | None,
        options: dict[str, Any],  # of the loss
    ) -> None:
        self.asked, self.entry, self.weights, self.options = asked, entry, weights, options
        self._inputs: Inputs | None = None  # of the student's last call
        self._in_head: _InHead | None = None  # of a training step from hidden states
        self._replaced = ExitStack()  # the head's forward, while the student runs
        self._told: Head | None = None  # a head whose scale and cap are those of the student's forward

    @torch.compiler.disable
    def before(self, student: nn.Module, args: tuple[Any, ...], inputs: Inputs) -> tuple[tuple[Any, ...], Inputs]:
        """The forward pre-hook of the student: keeps its inputs, and replaces its head in a training step."""
        if getattr(student, "_is_replica", False):
            raise RuntimeError(
                "the student is a replica of torch.nn.DataParallel, which the Trainer takes for several GPUs in one "
                "process; start a process per GPU with torchrun or accelerate launch"
            )
        if "shift_labels" in inputs:
            raise ValueError(
                "the batch has shift_labels, as context parallelism makes them, but the loss shifts labels itself; "
                "leave them out of the batch, and context parallelism out of the Trainer"
            )
        self._inputs, self._in_head = None, None
        if "labels" not in inputs:  # which the Trainer takes out
            self._inputs = {name: x for name, x in inputs.items() if name not in NOT_OF_A_TEACHER}
            if self.entry == "hidden" and student.training and torch.is_grad_enabled():
                head = _head_of_student(student)
                self._in_head = _InHead(head, self.asked(self._inputs), self.options, probed=head != self._told)
                self._in_head.taken = self._replaced.enter_context(within_head(head.module, self._in_head.forward))
        return args, {name: x for name, x in inputs.items() if name not in COLUMNS}

    @torch.compiler.disable
    def after(self, *_: Any) -> None:
        """The forward hook of the student, after an error too."""
        self._replaced.close()

    def __call__(
        self,
        outputs: Any,
        labels: Tensor | None,  # (B, T)
        num_items_in_batch: float | Tensor | None = None,
    ) -> Tensor:  # ()
        """The sum over the labels, divided by `num_items_in_batch`, or by their number where it is None."""
        if self._inputs is None:
            raise RuntimeError(
                "the student has not run without labels since the last loss; give distill the model that the Trainer "
                "trains, such as the one that get_peft_model returns, and call that whole model, not a part of it"
            )
        if labels is None:
            raise ValueError("the batch has no labels; give it some, with -100 where no token counts")
        inputs, in_head, self._inputs, self._in_head = self._inputs, self._in_head, None, None
        factors = None if self.weights is None else self.weights(labels)
        if in_head is None:
            return causal_topk_reverse_kl(
                outputs.logits, self.asked(inputs), labels, num_items_in_batch=num_items_in_batch, weights=factors,
                **self.options,
            )  # fmt: skip
        per_token = in_head.per_token(outputs)
        self._told = in_head.head
        given = as_weighted(per_token.unsqueeze(-1), "outputs", None, labels, num_items_in_batch, 1, -100, factors, {})
        loss = aggregate(per_token, given["weights"], denominator=given["denominator"])
        returned: Tensor = outputs.logits
        return loss + 0 * returned[..., -1].sum()  # whose hooks DDP with static_graph, and FSDP1, need


class _InHead:
    """A step whose loss is taken within the head: of every position, since the Trainer tells the labels afterwards."""

    def __init__(self, head: Head, teacher: Support | Tensor, options: dict[str, Any], probed: bool) -> None:
        self.head, self.teacher, self.options, self.probed = head, teacher, options, probed
        self.taken: list[Tensor] = []  # by `within_head`
        self.positions = torch.Size()
        self.logits: Tensor | None = None  # (1, 1, V), of one position, before scale and cap

    def forward(
        self,
        hidden: Tensor,  # (B, T, H)
    ) -> Tensor:  # (1, 1, V + 1 + B T): the logits of one position if probed, 0, the losses
        self.positions = hidden.shape[:-1]
        labels = torch.zeros(self.positions, dtype=torch.long, device=hidden.device)
        given = {"teacher": self.teacher, "labels": labels, "reduction": "none", **self.head.student, **self.options}
        losses = linear_causal_topk_reverse_kl(hidden, **given).flatten()
        parts = [losses.new_zeros(1), losses]
        if not torch.compiler.is_compiling() and self.probed:
            with torch.no_grad():
                self.logits = nn.Linear.forward(self.head.module, hidden[:1, :1])  # type: ignore[arg-type]
            parts.insert(0, self.logits.flatten())
        return torch.cat(parts).view(1, 1, -1)

    def per_token(self, outputs: Any) -> Tensor:  # (B, T)
        """The losses, once the model's logits are found to be those that the head tells."""
        if len(self.taken) != 1:
            raise RuntimeError(
                f"the student ran its head {len(self.taken)} times in one forward pass, not once; use "
                "distill(..., entry='logits')"
            )
        require_unrounded(self.taken[0])
        if self.logits is not None:
            require_told(self.head, self.logits, outputs.logits[..., : self.logits.shape[-1] + 1].detach())
        (taken,) = self.taken
        return taken[0, 0, -self.positions.numel() :].view(self.positions)


def _head_of_student(student: nn.Module) -> Head:
    try:
        return head_of(student)
    except TypeError as error:
        raise TypeError(f"{error}. The call that does so is distill(student, teacher, entry='logits')") from error


def _asked_of_model(teacher: nn.Module, k: int | None, normalize: bool) -> Asked:
    if k is None:
        raise ValueError("k is None with a model for teacher; say how many of its tokens are compared, such as k=32")
    try:
        head_topk = HeadTopK(teacher.eval().requires_grad_(False), k, normalize=normalize)
    except TypeError as error:
        remedy = "The teacher's logits are distill(student, lambda inputs: teacher(**inputs).logits, k=...)"
        raise TypeError(f"{error}. {remedy}") from error

    def asked(inputs: Inputs) -> Support:
        given = {name: x for name, x in inputs.items() if name not in COLUMNS}
        device = next(x.device for x in given.values() if isinstance(x, Tensor))
        if next(teacher.parameters()).device != device:
            teacher.to(device)
        return head_topk(**given, use_cache=False)

    return asked


def _stored(inputs: Inputs) -> Support:
    try:
        return Support.from_dict(inputs)
    except ValueError as error:
        raise ValueError(
            f"{error}. The Trainer drops columns that the model's forward does not name: pass "
            "TrainingArguments(remove_unused_columns=False) and a data_collator that keeps them"
        ) from error
