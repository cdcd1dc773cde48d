"""A copy of the repository with its own runs of Snakemake, and what a dry run says of it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from semgap.experiment.config import Config, check_config

REPOSITORY = Path(__file__).resolve().parents[2]
SNAKEMAKE = Path(sys.executable).with_name("snakemake")
CONFIG = "tests/workflow/tiny.yaml"
MODES = ("local", "remote_cache", "sys_simulated")
REFERENCE = "computing the reference of tiny, phase decode"
FETCH = "fetching model tiny"
DUMP, CODECS = "dumping tensors of tiny for the codecs", "measuring codecs on tensors of tiny"
COMPARED = "computing the exactness reference of tiny"
AFTERWARDS = {"collecting the trials", "making the tables", "plotting the figures", "making the explorer"}
_JOB = re.compile(r"^Job \d+: (.*)$", re.MULTILINE)
_TARGET = "is up to date"


def trials(modes: Iterable[str], numbers: Iterable[int], phase: str = "decode", model: str = "tiny") -> set[str]:
    """The jobs that measure these trials, as `Clone.planned` names them."""
    numbers = tuple(numbers)
    return {f"measuring {mode}, {phase}, trial {number} ({model}, loopback)" for mode in modes for number in numbers}


def checks(modes: Iterable[str]) -> set[str]:
    """The jobs that check what these modes keep."""
    return {f"checking what {mode} keeps (tiny)" for mode in modes}


def blocks(numbers: Iterable[int]) -> set[str]:
    """The jobs that open these blocks."""
    return {f"opening block tiny loopback trial {number}" for number in numbers}


def job_names(output: str) -> list[str]:
    """The jobs that Snakemake's output tells of, in their order, but for the one that stands for the whole."""
    return [name for name in _JOB.findall(output) if not name.endswith(_TARGET)]


@dataclass(frozen=True)
class Clone:
    """A repository at `root` that a test may change as it likes."""

    root: Path

    @classmethod
    def of_repository(cls, root: Path) -> Clone:
        """What `git clone` would give, with what is not yet committed: no results, no models, new time stamps."""
        listed = subprocess.run(
            ["git", "-C", REPOSITORY, "ls-files", "-co", "--exclude-standard", "-z"], check=True, capture_output=True, text=True
        )
        for name in filter(None, listed.stdout.split("\0")):
            source, target = REPOSITORY / name, root / name
            if source.is_file():  # a file that was deleted and not committed is still listed
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)
        return cls(root)

    def copy(self, root: Path) -> Clone:
        """All of it with its time stamps, as `cp -a`."""
        return Clone(Path(shutil.copytree(self.root, root, symlinks=True)))

    def fresh(self, root: Path) -> Clone:
        """The same code with new time stamps, and nothing that ran."""
        ran = {self.root / name for name in (".snakemake", "results", "resources/models")}

        def what_ran(directory: str, names: list[str]) -> list[str]:
            return [name for name in names if Path(directory, name) in ran]

        return Clone(Path(shutil.copytree(self.root, root, ignore=what_ran, copy_function=shutil.copyfile)))

    def command(self, *arguments: str) -> list[str]:
        return [str(SNAKEMAKE), "--configfile", CONFIG, "--cores", "1", *arguments]

    def snakemake(self, *arguments: str, within: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
        """One run, with stderr in stdout; `within` is a command that runs it."""
        command = [*within, *self.command(*arguments)]
        return subprocess.run(
            command, cwd=self.root, env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=600
        )

    def run(self, *arguments: str, within: Sequence[str] = ()) -> str:
        """The output of a run that must succeed."""
        done = self.snakemake(*arguments, within=within)
        assert done.returncode == 0, done.stdout
        return done.stdout

    def planned(self, *arguments: str) -> set[str]:
        """The jobs of a dry run."""
        names = job_names(self.run("--dry-run", *arguments))
        assert len(names) == len(set(names))
        return set(names)

    def configure(self, changes: Mapping[str, Any]) -> None:
        """Merges `changes` deeply into the run's config file."""
        path = self.root / CONFIG
        path.write_text(yaml.safe_dump(merged(yaml.safe_load(path.read_text()), changes)))

    def config(self) -> Config:
        """The config as a run sees it."""
        default, own = (yaml.safe_load((self.root / name).read_text()) for name in ("config/config.yaml", CONFIG))
        return check_config(merged(default, own), self.root)

    def append(self, name: str, text: str) -> None:
        """Changes a file's content and leaves its time stamps as they were."""
        path = self.root / name
        before = path.stat()
        path.write_text(path.read_text() + text)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    def trial(self, mode: str, number: int) -> Path:
        """The directory of a trial."""
        return self.root / f"results/trials/model=tiny/network=loopback/mode={mode}/phase=decode/trial={number}"


@dataclass(frozen=True)
class Finished:
    """A clone in which everything is up to date, and what the run that made it so printed."""

    clone: Clone
    output: str


def environment() -> dict[str, str]:
    """As in a new shell: a workflow must find its own code, and belong to no other one."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH" and not name.startswith("SEMGAP_")}


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """As Snakemake merges config files."""
    nested = {
        key: merged(below[key], value) for key, value in above.items() if isinstance(value, dict) and isinstance(below.get(key), dict)
    }
    return {**below, **above, **nested}
