"""The loss within the forward pass of the head: the one place where DDP, FSDP and ZeRO-3 all have the head whole."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from topk_rkl import checks
from topk_rkl.linear_loss import linear_causal_topk_reverse_kl, linear_teacher_topk
from topk_rkl.rows import result_dtype
from topk_rkl.support import Support
from topk_rkl.trainers.heads import Head, head_of

__all__ = ["HeadLoss", "HeadTopK", "within_head"]

ROUNDINGS = 4  # of the logits' dtype, that a model's logits may differ by from those that its config tells


@contextlib.contextmanager
def within_head(
    module: nn.Module,
    function: Callable[[Tensor], Tensor],  # of (..., H)
) -> Iterator[list[Tensor]]:
    """Within the block the module's forward is `function`; the list then holds what each call gave.

    The results are taken by a forward hook, the last of the module's hooks: those of FSDP1 and ZeRO-3 have then seen
    them, and gather the parameters again for the backward pass.
    """
    taken: list[Tensor] = []
    before = vars(module).get("forward")
    module.forward = function
    hook = module.register_forward_hook(lambda *call: taken.append(call[-1]))
    try:
        yield taken
    finally:
        hook.remove()
        del module.forward
        if before is not None:
            module.forward = before


class _WithinHead:
    """A model whose head gives something else than logits, for one call."""

    def __init__(self, model: nn.Module, head: Head | None, options: dict[str, Any]) -> None:
        self.model, self.head, self.options = model, head_of(model) if head is None else head, options
        self._told = False  # whether the model's logits are those that `head` tells

    def _run(
        self,
        inputs: dict[str, Any],  # of the model
        function: Callable[[Tensor], Tensor],  # (B, T, H) -> (): what the head gives
        of_loss: bool,
    ) -> Tensor:  # ()
        """Runs the model. Its first run makes the logits of one position too, and compares them."""
        module, seen = self.head.module, []
        forward = type(module).forward

        def within(hidden: Tensor) -> Tensor:  # (B, T, H) -> (1, 1, V + 1), the result last, or (1, 1, 1)
            given = function(hidden)
            if self._told or torch.compiler.is_compiling():
                return given.view(1, 1, 1)
            with torch.no_grad():
                seen.append(forward(module, hidden[:1, :1]))
            return torch.cat((seen[-1], given.view(1, 1, 1)), -1)

        with within_head(module, within) as taken:
            outputs = self.model(**inputs)
        if len(taken) != 1:
            raise RuntimeError(
                f"the model ran its head {len(taken)} times in one forward pass, not once; take the loss from its "
                "logits with topk_reverse_kl"
            )
        if of_loss:
            require_unrounded(taken[0])
        logits = _logits(outputs)
        if seen:
            require_told(self.head, seen[0], logits.detach())
            self._told = True
        # FSDP1 hangs its hooks on what the model returns. A sum of nothing is 0 where 0 times a loss of inf is NaN.
        return taken[0][..., -1].view(()) + logits[..., :0].sum()


class HeadLoss(_WithinHead):
    """`linear_causal_topk_reverse_kl` of a model of transformers, taken within its head: no logits are made.

        head_loss = HeadLoss(student)
        loss = head_loss(support, labels, input_ids=input_ids, attention_mask=attention_mask)

    The model may be within DDP, FSDP1, FSDP2 or DeepSpeed ZeRO-3: their forward passes run as ever, and the head is
    whole where the loss is taken.

    Args:
        model: a causal language model as `head_of` takes it, wrapped as it is trained.
        head: the head of another model, as Head(module, logit_scale, softcap); None asks `head_of`.
        **options: those of `linear_topk_divergence`: divergence, mass, k, temperature, teacher_temperature and so on.

    Raises:
        TypeError: see `head_of`.
        RuntimeError: at the first call, the logits of one position are not those of the head's scale and cap.
    """

    def __init__(self, model: nn.Module, *, head: Head | None = None, **options: Any) -> None:
        super().__init__(model, head, options)
        checks.require_one_of("reduction", options.get("reduction", "mean"), ("mean", "sum"))

    def __call__(
        self,
        teacher: Tensor | Support,  # (B, T, V_teacher) logits, or a Support of (B, T, K) or (B, T - 1, K)
        labels: Tensor,  # (B, T)
        *,
        num_items_in_batch: float | Tensor | None = None,
        world_size: int = 1,
        weights: Tensor | None = None,  # (B, T)
        **inputs: Any,
    ) -> Tensor:  # ()
        """The loss of the model on `inputs`; see `causal_topk_reverse_kl` for the other arguments."""
        if not isinstance(num_items_in_batch, Tensor | None):  # of which torch.compile would compile each number anew
            checks.require_denominator(num_items_in_batch, None, "num_items_in_batch")
            device = getattr(labels, "device", None)
            num_items_in_batch = torch.full((), float(num_items_in_batch), dtype=torch.float64, device=device)
        counted = {"num_items_in_batch": num_items_in_batch, "world_size": world_size, "weights": weights}

        def loss(hidden: Tensor) -> Tensor:  # (B, T, H) -> ()
            given = {"labels": labels, "teacher": teacher, **counted, **self.head.student, **self.options}
            return linear_causal_topk_reverse_kl(hidden, **given)

        return self._run(inputs, loss, of_loss=True)


class HeadTopK(_WithinHead):
    """`linear_teacher_topk` of a model of transformers, taken within its head: no logits are made.

        support = HeadTopK(teacher, k=32)(input_ids=input_ids, attention_mask=attention_mask)

    Args:
        model, head: see `HeadLoss`.
        k: 1 <= k <= V.
        **options: those of `linear_teacher_topk`: normalize, chunk_rows, logits_dtype; logit_scale and softcap take
            the place of the head's.
    """

    def __init__(self, model: nn.Module, k: int, *, head: Head | None = None, **options: Any) -> None:
        super().__init__(model, head, {"k": k, **options})

    @torch.no_grad()
    def __call__(self, **inputs: Any) -> Support:  # of (B, T, K)
        """The support of every position of `inputs`."""
        found: list[Support] = []

        def select(hidden: Tensor) -> Tensor:  # (B, T, H) -> ()
            found.append(linear_teacher_topk(hidden.detach(), **{**self.head.teacher, **self.options}))
            return hidden.new_zeros(())

        self._run(inputs, select, of_loss=False)
        return found[0]


def require_unrounded(taken: Tensor) -> None:
    """Refuses losses that a hook of the head has cast, as FSDP2 does with an output_dtype."""
    if torch.finfo(taken.dtype).bits < 32:
        raise RuntimeError(
            f"the head's losses were cast to {taken.dtype}, as MixedPrecisionPolicy(output_dtype=...) of fully_shard "
            "does; leave output_dtype out of the policy of a head in a group of its own"
        )


def require_told(
    head: Head,
    z: Tensor,  # (1, 1, V) hidden @ weight.T + bias
    logits: Tensor,  # (1, 1, V + 1) what the model made of them, and of one number more
) -> None:
    """Refuses a head whose scale and cap are not what the model's forward does."""
    want = head.logit_scale * z.to(result_dtype(z))
    if head.softcap is not None:
        want = head.softcap * torch.tanh(want / head.softcap)
    eps = max(torch.finfo(x.dtype).eps for x in (z, logits))
    if logits.shape[-1] != z.shape[-1] + 1 or logits.numel() != z.numel() + 1:
        wrong = f"of shape {tuple(logits.shape)} where the head has {z.shape[-1]} tokens"
    elif (far := (logits[..., :-1] - want).abs().max()) > ROUNDINGS * eps * want.abs().max():
        wrong = f"up to {float(far):.3g} away"
    else:
        return
    raise RuntimeError(
        f"the model's logits are not those of logit_scale={head.logit_scale} and softcap={head.softcap}, "
        f"but {wrong}; pass head=Head(module, logit_scale, softcap) with what its forward does to them, or take "
        "the loss from its logits with topk_reverse_kl"
    )


def _logits(outputs: Any) -> Tensor:
    """What a model returns for logits."""
    if isinstance(outputs, Tensor):
        return outputs
    logits = outputs["logits"] if isinstance(outputs, dict) else getattr(outputs, "logits", None)
    if not isinstance(logits, Tensor):
        raise TypeError(f"the model returned {type(outputs).__qualname__} without logits; pass return_dict=True")
    return logits
