"""Snakemake runs of a campaign, in a clone of the repository with one tiny trial."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clone import Clone, environment

from semgap.analysis.beside import digest_of_json
from semgap.analysis.load import UnusableTrial, checked_trials
from torture.trials import exact_columns

MODE = "remote_cache"


@dataclass
class Workflow:
    """A clone whose target is one trial."""

    clone: Clone
    clean: dict[str, list[Any]] = field(default_factory=dict)

    @classmethod
    def made(cls, root: Path) -> Workflow:
        """A clone in which all but the trial has been made once, and what the trial's steps are."""
        clone = Clone.of_repository(root)
        clone.configure({"modes": [MODE], "trials": 1})
        made = cls(clone)
        done = made.run()
        assert done.returncode == 0, done.stdout
        made.clean = exact_columns(made.trial)
        return made

    @property
    def trial(self) -> Path:
        return self.clone.trial(MODE, 1)

    @property
    def target(self) -> str:
        return str((self.trial / "manifest.json").relative_to(self.clone.root))

    def run(self, *arguments: str, env: Mapping[str, str] | None = None, within: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
        """A run of the trial, to its end; its words are in stdout. `env`: replaces or adds variables, `within`: a command that runs it."""
        command = [*within, *self.clone.command(*(arguments or (self.target,)))]
        return subprocess.run(
            command,
            cwd=self.clone.root,
            env=environment() | dict(env or {}),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=300,
        )

    def start(self) -> subprocess.Popen[bytes]:
        """Begins a run of the trial."""
        with (self.clone.root / "started.log").open("wb") as log:
            return subprocess.Popen(self.clone.command(self.target), cwd=self.clone.root, env=environment(), stdout=log, stderr=log)

    def words(self) -> str:
        return (self.clone.root / "started.log").read_text(errors="replace")

    def clear(self) -> None:
        shutil.rmtree(self.trial, ignore_errors=True)

    def fault(self) -> str | None:
        """Why the trial that is there is not the clean one, or None; also if there is none."""
        manifest = self.trial / "manifest.json"
        if not manifest.exists():
            return None
        try:
            checked_trials([self.trial], {str(self.trial): digest_of_json(manifest) or ""})
        except UnusableTrial as error:
            return str(error)
        return None if exact_columns(self.trial) == self.clean else "its steps are not those of the clean run"

    def resume(self) -> list[str]:
        """Faults of the next run, as Snakemake says to begin it after a kill."""
        if any((self.clone.root / ".snakemake/locks").glob("*")):
            self.run("--unlock")
        done = self.run()
        if done.returncode or not (self.trial / "manifest.json").exists():
            return [f"resume failed (exit {done.returncode}): {done.stdout[-1500:]}"]
        fault = self.fault()
        return [f"resume: {fault}"] if fault else []


def semgap(*arguments: str, root: Path, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """The `semgap` command of a clone."""
    code = environment() | {"PYTHONPATH": str(root / "src")} | dict(env or {})
    return subprocess.run(
        [sys.executable, "-m", "semgap", *arguments],
        cwd=root,
        env=code,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=300,
    )


def owner_of(path: Path, uid: int) -> None:
    """Gives a tree to a user."""
    os.chown(path, uid, uid)
    for each in path.rglob("*"):
        os.chown(each, uid, uid, follow_symlinks=False)
