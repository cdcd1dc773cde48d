"""`python -m torture`: runs the campaign, or one attack, target or try of it, and writes its table."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

from torture.campaign import Book, Only, markdown, total
from torture.machine_state import MARK, mounts_are_mine, orphans

ROOT = Path(__file__).resolve().parents[2]
ATTACKS = {
    "snakemake": ("stopped_workflows", 0, 0.52),
    "edits": ("edits", 0, 0.16),
    "misuse": ("misuse", 0, 0.12),
    "surroundings": ("surroundings", 0, 0.20),
    "disk": ("disks", 1, 0.35),
    "frames": ("mutated_frames", 1, 0.65),
    "signals": ("stopped_processes", 2, 1.0),
}
"""By name, the module of each attack, its lane, and its share of that lane's time. Of a lane one attack runs at a time, in this order; the
time that one does not need goes to those after it. Signals have a lane of their own: it waits more than it computes."""
_NOT_IN_SHORT = ("surroundings",)  # each is a run of Snakemake; one at an odd path is among those that `snakemake` kills
_SHORT_MINUTES, _LONG_MINUTES = 1.5, 20.0


def main() -> int:
    parser = argparse.ArgumentParser(prog="make torture", description=__doc__)
    parser.add_argument("--seed", type=int, default=17, help="decides all that is random")
    parser.add_argument("--attack", action="append", default=[], metavar="ATTACK[:TARGET[:NUMBER]]", help=", ".join(ATTACKS))
    parser.add_argument("--short", action="store_true", help="the form of `make test`")
    parser.add_argument("--minutes", type=float, help="the bound; what is not done by then is left out, and the table says so")
    parser.add_argument("--output", type=Path, default=ROOT / "torture.json")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)  # this process is the one of an attack
    chosen = parser.parse_args()
    asked = [Only.of(text) for text in chosen.attack or ATTACKS]
    unknown = [name for name, _ in asked if name not in ATTACKS]
    if unknown:
        parser.error(f"attack {unknown[0]!r} is not known; use one of {', '.join(ATTACKS)}")
    minutes = chosen.minutes or (_SHORT_MINUTES if chosen.short else _LONG_MINUTES)
    if chosen.alone:
        return _alone(*asked[0], chosen.seed, chosen.short, time.monotonic() + 60 * minutes, chosen.output)
    every = [name for name in ATTACKS if not (chosen.short and name in _NOT_IN_SHORT)]
    return _campaign(chosen.attack or every, chosen.seed, chosen.short, minutes, chosen.output)


def _alone(attack: str, only: Only, seed: int, short: bool, ends_s: float, output: Path) -> int:
    """One attack in this process. Writes its rows."""
    own_mounts = mounts_are_mine()
    book = Book(attack, seed, ends_s, only)
    broke = None
    with tempfile.TemporaryDirectory(prefix=f"torture-{attack}-", ignore_cleanup_errors=True) as place:
        try:
            import_module(f"torture.{ATTACKS[attack][0]}").attack(book, Path(place), short)
            book.require_what_was_asked_for()
        except Exception:
            broke = traceback.format_exc()
    rows = [asdict(row) | {"tries": row.tries} for row in book.rows.values()]
    output.write_text(json.dumps({"rows": rows, "broke": broke, "own_mounts": own_mounts}))
    return 0


def _campaign(attacks: list[str], seed: int, short: bool, minutes: float, output: Path) -> int:
    """Attacks in processes of their own, one of each lane at a time. Prints the table and writes it; 1 if anything was wrong."""
    before, begin, utc = os.getloadavg()[0], time.monotonic(), time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    lanes: dict[int, list[str]] = {}
    for each in attacks:
        lanes.setdefault(ATTACKS[each.partition(":")[0]][1], []).append(each)
    ends_s, reports = begin + 60 * minutes, dict[str, dict[str, Any]]()

    def run(lane: list[str], place: Path) -> None:
        shares = [ATTACKS[each.partition(":")[0]][2] for each in lane]
        for at, each in enumerate(lane):
            own_s = (ends_s - time.monotonic()) * shares[at] / sum(shares[at:])
            reports[each] = _started(each, seed, short, max(3.0, own_s), place)

    with tempfile.TemporaryDirectory(prefix="torture-") as place, ThreadPoolExecutor(len(lanes)) as pool:
        for done in [pool.submit(run, lane, Path(place)) for lane in lanes.values()]:
            done.result()
    found = [reports[each] for each in attacks]
    rows = [row for each in found for row in each["rows"]]
    broke = {name: each["broke"] for name, each in zip(attacks, found, strict=True) if each["broke"]}
    wall_s = time.monotonic() - begin
    report = {
        "utc": utc,
        "seed": seed,
        "form": "short" if short else "long",
        "minutes_at_most": minutes,
        "wall_s": round(wall_s, 1),
        "commit": _commit(),
        "machine": {"cpus": os.cpu_count(), "python": platform.python_version(), "kernel": platform.release()},
        "load_before_and_after": [before, os.getloadavg()[0]],
        "mounts": "a tmpfs" if all(each["own_mounts"] for each in found) else "RLIMIT_FSIZE: mounting is not allowed here",
        "rows": rows,
        "total": total(rows),
        "orphans_at_the_end": [each for one in found for each in one["left"]],
        "broke": broke,
    }
    output.write_text(json.dumps(report, indent=1) + "\n")
    table = markdown(rows)
    output.with_suffix(".md").write_text(table)
    print(table)
    for row in rows:
        for each in row["wrongs"]:
            print(f"wrong: {each['try']}: {each['why']}  (again: make torture SEED={seed} ATTACK='{each['try']}')")
    for name, why in broke.items():
        print(f"the attack {name} itself broke:\n{why}")
    print(
        *report["orphans_at_the_end"],
        f"{report['form']} form, seed {seed}, {wall_s:.0f} s: {output}, {output.with_suffix('.md')}",
        sep="\n",
    )
    return 1 if report["total"]["wrong"] or broke or report["orphans_at_the_end"] else 0


def _started(attack: str, seed: int, short: bool, own_s: float, place: Path) -> dict[str, Any]:
    """Runs one attack in a process, for so long; gives its rows, and what it left running."""
    mark = f"{attack}-{os.getpid()}-{time.time_ns()}"
    output = place / f"{attack.replace(':', '-')}.json"
    command = [sys.executable, "-m", "torture", "--alone", "--attack", attack, "--seed", str(seed), "--output", str(output)]
    command += ["--minutes", f"{own_s / 60:.3f}", *(["--short"] if short else [])]
    log = output.with_suffix(".log")
    with log.open("w") as words:
        status = subprocess.run(command, env=os.environ | {MARK: mark}, stdout=words, stderr=words).returncode
    if not output.exists():
        output.write_text(json.dumps({"rows": [], "broke": f"exit {status}: {log.read_text()[-3000:]}", "own_mounts": True}))
    return json.loads(output.read_text()) | {"left": orphans(mark, {}, workflow_lives=False)}


def _commit() -> str | None:
    done = subprocess.run(["git", "-C", ROOT, "describe", "--always", "--dirty"], capture_output=True, text=True)
    return done.stdout.strip() or None


if __name__ == "__main__":
    sys.exit(main())
