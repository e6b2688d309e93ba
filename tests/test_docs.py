"""The pages follow the code and the results: names, signatures, examples, links, figures, and their sentences."""

import ast
import fnmatch
import html
import inspect
import re
from collections import Counter
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest

from benchmarks import report, summaries
from docs import api
from topk_rkl.backends import reference

ROOT = Path(__file__).parent.parent
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in (
        *ROOT.glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / x / "README.md" for x in ("gpu", "examples")),
    )
}
WRITTEN = {name: text for name, text in PAGES.items() if name != "docs/api.md"}  # by hand
KINDS = (".py", ".pyi", ".cpp", ".hpp", ".cu", ".cuh", ".sh", ".json", ".jsonl", ".svg", ".txt", ".toml")
SOURCES = {
    path: path.read_text()
    for folder in ("topk_rkl", "csrc", "tests", "benchmarks", "gpu", "examples", "docs", ".ci")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in KINDS
} | {path: path.read_text() for path in ROOT.iterdir() if path.suffix in KINDS or path.name == "Makefile"}
MARKS = {
    "README.md": ["picture"],
    "docs/benchmarks.md": ["cases", "cases", "exponents", "held", "cases", "gpu"],
    "docs/compiled.md": ["compiled"],
    "docs/paper.md": ["paper"] * 31,
    "docs/scaling.md": ["scaling"] * 18,
    "docs/stores.md": ["stores"] * 4,
    "examples/README.md": ["demo", "demo"],
}
FOREIGN = {  # names of Triton, torch and trainers
    "num_stages", "fp32_precision", "loss_parallel", "num_items_in_batch", "calculate_per_token_loss",
    "tensor_parallel_output_grad", "gather_from_sequence_parallel_region",
}  # fmt: skip
EXAMPLES = api.examples()
PUBLIC = {
    f"{path}.{name}": value for path in api.MODULES for name, value in api.public(import_module(path)).items()
}  # fmt: skip


def test_the_api_page_is_that_of_the_code() -> None:
    assert PAGES["docs/api.md"] == api.page(), "run python -m docs.api"


@pytest.mark.parametrize("name", [name for name, value in PUBLIC.items() if inspect.isfunction(value)])
def test_a_printed_signature_is_that_of_the_function(name: str) -> None:
    block = PAGES["docs/api.md"].partition(f"### `{name}`\n")[2].partition("```python\n")[2].partition("```")[0]
    scope: dict = {}
    exec(f"from __future__ import annotations\n{block} ...", vars(inspect.getmodule(PUBLIC[name])).copy(), scope)
    printed, real = (inspect.signature(f).parameters.values() for f in (scope.popitem()[1], PUBLIC[name]))
    assert [(p.name, p.kind, p.default) for p in printed] == [(p.name, p.kind, p.default) for p in real]


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_has_an_example_that_runs(name: str) -> None:
    cell = EXAMPLES[name.rpartition(".")[2]]
    homes = {full.rpartition(".")[2]: full.rpartition(".")[0] for full in PUBLIC}
    assert name.rpartition(".")[2] in {node.id for node in ast.walk(ast.parse(cell)) if isinstance(node, ast.Name)}
    scope: dict = {}
    for code in (api.set_up(homes), api.imports(cell, homes) + cell):
        exec(code, scope)


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page: str) -> None:
    for link in re.findall(r"\]\((?!https?://)([^)\s]+)\)", PAGES[page]):
        file, _, part = link.partition("#")
        target = (ROOT / page).parent / file if file else ROOT / page
        assert target.exists(), link
        assert not part or part in anchors(target.read_text()), link


