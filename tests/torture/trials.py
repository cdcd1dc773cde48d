"""Trials of a campaign: each with every process that a trial may have, run as a workflow runs it, and judged against a clean one."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml

from semgap.analysis.beside import digest_of_json
from semgap.analysis.load import UnusableTrial, checked_trials
from semgap.experiment.compute_reference import compute_reference
from semgap.experiment.config import Coordinates, check_config
from semgap.experiment.trial_setup import Paths
from torture.machine_state import MARK, is_pristine_parent, marked
from torture.recording import ROOT, SOURCE

_LOOSE = {"rtt_ms": 1e4, "goodput": 1e3, "lateness_ms": 1e4}  # a campaign damages trials, and does not time them
_MODE, _PHASE, _NETWORK = "sys_delta", "recovery-evict", "relays"
START_S, REPLY_S, TRIAL_S = 60.0, 8.0, 40.0
_ENDS_WITHIN_S = 300.0
EXACT = ("token", "position", "kind", "up_frame_bytes", "down_frame_bytes", "up_payload_bytes", "down_payload_bytes", "evicted_layers")
"""Columns of steps.parquet that are the same in every trial of a cell."""
_SCRIPT = """
import json, sys
from semgap.processes.pristine import run_program
run_program("semgap.experiment.measure_trial", json.load(open(sys.argv[1])))
"""  # as workflow/scripts/measure_trial.py
_TYPED = re.compile(r"semgap(\.\w+)+: \S|(OSError|PermissionError|FileNotFoundError): \[Errno \d+\] ")
_SAID = re.compile(r"semgap[\w. ]*: \S")
ROLES: dict[str, Callable[[str, bool], bool]] = {
    "client": lambda words, forked: forked and "semgap.client.measure" in words,
    "worker": lambda words, forked: forked and "semgap.worker.serve" in words,
    "KV host": lambda words, _: "-m semgap kvhost" in words,
    "relay": lambda words, _: "-m semgap relay" in words,
    "samplers": lambda words, _: "semgap.telemetry.sampler_process" in words,
    "the trial's script": lambda words, forked: (forked and "experiment.measure_trial" in words) or "run_program(" in words,
}
"""By name, whether a process of a trial is of this role: by its command line, and whether it is a fork of a pristine parent."""


@dataclass
class Bench:
    """Where trials run: their model, cell and reference."""

    place: Path
    model: Path
    cell: dict[str, Any]
    reference: Path
    log: Path
    clean: dict[str, list[Any]] = field(default_factory=dict)
    lives_s: dict[str, float] = field(default_factory=dict)

    @classmethod
    def made(cls, place: Path, model: Path) -> Bench:
        """A bench whose reference is computed. This process is the workflow of its trials."""
        os.environ["SEMGAP_WORKFLOW"] = f"{socket.gethostname()}:{os.getpid()}"
        os.environ.pop("SLURM_JOB_ID", None)
        config = check_config(_config(), ROOT)
        reference = place / "reference.npz"
        unhurried = {"timeouts": dict.fromkeys(("worker_start_s", "reply_s", "trial_s"), 600)}  # kernels may have to be compiled
        compute_reference(config.reference_cell("tiny", _PHASE) | unhurried, Paths(model, ROOT), reference)
        cell = config.cell(Coordinates("tiny", _NETWORK, _MODE, _PHASE, 1))
        bench = cls(place, model, cell | unhurried, reference, place / "trial.log")
        bench.run_clean()
        bench.cell = cell
        return bench

    @property
    def trial(self) -> Path:
        """The directory of the trial."""
        return self.place / "results/trials/trial=1"

    def start(self, output: Path | None = None, preexec: Callable[[], None] | None = None, **env: str) -> subprocess.Popen[bytes]:
        """Starts the trial's script, as Snakemake would, with an empty directory for its output."""
        output = output or self.trial
        order = {"cell": self.cell, "model_directory": str(self.model), "root": str(ROOT), "reference": str(self.reference)}
        order |= {"capacity": None, "output": str(output), "log": str(self.log)}
        file = self.place / "order.json"
        file.write_text(json.dumps(order))
        output.mkdir(parents=True, exist_ok=True)
        self.log.unlink(missing_ok=True)
        with (self.place / "script.log").open("w") as words:
            return subprocess.Popen(
                [sys.executable, "-c", _SCRIPT, str(file)], env=os.environ | env, stdout=words, stderr=words, preexec_fn=preexec
            )

    def words(self) -> str:
        """What the script and its trial said."""
        return "".join(file.read_text(errors="replace") for file in (self.place / "script.log", self.log) if file.exists())

    def run_clean(self) -> None:
        """A trial that nobody disturbs: what it measures is right, and its processes live so long."""
        begins: dict[str, float] = {}
        with patience(self.start()) as script:
            while script.poll() is None:
                now = time.monotonic()
                for role, found in processes_by_role().items():
                    self.lives_s[role] = now - begins.setdefault(role, now) if found else self.lives_s.get(role, 0.0)
                time.sleep(0.01)
            fault = self.finish(script)
        assert fault is None, fault
        self.clean = exact_columns(self.trial)

    def finish(self, script: subprocess.Popen[bytes]) -> str | None:
        """Waits for a script; the fault if its trial did not succeed, or is not as the clean one."""
        try:
            status = script.wait(_ENDS_WITHIN_S)
        except subprocess.TimeoutExpired:
            script.kill()
            script.wait()
            return f"the trial was not over after {_ENDS_WITHIN_S:g} s: {self.words()[-800:]}"
        if status:
            return f"the trial failed (exit {status}): {self.words()[-1500:]}"
        return self.not_as_clean(self.trial)

    def not_as_clean(self, directory: Path) -> str | None:
        """Why a finished trial is not the one that was measured, or None."""
        try:
            checked_trials([directory], {str(directory): digest_of_json(directory / "manifest.json") or ""})
        except UnusableTrial as error:
            return str(error)
        found = exact_columns(directory)
        wrong = [name for name in found if self.clean and found[name] != self.clean[name]]
        return f"its {wrong[0]} are {found[wrong[0]]}, a clean trial's {self.clean[wrong[0]]}" if wrong else None

    def after_failure(self, status: int, killed: bool) -> list[str]:
        """Faults of a trial whose script ended with `status`: a manifest, or words that are no typed error."""
        if status == 0:
            fault = self.not_as_clean(self.trial)
            return [f"it ended with 0, but {fault}"] if fault else []
        manifests = sorted((self.place / "results").rglob("manifest.json"))
        if killed:  # after its directory took its place, the trial is whole
            return [f"a broken trial left {file}: {fault}" for file in manifests if (fault := self.not_as_clean(file.parent))]
        return [f"a broken trial left {file}" for file in manifests] + untyped(self.words())

    def clear(self) -> None:
        """Removes what a try left, as one deletes a trial to rerun it."""
        shutil.rmtree(self.place / "results", ignore_errors=True)

    def resume(self) -> list[str]:
        """Faults of the next run of the trial, which must complete, and of what it leaves behind."""
        fault = self.finish(self.start())
        left = [path.name for path in Path(os.environ.get("TMPDIR", "/tmp")).glob("semgap-*-*-*-*") if _is_ownerless(path)]
        return [f"resume: {fault}"] * bool(fault) + [f"resume left {name}" for name in left]


