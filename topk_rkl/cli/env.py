"""`topk-rkl env`: what a bug report needs. Every probe is guarded, so that it always prints."""

import argparse
import importlib
import importlib.metadata
import os
import platform
import sys
from collections.abc import Callable
from typing import Any

import torch

import topk_rkl
from topk_rkl import backends


def add_to(commands: Any, formatter: Any) -> None:
    about = "what a bug report needs: versions, devices, and which backends run here"
    command = commands.add_parser("env", help=about, description=about.capitalize(), formatter_class=formatter)
    command.set_defaults(run=run)


def run(_: argparse.Namespace) -> int:
    for name, finding in facts().items():
        print(f"{name:18} {finding}")
    return 0


def facts() -> dict[str, str]:
    """Name -> finding, in the order in which they are printed."""
    return {
        "topk_rkl": _guarded(lambda: topk_rkl.__version__),
        "python": _guarded(lambda: sys.version.replace("\n", " ")),
        "platform": _guarded(platform.platform),
        "torch": _guarded(lambda: torch.__version__),
        "cuda": _guarded(lambda: f"cuda {torch.version.cuda}, hip {torch.version.hip}"),
        "triton": _guarded(lambda: importlib.metadata.version("triton")),
        "gpus": _guarded(lambda: _gpus()),
        "cpu threads": _guarded(torch.get_num_threads),
        "environment": _guarded(_environment),
        "reference backend": _guarded(lambda: _backend("reference")),
        "native backend": _guarded(lambda: _backend("native")),
        "native build": _guarded(_native_build),
        "triton backend": _guarded(lambda: _backend("triton")),
        "cuda backend": _guarded(lambda: _backend("cuda")),
        "auto takes": _guarded(_auto),
    }


def _guarded(probe: Callable[[], object]) -> str:
    try:
        return str(probe())
    except Exception as error:  # a report of a broken installation is the point
        return f"failed: {type(error).__name__}: {error}"


def _gpus() -> list[str]:
    return [
        f"{torch.cuda.get_device_name(i)} sm_{''.join(map(str, torch.cuda.get_device_capability(i)))}"
        for i in range(torch.cuda.device_count())
    ]


def _environment() -> dict[str, str]:
    return {name: os.environ[name] for name in ("TOPK_RKL_BACKEND", "TRITON_INTERPRET") if name in os.environ}


def _native_build() -> str:
    if backends.unavailable("native"):
        return "none"
    native = importlib.import_module("topk_rkl._native")
    return f"{native.BUILD}; runs {native.isa()} of {', '.join(native.isas())}"


def _backend(name: str) -> str:
    """Told by a call: a compiler may be missing, or a kernel for this card, which nothing else shows."""
    if reason := backends.unavailable(name):
        return reason
    on_gpu = name in ("triton", "cuda") and torch.cuda.is_available()
    logits = torch.tensor([0.0, 3.0, 1.0, 2.0], device="cuda" if on_gpu else "cpu")
    with topk_rkl.use_backend(name):
        ids = topk_rkl.teacher_topk(logits, 2).ids.tolist()
    return "can run" if ids == [1, 3] else f"runs and is wrong: {ids} are not the ids of the 2 largest of {logits}"


def _auto() -> str:
    fastest = {"native": "CPU"} | ({"triton": "GPU"} if torch.cuda.is_available() else {})
    slow = "reference, plain PyTorch and slower,"
    return "; ".join(f"{slow if backends.unavailable(name) else name} on a {fastest[name]}" for name in fastest)
