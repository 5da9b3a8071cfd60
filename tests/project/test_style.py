"""The code obeys its own configurations and the rules of CONTRIBUTING.md, "Style"."""

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
ROOMS = "sherry_gguf", "scripts", "examples", "tests"
PYTHON = sorted(p for room in ROOMS for p in (REPO / room).rglob("*.py")) + [REPO / "setup.py"]
C = sorted(
    p for room in ("ggml_patch/src", "scripts", "tests") for end in ("c", "h", "cpp", "hpp", "inc") for p in (REPO / room).rglob(f"*.{end}")
)
LINES, FUNCTION_LINES = 500, 60
COMPILED = "sherry_gguf._kernels"  # cffi's module, private to sherry_gguf.kernels


@pytest.mark.parametrize(
    "command",
    [
        ["ruff", "format", "--check", "--diff", "."],
        ["ruff", "check", "--output-format", "concise", "."],
        ["clang-format", "--dry-run", "-Werror", *C],
        ["mypy", "sherry_gguf"],
    ],
    ids=lambda command: " ".join(command[:2]),
)
def test_tools(command):
    done = subprocess.run([BIN / command[0], *command[1:]], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]


# ---- sizes ----


def too_long(source: str) -> list[str]:
    """Functions above FUNCTION_LINES without a comment above them or as their first line that says why."""
    lines, found = source.splitlines(), []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno - node.lineno >= FUNCTION_LINES:
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            body = node.body[1:] if ast.get_docstring(node) else node.body
            begins = node.body[0].end_lineno if ast.get_docstring(node) else node.body[0].lineno - 2
            beside = [*lines[max(first - 2, 0) : first - 1], *lines[begins : body[0].lineno - 1], lines[begins]]
            if not any(line.strip().startswith("#") for line in beside):
                found.append(f"{node.lineno}: {node.name} has {node.end_lineno - node.lineno + 1} lines, and no comment says why")
    return found


def test_sizes():
    found = []
    for path in PYTHON:
        source = path.read_text("utf-8")
        if (count := source.count("\n")) > LINES:
            found.append(f"{path.relative_to(REPO)} has {count} lines")
        found += [f"{path.relative_to(REPO)}:{line}" for line in too_long(source)]
    assert not found, "\n".join(found)


def test_a_long_function_is_found():
    body = "    x = 1\n" * 60
    assert [line.partition(":")[0] for line in too_long(f"\n\ndef f():\n{body}\ndef g():\n    y = 2\n")] == ["3"]
    for reason in (f"# why\ndef f():\n{body}", f"# why\n@g\ndef f():\n{body}", f"def f():\n    # why\n{body}",
                   f'def f():\n    """What."""\n    # why\n{body}'):  # fmt: skip
        assert not too_long(reason)


# ---- imports ----


@functools.cache
def modules() -> dict[str, Path]:
    """The package's modules by name, and the scripts by path."""
    package = {
        ".".join(p.relative_to(REPO).with_suffix("").parts).removesuffix(".__init__"): p for p in (REPO / "sherry_gguf").rglob("*.py")
    }
    return package | {str(p.relative_to(REPO)): p for p in (REPO / "scripts").rglob("*.py")}


def resolved(module: str, importer: str) -> str:
    """The key in modules() for the name in an import: a script is imported by its stem, from the importer's directory if it is there."""
    if module in modules() or "." in module:
        return module
    found = [key for key, path in modules().items() if key.startswith("scripts/") and path.stem == module]
    beside = str(Path(importer).with_name(f"{module}.py")) if "/" in importer else ""
    assert beside in found or len(found) < 2, f"{importer} imports {module}: {', '.join(found)}"
    return beside if beside in found else next(iter(found), module)


def imports(name: str, tree: ast.AST, is_package: bool) -> list[tuple[str, str, str, int]]:
    """(module of ours, name taken from it or "", what it is called here, line) for each import, also within functions."""
    found, ours = [], {*modules(), COMPILED}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            named = [(resolved(alias.name, name), alias.asname or alias.name) for alias in node.names]
            found += [(module, "", here, node.lineno) for module, here in named if module in ours]
        elif isinstance(node, ast.ImportFrom):
            parents = name.split(".")[: len(name.split(".")) - node.level + is_package] if node.level else []
            module = resolved(".".join([*parents, *([node.module] if node.module else [])]), name)
            for alias in node.names:
                within = f"{module}.{alias.name}"
                if within in ours:
                    found.append((within, "", alias.asname or alias.name, node.lineno))
                elif module in ours:
                    found.append((module, alias.name, alias.asname or alias.name, node.lineno))
    return found


def parsed() -> dict[str, tuple[ast.AST, list]]:
    trees = {name: ast.parse(path.read_text("utf-8")) for name, path in modules().items()}
    return {name: (tree, imports(name, tree, modules()[name].name == "__init__.py")) for name, tree in trees.items()}


def circle(graph: dict[str, set[str]]) -> list[str]:
    """A circle of a graph, its first node at the end again, or []."""
    done: set[str] = set()

    def visit(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return []
        found = next(filter(None, (visit(n, [*path, node]) for n in sorted(graph.get(node, ())))), [])
        done.add(node)
        return found

    return next(filter(None, (visit(node, []) for node in sorted(graph))), [])


def test_no_import_circle():
    graph = {name: {module for module, *_ in found} - {name} for name, (_, found) in parsed().items()}
    assert len(graph) > 30 and "sherry_gguf.tq1_25" in graph["sherry_gguf.kernels"]  # it sees something
    assert "scripts/build/cross_arm.py" in graph["scripts/build/portable.py"]
    assert not circle(graph)
    assert not [
        name for name, to in graph.items() if "sherry_gguf.cli" in to and name.startswith("sherry_gguf.") and name != "sherry_gguf.__main__"
    ]


def test_a_circle_is_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert not circle({"a": {"b", "c"}, "b": {"c"}})


def test_no_underscored_names_of_others():
    found = []
    for name, (tree, taken) in parsed().items():
        where = modules()[name].relative_to(REPO)
        found += [f"{where}:{line}: {module}'s {its}" for module, its, _, line in taken if its.startswith("_") and not its.startswith("__")]
        called = {here: module for module, its, here, _ in taken if not its}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
                if (module := called.get(ast.unparse(node.value))) and module != name:
                    found.append(f"{where}:{node.lineno}: {module}'s {node.attr}")
    assert not found, "\n".join(found)