def _is_ownerless(path: Path) -> bool:
    """True for a scratch directory of this user whose owner, named in it, is gone."""
    fields = path.name.split("-")
    return fields[-3].isdigit() and path.stat().st_uid == os.getuid() and not Path(f"/proc/{fields[-3]}").exists()


def untyped(words: str) -> list[str]:
    """A fault if the last error that a program printed is not one of semgap's own, or of the system's with a file's name.

    The last error is the line that ends the last traceback; without a traceback, a line of a program of semgap's that gives a reason.
    """
    lines = [line for line in words.splitlines() if line.strip() and not line.startswith("[")]  # but for those of its processes
    begins = [at for at, line in enumerate(lines) if line.startswith("Traceback (most recent call last)")]
    if begins:
        ends = (line for line in lines[begins[-1] + 1 :] if not line.startswith((" ", "\t")))
        typed = bool(_TYPED.match(next(ends, "")))
    else:
        typed = any(_SAID.match(line) for line in lines)
    return [] if typed else [f"it failed without a typed error: {words[-800:]}"]


def exact_columns(trial: Path) -> dict[str, list[Any]]:
    """The columns of a trial's steps that every trial of its cell has."""
    return pq.read_table(trial / "steps.parquet", columns=list(EXACT), partitioning=None).to_pydict()


def processes_by_role() -> dict[str, list[int]]:
    """The live processes of the campaign's trial."""
    found: dict[str, list[int]] = {role: [] for role in ROLES}
    for (pid, _), words in marked(os.environ[MARK]).items():
        if not is_pristine_parent(pid, words):
            for role, is_one in ROLES.items():
                found[role] += [pid] * is_one(words, "pristine_parent" in words)
    return found


def wait_for(role: str, script: subprocess.Popen[bytes]) -> list[int]:
    """The processes of a role as soon as there are any; none if the script ends first."""
    while script.poll() is None:
        found = processes_by_role()[role]
        if found:
            return found
        time.sleep(0.005)
    return []


def send(pid: int, number: signal.Signals) -> bool:
    """Sends a signal; False if the process is gone, or has ended and waits for its parent to hear of it."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0]
        os.kill(pid, number)
    except (ProcessLookupError, FileNotFoundError):
        return False
    return state not in "ZX"


def _config() -> Mapping[str, Any]:
    raw = yaml.safe_load((ROOT / "config/config.yaml").read_text())
    raw["define"]["models"], raw["models"] = {"tiny": SOURCE}, ["tiny"]
    evict = {"kind": "recovery", "prompt_lengths": [70], "steps": 6, "evict_fractions": [0, 0.5, 1]}
    raw["define"]["phases"], raw["phases"] = {_PHASE: evict}, [_PHASE]
    relay = {"kind": "relay", "tolerance": _LOOSE}  # without a rate, whose probe may fail on a busy machine
    raw["define"]["networks"], raw["networks"] = {"near": relay, _NETWORK: relay | {"kv": "near"}}, [_NETWORK]
    raw["modes"] = [_MODE]
    raw["define"]["modes"][_MODE] |= {"phases": [_PHASE], "networks": [_NETWORK]}
    raw |= {"max_length": 128, "device": "cpu", "probe": {"round_trips": 3, "payload_bytes": 1 << 18}}
    raw["telemetry"] = {"interval_s": 0.05, "sources": ["host"]}
    raw["timeouts"] = {"worker_start_s": START_S, "reply_s": REPLY_S, "trial_s": TRIAL_S}
    return dict(raw)


@contextlib.contextmanager
def patience(process: subprocess.Popen[bytes]) -> Any:
    """Ends a process with the context, whatever came of it."""
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
