"""Writes docs/api.md from the signatures and docstrings of the package, and from docs/api_examples.py.

python -m docs.api
"""

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from dataclasses import is_dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, get_origin

HERE = Path(__file__).parent
MODULES = (
    "topk_rkl.loss",
    "topk_rkl.diagnostics",
    "topk_rkl.recipe.builders",
    "topk_rkl.recipe.composition",
    "topk_rkl.recipe.rewards",
    "topk_rkl.recipe.rollout",
    "topk_rkl.recipe.weighting",
    "topk_rkl.trainers.heads",
    "topk_rkl.trainers.head_loss",
    "topk_rkl.extraction",
    "topk_rkl.plot",
    "topk_rkl.servers",
    "topk_rkl.servers.client",
    "topk_rkl.store",
    "topk_rkl.store.readers",
    "topk_rkl.tokenizers",
)
HELPERS = ("log_probs_at", "normalized")  # of the builders, for the compositions
HEAD = """# API

`python -m docs.api` writes this page from the signatures and the docstrings. Shapes stand beside the arguments. Each
example runs after this set-up:

"""
SECTION = re.compile(r"^(Args|Returns|Raises):$\n((?:^(?:    .*)?$\n?)+)", re.MULTILINE)
ITEM = re.compile(r"^(\w[\w., ]*): (.*(?:\n(?:    .*|))*)", re.MULTILINE)


def public(module: ModuleType) -> dict[str, Any]:
    """Functions first, then classes, then types."""
    named = {name: getattr(module, name) for name in getattr(module, "__all__", None) or defined(module)}
    return dict(sorted(named.items(), key=lambda pair: (not inspect.isfunction(pair[1]), not inspect.isclass(pair[1]))))


