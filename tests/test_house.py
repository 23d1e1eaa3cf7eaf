"""The house's own rules: layers, what a worker imports, sizes of files and functions, and what is shipped."""

from __future__ import annotations

import ast
import io
import os
import statistics
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from pathlib import Path

import pytest

import streamgmm

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "streamgmm"
MODULES = sorted(PACKAGE.rglob("*.py"))
CODE = [
    *MODULES,
    *(path for part in ("tests", "examples", "benchmarks") for path in sorted((ROOT / part).rglob("*.py"))),
]

#: what runs on a worker, and what must not be loaded there: scikit-learn alone costs 120 MB
WORKER = ("streamgmm", *(f"streamgmm.{name}" for name in ("kernel", "sources", "executors", "pilot", "prediction")))
HEAVY = ("sklearn", "pandas", "matplotlib", "typer", "rich")

Function = ast.FunctionDef | ast.AsyncFunctionDef


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def code_lines(path: Path) -> frozenset[int]:
    """Numbers of the lines that hold code: not blank, not a comment, not part of a docstring."""
    silent = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline):
        if token.type not in silent:
            lines.update(range(token.start[0], token.end[0] + 1))
    documented = (ast.Module, ast.ClassDef, *Function.__args__)
    for node in ast.walk(parsed(path)):
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            lines -= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    return frozenset(lines)


def functions(path: Path) -> Iterator[tuple[str, int]]:
    """Each function with its number of lines of code, its signature included."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, Function):
            span = range(node.lineno, (node.end_lineno or node.lineno) + 1)
            yield f"{name_of(path)}: {node.name}", len(code_lines(path) & set(span))


def run_python(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


# -- layers --------------------------------------------------------------------------------------------------------


def test_the_import_contract_holds() -> None:
    code = "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True))"
    environment = {**os.environ, "PYTHONWARNINGS": "ignore", "COLUMNS": "120"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Contracts: 7 kept, 0 broken." in done.stdout


def test_our_own_imports_stand_at_the_top() -> None:
    """An import inside a function would hide a layer that points up; the resolver of public names is the exception."""
    hidden = []
    for path in MODULES:
        for function in (node for node in ast.walk(parsed(path)) if isinstance(node, Function)):
            for node in ast.walk(function):
                own = isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("streamgmm"))
                named = isinstance(node, ast.Import) and any(a.name.startswith("streamgmm") for a in node.names)
                called = isinstance(node, ast.Call) and "import_module" in ast.dump(node.func)
                if own or named or called or (isinstance(node, ast.Name) and node.id == "__import__"):
                    hidden.append(f"{name_of(path)}: {function.name}")
    assert hidden == ["streamgmm/__init__.py: __getattr__"]


def test_a_worker_loads_nothing_heavy() -> None:
    """The same look at sys.modules finds scikit-learn where it is: behind the estimator."""
    look = f"print([name for name in {HEAVY!r} if name in sys.modules])"
    found = run_python(f"import sys, {', '.join(WORKER)}; {look}; streamgmm.GaussianMixture; {look}").splitlines()
    assert found[0] == "[]"
    assert "'sklearn'" in found[1]


# -- sizes ---------------------------------------------------------------------------------------------------------


def test_no_file_is_long() -> None:
    assert {name_of(path): len(code_lines(path)) for path in CODE if len(code_lines(path)) > 400} == {}


def test_no_function_is_long() -> None:
    assert {name: size for path in CODE for name, size in functions(path) if size > 80} == {}


def test_functions_are_short() -> None:
    sizes = [size for path in MODULES for _, size in functions(path)]
    assert len(sizes) > 100
    assert statistics.median(sizes) <= 10


# -- what is shipped -----------------------------------------------------------------------------------------------


def test_every_public_name_resolves() -> None:
    assert set(streamgmm.__all__) == {"__version__", *streamgmm._HOMES}
    for name in streamgmm.__all__:
        assert getattr(streamgmm, name) is not None
    assert dir(streamgmm) == sorted(streamgmm.__all__)
    assert streamgmm.GaussianMixture.__doc__
    with pytest.raises(AttributeError, match="module 'streamgmm' has no attribute 'Gausian'"):
        _ = streamgmm.Gausian


def test_the_version_has_one_place() -> None:
    assert streamgmm.__version__ == metadata.version("streamgmm")
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'version = "{streamgmm.__version__}"' in project
    assert not [name_of(path) for path in MODULES if f'"{streamgmm.__version__}"' in path.read_text(encoding="utf-8")]


def test_types_are_shipped() -> None:
    assert (Path(streamgmm.__file__).parent / "py.typed").is_file()


def test_every_module_says_what_it_is() -> None:
    empty = [path for path in MODULES if not path.read_text(encoding="utf-8").strip()]
    assert [name_of(path) for path in MODULES if path not in empty and not ast.get_docstring(parsed(path))] == []


# -- habits --------------------------------------------------------------------------------------------------------


def test_nothing_is_left_to_do() -> None:
    marks = ("TO" + "DO", "FIX" + "ME", "XX" + "X")
    files = [*CODE, *ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "pyproject.toml", ROOT / ".ci" / "run"]
    texts = {name_of(path): path.read_text(encoding="utf-8") for path in files}
    assert [name for name, text in texts.items() if any(mark in text for mark in marks)] == []


def test_expected_errors_and_warnings_are_matched() -> None:
    loose = []
    for path in sorted((ROOT / "tests").rglob("*.py")):
        for node in ast.walk(parsed(path)):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute | ast.Name)):
                continue
            called = ast.unparse(node.func)
            expects = called in {"pytest.raises", "pytest.warns", "raises", "warns", "pytest.deprecated_call"}
            if expects and "match" not in {keyword.arg for keyword in node.keywords}:
                loose.append(f"{name_of(path)}:{node.lineno}")
    assert loose == []


def test_ci_runs_the_tests_as_the_readme_says() -> None:
    command = 'python -m venv .venv && . .venv/bin/activate && pip install -e ".[test]" && pytest'
    assert command in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert command in (ROOT / "README.md").read_text(encoding="utf-8")
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
