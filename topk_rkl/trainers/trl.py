"""TRL's distillation trainers with the loss on the teacher's top K; each is made, and its TRL module read, when asked.

from topk_rkl.trainers.trl import TopKGKDTrainer

trainer = TopKGKDTrainer("student", "teacher", GKDConfig("out", beta=1.0), train_dataset=dataset, k=32)

`patch` makes one of them of a trainer that exists. A trainer of your own takes a mix-in instead: `class Mine(TopKJSD,
MyGKDTrainer)`. The losses alone, as functions of TRL's signatures, are in `topk_rkl.trainers.trl_losses`.
"""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from topk_rkl.diagnostics import OF_TRUE_LOG_PROBS, topk_diagnostics
from topk_rkl.divergence import REVERSE_KL, Mass
from topk_rkl.loss import Support, teacher_topk
from topk_rkl.recipe.weighting import special_token_mask
from topk_rkl.trainers import trl_losses
from topk_rkl.trainers.trl_losses import Compared

_Trainer: Any = object  # TRL's trainer, which follows the mix-in in the order of resolution
DIAGNOSTICS = ("student_entropy", "student_mass", "overlap_count")


class TopKMixin(_Trainer):
    """What the trainers share: the options of `compare_top_k`, and diagnostics among the logs."""

    _options: tuple[str, ...] = ("k", "divergence", "mass", "special_token_ids", "diagnostics")
    _beta = "beta"  # what the configuration calls it, "" where TRL allows one value alone

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Takes what TRL's trainer takes, and by keyword what `compare_top_k` does."""
        options = {name: kwargs.pop(name) for name in self._options if name in kwargs}
        super().__init__(*args, **kwargs)
        self.compare_top_k(**options)

    def compare_top_k(
        self,
        *,
        k: int = 32,
        divergence: Compared | None = None,
        mass: Mass = "renormalized",
        special_token_ids: Iterable[int] = (),
        diagnostics: Sequence[str] = DIAGNOSTICS,
    ) -> None:
        """Sets what the loss compares.

        Args:
            k: how many of the teacher's tokens; written over the configuration's own number where it has one.
            divergence: see `topk_divergence`; None is reverse KL, and warns if the configuration's `beta` says another.
                "beta" follows the configuration: forward KL at 0, reverse KL at 1, `generalized_jsd(beta)` between.
            mass: "renormalized", "tail", "raw" or "raw_stop_grad"; see `topk_divergence`.
            special_token_ids: ids whose first occurrence in each completion is left out, as by `special_token_mask`.
            diagnostics: names of `topk_rkl.diagnostics`, logged as "topk_rkl/student_mass" and so on: means over the
                tokens that count. They read the student's logits once more; () costs nothing.

        Raises:
            TypeError, ValueError: an argument is not as above, or the configuration chooses another loss.
        """
        self.divergence: Compared = REVERSE_KL if divergence is None else divergence
        trl_losses.require_options(self.divergence, mass, k, diagnostics)
        self.k, self.mass, self.diagnostics = k, mass, tuple(diagnostics)
        self.special_token_ids = tuple(special_token_ids)
        name = self._beta
        if divergence is None and name and getattr(self.args, name) != 1:
            warnings.warn(
                f"{name} is {getattr(self.args, name)}, but this loss is reverse KL, which is {name}=1.0; pass "
                f'{name}=1.0 in the configuration, or divergence="beta" to follow it',
                stacklevel=2,
            )

    def _kept(self, labels: Tensor) -> Tensor:  # (B, T) -> (B, T) bool
        """Which labels count: neither -100 nor a special token."""
        kept = labels != -100
        return kept & special_token_mask(labels, self.special_token_ids) if self.special_token_ids else kept

    def _log_diagnostics(self, sums: dict[str, Tensor], count: Tensor) -> None:
        """The means over all ranks, among the trainer's own metrics. Every rank calls this."""
        if not sums:
            return
        values = torch.stack([x.double() for x in (*sums.values(), count)])  # (names + 1,)
        *totals, n = self.accelerator.gather(values[None]).sum(0).tolist()
        if n > 0:
            metrics = self._metrics["train" if self.model.training else "eval"]
            for name, total in zip(sums, totals):
                metrics[f"topk_rkl/{name}"].append(total / n)

    def _watch(
        self,
        student_logits: Tensor,  # (B, T, V)
        teacher: Tensor | Support,  # (B, T, V), or (B, T, K)
        kept: Tensor,  # (B, T) bool
        temperature: float,
    ) -> None:
        """Logs the diagnostics of the tokens that count."""
        k = None if isinstance(teacher, Support) else self.k
        if self.diagnostics:
            watched = topk_diagnostics(student_logits, teacher, self.diagnostics, k=k, temperature=temperature)
            self._log_diagnostics({name: x[kept].sum() for name, x in watched.items()}, kept.sum())


