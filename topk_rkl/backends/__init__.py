"""The one place where a backend is chosen."""

import contextlib
import copy
import functools
import importlib
import os
import sys
import warnings
from collections.abc import Iterator
from contextvars import ContextVar
from types import ModuleType

import torch
from torch import Tensor

from topk_rkl.checks import callers_level
from topk_rkl.divergence import REVERSE_CODE, Code, Terms

NAMES = ("auto", "reference", "native", "triton", "cuda")

_WAY_OUT = {
    "native": "the compiled extension was not built; install a C++20 compiler (GCC or Clang) and reinstall topk_rkl "
    "with pip install --force-reinstall --no-cache-dir --no-deps",
    "triton": "install it (pip install triton)",
    "cuda": "the CUDA part of the compiled extension was not built; reinstall topk_rkl with TOPK_RKL_BUILD_CUDA=on "
    "where nvcc is installed, use 'triton'",
}
_REINSTALL = "it was built for another machine: reinstall it on this one"
_WAY_OUT_OF_FAILED = {"triton": "install torch 2.9 or later, which brings a Triton that fits"}
_LOW_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


# From K = V / DENSE_FROM on, the dense product of the head is taken to be cheaper.
DENSE_FROM = 4

# From these K on "auto" takes "cuda" before "triton": of the selection and its loss, and of the head. None is never: an
# H200 took longer in every launch of "cuda". Only the host's part of a call is shorter, which no K tells.
CUDA_FROM_K: int | None = None
CUDA_LINEAR_FROM_K: int | None = None

# What is in force in this context: the process's choice, then that of each open block, with something that tells it
# from every other. A block that ends takes out its own, so that blocks may end in any order.
_open_blocks: ContextVar[tuple[tuple[str, object], ...]] = ContextVar(
    "topk_rkl_backend", default=((os.environ.get("TOPK_RKL_BACKEND", "auto"), None),)
)
_this = sys.modules[__name__]


def __getattr__(name: str) -> str:
    """`innermost`, an attribute: torch.compile reads no context variable, but guards on a module's attribute."""
    if name != "innermost":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _open_blocks.get()[-1][0]


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Chooses the backend of every call inside the `with` block, and of the backward passes of those calls.

    The choice is a context variable. It reaches the coroutines and tasks that the block starts, and no others. A thread
    starts from TOPK_RKL_BACKEND, unless it is run in a copy of the context, as asyncio.to_thread does. So do autograd's
    own threads where they call a loss anew, as activation checkpointing on a GPU does.

    Args:
        name: "reference" (plain PyTorch, any device), "native" (the compiled extension, CPU), "triton" (GPU) or "cuda"
            (the CUDA part of the extension, GPU). "auto", the default, is the fastest that can take the tensors:
            "triton" on a GPU, whose kernels took less time than those of "cuda" at every K on an H200. Calls of a few
            rows wait for the host, less with "cuda". "triton" takes CPU tensors only under TRITON_INTERPRET=1, set
            before the package is imported. The environment variable TOPK_RKL_BACKEND sets the name for a process.

    Raises:
        ValueError: there is no such backend.
        RuntimeError: it cannot run here; the message has the reason. "auto" never raises.
    """
    _check_name(name, "use_backend()")
    if name != "auto" and (reason := unavailable(name)):
        raise RuntimeError(f"the {name!r} backend cannot run here: {reason}")
    block = name, object()
    _open_blocks.set((*_open_blocks.get(), block))
    try:
        yield
    finally:
        _open_blocks.set(tuple(other for other in _open_blocks.get() if other != block))


def requested() -> str:
    """The name in force: that of the innermost `use_backend`, else TOPK_RKL_BACKEND, else "auto"."""
    name: str = _this.innermost
    return name


def choose(
    name: str,
    k: int,
    *logits: Tensor,  # (..., V) each
    divergence: Code | Terms = REVERSE_CODE,
    mass: str = "renormalized",
    linear: bool = False,
    function: str | None = None,
) -> ModuleType:
    """The backend module that serves these logits: the one named, or for "auto" the fastest that can take them all.

    With `linear` they are hidden states, which meet K rows of the head. `function` is one that some backends lack.
    """
    _check_name(name, "TOPK_RKL_BACKEND")
    if name != "auto":
        if reason := _first_refusal(name, k, logits, divergence, mass, function):
            raise RuntimeError(f"the {name!r} backend cannot take these tensors: {reason}")
        return _load(name)
    fastest = _fastest(k, logits[0], CUDA_LINEAR_FROM_K if linear else CUDA_FROM_K)
    able = (name for name in fastest if not _first_refusal(name, k, logits, divergence, mass, function))
    if found := next(able, None):
        return _load(found)
    served = all(x.dtype in _LOW_DTYPES for x in logits) and not _lacks_kernel(divergence, mass)
    if served and fastest and (reason := unavailable(fastest[-1])):
        _warn_of_slow_path(fastest[-1], reason)
    return _load("reference")


def choose_linear(
    name: str,
    k: int,
    hidden: Tensor,  # (N, H)
    vocab: int,
    divergence: Code | Terms = REVERSE_CODE,
) -> ModuleType:
    """The module that serves K rows of the head per position, or for "auto" the dense product where that is cheaper.

    Memory bandwidth bounds the gathering of K rows; arithmetic bounds the product with all V. They break even at
    K = V / 12 where the head is far larger than the caches, and at V / 2 where it fits. Both were measured on CPUs
    alone. A product in TF32 or bfloat16 would be less exact: see torch.backends.mkldnn.matmul.fp32_precision.
    """
    module = choose(name, k, hidden, divergence=divergence, linear=True)
    dense_pays = k * DENSE_FROM >= vocab and hidden.is_cpu and hidden.dtype in _LOW_DTYPES
    if name == "auto" and dense_pays and _products_are_float32():
        return _load("dense_linear")
    return module


def _products_are_float32() -> bool:
    """Whether no setting lets oneDNN compute a CPU's float32 products in TF32 or bfloat16."""
    newer = getattr(torch.backends.mkldnn, "matmul", None)  # from torch 2.9 on; the older may raise once it was used
    if newer is None:
        return torch.get_float32_matmul_precision() == "highest"
    return newer.fp32_precision in ("none", "ieee")


