"""Which backend serves a call, and what is said when one cannot."""

import asyncio
import contextlib
import functools
import importlib.metadata
import sys
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import BACKENDS, DEVICE
from torch._dynamo.testing import CompileCounterWithBackend

from tests.processes import python
from topk_rkl import (
    backends,
    linear_topk_reverse_kl,
    ops,
    teacher_topk,
    topk_divergence,
    topk_reverse_kl,
    use_backend,
)


def test_auto_takes_the_fastest_that_fits_and_the_reference_otherwise() -> None:
    fastest = "triton" if DEVICE == "cuda" else "native"
    name = fastest if fastest in BACKENDS else "reference"
    assert backends.choose("auto", 5, torch.randn(2, 9, device=DEVICE)).__name__ == f"topk_rkl.backends.{name}"
    assert (
        backends.choose("auto", 5, torch.randn(2, 9, device=DEVICE).double()).__name__ == "topk_rkl.backends.reference"
    )
    for x, k in ((torch.empty(1, 1).expand(1, 2**21), 5), (torch.empty(1, 5_000), 2_000)):
        limited = "reference" if name == "triton" else name
        assert backends.choose("auto", k, x.to(DEVICE)).__name__ == f"topk_rkl.backends.{limited}"


def test_auto_takes_cuda_from_the_k_that_was_measured(monkeypatch) -> None:
    """On a GPU; where its kernels refuse, Triton is next."""
    on_gpu, on_cpu = (SimpleNamespace(is_cuda=x, is_cpu=not x, dtype=torch.float32) for x in (True, False))
    refused = set()

    def stand_in(name: str) -> SimpleNamespace:
        no_masses = "no" if name == "cuda" else None
        return SimpleNamespace(
            name=name,
            HOST=True,
            INTERPRETED=True,
            refusal=lambda *_: "no" if name in refused else None,
            objective_refusal=lambda _, mass: None if mass == "renormalized" else no_masses,
        )

    def chosen(k: int, logits: SimpleNamespace, **options: Any) -> str:
        return backends.choose("auto", k, logits, **options).name

    monkeypatch.setattr(backends, "_load", stand_in)
    assert chosen(1_024, on_gpu) == chosen(1_024, on_gpu, linear=True) == "triton"
    monkeypatch.setattr(backends, "CUDA_FROM_K", 128)
    monkeypatch.setattr(backends, "CUDA_LINEAR_FROM_K", 8)
    assert [chosen(k, on_gpu) for k in (127, 128)] == ["triton", "cuda"]
    assert [chosen(k, on_gpu, linear=True) for k in (7, 8)] == ["triton", "cuda"]
    assert chosen(128, on_gpu, mass="tail") == "triton"
    refused.add("cuda")
    assert chosen(128, on_gpu) == "triton"
    refused.add("triton")
    assert chosen(128, on_gpu) == "reference"
    assert chosen(128, on_cpu) == "native"


def test_auto_needs_every_tensor_to_fit() -> None:
    mixed = torch.randn(2, 9, device=DEVICE), torch.randn(2, 9, device=DEVICE).double()
    assert backends.choose("auto", 5, *mixed).__name__ == "topk_rkl.backends.reference"


def test_auto_takes_the_reference_for_what_no_kernel_has() -> None:
    logits = torch.randn(2, 9, device=DEVICE)
    fast = backends.choose("auto", 5, logits)
    for objective in ({"divergence": (2, 0.5, 0.5, 0.5, 0.5)}, {"mass": "tail"}, {"mass": "raw"}):
        assert backends.choose("auto", 5, logits, **objective) is fast
    for objective in ({"divergence": torch.sub}, {"mass": "ema_pg"}, {"mass": "ema_pg_corrected"}):
        assert backends.choose("auto", 5, logits, **objective).__name__ == "topk_rkl.backends.reference"


@pytest.mark.skipif("cuda" in BACKENDS, reason="the CUDA kernels can run here")
def test_a_backend_that_cannot_run_here_says_why() -> None:
    with (
        pytest.raises(RuntimeError, match=r"'cuda' backend cannot run here: .*use .*'reference'"),
        use_backend("cuda"),
    ):
        pass


