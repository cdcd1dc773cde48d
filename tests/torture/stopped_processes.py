"""SIGKILL and SIGSTOP of every process of a trial at random moments."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

from torture.campaign import MOST_DRAWS, Book, Try
from torture.machine_state import MARK, marked, orphans
from torture.recording import tiny_model
from torture.trials import REPLY_S, ROLES, START_S, TRIAL_S, Bench, patience, processes_by_role, send, wait_for

EACH, SHORT = 20, 1
_STOPPED_FOR_S = 1.5
_FOREVER = 10  # of so many stops one is never continued: the trial's own time limits must end it
_ENDS_WITHIN_S = 30.0 + START_S + TRIAL_S + REPLY_S


def attack(book: Book, place: Path, short: bool) -> None:
    """Each try: a trial, a signal, a look at what is left, and the trial once more if it failed."""
    bench = Bench.made(place, tiny_model(place / "model"))
    bench.run_clean()
    targets = [f"{number} {role}" for role in ROLES for number in ("SIGKILL", "SIGSTOP")]
    if short:
        targets = [each for each in targets if each in ("SIGKILL worker", "SIGKILL the trial's script", "SIGSTOP KV host")]
    for one in book.turns(dict.fromkeys(targets, SHORT if short else EACH)):
        outcome, faults = "missed", list[str]()
        for _ in range(MOST_DRAWS):
            if outcome == "missed" and not faults:
                outcome, faults = _try(bench, one)
        book.judged(one, outcome, faults)
    for target in book.rows:
        book.note(target, "a trial with worker, KV host, client, two relays and samplers")


def _try(bench: Bench, one: Try) -> tuple[str, list[str]]:
    """The outcome and its faults; `missed` if the trial or the process had ended before the signal."""
    bench.clear()
    before = marked(os.environ[MARK])
    with patience(bench.start()) as script:
        hit = _signal(one, bench, script)
        deadline = time.monotonic() + _ENDS_WITHIN_S
        while script.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        hung = script.poll() is None
    status = script.returncode
    faults = [f"the trial was not over {_ENDS_WITHIN_S:g} s later: {bench.words()[-500:]}"] * hung
    faults += orphans(os.environ[MARK], before)
    faults += bench.after_failure(status, killed=status < 0 or "script" in one.target)
    faults += bench.resume() if status else []  # nothing is left to measure where the trial went on
    return "missed" if not hit else "survived" if status == 0 else "refused", faults


def _signal(one: Try, bench: Bench, script: subprocess.Popen[bytes]) -> bool:
    """Sends the signal to one process of the target's role, at a moment of its life. False if it came late."""
    name, role = one.target.split(" ", 1)
    wait_for(role, script)
    time.sleep(one.rng.random() * bench.lives_s[role])
    found = processes_by_role()[role]
    if not found:
        return False
    pid = one.rng.choice(found)
    if name == "SIGKILL":
        return send(pid, signal.SIGKILL)
    sent = send(pid, signal.SIGSTOP)
    if sent and one.number % _FOREVER:
        time.sleep(one.rng.random() * _STOPPED_FOR_S)
        send(pid, signal.SIGCONT)
    elif sent and role == "the trial's script":  # nobody else ends it
        time.sleep(one.rng.random() * _STOPPED_FOR_S)
        send(pid, signal.SIGKILL)
    return sent