def choose_plain(name: str, mass: str) -> ModuleType:
    """The loss from hidden states with a mass that needs every logit: plain PyTorch, wherever the tensors are."""
    _check_name(name, "TOPK_RKL_BACKEND")
    if name not in ("auto", "reference"):
        raise RuntimeError(f"the {name!r} backend has no mass={mass!r} from hidden states; use 'auto' or 'reference'")
    return _load("linear_mass")


def unavailable(name: str) -> str | None:
    """Why the backend cannot run in this process whatever the tensors, or None."""
    try:
        module = _load(name)
    except ModuleNotFoundError as error:
        return f"{error}; {_WAY_OUT[name]}, or use 'reference'"
    except ImportError as error:
        return f"{error}; {_WAY_OUT_OF_FAILED.get(name, _REINSTALL)}, or use 'reference'"
    if name == "cuda" and not module.HOST and not torch.cuda.is_available():
        return "there is no GPU that torch can use; use 'native' or 'reference'"
    if name == "triton" and not module.INTERPRETED and not torch.cuda.is_available():
        return (
            "there is no GPU that torch can use; set TRITON_INTERPRET=1 before topk_rkl is imported to interpret the "
            "kernels on a CPU, or use 'native' or 'reference'"
        )
    return None


@functools.cache
def _warn_of_slow_path(name: str, reason: str) -> None:
    """Once per process, since pip hides what the build of an extension prints."""
    warnings.warn(
        f"plain PyTorch serves this call, slower than the {name!r} backend: {reason} by name "
        "(TOPK_RKL_BACKEND=reference), which does not warn",
        stacklevel=callers_level(),
    )


def _fastest(k: int, like: Tensor, cuda_from_k: int | None) -> tuple[str, ...]:
    """What "auto" tries before the reference, in this order."""
    if not like.is_cuda:
        return ("native",) if like.is_cpu else ()
    return ("triton",) if cuda_from_k is None or k < cuda_from_k else ("cuda", "triton")


def _first_refusal(
    name: str, k: int, logits: tuple[Tensor, ...], divergence: Code | Terms, mass: str, function: str | None
) -> str | None:
    reasons = (_refusal(name, k, x) for x in logits)
    if reason := next(filter(None, reasons), None) or _objective_refusal(name, divergence, mass):
        return reason
    if function is not None and not hasattr(_load(name), function):
        return f"it has no kernel for {function}; use 'triton' or 'auto'"
    return None


def _refusal(name: str, k: int, logits: Tensor) -> str | None:
    if (reason := unavailable(name)) or name == "reference":
        return reason
    if logits.dtype not in _LOW_DTYPES:
        return f"the logits are {logits.dtype}; use bfloat16, float16 or float32, or the 'reference' backend"
    refusal: str | None = _load(name).refusal(k, logits)
    return refusal


def _objective_refusal(name: str, divergence: Code | Terms, mass: str) -> str | None:
    if name == "reference":
        return None
    refusal: str | None = _lacks_kernel(divergence, mass) or _load(name).objective_refusal(divergence, mass)
    return refusal


def _lacks_kernel(divergence: Code | Terms, mass: str) -> str | None:
    """Why no backend but the reference has it."""
    if callable(divergence):
        return "it has no kernel for a divergence that is a function; use 'auto' or 'reference'"
    if mass.startswith("ema_pg"):
        return f"it has no kernel for mass={mass!r}; use 'auto' or 'reference'"
    return None


def _load(name: str) -> ModuleType:
    found = _imported(name)
    if isinstance(found, ImportError):
        raise copy.copy(found)  # the one that is kept would hold the frames of its caller, tensors included
    return found


@functools.cache
def _imported(name: str) -> ModuleType | ImportError:
    """A failure is kept too: Python would look for the module anew, a millisecond per op."""
    try:
        return importlib.import_module(f"topk_rkl.backends.{name}")
    except ImportError as error:
        return copy.copy(error)  # without its frames


def _check_name(name: str, source: str) -> None:
    if not isinstance(name, str) or name not in NAMES:
        raise ValueError(f"{source}: there is no backend {name!r}; use one of {', '.join(NAMES)}")