def defined(module: ModuleType) -> list[str]:
    """The functions and the literal types that a module without `__all__` defines for others."""
    mine = {node.id for node in ast.walk(ast.parse(inspect.getsource(module))) if isinstance(node, ast.Name)}
    functions = [name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
    types = [name for name, value in vars(module).items() if get_origin(value) is Literal and name in mine]
    named = [name for name in functions if inspect.isfunction(getattr(module, name))] + types
    return [name for name in named if name[0] != "_" and name not in HELPERS]


def page() -> str:
    cells = examples()
    found = {path: public(import_module(path)) for path in MODULES}
    homes = {name: path for path, names in found.items() for name in names}
    text = HEAD + fenced(set_up(homes))
    for path, names in found.items():
        links = ", ".join(f"[`{name}`](#{anchor(path, name)})" for name in names)
        text += f"\n## `{path}`\n\n{described(import_module(path))}{links}\n{choices(import_module(path))}"
        for name, value in names.items():
            text += f"\n### `{path}.{name}`\n\n{entry(name, value)}"
            if name in cells:
                text += f"\n{fenced(imports(cells[name], homes) + cells[name])}"
    return text


def anchor(path: str, name: str) -> str:
    """As GitHub makes it of the heading."""
    return f"{path}.{name}".lower().replace(".", "")


def examples() -> dict[str, str]:
    """The cells of api_examples.py by name. The set-up loses the imports that each cell is printed with."""
    _, *parts = re.split(r"^# %% (.*)\n", (HERE / "api_examples.py").read_text(), flags=re.MULTILINE)
    cells = dict(zip(parts[::2], parts[1::2], strict=True))
    lines = cells["set-up"].splitlines()
    for node in ast.parse(cells["set-up"]).body:
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("topk_rkl"):
            lines[node.lineno - 1 : node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)
    return {**cells, "set-up": re.sub(r"\n{3,}", "\n\n", "\n".join(lines))}


def set_up(homes: dict[str, str]) -> str:
    code = examples()["set-up"]
    return code.replace("import torch\n", f"import torch\n\n{imports(code, homes).strip()}\n", 1)


def imports(cell: str, homes: dict[str, str]) -> str:
    """The lines that import what the example names."""
    used = {node.id for node in ast.walk(ast.parse(cell)) if isinstance(node, ast.Name)} & homes.keys()
    paths: dict[str, list[str]] = {}
    for name in sorted(used):
        paths.setdefault(homes[name], []).append(name)
    return "".join(f"from {path} import {', '.join(names)}\n" for path, names in sorted(paths.items())) + "\n"


def fenced(code: str) -> str:
    return f"```python\n{code.strip()}\n```\n"


def described(module: ModuleType) -> str:
    """The first paragraph of the module's docstring."""
    return inspect.getdoc(module).split("\n\n")[0] + "\n\n" if module.__doc__ else ""


def choices(module: ModuleType) -> str:
    """The names that the functions of `topk_rkl.diagnostics` take, each with its meaning."""
    names = getattr(module, "NAMES", ())
    return "\n" * bool(names) + "".join(item(name, inspect.getdoc(getattr(module.Block, name))) for name in names)


def entry(name: str, value: Any) -> str:
    if inspect.isfunction(value):
        return fenced(header(value)) + "\n" + body(value)
    if inspect.isclass(value):
        return fenced("\n".join(class_headers(name, value))) + "\n" + body(value) + fields(value) + methods(value)
    return fenced(f"{name} = {value}".replace("typing.", "").replace("'", '"'))


def header(function: Any) -> str:
    """The `def` as it stands in the source, with the shape beside each tensor."""
    source = textwrap.dedent(inspect.getsource(function))
    node = ast.parse(source).body[0]
    assert isinstance(node, ast.FunctionDef)
    return "\n".join(source.splitlines()[node.lineno - 1 : node.body[0].lineno - 1])


def class_headers(name: str, value: type) -> Iterator[str]:
    """A module's constructor and call as they stand in the source, of another class its constructor's signature."""
    if "forward" not in dir(value):
        yield f"class {name}{str(inspect.signature(value)).removesuffix(' -> None')}"
        return
    yield f"class {name}:"
    for method in ("__init__", "forward"):
        yield textwrap.indent(header(getattr(value, method)), "    ")


def fields(value: type) -> str:
    """Those of a NamedTuple or a dataclass that have a string below them, each with it."""
    if not hasattr(value, "_fields") and not is_dataclass(value):
        return ""
    node = ast.parse(textwrap.dedent(inspect.getsource(value))).body[0]
    assert isinstance(node, ast.ClassDef)
    lines = []
    for field, string in zip(node.body, node.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(string, ast.Expr):
            lines.append(item(field.target.id, inspect.cleandoc(ast.literal_eval(string.value))))
    return "\n" * bool(lines) + "".join(lines)


def methods(value: type) -> str:
    """With the properties; those without a docstring are what their name says."""
    own = {name: method for name, method in vars(value).items() if name[0] != "_" and name != "forward"}
    lines = []
    for name, method in own.items():
        if isinstance(method, property) and method.__doc__:
            lines.append(f"\n`{name}`: {body(method)}")
        function = method.__func__ if isinstance(method, staticmethod) else method
        if inspect.isfunction(function):
            of_class = f"{value.__name__}." * isinstance(method, staticmethod)
            lines.append(f"\n`{of_class}{name}{signature(function)}`: {body(function)}")
    return "".join(lines)


def signature(method: Any) -> str:
    """Without self and the modules of types."""
    found = inspect.signature(method, eval_str=True)
    found = found.replace(parameters=[x for name, x in found.parameters.items() if name != "self"])
    return re.sub(r"\b(collections\.abc|typing|topk_rkl[\w.]*|torch(?=\.Tensor))\.", "", str(found)).replace("'", '"')


def body(value: Any) -> str:
    """The docstring in Markdown: its sections become lists."""
    text = inspect.getdoc(value) or ""
    return SECTION.sub(section, text + "\n")


def section(found: re.Match[str]) -> str:
    text = textwrap.dedent(found[2])
    items = [item(name, rest) for name, rest in ITEM.findall(text)] if found[1] != "Returns" else []
    return f"**{found[1]}**\n\n" + ("".join(items) or text.strip() + "\n") + "\n" * found[2].endswith("\n\n")


def item(names: str, text: str) -> str:
    code = ", ".join(f"`{name}`" for name in names.split(", "))
    return f"- {code}: {' '.join(text.split())}\n"


if __name__ == "__main__":
    (HERE / "api.md").write_text(page())
