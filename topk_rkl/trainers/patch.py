"""One line for a trainer that exists: `topk_rkl.patch(trainer, k=32)`."""

from typing import Any

from topk_rkl import checks

LOOPS = "for a loop or another framework see HeadLoss in topk_rkl.trainers.head_loss"


def patch(
    trainer: Any,
    *,
    k: int = 32,
    teacher: Any = None,
    **options: Any,
) -> Any:
    """Gives a trainer that exists this loss, prints what was done to it, and returns it.

        trainer = topk_rkl.patch(GKDTrainer(student, teacher, args, train_dataset=dataset), k=32)

    Args:
        trainer: one of TRL's distillation trainers, which becomes its class in `topk_rkl.trainers.trl`. Or the Trainer
            of transformers or TRL's SFTTrainer, which get a `compute_loss_func` of `distill`; see
            `topk_rkl.trainers.transformers`. A trainer with another `compute_loss` of its own is refused.
        k: how many of the teacher's tokens are compared.
        teacher: for the Trainer and SFTTrainer alone, as `distill` takes it. TRL's others have one.
        **options: those of `compare_top_k`, or of `distill`.

    Raises:
        TypeError: the trainer is none of these; it is then as it was.
        ValueError: an option is not as above, or the trainer already has a `compute_loss_func`.
    """
    kind = type(trainer)
    if kind.__module__.startswith("trl.") and kind.__name__ in _of_trl():
        from topk_rkl.trainers import trl

        if teacher is not None:
            raise ValueError(f"teacher is given, but {kind.__name__} has its own; leave teacher out")
        trl.patch(trainer, k=k, **options)
        _tell(
            trainer, f"is a {type(trainer).__name__} now, and compares the teacher's top {k} in place of its own loss"
        )
        return trainer
    base = _asks_a_function(kind)
    if base is None:
        raise TypeError(
            f"trainer is a {kind.__module__}.{kind.__qualname__}; it must be the Trainer of transformers, or one of "
            f"TRL's SFTTrainer, {', '.join(_of_trl())}; {LOOPS}"
        )
    if trainer.compute_loss_func is not None:
        raise ValueError(
            f"trainer has a compute_loss_func, {checks.kind_of(trainer.compute_loss_func)}; this loss would replace "
            "it: set trainer.compute_loss_func = None first"
        )
    from topk_rkl.trainers.transformers import distill

    stored = teacher is None  # whose columns have K tokens
    loss = distill(trainer.model, teacher, k=None if stored else k, **options)
    trainer.compute_loss_func = loss
    where = "the student's logits" if loss.entry == "logits" else "within the student's head, no logits made"
    whose = "the batch's teacher_ids and teacher_log_probs" if stored else f"the teacher's top {k}"
    _tell(trainer, f"asks distill for its loss: {whose}, {where}, divided by num_items_in_batch")
    return trainer


def _of_trl() -> list[str]:
    from topk_rkl.trainers.trl import TRAINERS

    return [base for _, _, base in TRAINERS.values()]


def _asks_a_function(kind: type) -> type | None:
    """The class whose compute_loss the trainer has, if that one asks `compute_loss_func`."""
    own = next((base for base in kind.__mro__ if "compute_loss" in vars(base)), None)
    asks = {("transformers.trainer", "Trainer"), ("trl.trainer.sft_trainer", "SFTTrainer")}
    return own if own is not None and (own.__module__, own.__name__) in asks else None


def _tell(trainer: Any, what: str) -> None:
    """Once, and not per rank."""
    if getattr(trainer, "is_world_process_zero", lambda: True)():
        print(f"topk_rkl: the trainer {what}.")
