"""Disks that fill or turn read-only at every write of a trial and of a run."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq

from semgap.analysis.beside import digest_of_json
from semgap.analysis.load import UnusableTrial, checked_trials
from semgap.experiment.trial_schemas import TrialResult
from torture.campaign import MOST_DRAWS, Book, Try
from torture.machine_state import MARK, marked, orphans, small_disk, write_protect
from torture.recording import tiny_model
from torture.trials import Bench, patience
from torture.workflows import Workflow

_PAGE = 4096
_EACH, _REWRITES, _RUNS, _LIMITED = 20, 200, 5, 3
Script = subprocess.Popen[bytes]
_ENDS_WITHIN_S = 240.0  # without a file for their machine code, kernels compile in every process


def attack(book: Book, place: Path, short: bool) -> None:
    """With the right to mount: a tmpfs of a random size, or one that turns read-only. Everywhere: a limit of a file's size."""
    scratch = place / "tmp"
    scratch.mkdir()
    os.environ["TMPDIR"] = tempfile.tempdir = str(scratch)  # one for all: pristine parents are of one TMPDIR
    bench = Bench.made(place, tiny_model(place / "model"))
    bench.run_clean()
    kept = Path(shutil.copytree(bench.trial, place / "kept"))
    tries: dict[str, tuple[int, Callable[[Try], tuple[str, list[str]]]]] = {}
    tries["file size limit, trial"] = (_LIMITED, lambda one: _limited(bench, one))
    if may_mount(place / "probe"):
        tries |= {
            "full disk, written again": (_REWRITES, lambda one: _written_again(place / "small", kept, one)),
            "full disk, trial": (_EACH, lambda one: _full(bench, one, _size_of(kept))),
            "full TMPDIR, trial": (_EACH, lambda one: _full_scratch(bench, one, scratch)),
            "read-only, trial": (_EACH, lambda one: _read_only(bench, one)),
        }
        if not short:
            run = Run(place / "run")
            tries["full disk, run"] = (_RUNS, run.full)
    counts = {name: count for name, (count, _) in tries.items()}
    if short:
        counts = {"full disk, written again": 20, "full disk, trial": 1} if len(tries) > 1 else {"file size limit, trial": 1}
    for one in book.turns(counts):
        book.judged(one, *tries[one.target][1](one))


def may_mount(place: Path) -> bool:
    try:
        with small_disk(place, _PAGE):
            return True
    except OSError:
        return False


