"""Measure the code's structure and readability: `python tests/count_structure.py [ROOT]` prints one JSON line.

The counts use only the source text, so that any checkout of this project can be measured, including older ones.
"""

import ast
import json
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

PRODUCT = ("diffdis", "platform", "jobs")
LAYERS = ("diffdis", "ray_platform", "diffdis_platform", "jobs")  # a package may import only packages to its left
TRAINING = ("ray", "deepspeed", "torch", "diffusers", "transformers")
DEPENDENCIES = (*TRAINING, "jsonargparse", "argparse", "mlflow", "optuna", "pyarrow")
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
    """Return the project's modules that a module imports, including imports within functions and under TYPE_CHECKING."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name in modules else node.module for name in inner}
    return names & modules


def reaches_itself(start: str, graph: dict[str, set[str]]) -> bool:
    seen: set[str] = set()
    stack = list(graph[start])
    while stack:
        if (name := stack.pop()) not in seen:
            seen.add(name)
            stack += graph[name]
    return start in seen


def private_sites(tree: ast.AST) -> set[int]:
    """Return the lines that import a private name of a dependency or read a private attribute that the file does not define."""
    nodes = list(ast.walk(tree))
    ours = {node.name for node in nodes if isinstance(node, ast.ClassDef)} | {"self", "cls", "os"}
    documented = {"_replace", "_asdict", "_fields", "_make"}  # documented methods of named tuples
    own = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    own |= {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}
    own |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    lines = set()
    for node in nodes:
        if isinstance(node, ast.Import | ast.ImportFrom):
            prefix = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            names = [prefix + alias.name for alias in node.names]
            if any(name.split(".")[0] in DEPENDENCIES and PRIVATE_MODULE.search(name) for name in names):
                lines.add(node.lineno)
        elif isinstance(node, ast.Attribute) and re.match(r"_[a-zA-Z]", node.attr):
            base = node.value.id if isinstance(node.value, ast.Name) else ""
            if base not in ours and node.attr not in own | documented:
                lines.add(node.lineno)
    return lines


def count(root: Path) -> dict[str, object]:
    texts = {path: path.read_text(encoding="utf-8") for path in python_files(root, *PRODUCT)}
    names = {path: module_name(root, path) for path in texts}
    trees = {names[path]: ast.parse(text) for path, text in texts.items()}
    graph = {name: imports(tree, set(trees)) - {name} for name, tree in trees.items()}
    importers = Counter(target for targets in graph.values() for target in targets)
    classes: dict[str, list[str]] = defaultdict(list)
    long_functions, f_strings = [], 0
    for name, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                classes[node.name].append(name)
            elif isinstance(node, ast.Assign) and node in tree.body and isinstance(node.targets[0], ast.Name):
                if re.fullmatch(r"[A-Z][a-z]\w*", node.targets[0].id):  # a type alias, as in `Labels = Mapping[str, str]`
                    classes[node.targets[0].id].append(name)
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno - node.lineno > 60:
                long_functions.append(f"{name}.{node.name}")
            elif isinstance(node, ast.JoinedStr):
                text = "".join(part.value for part in node.values if isinstance(part, ast.Constant))
                f_strings += bool(HTML_IN_F_STRING.search(text))
    layer = {name: LAYERS.index(name.split(".")[0]) if name.split(".")[0] in LAYERS else len(LAYERS) - 1 for name in trees}
    return {
        "product_lines": sum(text.count("\n") for text in texts.values()),
        "product_files": len(texts),
        "test_lines": sum(path.read_text(encoding="utf-8").count("\n") for path in python_files(root, "tests")),
        "single_importer_modules": sorted(name for name in trees if importers[name] == 1 and "." in name),
        "dict_str_any": sum(len(UNTYPED_RECORD.findall(text)) for text in texts.values()),
        "repeated_class_names": sorted(name for name, places in classes.items() if len(places) > 1),
        "private_api_sites": {name: len(lines) for name, tree in trees.items() if (lines := private_sites(tree))},
        "html_f_strings": f_strings,
        "modules_in_cycles": sum(reaches_itself(name, graph) for name in graph),
        "imports_upward": [f"{name} -> {target}" for name in graph for target in graph[name] if layer[target] > layer[name]],
        "functions_over_60_lines": long_functions,
        "files_over_400_lines": [names[path] for path, text in texts.items() if text.count("\n") > 400],
    }


if __name__ == "__main__":
    print(json.dumps(count(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1])))
