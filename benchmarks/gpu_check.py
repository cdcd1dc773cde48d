"""`make gpu-check`: the GPU tests and the benchmark, on a machine that has torch with CUDA and no network, within a time budget.

Installs the wheels of `make gpu-wheels` into .gpu-check/site, runs each part (gpu_table.py) in a process of its own with a deadline,
and writes gpu-check.json after every part. The table comes last, on stdout. Exit status: 0 where every part ran to its end and no
test failed (bounds that are not kept are in the table), 1 where not, 2 where this machine cannot run it.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gpu_table import PARTS, Measured, Part, PartResult, kept, missing_rows, read_records, render_table, without_bounds

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "benchmarks/gpu_parts.py"
BUDGET_S = 560.0  # of the 600 that a command of a lent machine may take; what matters first is done by half of it
_END_S = 2.0  # for a part over its deadline to end by itself
_LOG_LINES = 15
_NOT_NEEDED = {"gguf", "cryptography"}  # only for models that come as GGUF, and for a worker's certificate


class Refusal(Exception):
    """This machine, or what was carried to it, cannot run the check; the message names the way out."""


def main() -> int:
    """Checks the machine, runs the parts, and leaves the table and the JSON file."""
    options = _options()
    options.output.unlink(missing_ok=True)  # an earlier run's must not pass for this one's
    begin = time.monotonic()
    try:
        environment = prepare(options)
    except Refusal as refusal:
        print(f"gpu-check: {refusal}", file=sys.stderr)
        return 2
    parts = [part for part in PARTS if not options.only or part.name in options.only]
    parts = [without_bounds(part) for part in parts] if options.rehearse else parts
    check = Check(parts, options.directory, options.output, options.rehearse)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    check.run(environment, begin + options.budget_s)
    print(check.text())
    return check.status()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("gpu-check.json"), help="default: %(default)s")
    parser.add_argument("--directory", type=Path, default=ROOT / ".gpu-check", help="logs and installed wheels (default: .gpu-check)")
    parser.add_argument("--wheels", type=Path, default=ROOT / "wheels", help="what make gpu-wheels collected (default: wheels)")
    parser.add_argument("--budget-s", type=float, default=BUDGET_S, help="for all parts together (default: %(default)s)")
    parser.add_argument("--only", type=lambda text: text.split(","), default=[], metavar="PART,PART", help=", ".join(_names(PARTS)))
    parser.add_argument("--rehearse", action="store_true", help="tiny models on the CPU: figures mean nothing; shows that the check runs")
    options = parser.parse_args()
    unknown = [name for name in options.only if name not in _names(PARTS)]
    if unknown:
        parser.error(f"--only: there is no part {unknown[0]!r}; the parts are {', '.join(_names(PARTS))}")
    return options


class Check:
    """The parts' results, and what is made of them."""

    def __init__(self, parts: Sequence[Part], directory: Path, output: Path, rehearse: bool = False, script: Path = SCRIPT) -> None:
        self.parts, self._directory, self._output, self._rehearse, self._script = parts, directory, output, rehearse, script
        self._scratch = scratch_of(directory)
        self.results: list[PartResult] = []
        self.rows: dict[str, Measured] = {}
        self.facts: dict[str, Any] = {}
        self._begin, self._utc = time.monotonic(), datetime.now(UTC)
        for name in ("logs", "parts"):
            shutil.rmtree(directory / name, ignore_errors=True)
            (directory / name).mkdir(parents=True)

    def run(self, environment: Mapping[str, str], end_s: float) -> None:
        """Runs part after part until `end_s` (of time.monotonic); an interrupt leaves the rest unrun, and what was measured written."""
        interrupted = False
        try:
            for number, part in enumerate(self.parts):
                later_s = sum(other.limit_s for other in self.parts[number + 1 :])
                factor = min(1.0, max(0.0, end_s - time.monotonic()) / (part.limit_s + later_s))
                self._take(part, self._run_part(part, environment, end_s - time.monotonic() - factor * later_s))
        except KeyboardInterrupt:
            interrupted = True
        finally:
            done = {result.name for result in self.results}
            for part in self.parts:
                if part.name not in done:
                    why = "the check was interrupted" if interrupted else "the check itself failed"
                    self._take(part, PartResult(part.name, "not run", why, None, None, None))
            shutil.rmtree(self._scratch, ignore_errors=True)

    def _run_part(self, part: Part, environment: Mapping[str, str], limit_s: float) -> PartResult:
        failed = [result.name for result in self.results if result.name in part.needs and result.status != "ran"]
        unrun = [name for name in part.needs if name not in {result.name for result in self.results}]
        if failed or unrun:
            return PartResult(part.name, "not run", f"it needs part {(failed + unrun)[0]}, which did not run to its end", None, None, None)
        log, records = self._directory / "logs" / f"{part.name}.log", self._directory / "parts" / f"{part.name}.jsonl"
        command = [sys.executable, str(self._script), part.name, str(records), str(self._scratch)]
        command += ["--rehearse"] if self._rehearse else []
        print(f"gpu-check: part {part.name}, at most {limit_s:.0f} s", file=sys.stderr, flush=True)
        begin = time.monotonic()
        why = run_with_deadline(command, environment, log, limit_s)
        seconds = time.monotonic() - begin
        print(f"gpu-check: part {part.name}: {why or 'ran'}, {seconds:.1f} s", file=sys.stderr, flush=True)
        if why:
            print(_tail(log), file=sys.stderr, flush=True)
        return PartResult(part.name, "failed" if why else "ran", why, round(seconds, 2), round(limit_s, 2), str(log))

    def _take(self, part: Part, result: PartResult) -> None:
        self.results.append(result)
        given, facts = read_records(self._directory / "parts" / f"{part.name}.jsonl")
        self.rows |= missing_rows(
            part, given, f"part {part.name} {result.status}, see below" if result.reason else "the part gave no such row"
        )
        self.facts |= facts
        self._write()

    def _write(self) -> None:
        """Written after every part: whatever ends this process, the file holds what was measured before."""
        partial = self._output.with_name(self._output.name + ".partial")
        partial.write_text(json.dumps(self.report(), indent=1) + "\n")
        partial.replace(self._output)

    def report(self) -> dict[str, Any]:
        """All that gpu-check.json holds."""
        rows = [
            {"part": part.name, **asdict(row), **asdict(self.rows[row.name]), "kept": kept(row, self.rows[row.name])}
            for part in self.parts
            for row in part.rows
            if row.name in self.rows
        ]
        return {
            "schema": 1,
            "utc": self._utc.isoformat(timespec="seconds"),
            "git": _git_commit(),
            "rehearsal": self._rehearse,
            "device": self.facts.get("device"),
            "seconds": round(time.monotonic() - self._begin, 2),
            "whole": len(self.results) == len(self.parts),
            "parts": [asdict(result) for result in self.results],
            "rows": rows,
            "facts": self.facts,
        }

    def text(self) -> str:
        """The table, with where and when it was measured above it."""
        missed = [row for part in self.parts for row in part.rows if kept(row, self.rows[row.name]) is False]
        device = "rehearsal on the CPU, figures mean nothing" if self._rehearse else self.facts.get("device") or "device unknown"
        head = f"gpu-check, {device}, {self._utc:%Y-%m-%d %H:%M} UTC, commit {_git_commit()[:12]}"
        tail = f"\nBounds not kept: {len(missed)}. Everything measured is in {self._output}"
        return "\n".join([head, "", render_table(self.parts, self.rows, self.results), tail])

    def status(self) -> int:
        """0 where every part ran to its end and no test failed. Tests that were all skipped show nothing, but in a rehearsal."""
        tests = self.rows.get("tests_failed", Measured(0.0))
        all_passed = tests.value == 0 or (self._rehearse and tests.value is None)
        return int(any(result.status != "ran" for result in self.results) or not all_passed)


