"""The Containerfile's steps, carried out here in a bare virtual environment, since nothing here builds images.

What is left out: the base image, and unpacking the packages that requirements.lock pins, which `make test` did before any test ran.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from clone import REPOSITORY, Clone

LINES = [line for line in (REPOSITORY / "Containerfile").read_text().splitlines() if line and not line.startswith("#")]
STEPS = [tuple(line.split(" ", 1)) for line in LINES]
LOCK = "--requirement requirements.lock"


def arguments(instruction: str) -> list[str]:
    return [rest for name, rest in STEPS if name == instruction]


def run(command: str, directory: Path, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """A RUN line, or a part of one, by sh as a builder runs it; `path` is put in front of PATH."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV", "MAKEFLAGS", "MAKELEVEL")}
    environment |= {"PATH": f"{path}{os.pathsep}{environment['PATH']}"} if path else {}
    return subprocess.run(["sh", "-c", command], cwd=directory, env=environment, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`COPY . .`: the files that git tracks, or would."""
    return Clone.of_repository(tmp_path_factory.mktemp("image") / "semgap").root


def test_the_steps_are_those_that_these_tests_know() -> None:
    assert [name for name, _ in STEPS] == ["FROM", "RUN", "WORKDIR", "COPY", "RUN", "ENV", "CMD"]
    assert arguments("WORKDIR") == ["/semgap"] and arguments("COPY") == [". ."]


def test_the_base_image_has_the_oldest_python_that_semgap_runs_on() -> None:
    (base,) = re.findall(r"python:(\d+\.\d+)-", arguments("FROM")[0])
    assert f'requires-python = ">={base}"' in (REPOSITORY / "pyproject.toml").read_text()


def test_debian_has_the_packages_that_the_image_installs() -> None:
    (install,) = re.findall(r"apt-get (install [^&]+)", arguments("RUN")[0])
    if not shutil.which("apt-get"):
        pytest.skip("there is no apt-get here")
    if not list(Path("/var/lib/apt/lists").glob("*_Packages*")):
        pytest.skip("apt has no lists here: apt-get update")
    simulated = run(f"apt-get --simulate {install}", Path("/"))
    assert simulated.returncode == 0, simulated.stderr


def test_the_build_context_leaves_out_all_that_git_ignores() -> None:
    ignored, left_out = ((REPOSITORY / name).read_text().splitlines() for name in (".gitignore", ".dockerignore"))
    anchored = {line.replace("!/", "!").strip("/") for line in ignored}
    assert anchored == {line.removeprefix("**/") for line in left_out if not line.startswith("#")}


def test_the_set_up_of_the_image_runs_in_a_bare_environment_and_gives_the_command(copied: Path) -> None:
    """`RUN make .venv/.installed`, command by command. Of the lock only setuptools is installed anew."""
    listed = run(f"{arguments('RUN')[1].replace('make', 'make --dry-run')} PYTHON={sys.executable}", copied)
    assert listed.returncode == 0, listed.stderr
    python, venv, lock, package, done = (line for line in listed.stdout.splitlines() if line)
    assert venv.endswith("-m venv .venv") and lock.endswith(LOCK) and done == "touch .venv/.installed"
    (setuptools,) = re.findall(r"^setuptools==.*$", (copied / "requirements.lock").read_text(), re.MULTILINE)
    for command in (python, venv, f"{lock.removesuffix(LOCK)} {setuptools}", package, done):
        step = run(command, copied)
        assert step.returncode == 0, f"{command}: {step.stderr}"
    (path,) = re.findall(r"PATH=/semgap/(\S+):\$PATH", arguments("ENV")[0])
    helped = run("semgap --help", Path("/"), copied / path)
    assert helped.returncode == 0 and "run one trial without Snakemake" in helped.stdout, helped.stderr


def test_the_environment_that_runs_these_tests_holds_the_whole_lock(copied: Path) -> None:
    resolved = f"{sys.executable} -m pip install --quiet --dry-run --no-deps --no-index --report report.json {LOCK}"
    done = run(resolved, copied)
    assert done.returncode == 0, done.stderr
    assert json.loads((copied / "report.json").read_text())["install"] == []


def test_the_image_s_command_sets_nothing_up_again(copied: Path) -> None:
    (copied / ".venv").mkdir(exist_ok=True)
    (copied / ".venv/.installed").touch()
    planned = run(" ".join(json.loads(arguments("CMD")[0])) + " --dry-run", copied)
    assert planned.returncode == 0, planned.stderr
    assert "snakemake --cores 1" in planned.stdout and "pip install" not in planned.stdout