def _size_of(directory: Path) -> int:
    return sum(-(-file.stat().st_size // _PAGE) * _PAGE for file in directory.iterdir())


def whole_or_gone(directory: Path) -> tuple[str | None, str | None]:
    """When the trial in a directory was measured, None if there is none; and its fault, if it is there and does not stand."""
    manifest = directory / "manifest.json"
    if not manifest.exists():
        return None, None
    try:
        (checked,) = checked_trials([directory], {str(directory): digest_of_json(manifest) or ""})
    except UnusableTrial as error:
        return "?", str(error)
    return str(checked.manifest["provenance"]["utc"]), None


def _written_again(place: Path, kept: Path, one: Try) -> tuple[str, list[str]]:
    """A finished trial is written over an older one, in this process, with room for a part of it: the older one or the new one is there."""
    tables = {file.stem: pq.read_table(file, partitioning=None) for file in kept.glob("*.parquet")}
    size = _size_of(kept)
    with small_disk(place, 3 * size + 32 * _PAGE):
        trial = place / "trial=1"
        (checked,) = checked_trials([kept], {str(kept): digest_of_json(kept / "manifest.json") or ""})
        old = {**checked.manifest, "provenance": {**checked.manifest["provenance"], "utc": "the old one"}}
        TrialResult(tables, old).write(trial)
        free = os.statvfs(place).f_bavail * _PAGE
        fill = max(0, free - one.rng.randrange(0, size + 16 * _PAGE) // _PAGE * _PAGE)
        (place / "filler").write_bytes(bytes(fill))
        failed = ""
        try:
            TrialResult(tables, {**old, "provenance": {**old["provenance"], "utc": "the new one"}}).write(trial)
        except OSError as error:
            failed = str(error)
        when, fault = whole_or_gone(trial)
        left = [path.name for path in place.iterdir() if path.name not in ("trial=1", "filler")]
    faults = [fault] if fault else []
    if when not in (("the old one",) if failed else ("the new one",)):
        faults.append(f"{failed or 'it was written'}, and the trial that is there is {when}")
    faults += [f"it left {name}" for name in left]
    return "refused" if failed else "survived", faults


def _ended(bench: Bench, disturb: Callable[[Script], None] = lambda _: None, **how: object) -> int | None:
    with patience(bench.start(**how)) as script:
        disturb(script)
        deadline = time.monotonic() + _ENDS_WITHIN_S
        while script.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        return script.poll()


def _disturbed(bench: Bench, disk: Path, size: int, disturb: Callable[[Script], None] = lambda _: None) -> tuple[str, list[str]]:
    """A trial while `disk` is a tmpfs of this size; then the trial once more without it."""
    bench.clear()
    before = marked(os.environ[MARK])
    with small_disk(disk, size):
        status = _ended(bench, disturb)
        faults = orphans(os.environ[MARK], before)
        faults += [f"not over {_ENDS_WITHIN_S:g} s later"] if status is None else bench.after_failure(status, killed=False)
    bench.clear()
    return "survived" if status == 0 else "refused", faults + bench.resume()


def _full(bench: Bench, one: Try, size: int) -> tuple[str, list[str]]:
    return _disturbed(bench, bench.trial.parent, one.rng.randrange(_PAGE, size + 16 * _PAGE))


def _full_scratch(bench: Bench, one: Try, scratch: Path) -> tuple[str, list[str]]:
    """The trial's scratch directory, in which its client and samplers write, has no room."""
    return _disturbed(bench, scratch, one.rng.randrange(_PAGE, 64 * _PAGE))


def _read_only(bench: Bench, one: Try) -> tuple[str, list[str]]:
    """The disk of the results turns read-only at a random moment of a trial; `missed` if the trial had ended by then."""
    disk, hit = bench.trial.parent, False

    def disturb(script: Script) -> None:
        nonlocal hit
        time.sleep(one.rng.random() * bench.lives_s["the trial's script"])
        while not write_protect(disk, True):
            time.sleep(0.001)
        hit = script.poll() is None

    for _ in range(MOST_DRAWS):
        outcome, faults = _disturbed(bench, disk, 64 << 20, disturb)
        if hit or faults:
            return outcome, faults
    return "missed", []


def _limited(bench: Bench, one: Try) -> tuple[str, list[str]]:
    """No process of the trial may write a file of more than so many bytes, which is how a quota looks."""
    bench.clear()
    before, most = marked(os.environ[MARK]), one.rng.randrange(1, 60_000)
    workflow = os.environ.pop("SEMGAP_WORKFLOW")  # its processes start anew: a fork has the limits of its pristine parent
    try:
        status = _ended(bench, preexec=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, most)))
    finally:
        os.environ["SEMGAP_WORKFLOW"] = workflow
    faults = orphans(os.environ[MARK], before)
    faults += [f"not over {_ENDS_WITHIN_S:g} s later"] if status is None else bench.after_failure(status, killed=False)
    bench.clear()
    return "survived" if status == 0 else "refused", faults + bench.resume()


class Run:
    """Snakemake runs in a clone on a disk that fills."""

    def __init__(self, place: Path) -> None:
        self._disk = small_disk(place, 256 << 20)
        self.place = self._disk.__enter__()  # for the life of this process
        self.flow = Workflow.made(place / "clone")

    def full(self, one: Try) -> tuple[str, list[str]]:
        """A run of one trial with so little room left."""
        self.flow.clear()
        filler = self.place / "filler"
        free = os.statvfs(self.place).f_bavail * _PAGE
        with filler.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(1, free - one.rng.randrange(0, 400_000) // _PAGE * _PAGE))
        before = marked(os.environ[MARK])
        done = self.flow.run()
        faults = orphans(os.environ[MARK], before, workflow_lives=False)
        broken = self.flow.fault()
        filler.unlink()
        faults += [f"a trial of a failed run is there, but {broken}"] * bool(broken)
        if done.returncode and not any(words in done.stdout for words in ("No space left", "Errno 28")):
            faults.append(f"the run failed without a word on the disk: {done.stdout[-800:]}")
        return "survived" if done.returncode == 0 else "refused", faults + self.flow.resume()