def run_with_deadline(command: Sequence[str], environment: Mapping[str, str], log: Path, limit_s: float) -> str | None:
    """Runs a command with its output in `log`, and ends it and all that it started at the deadline; why it failed, or None."""
    if limit_s < 1:
        return "no time was left"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=dict(environment), start_new_session=True
        )
        try:
            status = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return f"it was not done after {limit_s:.0f} s"
        finally:
            _end_group(process)
    if status < 0:
        return f"it died of {signal.Signals(-status).name}: {_last_line(log)}"
    return f"exit status {status}: {_last_line(log)}" if status else None


def _end_group(process: subprocess.Popen) -> None:
    """Ends the process and its group: first asked, then killed."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_END_S)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


_MEMORY = Path("/dev/shm")


def scratch_of(directory: Path) -> Path:
    """Where the model's 12 GB lie while the check runs: in memory where there is room, else on disk."""
    roomy = _MEMORY.is_dir() and os.access(_MEMORY, os.W_OK) and shutil.disk_usage(_MEMORY).free > 32e9
    return _MEMORY / f"semgap-gpu-check-{os.getpid()}" if roomy else directory / "scratch"


def prepare(options: argparse.Namespace) -> dict[str, str]:
    """Checks wheels, torch and versions, installs the wheels, and gives the parts' environment. Raises Refusal."""
    site = options.directory / "site"
    environment = _environment(site, options.directory / "triton")
    if options.rehearse:
        if importlib.util.find_spec("msgspec") is None:  # else what is installed here is what is rehearsed
            _install(options.wheels, site)
        return environment
    _require_wheels(options.wheels)
    _require_compiler()
    _require_cuda(environment)
    _install(options.wheels, site)
    _require_versions(environment)
    return environment


