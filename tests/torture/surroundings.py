"""Odd surroundings: a run there does what it does elsewhere, or says why it does not."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from torture.campaign import Book, Try
from torture.disks import may_mount
from torture.machine_state import MARK, orphans, small_disk
from torture.workflows import Workflow, owner_of, semgap

_EACH = 2
_FULL_BYTES = 64 << 10
NOBODY = 65534


def attack(book: Book, place: Path, short: bool) -> None:
    """Each try: a run of a trial in the surroundings, a look at it, and a run in ordinary ones."""
    flow = Workflow.made(place / "Prüf stand/semgap run")
    tries: dict[str, Callable[[Try], tuple[str, list[str]]]] = {
        "a path with a space and an umlaut": lambda one: _run(flow),
        "unwritable HOME": lambda one: _unwritable_home(flow, place / "home", place / "home/.cache"),
        "unwritable HOME, caches elsewhere": lambda one: _unwritable_home(flow, place / "home", place / "caches"),
        "LANG=C": lambda one: _run(flow, LANG="C", LC_ALL="C"),
        "python -O": lambda one: _run(flow, PYTHONOPTIMIZE="1"),
    }
    if may_mount(place / "probe"):
        tries["full TMPDIR"] = lambda one: _full_temporary(flow, place / "tmp")
    if os.getuid() == 0:
        tries["a user without rights, own files"] = lambda one: _nobody(flow, own=True)
        tries["a user without rights, files of others"] = lambda one: _nobody(flow, own=False)
    if short:
        tries = {name: tries[name] for name in ("a path with a space and an umlaut",)}
    for one in book.turns(dict.fromkeys(tries, 1 if short else _EACH)):
        outcome, faults = tries[one.target](one)
        book.judged(one, outcome, faults + orphans(os.environ[MARK], {}, workflow_lives=False))


def _run(flow: Workflow, typed: tuple[str, ...] = (), **env: str) -> tuple[str, list[str]]:
    """A run of the trial, and `semgap verify` of it. `typed`: words of which a refusal must have one; without, it must not fail."""
    flow.clear()
    done = flow.run(env=env)
    return _judged(flow, done, typed, **env)


def _judged(flow: Workflow, done: subprocess.CompletedProcess[str], typed: tuple[str, ...], **env: str) -> tuple[str, list[str]]:
    if done.returncode:
        if any(words in done.stdout for words in typed):
            return "refused", flow.resume()
        return "refused", [f"it failed: {done.stdout[-1500:]}"]
    said = semgap("verify", "results", root=flow.clone.root, env=env)
    faults = [f"verify says {said.stdout}"] if said.returncode or "1 trials, whose sums hold" not in said.stdout else []
    fault = flow.fault()
    return "survived", faults + [fault] * bool(fault)


def _unwritable_home(flow: Workflow, home: Path, caches: Path) -> tuple[str, list[str]]:
    """HOME is a file, so that nobody can write below it, root neither. Snakemake itself needs a place for caches."""
    home.write_text("no directory")
    return _run(flow, HOME=str(home), XDG_CACHE_HOME=str(caches), typed=(str(caches),) if caches.parent == home else ())


def _full_temporary(flow: Workflow, disk: Path) -> tuple[str, list[str]]:
    with small_disk(disk, _FULL_BYTES):
        (disk / "filler").write_bytes(bytes(os.statvfs(disk).f_bavail * 4096))
        return _run(flow, TMPDIR=str(disk), typed=("No space left", "temporary directory", "Errno 28"))


def without_rights() -> tuple[str, ...]:
    """A command that runs another one as nobody; where nobody may not run this Python, as a root that has lost every capability."""
    as_nobody = ("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups")
    started_below = ["sh", "-c", '"$0" -c "import semgap"', sys.executable]  # setpriv itself still may
    if subprocess.run([*as_nobody, *started_below], capture_output=True).returncode == 0:
        return as_nobody
    return ("setpriv", "--bounding-set=-all", "--inh-caps=-all")


def _nobody(flow: Workflow, own: bool) -> tuple[str, list[str]]:
    """A user without rights runs a copy of the clone: its own, or one that it may only read."""
    within = without_rights()
    user = NOBODY if "--clear-groups" in within else os.getuid()
    with tempfile.TemporaryDirectory(prefix="torture-nobody-", ignore_cleanup_errors=True) as name:
        shared = Path(name)
        shared.chmod(0o755)
        theirs = Workflow(flow.clone.copy(shared / "clone"), flow.clean)
        home = shared / "home"
        home.mkdir()
        theirs.clear()
        owner_of(home, user)
        owner_of(theirs.clone.root, user if own else NOBODY + 1)
        done = theirs.run(env={"HOME": str(home)}, within=within)
        if own:
            return _judged(theirs, done, ())
        if done.returncode == 0:
            return "survived", ["a user wrote where it had no right to"]
        typed = [words for words in ("Permission denied", "PermissionError", "not writable", "Errno 13") if words in done.stdout]
        return "refused", [] if typed else [f"it failed without naming the right that it lacks: {done.stdout[-1500:]}"]
