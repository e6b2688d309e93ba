"""A source distribution, installed where the source tree is out of reach: without a compiler, and again with one."""

import os
import re
import shutil
import site
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from conftest import BACKENDS, DEVICE

ROOT = Path(__file__).parent.parent
SELECTS = """
import sys, torch, topk_rkl
from topk_rkl.cli import env
assert topk_rkl.__file__.startswith(sys.argv[1]), topk_rkl.__file__
logits = torch.randn(5, 999).round(decimals=1)
want = logits.sort(dim=-1, descending=True, stable=True).indices[:, :40]
for _ in range(2):
    assert torch.equal(topk_rkl.teacher_topk(logits, 40).ids, want.int())
print("native:", env.facts()["native backend"])
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(DEVICE != "cpu", reason="it needs a package index for its build"),
]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a copy, so that what was built in the tree is neither used nor touched."""
    sources = tmp_path_factory.mktemp("sdist") / "source"
    left_out = shutil.ignore_patterns(".*", "build", "*.so", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, sources, ignore=left_out)
    checked(sources, [sys.executable, "-c", "from setuptools import build_meta; build_meta.build_sdist('..')"])
    shutil.rmtree(sources)
    (made,) = sources.parent.iterdir()
    return made


def checked(folder: Path, command: list[str], **env: str) -> str:
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHONPATH", "TOPK_RKL"))}
    done = subprocess.run(
        command, cwd=folder, env=plain | env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_the_sdist_has_every_source(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    needed = ["CMakeLists.txt", "LICENSE", "README.md", "pyproject.toml", "setup.py", "topk_rkl/py.typed"]
    needed += ["topk_rkl/plot/page.html"]
    found = [*(ROOT / "csrc").rglob("*.*"), *(ROOT / "topk_rkl").rglob("*.py")]
    needed += [str(path.relative_to(ROOT)) for path in found]
    assert len(needed) > 90 and [name for name in needed if name not in held] == []
    assert [name for name in held if name.endswith((".so", ".pyc")) or name.startswith("tests")] == []


@pytest.mark.skipif("native" not in BACKENDS, reason="the extension was not built here")
def test_it_installs_without_a_compiler_and_the_remedy_it_names_brings_the_extension(
    sdist: Path, tmp_path: Path
) -> None:
    environment = tmp_path / "environment"
    checked(tmp_path, [sys.executable, "-m", "venv", "--without-pip", str(environment)])
    python = environment / "bin" / "python"
    (packages,) = environment.glob("lib/*/site-packages")
    # torch and pytest come from here. A folder named in a .pth file brings none of its own, which lead to the tree.
    (packages / "torch.pth").write_text("\n".join(site.getsitepackages()))
    pinned = {name: str(ROOT / "constraints.txt") for name in ("PIP_CONSTRAINT", "PIP_BUILD_CONSTRAINT")}
    # Another test builds the CUDA part. The code is that of an installation but for the time spent on optimising it.
    pinned |= {"CMAKE_BUILD_TYPE": "Debug", "PIP_CACHE_DIR": str(tmp_path / "cache")}

    def pip(*words: str, **env: str) -> str:
        command = [sys.executable, "-m", "pip", "--python", str(python), *words, str(sdist)]
        return checked(tmp_path, command, **pinned, **env)

    printed = pip("install", "--verbose", "--no-deps", "--no-build-isolation", CXX=str(tmp_path / "no-compiler"))
    assert "The compiled extension of topk_rkl was not built" in printed
    assert "install a C++20 compiler" in printed
    found = checked(tmp_path, [python, "-c", SELECTS, environment])
    assert found.count("plain PyTorch serves this call") == 1 and "native: No module named" in found
    (remedy,) = re.findall(r"UserWarning: .*reinstall topk_rkl with pip (install[-\w ]*),", found)

    pip(*remedy.split())
    found = checked(tmp_path, [python, "-c", SELECTS, environment])
    assert "native: can run" in found and "plain PyTorch" not in found
    shutil.copytree(ROOT / "tests", tmp_path / "tests")
    options = ["-q", "-c", os.devnull, "--rootdir", ".", "-p", "no:cacheprovider", "-W", "ignore"]
    options += ["-k", "native and not 151936 and not 262144"]
    path = os.pathsep.join(map(str, (tmp_path, tmp_path / "tests")))
    printed = checked(tmp_path, [python, "-m", "pytest", *options, "tests/test_select.py"], PYTHONPATH=path)
    assert re.search(r"\d{2,} passed", printed), printed
