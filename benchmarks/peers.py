"""Other projects' losses, each from its own unmodified files, called as its users call it.

    make bench-setup  # those on the package index, at the versions that the Makefile names
    git clone https://github.com/NVIDIA-NeMo/RL build/peers/nemo-rl  # measured at 7ea279abf
    git clone https://github.com/ServiceNow/Fast-LLM build/peers/fast-llm  # for a GPU

The folder is on the path for Liger's Triton kernels alone, which need transformers. Other files are loaded by name,
with stand-ins for the modules of their projects that they import and do not need here. axolotl's file also needs numpy
and Liger's file, TRL's needs packaging and transformers. FlashInfer is taken as it is installed.

Every loss is a mean over the positions. TRL, Liger and Fast-LLM compare the whole vocabulary, so they get a teacher's
logits, or its hidden states and head. verl and VeOmni compute forward KL.
"""

import contextlib
import importlib.util
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

import torch
from torch import Tensor

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "build" / "peers"

Loss = Callable[[], Tensor]


def module(dotted: str, folder: str = "", **stubs: dict[str, object]) -> ModuleType:
    """The module of that name from its file under FOLDER, with stand-ins for modules it imports, by dotted name."""
    for stub, names in {dotted.rpartition(".")[0]: {}, **stubs}.items():
        parts = stub.split(".")
        for parent in (".".join(parts[:i]) for i in range(1, len(parts) + 1)):
            sys.modules.setdefault(parent, ModuleType(parent)).__path__ = []
        vars(sys.modules[stub]).update(names)
    path = FOLDER / folder / f"{dotted.replace('.', '/')}.py"
    if not path.exists():
        raise FileNotFoundError(f"{path.relative_to(ROOT)} is not there; benchmarks/peers.py says how to get it")
    spec = importlib.util.spec_from_file_location(dotted, path)
    assert spec and spec.loader
    sys.modules[dotted] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[dotted])
    return sys.modules[dotted]


def ms_swift(
    student: Tensor,  # (N, V)
    ids: Tensor,  # (N, K) int64
    log_probs: Tensor,  # (N, K)
) -> Loss:
    swift = module("swift.rlhf_trainers.gkd_loss")
    labels = torch.zeros(1, len(student), dtype=torch.long, device=student.device)

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
        "nemo_rl.distributed.model_utils", "nemo-rl", **{"nemo_rl.algorithms.logits_sampling_utils": sampling}
    )

    def loss() -> Tensor:
        s, t, _ = nemo.get_distillation_topk_logprobs_from_logits(
            student[None], log_probs[None], ids[None], zero_outside_topk=False, calculate_entropy=False
        )
        return (s.exp() * (s - t)).sum(-1).mean()

    return loss


def verl(
    student: Tensor,  # (N, V)
    ids: Tensor,  # (N, K) int64
    log_probs: Tensor,  # (N, K)
) -> Loss:
    """Forward KL, not renormalised; with the diagnostics that its trainer always makes."""
    alone = {"get_ulysses_sequence_parallel_world_size": lambda: 1, "slice_input_tensor": None}
    configs = {"DistillationConfig": object, "DistillationLossConfig": object}
    losses = module(
        "verl.trainer.distillation.fsdp.losses", **{"verl.utils.ulysses": alone, "verl.workers.config": configs}
    )
    config = SimpleNamespace(distillation_loss=SimpleNamespace(log_prob_min_clamp=None, use_chunked_topk=False))
    offsets = torch.tensor([0, len(student)], device=student.device)
    values, columns = (torch.nested.nested_tensor_from_jagged(x, offsets=offsets) for x in (log_probs, ids))

    def loss() -> Tensor:
        found = losses.compute_forward_kl_topk(student[None], values, columns, config, "thd")
        return found["distillation_losses"].mean()

    return loss


def fast_llm(
    student: Tensor,  # (N, V)
    teacher: Tensor,  # (N, V)
) -> tuple[Loss, Callable[[], list[Tensor]]]:
    """Reverse KL over the vocabulary, with its gradient, by a Triton kernel -> the loss, the gradient it left."""
    import triton
    import triton.language as tl

    language = {
        "TritonConfig": triton.Config, "tl": tl, "tl_arange": tl.arange, "tl_constexpr": tl.constexpr,
        "triton": triton, "triton_autotune": triton.autotune, "triton_jit": triton.jit,
    }  # fmt: skip
    reduction = {"reduce_losses": lambda losses, divisor: losses.sum() / divisor}
    config = module("fast_llm.functional.config", "fast-llm")
    kernel = module(
        "fast_llm.functional.triton.entropy_loss",
        "fast-llm",
        **{"fast_llm.functional.triton": language, "fast_llm.functional.utils": reduction},
    ).triton_entropy_loss_forward_backward
    found: list[Tensor] = []

    def loss() -> Tensor:
        found.clear()
        reverse, logits = config.EntropyLossType.reverse_kl, config.TargetFormat.logits
        total, _, gradient = kernel(
            student.detach(), teacher, None, grad_output=1.0, target_format=logits, entropy_loss_type=reverse
        )
        found.append(gradient)
        return total

    return loss, lambda: found