class TopKJSD(TopKMixin):
    """For GKDTrainer, GOLDTrainer and IWOPDTrainer: replaces their public `generalized_jsd_loss`."""

    def compare_top_k(self, **options: Any) -> None:
        super().compare_top_k(**options)
        if getattr(self.args, "use_uld_loss", False):
            raise ValueError("use_uld_loss is True, and that loss has no top K; leave it out of GOLDConfig")
        if getattr(self.args, "distillation_objective", "jsd") != "jsd":
            raise ValueError(
                f"distillation_objective is {self.args.distillation_objective!r}, a loss of sampled tokens; pass "
                'distillation_objective="jsd" in IWOPDConfig'
            )
        if getattr(self.args, "use_teacher_server", False):
            raise ValueError("use_teacher_server is True; TopKServerDistillationTrainer has a teacher on a server")
        if hasattr(self, "loss_top_k"):  # of IW-OPD, which goes another way where it is 1
            self.args.loss_top_k = self.loss_top_k = self.k
        self._loss = trl_losses.generalized_jsd_loss(self.k, divergence=self.divergence, mass=self.mass)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Tensor | float | None = None
    ) -> Any:
        if num_items_in_batch is not None and self.model.training:
            num_items_in_batch = self._items(num_items_in_batch)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _items(self, counted: Tensor | float) -> Tensor | float:
        """What a rank divides by. TRL divides by the tokens of all ranks, whose gradients are then averaged."""
        ranks: int = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return counted / ranks

    def generalized_jsd_loss(
        self,
        student_logits: Tensor,  # (B, T, V)
        teacher_logits: Tensor,  # (B, T, V)
        labels: Tensor,  # (B, T)
        beta: float = 0.5,
        temperature: float = 1.0,
        reduction: str = "batchmean",
        **options: Any,
    ) -> Tensor:  # ()
        kept = self._kept(labels)
        selected = self.mass == "renormalized" and not {*OF_TRUE_LOG_PROBS} & {*self.diagnostics}  # once for both
        teacher = teacher_topk(teacher_logits, self.k) if selected else teacher_logits
        self._watch(student_logits, teacher, kept, temperature)
        labels = labels.masked_fill(~kept, -100)
        return self._loss(student_logits, teacher, labels, beta, temperature, reduction, **options)


class TopKBuffered(TopKJSD):
    """For GOLDTrainer and IWOPDTrainer, which fill a buffer with the micro-batches of an optimizer step.

    Divides by the tokens of that buffer. TRL divides by those of the dataset's answers, times
    gradient_accumulation_steps: its loss and gradient are that many times too small.
    """

    def _items(self, counted: Tensor | float) -> Tensor | float:
        buffered = [x.get("labels") for x in self._buffered_inputs]
        if any(labels is None for labels in buffered):  # a picture model makes them when a batch is due
            return super()._items(counted)
        count = sum(self._kept(labels[:, 1:]).sum() for labels in buffered)  # no logit predicts the first
        per_rank: Tensor = self.accelerator.gather(count).sum().clamp(min=1) / self.accelerator.num_processes
        return per_rank


