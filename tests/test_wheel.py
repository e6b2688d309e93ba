"""The wheel: built, installed and tested where the source tree is out of reach; with a compiler and without one."""

import os
import re
import shutil
import site
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import BACKENDS, DEVICE

ROOT = Path(__file__).parent.parent
SELECTS = """
import sys, torch, topk_rkl
from topk_rkl import collect_env
assert topk_rkl.__file__.startswith(sys.argv[1]), topk_rkl.__file__
logits = torch.randn(5, 999).round(decimals=1)
want = logits.sort(dim=-1, descending=True, stable=True).indices[:, :40]
assert torch.equal(topk_rkl.teacher_topk(logits, 40).ids, want.int())
print("native:", collect_env.facts()["native backend"])
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(DEVICE != "cpu", reason="it needs a package index for its build"),
]


def installed(folder: Path, **env: str) -> tuple[Path, str]:
    """The Python of a new environment that has the wheel, and what the build of the wheel printed."""
    sources, environment = folder / "source", folder / "environment"
    # A copy, so that what was built in the tree is neither used nor touched.
    left_out = shutil.ignore_patterns(".*", "build", "*.so", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, sources, ignore=left_out)
    pinned = {name: str(ROOT / "constraints.txt") for name in ("PIP_CONSTRAINT", "PIP_BUILD_CONSTRAINT")}
    # Another test builds the CUDA part. The code is that of an installation but for the time spent on optimising it.
    env = {"TOPK_RKL_BUILD_CUDA": "off", "CMAKE_BUILD_TYPE": "Debug", **env}

    def run(*words: str) -> str:
        return checked(folder, [sys.executable, "-m", *words], **pinned, **env)

    printed = run("pip", "wheel", "--verbose", "--no-deps", "--wheel-dir", "wheels", str(sources))
    shutil.rmtree(sources)
    run("venv", "--without-pip", str(environment))
    python = environment / "bin" / "python"
    (packages,) = environment.glob("lib/*/site-packages")
    # torch and pytest come from here. A folder named in a .pth file brings none of its own, which lead to the tree.
    (packages / "torch.pth").write_text("\n".join(site.getsitepackages()))
    run("pip", "--python", str(python), "install", "--quiet", "--no-deps", *map(str, (folder / "wheels").iterdir()))
    return python, printed


def checked(folder: Path, command: list[str], **env: str) -> str:
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, **env}, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.skipif("native" not in BACKENDS, reason="the extension was not built here")
def test_the_wheel_outside_the_source_tree(tmp_path: Path) -> None:
    python, _ = installed(tmp_path)
    assert "native: can run" in checked(tmp_path, [python, "-c", SELECTS, python.parent.parent])
    shutil.copytree(ROOT / "tests", tmp_path / "tests")
    options = ["-q", "-c", os.devnull, "--rootdir", ".", "-p", "no:cacheprovider", "-W", "ignore"]
    options += ["-k", "native and not 151936 and not 262144"]
    path = os.pathsep.join(map(str, (tmp_path, tmp_path / "tests")))
    printed = checked(tmp_path, [python, "-m", "pytest", *options, "tests/test_select.py"], PYTHONPATH=path)
    assert re.search(r"\d{2,} passed", printed), printed


def test_a_wheel_without_a_compiler(tmp_path: Path) -> None:
    python, printed = installed(tmp_path, CXX=str(tmp_path / "no-compiler"))
    assert "The compiled extension of topk_rkl was not built" in printed
    assert "install a C++20 compiler" in printed
    found = checked(tmp_path, [python, "-c", SELECTS, python.parent.parent])
    assert "the compiled extension was not built" in found
