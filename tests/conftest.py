"""Every test starts from its own seed, sees NaN in fresh memory, and runs kernels in the interpreter without a GPU."""

import os
import warnings
import weakref
import zlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from torch.utils._python_dispatch import TorchDispatchMode

import topk_rkl
from tests.direct import Direct
from topk_rkl import backends

pytest.register_assert_rewrite("tests.linear_problem", "tests.oracles")  # so that their assertions show values
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("reference", "native", "triton", "cuda") if DEVICE == "cpu" else ("reference", "triton", "cuda")
BACKENDS = [name for name in NAMES if backends.unavailable(name) is None]
if DEVICE == "cpu" and "triton" in BACKENDS:
    from tests.interpreter import hasten

    hasten()
EVERY_OBJECTIVE = [name for name in BACKENDS if name != "cuda"]  # which has the renormalised reverse KL alone


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what runs in the interpreter, and puts the longest tests first: the last of a worker should be short."""
    for item in items if DEVICE == "cpu" else ():
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU, and this machine has none"))
        if "triton" in [value for value in parameters(item).values() if isinstance(value, str)]:
            item.add_marker("interpreter")
    items.sort(key=lambda item: -2 * has(item, "slow") - has(item, "interpreter"))


def parameters(item: pytest.Item) -> dict[str, Any]:
    return item.callspec.params if hasattr(item, "callspec") else {}


def has(item: pytest.Item, marker: str) -> bool:
    return item.get_closest_marker(marker) is not None


@pytest.fixture(autouse=True)
def _seed(request: pytest.FixtureRequest) -> None:
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    """In this mode torch fills fresh memory with NaN, or the largest integer: an output never written shows."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have a deterministic implementation.*")
        torch.use_deterministic_algorithms(True, warn_only=True)
        yield
        torch.use_deterministic_algorithms(False)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`backend` and `module` are every backend that can run here, or those that HAVE_IT names in the test's file."""
    for fixture in {"backend", "module"}.intersection(metafunc.fixturenames):
        metafunc.parametrize(fixture, getattr(metafunc.module, "HAVE_IT", BACKENDS), indirect=True)


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once with each of them."""
    with topk_rkl.use_backend(request.param):
        yield request.param


@pytest.fixture
def module(request: pytest.FixtureRequest) -> Any:
    """The same, as the module with the backend's functions."""
    return Direct(backends._load(request.param))


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For small models, whose threads would mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def loaded() -> Any:
    """SmolLM2 and its tokenizer, which take 20 seconds to load: tests that ask for them are of the group "smollm2"."""
    from examples.smollm2 import load_teacher

    return load_teacher()


def simulated(module: Any) -> bool:
    """Whether kernels for a GPU run without one, for which few rows have to do: the interpreter, the CUDA host."""
    return DEVICE == "cpu" and module.__name__.endswith(("triton", "cuda"))


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """-0.0 is not 0.0 here, and a NaN is itself."""
    return (a.shape, a.dtype) == (b.shape, b.dtype) and torch.equal(
        *(x.contiguous().view(-1).view(torch.uint8) for x in (a, b))
    )


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that operations create, inputs and their views left out, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen |= {x.untyped_storage()._cdata for x in self._tensors((args, kwargs))}
        result = function(*args, **(kwargs or {}))
        for tensor in self._tensors(result):
            self._count(tensor.untyped_storage())
        return result

    @staticmethod
    def _tensors(tree: Any) -> list[torch.Tensor]:
        return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self.seen:
            return
        self.seen.add(storage._cdata)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())

    def _free(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.live -= size