class TopKGKD(TopKJSD):
    """For GKDTrainer, which samples with top_p = 1 whatever its configuration says.

    `top_p` of the rollouts is an option here. The other trainers have it in their configuration.
    """

    _options = (*TopKMixin._options, "top_p")

    def compare_top_k(self, *, top_p: float | None = None, **options: Any) -> None:
        super().compare_top_k(**options)
        if top_p is not None:
            self.generation_config.top_p = self.generation_kwargs["top_p"] = top_p


class TopKDistillation(TopKMixin):
    """For DistillationTrainer: replaces the private `_chunked_divergence_loss` for the time of a loss."""

    def compare_top_k(self, **options: Any) -> None:
        super().compare_top_k(**options)
        self._watched: list[dict[str, Tensor]] = []
        self._loss = trl_losses.chunked_divergence_loss(
            self.k, divergence=self.divergence, mass=self.mass, diagnostics=self.diagnostics, watch=self._watched.append
        )

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """A special token is one that no student wrote, such as a tool's answer; TRL's count is of the others."""
        batch: dict[str, Any] = super()._generate_and_score_completions(inputs)
        if self.special_token_ids:
            batch["tool_mask"] = batch.get("tool_mask", 1) * self._kept(batch["completion_ids"])
            count = (batch["completion_mask"] * batch["tool_mask"]).sum()
            batch["num_items_in_batch"] = self.accelerator.gather(count).sum()
        return batch

    def _compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        module = import_module("trl.trainer.distillation_trainer")
        with _replaced(module, "_chunked_divergence_loss", self._loss):
            return super()._compute_loss(*args, **kwargs)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        self._watched.clear()
        loss = super().compute_loss(*args, **kwargs)
        for watched in self._watched:  # now that the forward of DDP or FSDP is over, where no rank may wait
            count = torch.tensor(len(next(iter(watched.values()))), device=self.accelerator.device)
            self._log_diagnostics({name: x.sum() for name, x in watched.items() if name != "student_entropy"}, count)
        if "student_entropy" not in self.diagnostics:
            self._metrics["train" if self.model.training else "eval"].pop("entropy", None)  # of NaN
        return loss


class TopKServer(TopKMixin):
    """For ServerDistillationTrainer: replaces the private `_compute_server_forward_kl_loss`.

    TRL asks the server for more than one token at `beta=0.0` alone, which is therefore what the configuration must say;
    `divergence` decides all the same, and None is reverse KL.
    """

    _beta = ""

    def compare_top_k(self, **options: Any) -> None:
        super().compare_top_k(**options)
        if self.args.beta != 0:
            raise ValueError(
                f"beta is {self.args.beta}, for which TRL asks the server for one token; pass beta=0.0 in "
                "ServerDistillationConfig: divergence decides what is compared"
            )
        self.args.loss_top_k = self.loss_top_k = self.k
        self._loss = trl_losses.server_forward_kl_loss(divergence=self.divergence, mass=self.mass)

    def _compute_server_forward_kl_loss(
        self,
        teacher_result: dict[str, Tensor],  # topk_token_ids, topk_logprobs: (B, T, K)
        student_log_probs: Tensor,  # (B, T, V)
        labels: Tensor,  # (B, T)
    ) -> Tensor:  # ()
        kept = self._kept(labels)
        self._watch(
            student_log_probs, Support(teacher_result["topk_token_ids"], teacher_result["topk_logprobs"]), kept, 1.0
        )
        return self._loss(teacher_result, student_log_probs, labels.masked_fill(~kept, -100))