def flashinfer_top_k() -> Callable[[Tensor, int], tuple[Tensor, Tensor]]:
    """Any of equal logits, in any order; as fast as it goes."""
    from flashinfer import top_k

    return top_k


def axolotl(
    hidden: Tensor,  # (N, H)
    head: Tensor,  # (V, H)
    ids: Tensor,  # (N, K) int64
    log_probs: Tensor,  # (N, K)
    compiled: bool = False,
) -> Loss:
    """It sums, so the mean is asked for through the weight of the loss; a head that is frozen saves it nothing."""
    module("liger_kernel.chunked_loss.fused_linear_distillation")
    module("axolotl.integrations.kd.utils")
    kernel = module("axolotl.integrations.kd.kernels.liger").LigerFusedLinearKLTopKLogprobLoss(
        weight_hard_loss=0.0, weight_soft_loss=1 / len(hidden), beta=1.0, compute_ce_loss=False, compiled=compiled
    )
    teacher = ids[None], log_probs.log_softmax(-1)[None], torch.ones_like(ids, dtype=torch.bool)[None]
    labels = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
    return lambda: kernel(head, hidden[None], *teacher, labels)


def veomni(
    hidden: Tensor,  # (N, H)
    head: Tensor,  # (V, H)
    ids: Tensor,  # (N, K) int64
    log_probs: Tensor,  # (N, K)
) -> Loss:
    """Forward KL, not renormalised; with the entropy that its trainer always makes."""
    alone = {"get_parallel_state": lambda: SimpleNamespace(sp_enabled=False)}
    folder = "veomni.ops.kernels.cross_entropy"
    module(f"{folder}.chunk_logprobs", **{"veomni.distributed.parallel_state": alone})
    kernel = module(f"{folder}.chunk_topk_distill").chunk_topk_distill_function
    labels = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)

    def loss() -> Tensor:
        return kernel(hidden[None], head, labels, ids[None], log_probs[None], shift_labels=labels)[2].mean()

    return loss


def trl(
    hidden: Tensor,  # (N, H)
    head: Tensor,  # (V, H)
    teacher_hidden: Tensor,  # (N, H)
    teacher_head: Tensor,  # (V, H)
) -> Loss:
    """Reverse KL over the vocabulary."""
    ungathered = {"maybe_gather_lm_head_ctx": lambda *_: contextlib.nullcontext()}
    module("trl.kernels.chunked_logprob", **{"trl.trainer.utils": ungathered})
    divergence = module("trl.kernels.chunked_divergence").ChunkedDivergenceFunction
    return lambda: divergence.apply(hidden, head, None, teacher_hidden, teacher_head, None, 1.0)[0].mean()


def liger(
    hidden: Tensor,  # (N, H)
    head: Tensor,  # (V, H)
    teacher_hidden: Tensor,  # (N, H)
    teacher_head: Tensor,  # (V, H)
    compiled: bool = False,
) -> Loss:
    """Reverse KL over the vocabulary; a head that is frozen saves it nothing."""
    module("liger_kernel.chunked_loss.fused_linear_distillation")
    kernel = module("liger_kernel.chunked_loss.jsd_loss").LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0, compiled=compiled
    )
    labels = torch.zeros(len(hidden), dtype=torch.long, device=hidden.device)
    return lambda: kernel(hidden, head, teacher_hidden, teacher_head, labels)


def liger_triton(
    hidden: Tensor,  # (N, H)
    head: Tensor,  # (V, H)
    teacher_hidden: Tensor,  # (N, H)
    teacher_head: Tensor,  # (V, H)
) -> Loss:
    """Reverse KL over the vocabulary, by Triton kernels."""
    loss = _liger_package().LigerFusedLinearJSD(jsd_beta=1.0)
    return lambda: loss(hidden, head, teacher_hidden, teacher_head, None)


@cache
def _liger_package() -> ModuleType:
    """Liger's Triton kernels, which take the package itself: the stand-ins of its modules step aside."""
    stands = {name: sys.modules.pop(name) for name in [*sys.modules] if name.partition(".")[0] == "liger_kernel"}
    with mock.patch.object(sys, "path", [str(FOLDER), *sys.path]):
        package = importlib.import_module("liger_kernel.transformers")
    sys.modules.update(stands)
    return package
