"""`make gpu-check` without a GPU: refusals, deadlines, table, a rehearsal, and that it needs no package that the GPU machine lacks."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

pytestmark = pytest.mark.alone

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu_check  # noqa: E402
from gpu_check import Check, run_with_deadline, wanted_wheels, wrong_versions  # noqa: E402
from gpu_table import PARTS, Measured, Part, PartResult, Row, kept, read_records, render_table  # noqa: E402
from stand_in_driver import driver_environment  # noqa: E402

ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT / "benchmarks")])}


def checked(*options: str) -> subprocess.CompletedProcess[str]:
    """The command itself."""
    command = [sys.executable, str(ROOT / "benchmarks/gpu_check.py"), *options]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=1600)


def wheels_in(folder: Path, names: tuple[str, ...]) -> Path:
    folder.mkdir()
    for name in names:
        (folder / f"{name}-1.0-py3-none-any.whl").touch()
    return folder


def test_missing_wheels_are_named_with_the_command_that_collects_them(tmp_path: Path) -> None:
    folder = wheels_in(tmp_path / "wheels", tuple(name for name in wanted_wheels() if name != "zstandard"))
    done = checked("--wheels", str(folder), "--directory", str(tmp_path / "check"), "--output", str(tmp_path / "out.json"))
    assert done.returncode == 2
    assert "no wheel of zstandard" in done.stderr
    assert f"make gpu-wheels PYTHON_VERSION={sys.version_info.major}.{sys.version_info.minor}" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_refuses_at_once_and_leaves_no_earlier_result(tmp_path: Path) -> None:
    output = tmp_path / "gpu-check.json"
    output.write_text("of an earlier run")
    folder = wheels_in(tmp_path / "wheels", wanted_wheels())
    done = checked("--wheels", str(folder), "--directory", str(tmp_path / "check"), "--output", str(output))
    assert done.returncode == 2
    assert re.search(r"gpu-check: torch has no usable GPU: torch \S+, CUDA .+: .+; gpu-check needs a machine where", done.stderr)
    assert "make gpu-check PYTHON=" in done.stderr
    assert not output.exists()


OLD_DRIVER = """
from types import SimpleNamespace
def init():
    raise RuntimeError("The NVIDIA driver on your system is too old (found version 12020). Please update it\\nor not")
__version__, version, cuda = "2.11.0+cu130", SimpleNamespace(cuda="13.0"), SimpleNamespace(is_available=lambda: False, init=init)
"""


@pytest.fixture
def old_driver(tmp_path: Path) -> dict[str, str]:
    """An environment whose torch finds a driver older than its CUDA, and says so as torch does."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text(OLD_DRIVER)
    return ENVIRONMENT | {"PYTHONPATH": os.pathsep.join([str(tmp_path), ENVIRONMENT["PYTHONPATH"]])}


def test_a_driver_older_than_torchs_cuda_is_named(tmp_path: Path, old_driver: dict[str, str]) -> None:
    folder = wheels_in(tmp_path / "wheels", wanted_wheels())
    command = [sys.executable, str(ROOT / "benchmarks/gpu_check.py"), "--wheels", str(folder), "--output", str(tmp_path / "out.json")]
    command += ["--directory", str(tmp_path / "check")]
    done = subprocess.run(command, env=old_driver, capture_output=True, text=True, timeout=60)
    told = "torch 2.11.0+cu130, CUDA 13.0: The NVIDIA driver on your system is too old (found version 12020). Please update it;"
    assert done.returncode == 2 and f"gpu-check: torch has no usable GPU: {told}" in done.stderr
    choose = "import semgap.engine.device as d; print(d.choose_device('auto')); d.choose_device('cuda')"
    done = subprocess.run([sys.executable, "-c", choose], env=old_driver, capture_output=True, text=True, timeout=60)
    assert done.stdout == "cpu\n" and f"device 'cuda' needs a usable GPU, which this machine lacks: {told} use device: cpu" in done.stderr