def anchors(text: str) -> set[str]:
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def code_of(text: str) -> list[str]:
    """What stands in backticks, blocks left out."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE))


@cache
def words() -> frozenset[str]:
    """Of the sources and of their file names."""
    code = (text for path, text in SOURCES.items() if path.suffix not in (".json", ".jsonl", ".svg"))
    return frozenset(word for text in (*code, *map(str, SOURCES)) for word in re.findall(r"\w+", text))


@pytest.mark.parametrize("page", [name for name in PAGES if name != "CHANGELOG.md"])
def test_every_file_that_it_names_is_there(page: str) -> None:
    files = [str(path.relative_to(ROOT)) for path in (*SOURCES, *map(ROOT.joinpath, PAGES))]
    drawn = [
        word for line in re.findall(r"^ {4}(.*)", PAGES[page], re.MULTILINE) for word in re.findall(r"[\w./-]+", line)
    ]
    named = [x for x in code_of(PAGES[page]) + drawn if re.fullmatch(r"[\w./*-]+\.(py|pyi|cpp|hpp|cu|cuh|md|svg)", x)]
    assert page != "docs/design.md" or len(drawn) > 100
    for name in named:
        pattern = re.sub(r"\b[A-Z]+\b(?=[./])(?!\.md)", "*", name)  # OP.py is a file per op
        written = any(f'"{name}"' in text for text in SOURCES.values())  # by a command
        assert written or fnmatch.filter(files, pattern) or fnmatch.filter(files, f"*/{pattern}"), name


@pytest.mark.parametrize("page", [name for name in PAGES if name not in ("CHANGELOG.md", "docs/objectives.md")])
def test_every_name_that_it_uses_is_in_the_code(page: str) -> None:
    """Of what stands in backticks the calls, and the words with an underscore."""
    for code in code_of(PAGES[page]):
        for word in re.findall(r"\w+(?=\()|\w*[a-z]_\w+", code):
            assert word in words() | FOREIGN or "*" in code, f"`{code}`"


@pytest.mark.parametrize("page", PAGES)
def test_every_test_that_it_names_is_there(page: str) -> None:
    files = {path.name: re.findall(r"def (test_\w+)", path.read_text()) for path in (ROOT / "tests").glob("test_*.py")}
    every = [name for names in files.values() for name in names]
    for name in re.findall(r"`((?:test_\w+\.py::)?test_[\w*]+(?:\.py)?)`", PAGES[page]):
        file, _, pattern = name.rpartition("::")
        assert name in files or fnmatch.filter(files[file] if file else every, pattern), name


def test_the_table_of_backend_functions_has_their_arguments() -> None:
    triton = pytest.importorskip("topk_rkl.backends.triton", exc_type=ImportError)
    rows = dict(re.findall(r"^\| `(\w+)` \| (.* \| .*) \|$", PAGES["docs/design.md"], re.MULTILINE))
    public = {name for name, f in vars(reference).items() if inspect.isfunction(f) and name in triton.__all__}
    assert rows.keys() == public == {*triton.__all__}
    for name, row in rows.items():
        parameters = inspect.signature(getattr(reference, name)).parameters
        assert parameters.keys() <= set(re.findall(r"\w+", row)), name


def test_every_make_target_that_a_page_names_is_there() -> None:
    targets = set(re.findall(r"^([\w-]+):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page, text in PAGES.items():
        assert set(re.findall(r"(?:^ {4}|`)make ([\w-]+)", text, re.MULTILINE)) <= targets, page


def test_every_promise_names_its_tests() -> None:
    _, *promises = PAGES["docs/promises.md"].split("\n### ")
    assert len(promises) > 20
    assert [p.splitlines()[0] for p in promises if not re.search(r"^Tests: `test_", p, re.MULTILINE)] == []


@pytest.mark.parametrize("page", MARKS)
def test_figures_are_those_of_the_results(page: str) -> None:
    assert [mark[1] for mark in report.MARK.findall(PAGES[page])] == MARKS[page]
    assert report.filled(PAGES[page]) == PAGES[page], "run python -m benchmarks report"


def test_the_picture_is_of_the_results() -> None:
    text = (report.FOLDER / "cpu_linear.svg").read_text()
    shown = Counter(html.unescape(x) for x in re.findall(r"<text[^>]*>([^<]*)</text>", text))
    for _, bars in summaries.picture("cpu").values():
        assert bars[0].value < bars[-1].value
        assert Counter(x for bar in bars for x in (bar.name, bar.text)) <= shown


AS_PER = re.compile(
    r"\b((number|byte|term|row|logit|slot|register|instruction|program|thread|product|loss|second|nat|step)(e?s)?|\d+) "
    r"an? (position|slot|row|thread|token|core|element|instruction|warp|"
    r"program|sequence|step|response|case|call|block|processor|source|teacher)\b(?! (time|of))"
)
OPENERS = re.compile(
    r"(At|Behind|Below|Beside|Between|Beyond|By|During|For|From|In|Inside|Of|On|Over|Through|Under|Within|Without|"
    r"That|Those who|What|Which|Whoever|Whose)\b"
)


def sentences(text: str) -> list[str]:
    """Of paragraphs and lists; tables, blocks, headings and comments are left out, and code counts as a word."""
    text = re.sub(r"^```[^`]*^```$|<!--.*-->|^( {4,}|\||#).*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"^\s*(-|\d\.) ", "\n\n", re.sub(r"`[^`]+`", "code", text), flags=re.MULTILINE)
    paragraphs = (
        " ".join(part.split()) for part in re.split(r"\n\s*\n", re.sub(r"!?\[([^]]*)\]\([^)]*\)", r"\1", text))
    )
    return [s for part in paragraphs if part for s in re.split(r"(?<=[.!?]) ", part)]


@pytest.mark.parametrize("page", WRITTEN)
def test_a_sentence_is_short_and_begins_with_its_subject(page: str) -> None:
    found = sentences(WRITTEN[page])
    assert [s for s in found if len(s.split()) > 30] == []
    assert [s for s in found if OPENERS.match(s)] == []
    assert [s for s in found if AS_PER.search(s)] == []


def test_the_reader_of_prose_finds_what_it_looks_for() -> None:
    text = "A first one. Of the second `a b`\nmore.\n\n    In code.\n\n- K numbers a slot.\n\n| By | x |\n"
    assert sentences(text) == ["A first one.", "Of the second code more.", "K numbers a slot."]
    assert OPENERS.match("Of the second") and not OPENERS.match("One of")
    assert all(AS_PER.search(s) for s in ("a term a slot", "K numbers a position,", "16 bytes a thread"))
    assert not AS_PER.search("a program serves a row, some rows at a time")
