"""Count what keeps the code readable: `python tests/count_structure.py [ROOT]` prints one JSON line.

The counts use the source text alone, so that any checkout of this project can be measured, also an older one.
"""

import ast
import json
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

PRODUCT = ("diffdis", "platform", "jobs")
LAYERS = ("diffdis", "ray_platform", "diffdis_platform", "jobs")  # a package imports only packages to its left
DEPENDENCIES = (
    "ray",
    "deepspeed",
    "torch",
    "jsonargparse",
    "argparse",
    "mlflow",
    "diffusers",
    "transformers",
    "optuna",
    "pyarrow",
)
# Names with one leading underscore that are public API in spite of it, or belong to our own objects.
PRIVATE_MODULE = re.compile(r"(^|\.)_[a-z]")
UNTYPED_RECORD = re.compile(r"\b(?:dict|Mapping)\[str, (?:Any|object)\]")
HTML_IN_F_STRING = re.compile(r"</?(?:div|td|th|tr|table|span|b|i|li|ul|code|svg|p|a|h[1-3]|details|summary|figure)\b")


def python_files(root: Path, *folders: str) -> Iterator[Path]:
    for folder in folders:
        yield from (path for path in sorted((root / folder).rglob("*.py")) if "__pycache__" not in path.parts)


def module_name(root: Path, path: Path) -> str:
    parts = list(path.relative_to(root).with_suffix("").parts)
    parts = parts[1:] if parts[0] == "platform" or (parts[0] == "jobs" and len(parts) > 2) else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.AST, modules: set[str]) -> set[str]:
    """The project's modules that a module imports, also those within functions and under TYPE_CHECKING."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name in modules else node.module for name in inner}
    return names & modules


def cycles(graph: dict[str, set[str]]) -> int:
    """Modules that reach themselves."""

    def reaches(start: str) -> bool:
        seen, stack = set(), list(graph[start])
        while stack:
            name = stack.pop()
            if name == start:
                return True
            if name not in seen:
                seen.add(name)
                stack += graph[name]
        return False

    return sum(map(reaches, graph))


def private_sites(tree: ast.AST) -> list[int]:
    """Lines that import a private module or name of a dependency, or read a private attribute of anything but `self`, `cls` or a
    class of the same file."""
    ours = {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)} | {"self", "cls", "super", "os"}
    lines = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            whole = [f"{node.module}.{name}" for name in names] if isinstance(node, ast.ImportFrom) and node.module else names
            if any(name.split(".")[0] in DEPENDENCIES and PRIVATE_MODULE.search(name) for name in whole):
                lines.append(node.lineno)
        elif isinstance(node, ast.Attribute) and re.match(r"_[a-zA-Z]", node.attr):
            base = node.value
            if isinstance(base, ast.Call):  # super()._x belongs to a base class of a dependency or of ours
                base = base.func
            if not (isinstance(base, ast.Name) and base.id in ours - {"super"}) and not _is_own_attribute(tree, node.attr):
                lines.append(node.lineno)
    return lines


def _is_own_attribute(tree: ast.AST, name: str) -> bool:
    """Whether the file itself defines the private name, as a function, an attribute or a field."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            return True
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        for target in targets:
            parts = target.elts if isinstance(target, ast.Tuple) else [target]
            if any(
                (isinstance(part, ast.Attribute) and part.attr == name) or (isinstance(part, ast.Name) and part.id == name)
                for part in parts
            ):
                return True
    return False


def count(root: Path) -> dict[str, object]:
    texts = {path: path.read_text(encoding="utf-8") for path in python_files(root, *PRODUCT)}
    trees = {path: ast.parse(text) for path, text in texts.items()}
    names = {path: module_name(root, path) for path in texts}
    modules = set(names.values())
    graph = {names[path]: imports(tree, modules) - {names[path]} for path, tree in trees.items()}
    importers = Counter(target for targets in graph.values() for target in targets)
    classes: dict[str, list[str]] = defaultdict(list)
    private: dict[str, int] = {}
    long_functions, f_strings = [], 0
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                classes[node.name].append(names[path])
            elif isinstance(node, ast.Assign) and node in tree.body and isinstance(node.targets[0], ast.Name):
                alias = node.targets[0].id  # a type alias, as in `Labels = Mapping[str, str]`
                if re.fullmatch(r"[A-Z][a-z]\w*", alias):
                    classes[alias].append(names[path])
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno - node.lineno > 60:
                long_functions.append(f"{names[path]}.{node.name}")
            elif isinstance(node, ast.JoinedStr):
                f_strings += bool(HTML_IN_F_STRING.search("".join(v.value for v in node.values if isinstance(v, ast.Constant))))
        if sites := len(set(private_sites(tree))):
            private[names[path]] = sites
    layer = {name: LAYERS.index(name.split(".")[0]) if name.split(".")[0] in LAYERS else len(LAYERS) - 1 for name in modules}
    upward = [f"{name} -> {target}" for name, targets in graph.items() for target in targets if layer[target] > layer[name]]
    return {
        "product_lines": sum(text.count("\n") for text in texts.values()),
        "product_files": len(texts),
        "test_lines": sum(path.read_text(encoding="utf-8").count("\n") for path in python_files(root, "tests")),
        "single_importer_modules": sorted(name for name in modules if importers[name] == 1 and "." in name),
        "dict_str_any": sum(len(UNTYPED_RECORD.findall(text)) for text in texts.values()),
        "repeated_class_names": sorted(name for name, places in classes.items() if len(places) > 1),
        "private_api_sites": private,
        "html_f_strings": f_strings,
        "modules_in_cycles": cycles(graph),
        "imports_upward": upward,
        "functions_over_60_lines": long_functions,
        "files_over_400_lines": [names[path] for path, text in texts.items() if text.count("\n") > 400],
    }


if __name__ == "__main__":
    print(json.dumps(count(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1])))