def test_without_a_c_compiler_it_refuses_at_once_and_names_it(tmp_path: Path) -> None:
    folder, nothing = wheels_in(tmp_path / "wheels", wanted_wheels()), tmp_path / "nothing"
    command = [sys.executable, str(ROOT / "benchmarks/gpu_check.py"), "--wheels", str(folder), "--output", str(tmp_path / "out.json")]
    environment = {name: value for name, value in ENVIRONMENT.items() if name != "CC"} | {"PATH": str(nothing)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "Triton needs a C compiler: there is no gcc or clang in PATH, and CC is not set; install gcc" in done.stderr


def test_wheels_that_this_python_cannot_take_are_refused_with_what_pip_says(tmp_path: Path) -> None:
    folder = tmp_path / "wheels"
    folder.mkdir()
    (folder / "msgspec-0.22.0-cp27-cp27m-win32.whl").touch()
    with pytest.raises(gpu_check.Refusal, match=r"(?s)not a supported wheel.*make gpu-wheels PYTHON_VERSION="):
        gpu_check._install(folder, tmp_path / "site")


def test_versions_that_are_too_old_or_missing_are_named() -> None:
    asked = ["torch>=2.11", "transformers>=5.17", "gguf>=0.19", "numpy>=2", "psutil>=7"]
    found = {"torch": "2.9.1+cu130", "transformers": "5.17.0", "numpy": "2.5.2"}
    assert wrong_versions(asked, found) == ["torch 2.9.1+cu130 (>= 2.11 is needed)", "no psutil (>= 7 is needed)"]


def test_every_wheel_has_one_version_and_it_is_the_locks_where_the_lock_has_it() -> None:
    locked = set(re.findall(r"(?m)^([A-Za-z0-9._-]+)==", (ROOT / "requirements.lock").read_text()))
    for line in (ROOT / "envs/gpu-wheels.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, _, version = line.partition("==")
            assert bool(version) is not (name in locked), line


def test_what_runs_past_its_deadline_is_ended_with_all_that_it_started(tmp_path: Path, wait_until: Callable[..., None]) -> None:
    child = "import time; print('up', flush=True); time.sleep(600)"
    code = (
        f"import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', {child!r}]).pid, flush=True); import time; time.sleep(600)"
    )
    begin = time.monotonic()
    why = run_with_deadline([sys.executable, "-c", code], os.environ, tmp_path / "log", 2)
    assert why == "it was not done after 2 s"
    assert time.monotonic() - begin < 10
    pid = int((tmp_path / "log").read_text().split()[0])
    wait_until(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE, f"the end of process {pid}")


def test_what_ignores_being_asked_to_end_is_killed(tmp_path: Path) -> None:
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    begin = time.monotonic()
    assert run_with_deadline([sys.executable, "-c", code], os.environ, tmp_path / "log", 1) == "it was not done after 1 s"
    assert time.monotonic() - begin < 10


def test_a_crash_and_a_failure_say_what_they_were(tmp_path: Path) -> None:
    killed = "import os, signal; print('a CUDA error', flush=True); os.kill(os.getpid(), signal.SIGSEGV)"
    assert run_with_deadline([sys.executable, "-c", killed], os.environ, tmp_path / "a", 20) == "it died of SIGSEGV: a CUDA error"
    failed = run_with_deadline([sys.executable, "-c", "raise ValueError('no room')"], os.environ, tmp_path / "b", 20)
    assert failed == "exit status 1: ValueError: no room"
    assert run_with_deadline([sys.executable, "-c", "print(1)"], os.environ, tmp_path / "c", 20) is None


SCRIPT = """
import os, signal, sys, time
sys.path.insert(0, {benchmarks!r})
from gpu_table import Measured, Part, Records, Row
name, records = sys.argv[1], sys.argv[2]
part = Part(name, 1, (Row(name + "_first", "", "x"), Row(name + "_second", "", "x")))
with open(records, "w") as file:
    given = Records(file, part)
    given.row(name + "_first", Measured(2.0))
    if name == "hangs":
        time.sleep(600)
    if name == "dies":
        file.write('{{"row": "dies_second", "val')
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    given.row(name + "_second", Measured(3.0))
"""


def parts_of(*names: str, **more: Any) -> list[Part]:
    return [Part(name, 3, (Row(f"{name}_first", f"{name} 1", "x", 1), Row(f"{name}_second", f"{name} 2", "x")), **more) for name in names]


@pytest.fixture
def check_of(tmp_path: Path) -> Callable[..., tuple[Check, Path]]:
    def make(parts: list[Part]) -> tuple[Check, Path]:
        script, output = tmp_path / "parts.py", tmp_path / "gpu-check.json"
        script.write_text(SCRIPT.format(benchmarks=str(ROOT / "benchmarks")))
        return Check(parts, tmp_path / "check", output, script=script), output

    return make


def test_a_part_that_hangs_or_dies_takes_neither_its_own_rows_nor_the_others_with_it(check_of: Callable[..., tuple[Check, Path]]) -> None:
    check, output = check_of([*parts_of("hangs", "dies"), *parts_of("needy", needs=("dies",)), *parts_of("whole")])
    check.run(ENVIRONMENT, time.monotonic() + 14)
    report = json.loads(output.read_text())
    assert [part["status"] for part in report["parts"]] == ["failed", "failed", "not run", "ran"]
    rows = {row["name"]: row for row in report["rows"]}
    assert rows["hangs_first"]["value"] == 2 and rows["hangs_first"]["kept"] is False
    assert rows["hangs_second"]["value"] is None and "part hangs failed" in rows["hangs_second"]["reason"]
    assert rows["dies_first"]["value"] == 2 and rows["dies_second"]["value"] is None
    assert rows["whole_second"]["value"] == 3
    text = check.text()
    assert "Part hangs failed: it was not done after" in text and "Part dies failed: it died of SIGKILL" in text
    assert "Part needy not run: it needs part dies, which did not run to its end" in text
    assert check.status() == 1


def test_time_that_a_part_saves_goes_to_the_next_and_a_hang_takes_no_other_parts_share(check_of: Callable[..., tuple[Check, Path]]) -> None:
    check, _ = check_of(parts_of("whole", "hangs", "last"))
    begin = time.monotonic()
    check.run(ENVIRONMENT, begin + 9)
    limits = {result.name: result.limit_s or 0 for result in check.results}
    assert limits["hangs"] > 3.5
    assert limits["last"] > 0.5 and check.results[-1].status == "ran"
    assert time.monotonic() - begin < 12


def test_parts_for_which_no_time_is_left_are_named_with_the_reason(check_of: Callable[..., tuple[Check, Path]]) -> None:
    check, output = check_of(parts_of("whole"))
    check.run(ENVIRONMENT, time.monotonic() + 0.1)
    assert json.loads(output.read_text())["parts"][0]["reason"] == "no time was left"
    assert check.status() == 1


def test_a_check_that_is_ended_early_still_writes_what_it_measured(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks/gpu_check.py"), "--rehearse", "--only", "environment,tests,trial"]
    command += ["--output", str(tmp_path / "out.json"), "--directory", str(tmp_path / "check")]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("gpu-check: part tests, at most"):
            break
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 1
    report = json.loads((tmp_path / "out.json").read_text())
    assert [part["status"] for part in report["parts"]] == ["ran", "not run", "not run"]
    assert {row["name"]: row["value"] for row in report["rows"]}["copy_gb_per_s"] > 0
    assert "Part trial not run: the check was interrupted" in out


@pytest.mark.parametrize(
    ("row", "measured", "verdict"),
    [
        (Row("a", "", "x", 1.6), Measured(1.6), True),
        (Row("a", "", "x", 1.6), Measured(1.61), False),
        (Row("a", "", "x", 3, at_least=True), Measured(2.9), False),
        (Row("a", "", "%", 1, by_interval=True), Measured(2.0, 0.9, 3.1), True),
        (Row("a", "", "%", 1, by_interval=True), Measured(2.0, 1.1, 2.9), False),
        (Row("a", "", "x"), Measured(2.0), None),
        (Row("a", "", "x", 1), Measured(reason="no GPU"), None),
    ],
)
def test_a_bound_is_kept_missed_or_not_known(row: Row, measured: Measured, verdict: bool | None) -> None:
    assert kept(row, measured) is verdict


def test_the_table_has_values_intervals_bounds_and_the_reasons_for_what_is_missing() -> None:
    part = Part("p", 1, (Row("a", "speed", "GB/s", 3, at_least=True), Row("b", "ratio", "x", 1.03)))
    measured = {"a": Measured(3.456, 3.1, 3.9, "12 GB"), "b": Measured(reason="no room:\n1 | 2")}
    table = render_table([part], measured, [PartResult("p", "failed", "exit status 1: no room", 1.0, 2.0, "log")])
    assert "| p | speed | 3.456 GB/s [3.1, 3.9]; 12 GB | >= 3 GB/s | yes |" in table
    assert "| p | ratio | not measured: no room: 1 \\| 2 | <= 1.03 x | - |" in table
    assert table.endswith("\nPart p failed: exit status 1: no room")


def test_tests_that_failed_or_never_ran_fail_the_check(check_of: Callable[..., tuple[Check, Path]]) -> None:
    check, _ = check_of([])
    for value, status in ((0.0, 0), (2.0, 1), (None, 1)):
        check.rows = {"tests_failed": Measured(value)}
        assert check.status() == status


def test_the_parts_shares_are_within_the_budget_and_rows_have_names_of_their_own() -> None:
    assert sum(part.limit_s for part in PARTS) <= gpu_check.BUDGET_S <= 570
    names = [row.name for part in PARTS for row in part.rows]
    assert len(names) == len(set(names))


def test_what_matters_first_is_measured_first() -> None:
    first = ["environment", "model", "local", "wire", "codecs", "recovery", "kernels"]
    assert [part.name for part in PARTS][: len(first)] == first
    assert all(need in {earlier.name for earlier in PARTS[:at]} for at, part in enumerate(PARTS) for need in part.needs)


def test_bounds_on_steps_and_products_are_ratios_to_the_bandwidth_of_the_same_machine() -> None:
    bounded = {row.name for part in PARTS for row in part.rows if row.bound is not None}
    assert {"local_over_floor", "llama_over_floor", "sys_over_local", "project_over_copy", "merge_over_copy"} <= bounded
    assert not {"local_ms", "llama_ms", "trial_ms", "kernels_ms", "project_gb_per_s", "merge_gb_per_s"} & bounded


def test_what_the_project_promises_of_speed_is_a_line_with_its_bound() -> None:
    bounds = {row.name: (row.bound, row.at_least) for part in PARTS for row in part.rows}
    promised = {"local_over_floor": 1.35, "llama_over_floor": 1.35, "setup_s": 5, "llama_setup_s": 5, "sys_over_local": 1.02}
    promised |= {"samplers_percent": 1, "kv_inexact_bytes": 0}
    at_least = {"upload_gb_per_s": 3, "kv_ratio": 1.35, "kv_encode_gb_per_s": 80}
    expected = {name: (bound, False) for name, bound in promised.items()} | {name: (bound, True) for name, bound in at_least.items()}
    assert {name: bounds[name] for name in expected} == expected


def test_tests_that_must_run_alone_are_there_by_their_names() -> None:
    from gpu_parts import ALONE

    for name in ALONE:
        file, _, function = name.partition("::")
        assert f"def {function}(" in (ROOT / "tests/gpu" / file).read_text() or not function


def test_docs_explain_every_part_and_row() -> None:
    text = (ROOT / "docs/gpu.md").read_text()
    for part in PARTS:
        for name in (part.name, *(row.name for row in part.rows)):
            assert f"`{name}`" in text, name


def machine_packages() -> list[str]:
    """Names of the packages that the GPU machine has, as it is."""
    lines = (ROOT / "tests/data/gpu_machine_packages.txt").read_text().splitlines()
    return [name for line in lines if not line.startswith("#") for name in line.split()]


def with_what_they_need(names: list[str]) -> list[importlib.metadata.Distribution]:
    """The installed ones of these packages, and what their versions here need, but nothing that is carried in a wheel."""
    found: dict[str, importlib.metadata.Distribution] = {}
    left = list(names)
    while left:
        name = canonicalize_name(left.pop())
        if name not in found and name.replace("-", "_") not in wanted_wheels():
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                found[name] = importlib.metadata.distribution(name)
                needs = map(Requirement, found[name].requires or ())
                left += [need.name for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
    return list(found.values())


def test_nothing_that_pyproject_asks_for_is_missing_there() -> None:
    requirements = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert wrong_versions(requirements, {name.replace("-", "_"): "999" for name in (*machine_packages(), *wanted_wheels())}) == []


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make gpu-wheels` collects, for the Python that runs here."""
    folder = tmp_path_factory.mktemp("wheels")
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    command = ["make", "gpu-wheels", f"WHEELS={folder}", f"PYTHON={sys.executable}", f"PYTHON_VERSION={version}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    if done.returncode and (
        broken := re.search(r".*(?:ConnectionError|NewConnectionError|Temporary failure in name resolution).*", done.stderr)
    ):
        pytest.skip(f"pip cannot download here: {broken[0]}")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, str]]:
    """The GPU machine's Python and environment: a bare virtual environment, and those of its packages that are installed here."""
    folder = tmp_path_factory.mktemp("there")
    subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True, timeout=120)
    packages = folder / "packages"
    packages.mkdir()
    for distribution in with_what_they_need(machine_packages()):
        for top in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            if not (packages / top).exists():
                (packages / top).symlink_to(Path(str(distribution.locate_file(top))))
    return str(folder / "venv/bin/python"), os.environ | {"PYTHONPATH": str(packages)}


def test_the_wheels_are_as_small_as_the_document_says(wheels: Path) -> None:
    (said,) = re.findall(r"^make gpu-wheels .* nvCOMP; (\d+) MB$", (ROOT / "docs/gpu.md").read_text(), re.MULTILINE)
    assert sum(wheel.stat().st_size for wheel in wheels.glob("*.whl")) == pytest.approx(1e6 * int(said), rel=0.05)


IMPORT_ALL = """
import pkgutil
import semgap
for module in pkgutil.walk_packages(semgap.__path__, "semgap."):
    if module.name != "semgap.__main__" and not module.name.startswith(("semgap.analysis.explorer", "semgap.analysis.tables")):
        __import__(module.name)
import gpu_parts, gpu_check, msgspec, snakemake.cli
print(msgspec.__file__)
import altair
"""


def test_all_that_the_check_runs_can_be_imported_from_the_unpacked_wheels_and_the_gpu_machines_packages(
    tmp_path: Path, wheels: Path, there: tuple[str, dict[str, str]]
) -> None:
    python, environment = there
    site = tmp_path / "site"
    command = [python, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", str(site), *map(str, wheels.glob("*.whl"))]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    paths = [ROOT / "src", ROOT / "benchmarks", site, environment["PYTHONPATH"]]
    environment = environment | {"PYTHONPATH": os.pathsep.join(map(str, paths))}
    done = subprocess.run([python, "-c", IMPORT_ALL], env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines() == [str(site / "msgspec/__init__.py")], done.stderr
    assert done.stderr.splitlines()[-1] == "ModuleNotFoundError: No module named 'altair'"  # what is here alone is not there
    collect = [python, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", str(ROOT / "tests/gpu")]
    done = subprocess.run(collect, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "tests/gpu/test_kernels.py::" in done.stdout, done.stdout + done.stderr


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory, wheels: Path, there: tuple[str, dict[str, str]]) -> Path:
    """The folder of a rehearsal on the GPU machine's Python, with gpu-check.json and check/; NVML and nvidia-smi have stand-ins."""
    folder = tmp_path_factory.mktemp("rehearsed")
    python, environment = there
    skipped = ("tests", "environment")  # tests/gpu run by themselves, the other above
    parts = ",".join(part.name for part in PARTS if part.name not in skipped)
    command = [python, str(ROOT / "benchmarks/gpu_check.py"), "--rehearse", "--only", parts, "--wheels", str(wheels)]
    command += [
        "--budget-s",
        "1500",
        "--output",
        str(folder / "gpu-check.json"),
        "--directory",
        str(folder / "check"),
    ]  # tests may run beside
    environment = driver_environment(folder) | {"PYTHONPATH": environment["PYTHONPATH"]}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1600)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_a_rehearsal_there_measures_every_row_that_needs_no_gpu(rehearsed: Path) -> None:
    assert (rehearsed / "check/site/msgspec/__init__.py").is_file()
    report = json.loads((rehearsed / "gpu-check.json").read_text())
    assert report["rehearsal"] and report["whole"] and {part["status"] for part in report["parts"]} == {"ran"}
    unmeasured = {row["name"]: row["reason"] for row in report["rows"] if row["value"] is None}
    assert all(name.startswith(("kv_", "project_", "merge_")) for name in unmeasured), unmeasured
    assert all(unmeasured.values())
    assert not list((rehearsed / "check").glob("scratch/*"))
    rows, facts = read_records(rehearsed / "check/parts/wire.jsonl")
    assert facts["books"] == "2 sessions reconciled to the byte"
    assert rows["by_hash_s"].note.startswith("0 bytes of weights sent")


def test_in_the_workflow_of_a_rehearsal_nvml_gpm_and_dmon_land_in_parquet_and_in_the_figure(rehearsed: Path) -> None:
    rows, _ = read_records(rehearsed / "check/parts/workflow.jsonl")
    assert min(rows[f"workflow_{name}_samples"].value or 0 for name in ("gpu", "gpm", "dmon")) > 0
    assert rows["workflow_gpu_panels"].note == "GPU in use (%), SM activity (%), GPU power (W)"


OURS = ("_project", "_merge", "_attend", "_norm", "_combine", "_embed")


def step_table(kept: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """One decode step of GPT-J-6B by the command."""
    environment = {name: value for name, value in ENVIRONMENT.items() if name != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(kept)}
    command = [sys.executable, str(ROOT / "benchmarks/kernel_table.py"), "step", *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def test_the_times_of_a_check_stand_beside_the_estimates_of_a_step(rehearsed: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """A rehearsal's file, whose operators of the CPU take the names of our kernels."""
    report, kept = json.loads((rehearsed / "gpu-check.json").read_text()), request.config.cache.mkdir("triton")
    file = tmp_path / "gpu-check.json"
    report |= {"rehearsal": False, "device": "NVIDIA H200"}
    for row, name in zip(report["facts"]["kernels"], OURS, strict=False):
        row["name"] = name
    file.write_text(json.dumps(report))
    done = step_table(kept, "gpt-j-6b", "--times", str(file))
    assert done.returncode == 0, done.stderr
    head, *lines = done.stdout.splitlines()
    assert head.endswith(f" Measured on NVIDIA H200, {report['utc'][:10]}, commit {report['git'][:12]}.")
    found = {(cells[1], cells[2]): cells[-2] for cells in ([cell.strip() for cell in line.split("|")] for line in lines[3:])}
    ms = {row["name"]: row["ms"] for row in report["facts"]["kernels"][: len(OURS)]}
    shapes = {"_project": ("28672 x 4096", "50400 x 4096"), "_merge": ("4096 x 20480",)}
    expected = {(name, shape): f"{1e3 * ms[name]:.0f}" for name in OURS for shape in shapes.get(name, ("-",))}
    expected |= {place: f"{value} (all shapes)" for place, value in expected.items() if place[0] == "_project"}
    assert found == expected | {("all", "-"): f"{1e3 * sum(ms.values()):.0f}"}


REFUSED = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from kernel_table import measured_times
for file, model in zip(sys.argv[2::2], sys.argv[3::2], strict=True):
    try:
        print(measured_times(Path(file), model, "float16"))
    except SystemExit as refused:
        print(refused)
"""


def test_times_that_are_not_those_of_the_step_are_refused(rehearsed: Path, tmp_path: Path) -> None:
    rehearsal = rehearsed / "gpu-check.json"
    report = json.loads(rehearsal.read_text()) | {"rehearsal": False}
    (tmp_path / "whole").write_text(json.dumps(report))
    (tmp_path / "cut").write_text(json.dumps(report | {"facts": {}}))
    asked = [str(rehearsal), "gpt-j-6b", str(tmp_path / "cut"), "gpt-j-6b", str(tmp_path / "whole"), "llama-3-8b"]
    command = [sys.executable, "-c", REFUSED, str(ROOT / "benchmarks"), *asked]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    first, second, third = done.stdout.splitlines()
    assert "is of a rehearsal on the CPU; take that of `make gpu-check` on a GPU" in first
    assert "has no times of kernels, since part kernels did not get that far" in second
    assert "gpu-check measures gpt-j-6b in float16, not llama-3-8b in float16; leave --times out" in third