class TopKSDPO(TopKMixin):
    """For SDPOTrainer: replaces `compute_topk_self_distillation_loss`, as its module sees it, for the time of a loss.

    `support` is an option here: "teacher" compares the teacher's best K, "student" the student's, as TRL does.
    """

    _options = (*TopKMixin._options, "support")
    _beta = "distillation_alpha"

    def compare_top_k(self, *, support: Literal["teacher", "student"] = "teacher", **options: Any) -> None:
        super().compare_top_k(**options)
        if self.args.distillation_mode != "topk_logits" or self.args.use_teacher_server:
            raise ValueError(
                f"distillation_mode is {self.args.distillation_mode!r} and use_teacher_server "
                f'{self.args.use_teacher_server}; pass distillation_mode="topk_logits" in SDPOConfig, and no server'
            )
        if self.mass not in ("renormalized", "tail"):
            raise ValueError(f"mass is {self.mass!r}; SDPO has 'renormalized' and 'tail'")
        self.args.distillation_topk, self.args.distillation_add_tail = self.k, self.mass == "tail"
        self._loss = trl_losses.topk_self_distillation_loss(divergence=self.divergence, support=support)

    def _compute_self_distillation_loss(self, model: Any, inputs: Any, distillation_logits: Any) -> Any:
        logits = distillation_logits
        logits.loss_mask = logits.loss_mask * self._kept(logits.completion_ids)
        self._watch(logits.student_logits, logits.teacher_logits, logits.loss_mask != 0, 1.0)
        module = import_module("trl.experimental.sdpo.sdpo_trainer")
        with _replaced(module, "compute_topk_self_distillation_loss", self._loss):
            return super()._compute_self_distillation_loss(model, inputs, logits)


@contextmanager
def _replaced(module: ModuleType, name: str, value: object) -> Iterator[None]:
    """The module's function of that name is `value` within: TRL has no argument for it."""
    original = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, original)


TRAINERS = {
    "TopKDistillationTrainer": (TopKDistillation, "trl.trainer.distillation_trainer", "DistillationTrainer"),
    "TopKGKDTrainer": (TopKGKD, "trl.experimental.gkd", "GKDTrainer"),
    "TopKGOLDTrainer": (TopKBuffered, "trl.experimental.gold", "GOLDTrainer"),
    "TopKIWOPDTrainer": (TopKBuffered, "trl.experimental.iw_opd", "IWOPDTrainer"),
    "TopKSDPOTrainer": (TopKSDPO, "trl.experimental.sdpo", "SDPOTrainer"),
    "TopKServerDistillationTrainer": (
        TopKServer, "trl.experimental.server_distillation", "ServerDistillationTrainer",
    ),
}  # fmt: skip


def patch(trainer: Any, **options: Any) -> Any:
    """Makes a trainer of TRL's own that exists the one of `TRAINERS`, and returns it. It trains with this loss then.

    Args:
        trainer: a DistillationTrainer, GKDTrainer, GOLDTrainer, IWOPDTrainer, SDPOTrainer or ServerDistillationTrainer.
        options: those of `TopKMixin.compare_top_k`.

    Raises:
        TypeError, ValueError: the trainer is none of those, such as a subclass, or an option is not as it says. The
            trainer is then as it was.
    """
    kind = type(trainer)
    bases = {base: name for name, (_, _, base) in TRAINERS.items()}
    if kind.__name__ not in bases or not kind.__module__.startswith("trl."):
        raise TypeError(
            f"trainer is a {kind.__module__}.{kind.__name__}; it must be one of TRL's {', '.join(bases)}, or derive "
            "from a mix-in of topk_rkl.trainers.trl, such as TopKJSD"
        )
    trainer.__class__ = __getattr__(bases[kind.__name__])
    try:
        trainer.compare_top_k(**options)
    except Exception:
        trainer.__class__ = kind
        raise
    return trainer


def __getattr__(name: str) -> Any:
    """A trainer of `TRAINERS`, made when it is asked for: TRL takes seconds to import, and a module for each."""
    if name not in TRAINERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    mixin, module, base = TRAINERS[name]
    trainer = type(
        name, (mixin, getattr(import_module(module), base)), {"__module__": __name__, "__doc__": mixin.__doc__}
    )
    globals()[name] = trainer
    return trainer


def __dir__() -> list[str]:
    return [*globals(), *TRAINERS]
