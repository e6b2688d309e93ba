"""MODEL: what transformers makes of a folder or a name, with the faults of people told in one line."""

from pathlib import Path
from typing import Any

import torch

from topk_rkl.cli.refusal import Refusal, refusing


def config(name: str, gguf_file: str | None = None) -> Any:
    from transformers import AutoConfig

    return _loaded(AutoConfig, name, gguf_file)


def tokenizer(name: str, gguf_file: str | None = None) -> Any:
    from transformers import AutoTokenizer

    return _loaded(AutoTokenizer, name, gguf_file)


def model(name: str, gguf_file: str | None, dtype: str, device: torch.device) -> Any:
    from transformers import AutoModelForCausalLM

    asked = dtype if dtype == "auto" else getattr(torch, dtype)
    return _loaded(AutoModelForCausalLM, name, gguf_file, dtype=asked).eval().requires_grad_(False).to(device)


def device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with refusing(f"--device {name} is none of auto, cpu, cuda or cuda:1", RuntimeError):
        asked = torch.device(name)
    if asked.type == "cuda" and (asked.index or 0) >= torch.cuda.device_count():
        raise Refusal(f"--device is {name}, but torch sees {torch.cuda.device_count()} GPUs; use --device cpu or auto")
    return asked


def _loaded(kind: Any, name: str, gguf_file: str | None, **options: Any) -> Any:
    given = options | ({"gguf_file": gguf_file} if gguf_file else {})
    if (name.startswith((".", "/", "~")) or name.count("/") > 1) and not Path(name).is_dir():
        raise Refusal(f"MODEL {name} is no folder; give one with a model, or a name as from_pretrained takes it")
    with refusing(f"MODEL {name} cannot be loaded", OSError, ValueError, KeyError, ImportError):
        return kind.from_pretrained(name, **given)
