"""A worker on another host through ssh: a real sshd on loopback, with its own port, keys and config."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from semgap.engine.model_files import load_digest
from semgap.experiment.compute_reference import compute_reference
from semgap.experiment.config import Coordinates, check_config
from semgap.experiment.measure_trial import measure_trial
from semgap.experiment.trial_schemas import TrialResult
from semgap.experiment.trial_setup import Paths, TrialError
from semgap.network.spec import NetworkError

pytestmark = [pytest.mark.alone, pytest.mark.usefixtures("own_run")]

ROOT = Path(__file__).resolve().parents[2]
SSHD = Path("/usr/sbin/sshd")
PRIVSEP = Path("/run/sshd")


# A trial that has come as far as its worker, and waits.
STARTS = """
import contextlib, json, sys
from pathlib import Path
from semgap.experiment.cell import Cell
from semgap.experiment.trial_worker import start_worker
from semgap.processes import machine
machine.LOCK, scratch, stack = Path(sys.argv[2]), Path(sys.argv[3]), contextlib.ExitStack()
side = start_worker(Cell.of(json.loads(sys.argv[1])), scratch, scratch, stack).side
print(side.address, flush=True)
input()
"""


@dataclass(frozen=True)
class Sshd:
    """A running sshd and a client's config for it: host `there` is let in, host `locked` would have to type a password."""

    config: Path
    process: subprocess.Popen[bytes]
    log: Path

    def workers(self) -> list[psutil.Process]:
        """Processes `semgap serve` below it."""
        return [process for process in psutil.Process(self.process.pid).children(recursive=True) if _is_worker(process)]


def _is_worker(process: psutil.Process) -> bool:
    try:
        return "serve" in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _require_sshd() -> None:
    """Debian's openssh-server, of which the binary alone is used. Skips where it is not here and cannot be had."""
    if SSHD.exists():
        return
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        pytest.skip("no sshd here, and it takes root and apt-get to install one")
    install = "apt-get update -qq; DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends openssh-server"
    done = subprocess.run(["sh", "-c", install], capture_output=True, text=True, env=os.environ | {"RUNLEVEL": "1"})  # and not started
    if not SSHD.exists():
        pytest.skip(f"openssh-server could not be installed: {(done.stderr or done.stdout)[-300:]}")


def _key(path: Path) -> Path:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)
    return path


@pytest.fixture(scope="module")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    _require_sshd()
    directory = tmp_path_factory.mktemp("ssh")
    host_key, key, stranger = (_key(directory / name) for name in ("host_key", "key", "stranger"))
    shutil.copy(directory / "key.pub", directory / "authorized_keys")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    lines = [f"Port {port}", "ListenAddress 127.0.0.1", f"HostKey {host_key}", f"AuthorizedKeysFile {directory}/authorized_keys"]
    lines += ["StrictModes no", "UsePAM no", "PidFile none", "PermitRootLogin yes", "PasswordAuthentication yes"]
    (directory / "sshd_config").write_text("\n".join(lines) + "\n")
    (directory / "known_hosts").write_text(f"[127.0.0.1]:{port} {(directory / 'host_key.pub').read_text()}")
    common = f"  HostName 127.0.0.1\n  Port {port}\n  UserKnownHostsFile {directory}/known_hosts\n  IdentitiesOnly yes\n"
    hosts = [f"Host there\n{common}  IdentityFile {key}\n", f"Host locked\n{common}  IdentityFile {stranger}\n"]
    hosts += [
        f"Host stranger\n{common.replace('known_hosts', 'no_hosts')}  IdentityFile {key}\n",
        "Host closed\n  HostName 127.0.0.1\n  Port 1\n",
    ]
    (directory / "config").write_text("".join(hosts))
    made = not PRIVSEP.exists() and os.geteuid() == 0
    PRIVSEP.mkdir(exist_ok=True) if made else None
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen([str(SSHD), "-D", "-e", "-f", str(directory / "sshd_config")], stderr=log)
    try:
        yield Sshd(directory / "config", process, directory / "log")
    finally:
        process.terminate()
        process.wait(10)
        if made:
            PRIVSEP.rmdir()


