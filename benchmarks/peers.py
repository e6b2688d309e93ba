"""Other projects' losses, each from its own unmodified file, called as its users call it.

    pip install --no-deps --target build/peers ms-swift==4.6.0
    git clone https://github.com/NVIDIA-NeMo/RL build/peers/nemo-rl  # measured at 7ea279abf

Each file needs no more of its project than the names given beside it here.
"""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

FOLDER = Path(__file__).parent.parent / "build" / "peers"

Loss = Callable[[], Tensor]


def module(file: str, **stubs: dict[str, object]) -> ModuleType:
    """The module of a file under FOLDER, with stand-ins for the modules it imports, by dotted name."""
    for dotted, names in stubs.items():
        parts = dotted.split(".")
        for parent in (".".join(parts[:i]) for i in range(1, len(parts) + 1)):
            sys.modules.setdefault(parent, ModuleType(parent)).__path__ = []
        vars(sys.modules[dotted]).update(names)
    name = Path(file).stem
    spec = importlib.util.spec_from_file_location(name, FOLDER / file)
    assert spec and spec.loader
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def ms_swift(
    student: Tensor,  # (N, V)
    ids: Tensor,  # (N, K) int64
    log_probs: Tensor,  # (N, K)
) -> Loss:
    swift = module("swift/rlhf_trainers/gkd_loss.py")
    labels = torch.zeros(1, len(student), dtype=torch.long)

    def loss() -> Tensor:
        teacher = swift.TeacherOutput(topk_logprobs=log_probs[None], topk_indices=ids[None])
        total, count = swift.gkd_loss(student[None], teacher, labels, beta=1.0, temperature=1.0)
        return total / count

    return loss


def nemo_rl(
    student: Tensor,  # (N + 1, V): the last position, which has no next token, is dropped by the function
    ids: Tensor,  # (N + 1, K) int64
    log_probs: Tensor,  # (N + 1, K)
) -> Loss:
    sampling = {"TrainingSamplingParams": object, "apply_top_k_top_p": None, "need_top_k_or_top_p_filtering": None}
    nemo = module(
        "nemo-rl/nemo_rl/distributed/model_utils.py", **{"nemo_rl.algorithms.logits_sampling_utils": sampling}
    )

    def loss() -> Tensor:
        s, t, _ = nemo.get_distillation_topk_logprobs_from_logits(
            student[None], log_probs[None], ids[None], zero_outside_topk=False, calculate_entropy=False
        )
        return (s.exp() * (s - t)).sum(-1).mean()

    return loss
