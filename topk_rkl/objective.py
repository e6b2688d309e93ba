"""What a loss compares and how, as a tuple for a backend and as one small tensor that crosses the border of an op."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from topk_rkl import checks
from topk_rkl.divergence import MASSES, REVERSE_CODE, Code, Divergence, ForwardKL, Mixture, ReverseKL, Terms
from topk_rkl.traced import traced


class Objective(NamedTuple):
    """The numbers of a loss that may change from call to call."""

    temperature: float = 1.0
    divergence: Code | Terms = REVERSE_CODE
    mass: str = "renormalized"
    logit_scale: float = 1.0
    softcap: float | None = None


PLAIN = Objective()


def pack(
    temperature: float = 1.0,
    divergence: Divergence | Terms | None = None,  # of ReverseKL(), if None
    mass: str = "renormalized",
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor | None:  # (numbers,) float64 on the CPU
    """The objective as an op takes it; None for the default. A function crosses beside it, see `ops`."""
    code = divergence.code if isinstance(divergence, Divergence) else REVERSE_CODE
    if temperature == 1 and logit_scale == 1 and softcap is None and len(code) == 1 and mass == "renormalized":
        return None
    numbers = (temperature, MASSES.index(mass), logit_scale, math.inf if softcap is None else softcap, *code)
    if torch.compiler.is_compiling():
        # Not stacked: where Inductor captures CUDA graphs, it moves a list of scalars to the GPU (torch 2.11 to 2.13).
        places = torch.arange(len(numbers), device="cpu")
        packed = torch.zeros(len(numbers), dtype=torch.float64, device="cpu")
        for i, x in enumerate(numbers):
            packed = torch.where(places == i, traced(x, packed, places.shape), packed)
        return packed
    return torch.tensor(numbers, dtype=torch.float64, device="cpu")


def unpack(
    packed: Tensor | None,  # as `pack` gives it
    terms: Terms | None = None,
) -> Objective:
    if packed is None:
        return Objective(divergence=terms or REVERSE_CODE)
    temperature, mass, logit_scale, softcap, *code = packed.tolist()
    return Objective(
        temperature, terms or tuple(code), MASSES[int(mass)], logit_scale, None if softcap == math.inf else softcap
    )


def temperature_of(
    packed: Tensor | None,  # as `pack` gives it
) -> Tensor | float:  # ()
    """Where a trace cannot `unpack`."""
    return 1.0 if packed is None else packed[0]


def head_numbers(
    packed: Tensor,  # as `pack` gives it
) -> tuple[Tensor, Tensor]:  # (), ()
    """The logit scale, and the softcap if there is one, where a trace cannot `unpack`."""
    return packed[2], packed[3]


def require_objective(divergence: object, mass: str) -> None:
    """Refuses what is no divergence, no mass, or no pair of them."""
    checks.require_one_of("mass", mass, MASSES)
    if isinstance(divergence, type):
        name = divergence.__name__
        raise TypeError(f"divergence is the class {name}; pass an instance, such as {name}(...)")
    known = isinstance(divergence, Divergence) and type(divergence).code is not Divergence.code
    if isinstance(divergence, nn.Module) and any(x.requires_grad for x in divergence.parameters()):
        raise ValueError(
            f"divergence is {checks.kind_of(divergence)} with parameters that require grad, to which a loss gives "
            "none; pass divergence.requires_grad_(False), or write a loss that trains them in plain PyTorch"
        )
    if not known and not callable(divergence):
        raise TypeError(
            f"divergence is {checks.kind_of(divergence)}; use ReverseKL(), another of topk_rkl.divergence, or a "
            "function (log_p, log_q) -> terms"
        )
    plain = divergence == ReverseKL() or isinstance(divergence, ForwardKL)
    if mass.startswith("ema_pg") and not plain:
        raise ValueError(
            f"mass={mass!r} is for ReverseKL() without clamp and ForwardKL(), but divergence is {divergence}"
        )
    if mass.startswith("raw") and not plain and not isinstance(divergence, Mixture):
        raise ValueError(
            f"mass={mass!r} is for ReverseKL() without clamp, ForwardKL() and Mixture, but divergence is {divergence}; "
            "use mass='tail' or 'renormalized'"
        )