@pytest.fixture(scope="module")
def cell_of(sshd: Sshd, llama: Path) -> Callable[..., dict[str, Any]]:
    """remote_cache over the tiny llama, its worker on a host of the ssh config; `more` replaces keys of config.worker."""
    raw = yaml.safe_load((ROOT / "config/config.yaml").read_text())
    raw["define"]["models"], raw["models"] = {"tiny": load_digest(llama).source}, ["tiny"]
    decode = {"kind": "decode", "prompt_lengths": [10], "requests": 1, "steps": 2, "warmup_requests": 0}
    raw["define"]["phases"], raw["phases"] = {"decode": decode}, ["decode"]
    raw["define"]["networks"], raw["networks"] = {"rack": {"kind": "hosts"}}, ["rack"]
    for row in (*raw["define"]["modes"].values(), *raw["define"]["phases"].values()):
        row.pop("networks", None)
    raw["modes"] = ["local", "remote_cache"]
    raw |= {"max_length": 128, "device": "cpu", "probe": {"round_trips": 3, "payload_bytes": 1 << 20}}
    raw["telemetry"] = {"interval_s": 0.05, "sources": ["host"]}
    raw["timeouts"] |= {"worker_start_s": 60}

    def make(mode: str, host: str = "there", **more: Any) -> dict[str, Any]:
        chosen = copy.deepcopy(raw)
        chosen["worker"] = {"launch": "ssh", "host": host, "python": sys.executable, "ssh_config": str(sshd.config)} | more
        return check_config(chosen, ROOT).cell(Coordinates("tiny", "rack", mode, "decode", 1))

    return make


@pytest.fixture(scope="module")
def run(cell_of: Callable[..., dict[str, Any]], llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TrialResult]:
    reference = tmp_path_factory.mktemp("reference") / "reference.npz"
    compute_reference(cell_of("local"), Paths(llama, ROOT), reference)
    return lambda *arguments, **more: measure_trial(cell_of(*arguments, **more), Paths(llama, ROOT), reference)


@pytest.mark.parametrize("tls", [False, True])
def test_a_trial_runs_against_a_worker_that_ssh_starts_and_stops(sshd: Sshd, run: Callable[..., TrialResult], tls: bool) -> None:
    manifest = run("remote_cache", tls=tls).manifest
    assert (manifest["reconciliation"]["tls"] or "").startswith("TLSv1.3 " if tls else "") and bool(
        manifest["reconciliation"]["tls"]
    ) is tls
    assert manifest["exactness"]["promise_kept"] and manifest["reconciliation"]["agreed"] and manifest["setup"]["worker_start_s"] > 0
    assert manifest["network"]["asked"] == {"rtt_s": None, "goodput_bytes_per_s": None} and manifest["network"]["measured"]["rtt_s"] > 0
    assert sshd.workers() == []


def test_the_secret_is_in_no_command_line_or_environment_and_the_worker_dies_with_the_trial(
    sshd: Sshd, cell_of: Callable[..., dict[str, Any]], llama: Path, tmp_path: Path, wait_until: Callable[..., None]
) -> None:
    """The trial is killed while its worker waits for a client."""
    command = [sys.executable, "-c", STARTS, json.dumps(cell_of("remote_cache")), str(tmp_path / "lock"), str(tmp_path)]
    driver = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert driver.stdin and driver.stdout
    assert driver.stdout.readline().startswith("127.0.0.1:")
    secret = (tmp_path / "secret").read_text()
    (worker,) = [process for process in sshd.workers() if "python" in process.name()][:1]
    seen = [*psutil.Process(driver.pid).children(recursive=True), *psutil.Process(sshd.process.pid).children(recursive=True)]
    told = "\n".join("\0".join(process.cmdline()) + Path(f"/proc/{process.pid}/environ").read_text(errors="replace") for process in seen)
    assert "serve" in told and secret not in told
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    wait_until(lambda: not psutil.pid_exists(worker.pid) and sshd.workers() == [], "the worker ends with the trial that wanted it")
    driver.stdin.close()
    driver.stdout.close()


@pytest.mark.parametrize(
    ("host", "more", "message"),
    [
        ("locked", {}, "(?s)Permission denied.*ssh wants a password or a passphrase, and a run has none: give locked a key"),
        ("stranger", {}, r"(?s)Host key verification failed.*connect once by hand \(ssh stranger\)"),
        ("closed", {}, "(?s)Connection refused.*nothing answers there"),
        (
            "there",
            {"python": "/no/such/python"},
            "(?s)No such file or directory.*set worker.python to the Python of an environment on there",
        ),
        ("there", {"address": "192.0.2.1:0"}, "(?s)192.0.2.1:0 is not an address of this machine.*set worker.address to HOST:PORT"),
    ],
)
def test_what_ssh_cannot_do_is_told_with_the_way_out(
    run: Callable[..., TrialResult], host: str, more: dict[str, str], message: str
) -> None:
    with pytest.raises(TrialError, match=message):
        run("remote_cache", host, **more)


def test_a_host_that_does_not_resolve_is_named(run: Callable[..., TrialResult]) -> None:
    with pytest.raises((TrialError, NetworkError), match=r"host 'no-such-host.invalid' is 'no-such-host.invalid' to ssh, which does not"):
        run("remote_cache", "no-such-host.invalid")
