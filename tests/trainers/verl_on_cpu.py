"""A platform of verl that has no accelerator, and batches as its trainer hands them to a worker."""

import contextlib
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import verl.utils.tensordict_utils as tu
from tensordict import TensorDict
from torch import Tensor
from verl.plugin.platform import PlatformBase, platform_manager

PROMPTS, RESPONSES, K = (3, 5, 2), (4, 6, 3), 8
ROWS = [  # that predict a token of a response
    start + i for start, p, r in zip((0, 7, 18), PROMPTS, RESPONSES, strict=True) for i in range(p - 1, p + r - 1)
]


MEASURES = (
    "empty_cache",
    "ipc_collect",
    "max_memory_allocated",
    "max_memory_reserved",
    "memory_allocated",
    "memory_reserved",
)


class PlatformCPU(PlatformBase):
    """What verl asks of a device, answered for a CPU with gloo."""

    device_name = vendor_name = "cpu"
    device_module = types.SimpleNamespace(
        **{
            **vars(torch.cpu),
            **dict.fromkeys(MEASURES, lambda *_: 0),
            "mem_get_info": lambda *_: (0, 0),
            "get_device_name": lambda *_: "cpu",
        }
    )

    def is_available(self) -> bool:
        return True

    def current_device(self) -> Any:
        return torch.device("cpu")

    def device_count(self) -> int:
        return 1

    def set_device(self, device_index: int) -> None: ...
    def synchronize(self, device_index: int | None = None) -> None: ...
    def set_allocator_settings(self, settings: str) -> None: ...
    def empty_cache(self) -> None: ...
    def profiler_start(self) -> None: ...
    def profiler_stop(self) -> None: ...
    def cudart(self) -> None: ...

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    def get_device_capability(self, *_: int) -> tuple[None, None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "NO_DEVICES"

    def ray_resource_name(self) -> str:
        return "CPU"

    def ray_noset_envvars(self) -> list[str]:
        return []

    def is_ipc_supported(self) -> bool:
        return False

    @contextlib.contextmanager
    def nvtx_range(self, *_: str) -> Iterator[None]:
        yield


def begin(patch: pytest.MonkeyPatch) -> None:
    """Until the end of the test. verl's registry has its FSDP engine under the name of a GPU."""
    patch.setattr(platform_manager, "_current_platform", PlatformCPU())
    told = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in {"VERL_ENGINE_DEVICE": "cuda", "WG_BACKEND": "ray", **told}.items():
        patch.setenv(name, value)


def jagged(parts: list[Tensor]) -> Tensor:
    return torch.nested.as_nested_tensor(parts, layout=torch.jagged)


def batch(vocab: int, temperature: float | Tensor = 1.0) -> tuple[TensorDict, Tensor]:
    """Three sequences, the first K of their teacher, and the student's logits (1, N, V) before any temperature."""
    lengths = [p + r for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    ids = [torch.randint(0, vocab, (n,)) for n in lengths]
    teacher = [3 * torch.randn(n, vocab) for n in lengths]
    best = [x.log_softmax(-1).topk(K) for x in teacher]
    for log_probs, slots in best:  # what verl fills the last position with, of which no server tells
        log_probs[-1] = 0
        slots[-1] = 0
    data = TensorDict(
        {
            "input_ids": jagged(ids),
            "position_ids": jagged([torch.arange(n) for n in lengths]),
            "prompts": jagged([x[:p] for x, p in zip(ids, PROMPTS, strict=True)]),
            "responses": jagged([x[p:] for x, p in zip(ids, PROMPTS, strict=True)]),
            **dict.fromkeys(
                ("response_mask", "loss_mask"), jagged([torch.ones(r, dtype=torch.long) for r in RESPONSES])
            ),
            "teacher_logprobs": jagged([x.values for x in best]),
            "teacher_ids": jagged([x.indices.int() for x in best]),
        },
        batch_size=[3],
    )
    said = {"dp_size": 1, "batch_num_tokens": sum(RESPONSES), "global_batch_size": 3, "distillation_use_topk": True}
    tu.assign_non_tensor(data, distillation_only=True, compute_loss=True, **said)
    if isinstance(temperature, Tensor):
        data["temperature"] = temperature
    else:
        tu.assign_non_tensor(data, temperature=temperature)
    return data, (torch.cat(teacher) + torch.randn(sum(lengths), vocab))[None]
