"""Bundle the plain model into one Python file, generated from the sources of this package.

Hugging Face's `trust_remote_code` loads modelling code from the folder of the weights. The files of
`model/` are concatenated unchanged, without their imports of each other; only the configuration
becomes a plain dataclass with the same fields, since its values were validated before.

transformers' `register_for_auto_class` copies only the file that defines the class and what it
imports relatively. These modules import absolutely, so its folder would need hg_scale to load.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from hg_scale.checkpoint.errors import CheckpointError
from hg_scale.config.schema import ModelConfig

_HEADER = '''"""The Hourglass language model of hg_scale {version}, its plain model files in one."""

from __future__ import annotations
'''

_CONFIG_HEAD = '''@dataclass(frozen=True)
class ModelConfig:
    """The architecture of an Hourglass: the model section of config.json."""'''


@dataclass(frozen=True)
class BundlePart:
    """A module to bundle: all of it, or only some of its top-level names."""

    module: str
    names: tuple[str, ...] | None = None


PARTS = (
    BundlePart("hg_scale.config.constants"),
    BundlePart("hg_scale.config.hierarchy"),
    BundlePart("hg_scale.config.resampling_kind"),
    BundlePart("hg_scale.config.schema", ("by_level", "Positions", "ModelConfig")),
    BundlePart("hg_scale.model.plan"),
    BundlePart("hg_scale.model.context"),
    BundlePart("hg_scale.model.cache"),
    BundlePart("hg_scale.model.grouping"),
    BundlePart("hg_scale.model.layers"),
    BundlePart("hg_scale.model.positions"),
    BundlePart("hg_scale.model.banded"),
    BundlePart("hg_scale.model.attention"),
    BundlePart("hg_scale.model.block"),
    BundlePart("hg_scale.model.resampling"),
    BundlePart("hg_scale.model.sharding"),
    BundlePart("hg_scale.model.initialization"),
    BundlePart("hg_scale.model.hourglass"),
    BundlePart("hg_scale.convert.huggingface_model"),
)


def bundle(version: str) -> str:
    """Return the source of the bundle. version: of hg_scale, for its docstring.

    Raises CheckpointError if two parts define the same name, or a name that one needs is missing.
    """
    imports: dict[str, set[str]] = defaultdict(set)
    bodies: list[str] = []
    owner: dict[str, str] = {}
    needed: dict[str, str] = {}
    for part in PARTS:
        text = _path(part.module).read_text(encoding="utf-8")
        lines, body, modules = text.splitlines(), [], []
        for node in ast.parse(text).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                if part.names is None:
                    modules += _record_imports(node, part, imports, needed)
                continue
            names = _defined(node)
            if _is_docstring(node) or (part.names is not None and not set(names) & set(part.names)):
                continue
            for name in names:
                if name in owner:
                    raise CheckpointError(f"{part.module} and {owner[name]} both define {name}")
                owner[name] = part.module
            config = names == ["ModelConfig"]
            body.append(_config_class(node, lines) if config else _text(node, lines))
        # `from hg_scale.model import banded` imports a module: here a class with its functions.
        spaces = [_namespace(module, owner) for module in modules]
        comment = f"# {'-' * 20} {part.module.replace('.', '/')}.py"
        bodies.append("\n\n\n".join([comment, *spaces, *body]))
    for name, module in needed.items():
        if name not in owner:
            raise CheckpointError(f"{module} needs {name}, which no part of the bundle defines")
    head = _HEADER.format(version=version) + "\n" + _import_lines(imports)
    return "\n\n\n".join([head, *bodies]) + "\n"


def _record_imports(
    node: ast.Import | ast.ImportFrom,
    part: BundlePart,
    imports: dict[str, set[str]],
    needed: dict[str, str],
) -> list[str]:
    """Record external imports and names needed of other parts; return parts used as modules."""
    if isinstance(node, ast.Import):
        imports[""] |= {ast.unparse(alias) for alias in node.names}
        return []
    module = str(node.module)
    if not module.startswith("hg_scale."):
        if module != "__future__":
            imports[module] |= {ast.unparse(alias) for alias in node.names}
        return []
    bundled = {part.module for part in PARTS}
    used = [f"{module}.{alias.name}" for alias in node.names]
    needed |= {
        alias.name: part.module
        for alias, path in zip(node.names, used, strict=True)
        if path not in bundled
    }
    return [path for path in used if path in bundled]


def _import_lines(imports: dict[str, set[str]]) -> str:
    plain = [f"import {name}" for name in sorted(imports.get("", ()))]
    imports = {
        **imports,
        "dataclasses": imports["dataclasses"] | {"dataclass"},  # for the plain configuration
        "typing": imports["typing"] | {"Any", "Literal"},
    }
    others = [f"from {m} import {', '.join(sorted(imports[m]))}" for m in sorted(imports) if m]
    return "\n".join([*plain, *others])


def _path(module: str) -> Path:
    """Return the path of a module without importing it: the last part needs transformers."""
    package, _, name = module.rpartition(".")
    folder = import_module(package)
    return Path(next(iter(folder.__path__))) / f"{name}.py"


def _defined(node: ast.stmt) -> list[str]:
    """Return the top-level names that a statement binds."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.Assign):
        return [
            t.id for target in node.targets for t in ast.walk(target) if isinstance(t, ast.Name)
        ]
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return [node.target.id]
    return []


def _is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _text(node: ast.stmt, lines: list[str]) -> str:
    """Return the source of a statement, with its decorators and the comments right above."""
    decorators = getattr(node, "decorator_list", [])
    first = min([node.lineno, *(d.lineno for d in decorators)]) - 1
    while first and lines[first - 1].startswith("#"):
        first -= 1
    return "\n".join(lines[first : node.end_lineno])


def _config_class(node: ast.stmt, lines: list[str]) -> str:
    """Return `ModelConfig` as a plain dataclass: its fields, and methods that need no pydantic."""
    assert isinstance(node, ast.ClassDef)
    fields = [f"    {name}: Any" for name in ModelConfig.model_fields]
    methods = [
        _text(child, lines)
        for child in node.body
        if isinstance(child, ast.FunctionDef)
        and not any("validator" in ast.unparse(d) for d in child.decorator_list)
    ]
    return "\n\n".join([_CONFIG_HEAD, "\n".join(fields), *methods])


def _namespace(module: str, owner: dict[str, str]) -> str:
    """Return a class that stands for a module: its public functions as static methods."""
    public = [name for name, part in owner.items() if part == module and name[0] != "_"]
    members = "\n".join(
        f"    {name} = staticmethod({name})" for name in public if not name.isupper()
    )
    return f"class {module.rpartition('.')[2]}:\n{members}"
