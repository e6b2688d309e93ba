"""A vocabulary that GPUs share through NCCL: cases of test_parallel.py on CUDA tensors, and nothing read on the host.

Two GPUs or more are needed. One GPU cannot show what ranks send.
"""

import os
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests import test_parallel
from tests.processes import HANGS
from tests.ranks import free_port
from tests.shards import SPLITS, mine
from topk_rkl.loss import linear_topk_reverse_kl, teacher_topk, topk_divergence

GPUS = torch.cuda.device_count()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(GPUS < 2, reason=f"needs two GPUs, and this machine has {GPUS}"),
]


@pytest.mark.parametrize("world", range(2, 5))
def test_gpus_give_what_one_gpu_gives(world: int) -> None:
    if world > GPUS:
        pytest.skip(f"needs {world} GPUs, and this machine has {GPUS}")
    mp.spawn(_on_gpu, args=(world, free_port()), nprocs=world)


def _on_gpu(rank: int, world: int, port: int) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.cuda.set_device(rank)
    torch.set_default_device("cuda")
    dist.init_process_group("nccl", rank=rank, world_size=world, timeout=timedelta(seconds=HANGS))
    try:
        group = dist.group.WORLD
        for split in SPLITS:
            for case in (test_parallel._selects, test_parallel._logits, test_parallel._hidden):
                torch.manual_seed(0)
                case(group, split)
        for mass in ("tail", "raw_stop_grad", "ema_pg"):
            torch.manual_seed(0)
            test_parallel._masses(group, mass)
        for case in (test_parallel._linear_selects, test_parallel._hostile, test_parallel._overwritten):
            torch.manual_seed(0)
            case(group)
        _without_a_host_sync(group)
    finally:
        dist.destroy_process_group()


def _without_a_host_sync(group: dist.ProcessGroup) -> None:
    torch.manual_seed(0)
    own = mine("unequal", group)
    student, teacher, weights = test_parallel.problem(torch.bfloat16)
    hidden, head = torch.randn(*test_parallel.ROWS, 8), torch.randn(student.shape[-1], 8)

    def step() -> None:
        support = teacher_topk(teacher[..., own], 3, normalize=True, group=group)
        leaves = [x.clone().requires_grad_() for x in (student[..., own], hidden, head[own])]
        options = {"weights": weights, "group": group}
        topk_divergence(leaves[0], teacher[..., own], k=3, **options).backward()
        topk_divergence(leaves[0], support, mass="tail", **options).backward()
        linear_topk_reverse_kl(leaves[1], leaves[2], support, **options).backward()

    step()  # compiles the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
