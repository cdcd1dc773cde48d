"""Write requirements.lock and envs/semgap.yaml from `pip freeze` on stdin: one set of pins, for pip and for conda."""

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOCK_HEAD = (
    "# Exact versions of all that `make` installs, made by `make lock`.\n# torch==2.13.0 is a CPU build where pip has one at hand.\n"
)
CONDA_HEAD = """\
# What a rule's conda environment holds, made by `make lock`: the project's dependencies at the versions of requirements.lock.
# semgap itself comes from src/, which the Snakefile puts on PYTHONPATH.
name: semgap
channels: [conda-forge, nodefaults]
dependencies:
  - python=3.11
  - pip
  - pip:
"""


def normalised(name: str) -> str:
    """A package's name as PEP 503 compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def direct_dependencies() -> list[str]:
    """Names that pyproject.toml asks for, for the package and for the workflow."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["workflow"]]
    return [normalised(re.match(r"[A-Za-z0-9_.-]+", line).group()) for line in wanted]


def main() -> None:
    """Strips local version labels (torch's +cpu), so that the same pin serves where the build is another."""
    pins = dict(re.sub(r"\+.*", "", line.strip()).split("==") for line in sys.stdin if "==" in line)
    (ROOT / "requirements.lock").write_text(LOCK_HEAD + "".join(f"{name}=={version}\n" for name, version in pins.items()))
    versions = {normalised(name): version for name, version in pins.items()}
    lines = "".join(f"      - {name}=={versions[name]}\n" for name in direct_dependencies())
    (ROOT / "envs/semgap.yaml").write_text(CONDA_HEAD + lines)


if __name__ == "__main__":
    main()
