"""Seconds and memory of the loss alone, and of the parts of a step."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from topk_rkl.loss import topk_reverse_kl
from topk_rkl.recipe.rollout import sampled_token_loss


class Clock:
    """Seconds since the last call, by the name of what ended then."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.last = time.perf_counter()

    def __call__(self, part: str) -> None:
        now = time.perf_counter()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self.last
        self.last = now


def reset_peak() -> bool:
    """Lets Linux forget the largest resident memory so far; False where it cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_mib(field: str = "VmHWM") -> float:
    """Resident memory at its largest since reset_peak; `VmRSS` is what it is now."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return round(next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024, 1)


def plain_topk(
    z: Tensor,  # (N, V)
    w: Tensor,  # (N, V)
    k: int,
) -> Tensor:  # ()
    top, ids = w.topk(k, dim=-1)  # (N, K)
    log_p, log_q = z.gather(-1, ids).log_softmax(-1), top.log_softmax(-1)  # (N, K)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def plain_full(
    z: Tensor,  # (N, V)
    w: Tensor,  # (N, V)
) -> Tensor:  # ()
    log_p, log_q = z.log_softmax(-1), w.log_softmax(-1)  # (N, V)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def loss_cost(positions: int, vocab: int, k: int, repeats: int) -> dict[str, dict[str, float | None]]:
    """Both passes of each loss in turn, `repeats` times over: medians of seconds, and memory beyond the inputs."""
    generator = torch.Generator().manual_seed(0)
    shape = positions, vocab
    w = 3 * torch.randn(shape, generator=generator)  # (N, V)
    z = (w + torch.randn(shape, generator=generator)).requires_grad_()  # (N, V)
    y = torch.randint(vocab, shape[:1], generator=generator)  # (N,)
    losses = {
        "topk_reverse_kl": lambda: topk_reverse_kl(z, w, k=k),
        "plain PyTorch, top-K": lambda: plain_topk(z, w, k),
        "sampled_token_loss": lambda: sampled_token_loss(z, w, y),
        "plain PyTorch, whole vocabulary": lambda: plain_full(z, w),
    }
    for loss in losses.values():
        torch.autograd.grad(loss(), z)  # the first call is slower
    clocks = [Clock() for _ in range(repeats)]
    for clock in clocks:
        for name, loss in losses.items():
            clock("between")
            torch.autograd.grad(loss(), z)
            clock(name)
    return {
        name: {
            "seconds": statistics.median(clock.seconds[name] for clock in clocks),
            "extra_mib": extra_mib(loss, z),
        }
        for name, loss in losses.items()
    }


def extra_mib(
    loss: Callable[[], Tensor],
    z: Tensor,  # (N, V)
) -> float | None:
    """Resident memory that both passes add at their peak, the gradient of z included."""
    if not reset_peak():
        return None
    before = peak_mib("VmRSS")
    torch.autograd.grad(loss(), z)
    return round(max(peak_mib() - before, 0.0), 1)