@pytest.mark.slow
def test_the_package_works_where_the_extension_was_not_built() -> None:
    code = (
        "import sys; sys.modules['topk_rkl._native'] = None\n"
        "import topk_rkl, torch\n"
        "x = torch.randn(2, 9, requires_grad=True)\n"
        "topk_rkl.topk_reverse_kl(x, torch.randn(2, 9), k=3).backward()\n"
        "assert x.grad.abs().sum() > 0\n"
        "with topk_rkl.use_backend('native'): pass\n"
    )
    outcome = python(code)
    assert "'native' backend cannot run here" in outcome.stderr
    assert "install a C++20 compiler (GCC or Clang) and reinstall" in outcome.stderr


SLOW_PATH = """
import sys, warnings
sys.modules[MISSING] = None
import topk_rkl, torch
from topk_rkl import backends, topk_divergence, topk_reverse_kl, use_backend

x, w = torch.randn(2, 9), torch.randn(2, 9)


def heard(call, *args, **options):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        call(*args, **options)
    return [f"{x.category.__name__} {x.filename}: {x.message}" for x in seen if "plain PyTorch" in str(x.message)]
"""


@pytest.mark.slow
def test_the_slow_path_on_a_cpu_is_told_once_where_it_is_taken() -> None:
    code = SLOW_PATH.replace("MISSING", "'topk_rkl._native'") + (
        "quiet = heard(topk_reverse_kl, x.double(), w.double(), k=3)\n"
        "quiet += heard(topk_divergence, x, w, k=3, divergence=lambda p, q: p.exp() * (p - q))\n"
        "quiet += heard(topk_reverse_kl, x.to('meta'), w.to('meta'), k=3)\n"
        "with use_backend('reference'):\n"
        "    quiet += heard(topk_reverse_kl, x, w, k=3)\n"
        "compiled = torch.compile(topk_reverse_kl, fullgraph=True, backend='eager')\n"
        "told = heard(topk_rkl.TopKReverseKLLoss(k=3), x, w)\n"
        "again = heard(topk_reverse_kl, x, w, k=3)\n"
        "backends._warn_of_slow_path.cache_clear()\n"
        "print(quiet, again, len(heard(compiled, x, w, k=3)), len(heard(compiled, x, w, k=3)))\n"
        "print(*told, sep='\\n')\n"
    )
    outcome = python(code)
    assert outcome.returncode == 0, outcome.stderr
    counts, told = outcome.stdout.splitlines()
    assert counts == "[] [] 1 0"
    assert told.startswith("UserWarning <string>: plain PyTorch serves this call, slower than the 'native' backend: ")
    assert "_native" in told and "install a C++20 compiler (GCC or Clang) and reinstall topk_rkl" in told
    assert told.endswith("or use 'reference' by name (TOPK_RKL_BACKEND=reference), which does not warn")


@pytest.mark.slow
def test_the_slow_path_on_a_gpu_is_told_where_triton_is_missing() -> None:
    code = SLOW_PATH.replace("MISSING", "'triton'") + (
        "from types import SimpleNamespace\n"
        "on_gpu = SimpleNamespace(is_cuda=True, is_cpu=False, dtype=torch.float32)\n"
        "print(*heard(backends.choose, 'auto', 3, on_gpu), *heard(topk_reverse_kl, x, w, k=3), sep='\\n')\n"
    )
    told, *of_the_cpu = python(code).stdout.splitlines()
    assert not any("triton" in line for line in of_the_cpu)  # where the extension is absent too, that is told
    assert "slower than the 'triton' backend: " in told and "install it (pip install triton)" in told


def test_an_extension_of_another_machine_is_not_said_to_be_absent(monkeypatch) -> None:
    def load(name: str) -> None:
        raise ImportError("libstdc++.so.6: version `GLIBCXX_3.4.30' not found")

    monkeypatch.setattr(backends, "_load", load)
    reason = backends.unavailable("native")
    assert "GLIBCXX_3.4.30" in reason and "built for another machine: reinstall it on this one" in reason


