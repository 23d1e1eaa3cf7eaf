"""What the documents show is run: the blocks are extracted from the text itself, never copied."""

from __future__ import annotations

import inspect
import logging
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import NamedTuple

import pytest
from markdown_it import MarkdownIt
from typer.testing import CliRunner

import streamgmm
from streamgmm import errors
from streamgmm.cli import app

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
DOCUMENTS = [README, *sorted((ROOT / "docs").glob("*.md"))]

#: What a block may be: code that runs here, what it prints or a drawing, and two directives that show no code.
LANGUAGES = {"python", "bash", "text", "{toctree}", "{eval-rst}"}


class CodeBlock(NamedTuple):
    """A block of a document. line: number of the first line of its text."""

    language: str
    line: int
    text: str


def blocks(document: Path) -> list[CodeBlock]:
    """All that the document shows as code, in order; blocks that are indented rather than fenced have no language."""
    tokens = MarkdownIt("commonmark").parse(document.read_text(encoding="utf-8"))
    shown = [token for token in tokens if token.type in ("fence", "code_block")]
    return [CodeBlock(token.info.strip(), token.map[0] + 2, token.content) for token in shown]


def texts(document: Path, language: str) -> list[str]:
    return [block.text for block in blocks(document) if block.language == language]


def set_up_commands() -> list[str]:
    """The README's two commands: the demo, and the tests."""
    return [text.strip() for text in texts(README, "bash")[:2]]


# -- blocks --------------------------------------------------------------------------------------------------------


def run_python(block: CodeBlock, document: Path, namespace: dict[str, object]) -> str:
    """What the block prints."""
    # line numbers of a failure are those of the document
    code = compile("\n" * (block.line - 1) + block.text, str(document), "exec")
    with redirect_stdout(StringIO()) as printed:
        exec(code, namespace)
    return printed.getvalue()


def commands(block: CodeBlock) -> list[str]:
    """The lines of a bash block. The demo among the README's two commands makes the same files from fewer rows here."""
    demo, tests = set_up_commands()
    return {demo: ["streamgmm demo --rows 50000"], tests: []}.get(block.text.strip(), block.text.splitlines())


def run_shell(block: CodeBlock, document: Path) -> str:
    """What the commands of the block print."""
    printed = ""
    for line in commands(block):
        program, *arguments = shlex.split(line)
        assert program == "streamgmm", f"{document.name} shows a command that this test cannot run: {line}"
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, f"{line}\n{result.output}"
        printed += result.stdout
    return printed


@pytest.fixture(autouse=True)
def quiet_again() -> Iterator[None]:
    """What a document shows of the log is over with it."""
    yield
    logging.getLogger("streamgmm").setLevel(logging.NOTSET)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_blocks_run_and_print_what_is_shown(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, with one namespace and folder. A text block that comes next after code is what that code prints."""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    printed: str | None = None
    for block in blocks(document):
        if block.language == "python":
            printed = run_python(block, document, namespace)
        elif block.language == "bash":
            printed = run_shell(block, document)
        else:
            if block.language == "text" and printed is not None:
                assert trimmed(printed) == trimmed(block.text), f"{document.name}, line {block.line}"
            printed = None


def trimmed(text: str) -> list[str]:
    """Lines without spaces at their ends."""
    return [line.rstrip() for line in text.strip().splitlines()]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_block_says_what_it_is(document: Path) -> None:
    """So nothing that looks like code escapes being run."""
    assert [block for block in blocks(document) if block.language not in LANGUAGES] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_directives_take_their_text_from_docstrings(document: Path) -> None:
    named = [name for text in texts(document, "{eval-rst}") for name in re.findall(r"^\s*\.\. *(\S+)::", text, re.M)]
    assert set(named) <= {"autoclass", "autofunction", "automodule"}


def test_all_kinds_of_blocks_are_seen(tmp_path: Path) -> None:
    document = tmp_path / "document.md"
    document.write_text(
        "```python\n1\n```\n\n- item\n\n  ~~~js\n  2\n  ~~~\n\n```\n3\n```\n\n    4\n", encoding="utf-8"
    )
    assert [(block.language, block.text) for block in blocks(document)] == [
        ("python", "1\n"),
        ("js", "2\n"),
        ("", "3\n"),
        ("", "4\n"),
    ]
    assert [block.line for block in blocks(document)][:3] == [2, 8, 12]


# -- README --------------------------------------------------------------------------------------------------------


def test_the_readme_has_python_to_run() -> None:
    assert len(texts(README, "python")) >= 5


def test_the_readme_has_commands_to_run() -> None:
    lines = "\n".join(texts(README, "bash")[2:])
    assert {"info", "fit", "predict"} <= set(re.findall(r"^streamgmm (\w+)", lines, re.MULTILINE))


def test_the_first_command_installs_and_runs_the_demo() -> None:
    steps = set_up_commands()[0].split(" && ")
    assert steps == ["python -m venv .venv", ". .venv/bin/activate", 'pip install -e ".[plot]"', "streamgmm demo"]


def test_the_second_command_is_the_one_that_ci_runs() -> None:
    command = set_up_commands()[1]
    assert command.endswith(" && pytest")
    assert command in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files(document: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", document.read_text(encoding="utf-8"))
    missing = [target for target in targets if "://" not in target and not (document.parent / target).exists()]
    assert missing == []


# -- rooms ---------------------------------------------------------------------------------------------------------


def test_the_table_of_rooms_is_the_import_contract() -> None:
    """The same names in the same order, from the top down."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contract = project["tool"]["importlinter"]["contracts"][0]["layers"]
    text = (ROOT / "docs" / "contributing.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.*?) \|", text, re.MULTILINE)
    assert re.findall(r"`(\w+)/?`", " ".join(rows)) == re.findall(r"\w+", " ".join(contract))


# -- the site ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built with every warning an error, a reference that leads nowhere included."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-n", "-W", "--keep-going", "-q", "-d", str(folder / "cache")]
    done = subprocess.run(
        [*command, "docs", str(folder / "html")], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "html"


def test_the_site_has_a_page_for_every_document(site: Path) -> None:
    pages = {path.stem for path in site.glob("*.html")}
    assert {path.stem for path in (ROOT / "docs").glob("*.md")} <= pages


def test_formulas_are_formulas(site: Path) -> None:
    page = (site / "numerics.html").read_text(encoding="utf-8")
    assert page.count('<div class="math notranslate nohighlight">') >= 8
    assert "$$" not in page


def test_every_public_name_is_in_the_reference(site: Path) -> None:
    page = (site / "reference.html").read_text(encoding="utf-8")
    documented = set(re.findall(r'<dt class="sig[^>]* id="([\w.]+)"', page))
    names = {f"streamgmm.{name}" for name in streamgmm.__all__ if name != "__version__"}
    ours = [kind for kind in streamgmm.GaussianMixture.__mro__ if kind.__module__.startswith("streamgmm")]
    for name, value in (item for kind in ours for item in vars(kind).items()):
        # scikit-learn adds set_fit_request and its like
        if inspect.isroutine(value) and not name.startswith("_") and not name.endswith("_request"):
            names.add(f"streamgmm.GaussianMixture.{name}")
    kinds = [kind for kind in vars(errors).values() if inspect.isclass(kind) and kind.__module__ == errors.__name__]
    names |= {f"streamgmm.errors.{kind.__name__}" for kind in kinds}
    assert {"streamgmm.GaussianMixture.fit", "streamgmm.GaussianMixture.update", "streamgmm.errors.DataError"} <= names
    assert names - documented == set()
