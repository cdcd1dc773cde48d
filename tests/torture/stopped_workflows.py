"""SIGKILL and SIGSTOP of Snakemake at random moments of a run."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from torture.campaign import MOST_DRAWS, Book, Try
from torture.machine_state import MARK, orphans
from torture.trials import patience, send
from torture.workflows import Workflow

EACH, SHORT = 20, 1
_STOPPED_FOR_S = 3.0
_KILLED_AFTER = 4  # of so many stops one ends with a kill
_ENDS_WITHIN_S = 120.0


def attack(book: Book, place: Path, short: bool) -> None:
    """Each try: a run of one trial, a signal, a look at what is left, and a run that goes on."""
    flow = Workflow.made(place / "Prüf stand/semgap run")  # a path with a space and an umlaut
    flow.clear()
    begin = time.monotonic()
    assert flow.run().returncode == 0
    clean_s = time.monotonic() - begin
    targets = ("SIGKILL snakemake",) if short else ("SIGKILL snakemake", "SIGSTOP snakemake")
    for one in book.turns(dict.fromkeys(targets, SHORT if short else EACH)):
        outcome, faults = "missed", list[str]()
        for _ in range(MOST_DRAWS):
            if outcome == "missed" and not faults:
                outcome, faults = _try(flow, one, clean_s)
        book.judged(one, outcome, faults)
    for target in book.rows:
        book.note(target, "a run of one trial")


def _try(flow: Workflow, one: Try, clean_s: float) -> tuple[str, list[str]]:
    """The outcome and its faults; `missed` if the run had ended before the signal."""
    flow.clear()
    with patience(flow.start()) as snakemake:
        time.sleep(one.rng.random() * clean_s)
        hit = snakemake.poll() is None
        if hit and one.target.startswith("SIGKILL"):
            send(snakemake.pid, signal.SIGKILL)
        elif hit and send(snakemake.pid, signal.SIGSTOP):
            time.sleep(one.rng.random() * _STOPPED_FOR_S)
            send(snakemake.pid, signal.SIGKILL if one.number % _KILLED_AFTER == 0 else signal.SIGCONT)
        deadline = time.monotonic() + _ENDS_WITHIN_S
        while snakemake.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        faults = [f"the run was not over {_ENDS_WITHIN_S:g} s later: {flow.words()[-500:]}"] * (snakemake.poll() is None)
    status = snakemake.returncode
    faults += orphans(os.environ[MARK], {}, workflow_lives=False)
    broken = flow.fault()
    faults += [f"a trial of a killed run is there, but {broken}"] * bool(broken)
    if status > 0:
        faults.append(f"the run failed (exit {status}): {flow.words()[-1500:]}")
    if status == 0 and not (flow.trial / "manifest.json").exists():
        faults.append("the run ended with 0 and left no trial")
    if not hit:
        return "missed", faults
    return "survived" if status == 0 else "refused", faults + flow.resume()
