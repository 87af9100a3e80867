"""The structure of the repository: one-way imports, unique public names, one language."""

from __future__ import annotations

import ast
import re
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from tests.shared import ROOT

PACKAGE = ROOT / "hg_scale"
LAYERS = (
    (
        "errors",
        "exit_codes",
        "arguments",
        "atomic_write",
        "bounded_read",
        "folder_lock",
        "formats",
        "metrics_file",
        "run_starts",
        "standard_streams",
        "__init__",
    ),
    ("config",),
    ("model",),
    ("parallel",),
    ("planning",),
    ("data",),
    ("checkpoint",),
    ("convert",),
    ("evaluation",),
    ("training",),
    ("train", "commands"),
    ("__main__",),
)
"""From the bottom up: a package imports from its own layer and those below.

`hg_scale/__init__.py` is at both ends: it holds the version, and imports the public API on use.
"""

VERBS = ("hg_scale.commands.", "hg_scale.train")
SHARED_NAMES = {
    "HELP": "every module of commands/ is one verb of `hg-scale` with the same three names",
    "add_options": "as HELP; train.py is the verb `train`",
    "run": "as HELP",
}
"""Public names that are defined more than once, in `VERBS` only, and why."""

TERMS = {
    r"bits a byte|nats a token|FLOPs a token|tokens a second|seconds a step": "per",
    r"lack of memory": "out of memory",
    r"anew": "again, from scratch",
    r"(?:go|goes|going|went|gone) on from": "resume from",
    r"alike on all ranks": "identical on all ranks",
    r"collective operations?": "collective",
    r"pass(?:ed|ing) over": "skip",
    r"mend(?:s|ed|ing)?": "fix",
    r"spoil(?:s|ed|t)?": "corrupt",
    r"whole checkpoints?|checkpoints? (?:is|are) whole": "complete",
    r"the valley": "the inner levels",
    r"where it stands|what stands there": "the current step, the contents",
    r"the teller|tells? the (?:fault|error)": "report",
    r"in vain": "without effect",
    r"the house": "repository layout",
}
"""Terms that nobody in the field uses, and what to write instead."""


def modules() -> dict[str, ast.Module]:
    """Every module of the package by its dotted name."""
    trees = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        trees[name] = ast.parse(path.read_text(encoding="utf-8"))
    return trees


def imports_of(tree: ast.AST, known: set[str], runtime: bool) -> Iterator[str]:
    """Modules of the package that a module imports; `runtime`: only while it is loaded."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hg_scale"):
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                yield submodule if submodule in known else str(node.module)
        elif runtime and _runs_later(node):
            continue
        else:
            yield from imports_of(node, known, runtime)


def _runs_later(node: ast.AST) -> bool:
    if isinstance(node, ast.If):
        return ast.unparse(node.test) == "TYPE_CHECKING"
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)


def layer_of(module: str) -> int:
    part = module.split(".")[1] if "." in module else "__init__"
    return next(i for i, names in enumerate(LAYERS) if part in names)


def test_imports_run_downwards() -> None:
    trees = modules()
    upwards = [
        f"{name} imports {target}"
        for name, tree in trees.items()
        for target in imports_of(tree, set(trees), runtime=False)
        if layer_of(target) > layer_of(name) and name != "hg_scale.__init__"
    ]
    assert not upwards


def test_imports_have_no_cycle() -> None:
    trees = modules()
    graph = {
        name: {t.removesuffix(".__init__") for t in imports_of(tree, set(trees), runtime=True)}
        for name, tree in trees.items()
    }
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for target in sorted(graph.get(name, ())):
                visit(target, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_every_package_has_an_init_file() -> None:
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    assert not [str(f) for f in sorted(folders) if not (f / "__init__.py").exists()]


def test_public_names_are_defined_once() -> None:
    places = defaultdict(set)
    for module, tree in modules().items():
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names = [node.name]
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names = [target.id for target in targets if isinstance(target, ast.Name)]
            else:
                continue
            for name in names:
                if not name.startswith("_"):
                    places[name].add(module)
    repeated = {name: sorted(found) for name, found in places.items() if len(found) > 1}
    for name in SHARED_NAMES:
        others = [module for module in repeated[name] if not module.startswith(VERBS)]
        assert not others, f"{name} is defined in {others}, which are no verbs"
    assert {k: v for k, v in repeated.items() if k not in SHARED_NAMES} == {}
    assert set(SHARED_NAMES) <= set(repeated), "an exception that is no longer needed"


def texts() -> Iterator[tuple[Path, str]]:
    """Every text file of the repository that people read, but for this one."""
    listed = subprocess.run(
        ["git", "ls-files", "*.py", "*.md", "*.sh", "Makefile", "*.toml", "*.html", "*.svg"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    for name in listed.splitlines():
        path = ROOT / name
        if path.exists() and path != Path(__file__):
            yield path, path.read_text(encoding="utf-8")


def test_terms_are_those_of_the_field() -> None:
    found = []
    for pattern, instead in TERMS.items():
        expression = re.compile(rf"\b(?:{pattern})\b", re.IGNORECASE)
        for path, text in texts():
            for number, line in enumerate(text.splitlines(), 1):
                if match := expression.search(line):
                    found.append(f"{path.relative_to(ROOT)}:{number}: {match[0]!r} -> {instead}")
    assert not found, "\n".join(found)
