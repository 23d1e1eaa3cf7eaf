"""What the documents show is run: the blocks are extracted from the text itself, never copied."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from streamgmm.cli import app

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
DOCUMENTS = [README, *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(document: Path, language: str) -> list[tuple[int, str]]:
    """The fenced blocks of a language, each with the number of its first line."""
    text = document.read_text(encoding="utf-8")
    found = (match for match in FENCE.finditer(text) if match[1] == language)
    return [(text.count("\n", 0, match.start(2)) + 1, match[2]) for match in found]


def set_up_commands() -> list[str]:
    """The README's two commands: the demo, and the tests."""
    return [code.strip() for _, code in blocks(README, "bash")[:2]]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_python_blocks_run(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for line, code in blocks(document, "python"):
        # line numbers of a failure are those of the document
        exec(compile("\n" * (line - 1) + code, str(document), "exec"), namespace)


def test_the_readme_has_python_to_run() -> None:
    assert len(blocks(README, "python")) >= 5


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_shell_blocks_run(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lines = [line for _, code in blocks(document, "bash") for line in code.splitlines()]
    lines = [line for line in lines if line not in set_up_commands()]
    # stands in for the first of the two commands, which makes the same files from more rows
    runner = CliRunner()
    assert runner.invoke(app, ["demo", "--rows", "50000"]).exit_code == 0
    for line in lines:
        program, *arguments = shlex.split(line)
        assert program == "streamgmm", f"{document.name} shows a command that this test cannot run: {line}"
        result = runner.invoke(app, arguments)
        assert result.exit_code == 0, f"{line}\n{result.output}"


def test_the_readme_has_commands_to_run() -> None:
    lines = "\n".join(code for _, code in blocks(README, "bash")[2:])
    assert {"info", "fit", "predict"} <= set(re.findall(r"^streamgmm (\w+)", lines, re.MULTILINE))


def test_the_first_command_installs_and_runs_the_demo() -> None:
    steps = set_up_commands()[0].split(" && ")
    assert steps == ["python -m venv .venv", ". .venv/bin/activate", 'pip install ".[plot]"', "streamgmm demo"]


def test_the_second_command_is_the_one_that_ci_runs() -> None:
    command = set_up_commands()[1]
    assert command.endswith(" && pytest")
    assert command in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files(document: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", document.read_text(encoding="utf-8"))
    missing = [target for target in targets if "://" not in target and not (document.parent / target).exists()]
    assert missing == []