def _environment(site: Path, kernels: Path) -> dict[str, str]:
    """`kernels`: where Triton keeps what it compiles; emptied, so that the first set-up is one with a cold cache."""
    shutil.rmtree(kernels, ignore_errors=True)
    paths = [str(ROOT / "src"), str(site), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "TRITON_CACHE_DIR": str(kernels.resolve()),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
    }


def wanted_wheels() -> tuple[str, ...]:
    """Names of the packages whose wheels are carried, as wheel files spell them."""
    lines = (ROOT / "envs/gpu-wheels.txt").read_text().splitlines()
    return tuple(_normal(re.split(r"[=<>!~ ]", line)[0]) for line in lines if line and not line.startswith("#"))


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "_", name).lower()


def _require_wheels(folder: Path) -> None:
    found = {_normal(path.name.split("-")[0]) for path in folder.glob("*.whl")}
    lacking = [name for name in wanted_wheels() if name not in found]
    if lacking:
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        raise Refusal(
            f"{folder} holds no wheel of {', '.join(lacking)}; where pip can download, run `make gpu-wheels PYTHON_VERSION={version}`, "
            f"then carry {folder.name}/ here"
        )


def _require_cuda(environment: Mapping[str, str]) -> None:
    if importlib.util.find_spec("torch") is None:
        raise Refusal(f"{sys.executable} has no torch; say make gpu-check PYTHON=... with the Python that has torch with CUDA")
    code = "import torch; from semgap.engine.device import why_no_cuda; print(torch.cuda.is_available() or why_no_cuda())"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=dict(environment), capture_output=True, text=True, timeout=120)
    if done.returncode:
        raise Refusal(f"torch does not start under {sys.executable}: {(done.stderr.strip().splitlines() or ['it said nothing'])[-1]}")
    why = done.stdout.strip()
    if why != "True":
        raise Refusal(
            f"torch has no usable GPU: {why}; gpu-check needs a machine where torch.cuda.is_available() is true "
            "(look at `nvidia-smi` and CUDA_VISIBLE_DEVICES, or say make gpu-check PYTHON=...)"
        )


def _require_compiler() -> None:
    sys.path.insert(0, str(ROOT / "src"))
    from semgap.engine.host_compiler import why_no_launcher  # of the standard library

    why = why_no_launcher()
    if why:
        raise Refusal(f"{why}; without it no kernel of ours runs")


def _install(wheels: Path, site: Path) -> None:
    shutil.rmtree(site, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--root-user-action=ignore", "--target", str(site), *map(str, sorted(wheels.glob("*.whl")))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if done.returncode:
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        raise Refusal(
            f"pip cannot install {wheels}/*.whl into {site}:\n{done.stderr.strip()}\n"
            f"empty the folder and collect the wheels for this Python: make gpu-wheels PYTHON_VERSION={version}"
        )


def _require_versions(environment: Mapping[str, str]) -> None:
    code = "import importlib.metadata as m; [print(d.metadata['Name'], d.version) for d in m.distributions()]"
    done = subprocess.run([sys.executable, "-c", code], env=dict(environment), capture_output=True, text=True, check=True, timeout=60)
    found: dict[str, str] = {}
    for name, version in (line.split() for line in done.stdout.splitlines()):
        found.setdefault(_normal(name), version)  # of two, the first on the path is imported
    wrong = wrong_versions(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"], found)
    if wrong:
        raise Refusal(f"{sys.executable} has {'; '.join(wrong)}; install that, or say make gpu-check PYTHON=... with a Python that has it")


def wrong_versions(requirements: Sequence[str], found: Mapping[str, str]) -> list[str]:
    """What is older than pyproject.toml asks for ('NAME>=VERSION'), or not there at all."""
    wrong = []
    for requirement in requirements:
        name, _, least = requirement.partition(">=")
        version = found.get(_normal(name))
        if name in _NOT_NEEDED:
            continue
        if version is None:
            wrong.append(f"no {name} (>= {least} is needed)")
        elif _numbers(version) < _numbers(least):
            wrong.append(f"{name} {version} (>= {least} is needed)")
    return wrong


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version.split("+")[0])[:3])


def _git_commit() -> str:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout.strip()
    return "unknown"


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), f"it said nothing; see {log}")


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-_LOG_LINES:]) if log.exists() else ""


def _names(parts: Sequence[Part]) -> list[str]:
    return [part.name for part in parts]


if __name__ == "__main__":
    sys.exit(main())