@pytest.mark.slow
def test_a_triton_that_is_too_old_is_told_by_its_version() -> None:
    """Triton 3.3 and 3.4 cannot tell a kernel which GPU it is compiled for."""
    pytest.importorskip("triton", reason="Triton is not installed here")
    outcome = python(
        "import sys, triton, triton.language\n"
        "triton.__version__ = '3.4.0'\n"
        "sys.modules['triton.language.target_info'] = None\n"
        "vars(triton.language).pop('target_info')\n"
        "from topk_rkl import backends\n"
        "print(backends.unavailable('triton'), backends.unavailable('triton'), sep='\\n')\n"
    )
    assert outcome.stdout.splitlines() == 2 * [
        "Triton 3.4.0 is too old: the kernels need 3.5 or later; install torch 2.9 or later, which brings a Triton "
        "that fits, or use 'reference'"
    ], outcome.stderr


def test_a_failed_import_holds_nothing_of_the_call_that_met_it(monkeypatch) -> None:
    """Frames of a kept error would hold the gradient that is being made, which autograd then has to copy."""
    monkeypatch.setattr(backends, "_imported", functools.cache(backends._imported.__wrapped__))
    monkeypatch.setitem(sys.modules, "topk_rkl.backends.native", None)

    def call() -> weakref.ref:
        gradient = torch.ones(3)
        assert "reinstall" in backends.unavailable("native")
        return weakref.ref(gradient)

    assert [call()() for _ in range(3)] == [None] * 3


@pytest.mark.interpreter
@pytest.mark.skipif("triton" not in BACKENDS, reason="Triton is not installed here")
def test_triton_says_what_it_cannot_take() -> None:
    with use_backend("triton"):
        with pytest.raises(RuntimeError, match=r"torch.float64; use bfloat16"):
            teacher_topk(torch.randn(2, 9, device=DEVICE).double(), 3)
        with pytest.raises(RuntimeError, match="K = 1025 and V = 2000"):
            teacher_topk(torch.randn(2, 2_000, device=DEVICE), 1_025)


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match="'tritton'; use one of auto, reference"), use_backend("tritton"):
        pass


def test_the_innermost_choice_holds_and_ends_with_its_block() -> None:
    before = backends.requested()
    with use_backend("reference"):
        with contextlib.suppress(ZeroDivisionError), use_backend("auto"):
            assert backends.requested() == "auto"
            raise ZeroDivisionError
        assert backends.requested() == "reference"
    assert backends.requested() == before


def test_blocks_of_coroutines_are_their_own() -> None:
    async def one(name: str, start: float, end: float) -> list[str]:
        await asyncio.sleep(start)
        with use_backend(name):
            here = backends.requested()
            await asyncio.sleep(end)
            return [here, backends.requested(), await asyncio.to_thread(backends.requested)]

    async def both() -> list[list[str]]:
        return await asyncio.gather(one("reference", 0, 0.02), one("auto", 0.01, 0.03))

    with use_backend("reference"):
        assert asyncio.run(both()) == [["reference"] * 3, ["auto"] * 3]
        assert backends.requested() == "reference"


def test_blocks_of_generators_may_end_in_any_order() -> None:
    def block(name: str) -> Iterator[None]:
        with use_backend(name):
            yield

    before = backends.requested()
    first, second = block("reference"), block("auto")
    assert [next(first), next(second)] == [None, None] and backends.requested() == "auto"
    first.close()
    assert backends.requested() == "auto"
    second.close()
    assert backends.requested() == before


