"""The LM head of a model as transformers builds it: how its logits come of hidden states."""

from typing import Any, NamedTuple

from torch import Tensor, nn

__all__ = ["Head", "head_of"]

# Config fields that multiply the logits, and the one that divides them. HyperCLOVA multiplies by that one too.
SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier")
DIVISOR, MULTIPLIES = "logits_scaling", "hyperclova"
CAPS = ("final_logit_softcapping", "logits_soft_cap")


class Head(NamedTuple):
    """Logits are softcap * tanh(logit_scale * z / softcap) with z = hidden @ weight.T + bias."""

    module: nn.Module
    """A linear layer; its weight is read at each use, since FSDP and ZeRO-3 have it whole within its forward alone."""
    logit_scale: float = 1.0
    softcap: float | None = None

    @property
    def weight(self) -> Tensor:  # (V, H)
        weight: Any = self.module.weight
        return weight  # type: ignore[no-any-return]

    @property
    def bias(self) -> Tensor | None:  # (V,)
        bias: Tensor | None = getattr(self.module, "bias", None)
        return bias

    @property
    def student(self) -> dict[str, Any]:
        """Arguments of `linear_topk_reverse_kl` and its like."""
        return {"student_weight": self.weight, "student_bias": self.bias, **self._bent}

    @property
    def teacher(self) -> dict[str, Any]:
        """Arguments of `linear_teacher_topk`, detached."""
        bias = None if self.bias is None else self.bias.detach()
        return {"teacher_weight": self.weight.detach(), "bias": bias, **self._bent}

    @property
    def _bent(self) -> dict[str, Any]:
        return {"logit_scale": self.logit_scale, "softcap": self.softcap}


def head_of(model: nn.Module) -> Head:
    """The head of a causal language model of transformers, with the logit scale and softcap that its config names.

    Args:
        model: with `get_output_embeddings()` and a `config`; alone, or within DDP, FSDP1, DeepSpeed, PEFT or
            torch.compile.

    Returns:
        Head: Cohere's logit_scale, Granite's 1 / logits_scaling, HyperCLOVA's logits_scaling, Falcon-H1's
        lm_head_multiplier, Gemma's final_logit_softcapping.

    Raises:
        TypeError: the model tells no head, or the head is no plain nn.Linear: a LoRA adapter, quantised, offloaded.
    """
    base = unwrapped(model)
    get = getattr(base, "get_output_embeddings", None)
    module = get() if callable(get) else None
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"model is {_name(base)}, which tells no output embeddings; pass its head, such as Head(model.lm_head), "
            "with logit_scale and softcap if its logits have them"
        )
    module = _trained(unwrapped(module))
    _require_plain(module)
    config: Any = getattr(base, "config", None)
    return Head(module, *_bent_by(config.get_text_config() if hasattr(config, "get_text_config") else config))


def unwrapped(model: Any) -> Any:
    """What DDP, FSDP1, DeepSpeed, torch.compile and PEFT have wrapped."""
    while True:
        if hasattr(model, "get_base_model"):
            inner = model.get_base_model()
        else:
            names = ("_orig_mod", "_fsdp_wrapped_module", "module")
            inner = next((x for name in names if isinstance(x := getattr(model, name, None), nn.Module)), None)
        if inner is None or inner is model:
            return model
        model = inner


def _trained(module: nn.Module) -> nn.Module:
    """The copy that PEFT trains in place of a head in modules_to_save."""
    copies = getattr(module, "modules_to_save", None)
    active = str(getattr(module, "active_adapter", None))
    return copies[active] if isinstance(copies, nn.ModuleDict) and active in copies else module


def _require_plain(module: nn.Module) -> None:
    """Refuses a head whose forward is more than hidden @ weight.T + bias, as its weight alone would not tell."""
    kind = _name(module)
    if hasattr(module, "base_layer"):  # as PEFT marks a layer with an adapter
        adapters = ", ".join(map(repr, getattr(module, "active_adapters", [])))
        raise TypeError(
            f"the head is {kind} with the adapter {adapters}, which its weight lacks; take the loss from the model's "
            "logits with topk_reverse_kl, merge the adapter with model.merge_and_unload(), or train the head itself "
            "with modules_to_save=['lm_head']"
        )
    if hasattr(module, "_hf_hook"):
        raise TypeError(
            f"the head is {kind} with an Accelerate hook, as device_map sets them; load the model without device_map, "
            "or take the loss from its logits with topk_reverse_kl"
        )
    replaced = "forward" in vars(module)  # on this module alone, as libraries do that patch a model
    if not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward or replaced:
        raise TypeError(
            f"the head is {kind}{' with another forward' * replaced}, whose logits may be more than hidden @ weight.T "
            "+ bias, such as quantised; take the loss from the model's logits with topk_reverse_kl"
        )


def _bent_by(config: Any) -> tuple[float, float | None]:
    """The logit scale and the softcap."""
    scale = next((x for name in SCALES if (x := getattr(config, name, None)) is not None), None)
    if scale is None and (divisor := getattr(config, DIVISOR, None)) is not None:
        scale = divisor if MULTIPLIES in str(getattr(config, "model_type", "")) else 1 / divisor
    softcap = next((x for name in CAPS if (x := getattr(config, name, None)) is not None), None)
    return 1.0 if scale is None else float(scale), None if softcap is None else float(softcap)


def _name(x: object) -> str:
    return f"a {type(x).__module__}.{type(x).__qualname__}"