def test_a_thread_starts_from_the_choice_of_the_process() -> None:
    def outer() -> str:
        with use_backend("reference"), ThreadPoolExecutor(1) as pool:
            return pool.submit(backends.requested).result()

    assert outer() == backends.requested()


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compile_follows_the_backend_in_force(compiler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled once for each, in whatever thread or context; the backward pass uses what its forward pass used."""
    asked, choose = [], ops.logits.choose
    monkeypatch.setattr(
        ops.logits, "choose", lambda name, *args, **options: asked.append(name) or choose(name, *args, **options)
    )
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(compiler)
    teacher = torch.randn(2, 9, device=DEVICE)

    def loss(student: torch.Tensor) -> torch.Tensor:
        return topk_reverse_kl(student, teacher, k=3)

    compiled = torch.compile(loss, backend=counter, fullgraph=True)

    def step() -> list[str]:
        asked.clear()
        student = torch.randn(2, 9, device=DEVICE, requires_grad=True)
        value = compiled(student)
        with use_backend("auto"):
            value.backward()
        return asked.copy()

    before = [backends.requested()] * 2
    assert step() == before and counter.frame_count == 1
    with use_backend("reference"):
        assert step() == ["reference"] * 2 and counter.frame_count == 2
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(step).result() == before
        assert step() == ["reference"] * 2
    assert step() == before and counter.frame_count == 2


def test_a_backward_pass_takes_the_backend_of_its_forward_pass(monkeypatch) -> None:
    native = pytest.importorskip("topk_rkl.backends.native", exc_type=ImportError)

    def other(*_: object) -> None:
        raise AssertionError("the backend in force, not that of the forward pass")

    for name in ("scatter", "mass_grad", "linear_weight_grad"):
        monkeypatch.setattr(native, name, other)
    z, head = torch.randn(3, 20, requires_grad=True), torch.randn(60, 20, requires_grad=True)
    w = torch.randn(3, 20)
    with use_backend("reference"):
        losses = [
            topk_reverse_kl(z, w, k=5),
            topk_reverse_kl(z, teacher_topk(w, 5)),
            topk_divergence(z, w, k=5, mass="tail"),
            linear_topk_reverse_kl(z, head, w, k=5),
            linear_topk_reverse_kl(z, head, w, k=5, weight_grad="sparse"),
        ]
    for loss in losses:
        loss.backward()
    assert z.grad.isfinite().all()


@pytest.mark.slow
def test_the_environment_variable_sets_the_backend() -> None:
    code = (
        "import sys, warnings; sys.modules['topk_rkl._native'] = None\n"
        "import topk_rkl, torch; warnings.simplefilter('error')\n"  # the slow path that is asked for is not told
        "topk_rkl.teacher_topk(torch.randn(2, 9), 3)"
    )
    assert python(code, TOPK_RKL_BACKEND="reference").returncode == 0
    wrong = python(code, TOPK_RKL_BACKEND="fast")
    assert wrong.returncode != 0 and "TOPK_RKL_BACKEND: there is no backend 'fast'" in wrong.stderr


@pytest.mark.interpreter
@pytest.mark.slow
@pytest.mark.skipif("triton" not in BACKENDS, reason="Triton is not installed here")
def test_triton_refuses_cpu_tensors_unless_interpreted() -> None:
    code = "import topk_rkl, torch\nwith topk_rkl.use_backend('triton'): topk_rkl.teacher_topk(torch.randn(2, 9), 3)"
    refused = python(code)
    assert refused.returncode != 0 and "TRITON_INTERPRET=1" in refused.stderr
    assert ("there is no GPU" if DEVICE == "cpu" else "the logits are on cpu") in refused.stderr
    interpreted = python(code, TRITON_INTERPRET="1")
    if release("triton") < (3, 7) and release("numpy") >= (2, 4):  # which that interpreter does not run on
        assert "only 0-dimensional arrays can be converted" in interpreted.stderr
    else:
        assert interpreted.returncode == 0, interpreted.stderr


def release(package: str) -> tuple[int, ...]:
    """Such as (3, 7)."""
    return tuple(map(int, importlib.metadata.version(package).split(".")[:2]))


@pytest.mark.slow
def test_the_package_imports_and_works_without_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import topk_rkl, torch\n"
        "x = torch.randn(2, 9, requires_grad=True)\n"
        "topk_rkl.topk_reverse_kl(x, torch.randn(2, 9), k=3).backward()\n"
        "assert x.grad.abs().sum() > 0\n"
        "with topk_rkl.use_backend('triton'): pass\n"
    )
    outcome = python(code)
    assert "'triton' backend cannot run here" in outcome.stderr and "pip install triton" in outcome.stderr


@pytest.mark.slow
def test_importing_has_no_side_effect() -> None:
    code = (
        "import sys, topk_rkl.loss, torch\n"
        "assert not torch.cuda.is_initialized()\n"
        "print([m for m in sys.modules if m.startswith('topk_rkl.backends.triton')])"
    )
    assert python(code).stdout.strip() == "[]"
