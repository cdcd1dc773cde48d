"""A real Slurm on this machine, of two nodes, for as long as its standard input is open: `python tests/cluster/cluster.py`.

Installs Debian's packages where they are missing, as root. Everything else that it makes goes when it ends: daemons, jobs, the files
in /etc/slurm, which is where job steps look for them whatever is in their environment, and the directory of all the rest. Ends when
its input does, so whatever kills the one who started it. Leaves a Slurm that is not its own alone.

A line `start NODE` on its input starts a node's slurmd again. Prints one line of JSON: {"directory": ..., "pid": ...} once both nodes
take jobs, or {"reason": ...} where there can be no cluster.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import psutil

ETC = Path("/etc/slurm")
FILES = (ETC / "slurm.conf", ETC / "gres.conf")
MARK = "# Made by semgap's tests, and removed by them. Directory: "
LOCK = Path("/run/lock/semgap-slurm.lock")
PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "munged")
DAEMONS = ("slurmctld", "slurmd", "slurmstepd", "munged")
NODES = {"n1": "127.0.0.1", "n2": "127.0.0.2"}  # one host with two addresses
_WAIT_FOR_OTHERS_S = 600.0
_PR_SET_CHILD_SUBREAPER = 36

SLURM_CONF = """\
{mark}{directory}
ClusterName=semgap
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={directory}/munge.socket
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool-%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd-%n.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
GresTypes=gpu
JobAcctGatherType=jobacct_gather/linux
AccountingStorageType=accounting_storage/none
ReturnToService=2
SlurmdTimeout=4
MessageTimeout=4
KillWait=5
MailProg=/bin/true
NodeName=n1 NodeHostname={host} NodeAddr={nodes[n1]} Port={ports[1]} CPUs=2 RealMemory=64000 Gres=gpu:1
NodeName=n2 NodeHostname={host} NodeAddr={nodes[n2]} Port={ports[2]} CPUs=2 RealMemory=64000 Gres=gpu:1
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=60 State=UP
"""
GRES_CONF = """\
{mark}{directory}
NodeName=n1,n2 Name=gpu File=/dev/null
"""


@dataclass(frozen=True)
class Cluster:
    """A running cluster, for the one who started this file; `directory` holds the daemons' logs and pid files."""

    directory: Path
    orders: IO[str]

    def slurmd_pid(self, node: str) -> int:
        return int((self.directory / f"slurmd-{node}.pid").read_text())

    def start_node(self, node: str) -> None:
        """Starts a slurmd that was killed."""
        self.orders.write(f"start {node}\n")
        self.orders.flush()


class NoCluster(Exception):
    """There can be no cluster here; the message says why."""


def main() -> None:
    """Brings the cluster up, and takes it down when standard input or a signal says so."""
    # What daemons and jobs leave behind becomes a child of this process, so that nothing escapes its end.
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(1))
    os.environ["PATH"] += ":/usr/sbin:/sbin"  # Slurm's daemons; `su` leaves them out of root's PATH
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(only_one())
            install()
            directory = stack.enter_context(cluster())
        except NoCluster as error:
            print(json.dumps({"reason": str(error)}), flush=True)
            return
        print(json.dumps({"directory": str(directory), "pid": os.getpid()}), flush=True)
        obey(directory)


def obey(directory: Path) -> None:
    """Does what standard input says until it ends, and reaps what daemons left."""
    while True:
        reap()
        if select.select([sys.stdin], [], [], 1.0)[0]:
            line = sys.stdin.readline()
            if not line:
                return
            start_node(directory, line.split()[1])


@contextlib.contextmanager
def only_one() -> Iterator[None]:
    """One such cluster a machine; others wait. NoCluster without root, beside another Slurm, or after a long wait."""
    if os.geteuid():
        raise NoCluster("not root: Slurm's daemons start jobs as their users")
    LOCK.parent.mkdir(parents=True, exist_ok=True)
    with LOCK.open("w") as lock:
        try:
            wait_until(lambda: _locked(lock.fileno()), "another test run's Slurm to end", _WAIT_FOR_OTHERS_S)
        except TimeoutError as error:
            raise NoCluster(str(error)) from error
        clean_up_after_a_killed_run()
        yield


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def clean_up_after_a_killed_run() -> None:
    """Removes what a run of this file left that was killed itself. NoCluster for a Slurm that is not from here."""
    ours = set()
    for file in FILES:
        if file.exists():
            first = file.read_text().partition("\n")[0]
            if not first.startswith(MARK):
                raise NoCluster(f"{file} is there and not from these tests: a Slurm that is somebody's is left alone")
            ours.add(Path(first.removeprefix(MARK)))
    if "SLURM_CONF" in os.environ:
        raise NoCluster(f"SLURM_CONF is {os.environ['SLURM_CONF']}: a Slurm that is somebody's is left alone")
    running = [process for process in psutil.process_iter(["name"]) if process.info["name"] in DAEMONS[:3]]
    if running and not ours:
        raise NoCluster(f"{running[0].info['name']} runs here already, with pid {running[0].pid}")
    if ours:
        end(running)
    for directory in ours:
        end([process for process in psutil.process_iter(["cmdline"]) if f"--socket={directory}/munge.socket" in process.info["cmdline"]])
        remove(directory)


def install() -> None:
    """Debian's packages, where programs are missing. NoCluster where apt cannot."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if not missing:
        return
    if shutil.which("apt-get") is None:
        raise NoCluster(f"{', '.join(missing)} not found, and no apt-get to install them")
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for arguments in (["update"], ["install", "--yes", "--no-install-recommends", *PACKAGES]):
        command = ["apt-get", "--quiet", *arguments]
        done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if done.returncode and arguments[0] == "install":
            raise NoCluster(f"{' '.join(command)} failed: {done.stderr.strip().rpartition(chr(10))[2]}")


@contextlib.contextmanager
def cluster() -> Iterator[Path]:
    """Daemons that answer, and jobs that can start; gives the directory of their logs."""
    directory = Path(tempfile.mkdtemp(prefix="semgap-slurm-"))
    directory.chmod(0o755)
    try:
        write_config(directory)
        start(
            directory,
            "munged",
            "--foreground",
            "--force",
            f"--socket={directory}/munge.socket",
            f"--key-file={directory}/munge.key",
            f"--pid-file={directory}/munged.pid",
            f"--log-file={directory}/munged.log",
            f"--seed-file={directory}/munged.seed",
        )
        wait_until((directory / "munge.socket").exists, "munged", 10)
        start(directory, "slurmctld", "-D")
        for node in NODES:
            start_node(directory, node)
        wait_until(lambda: idle_nodes() == set(NODES), f"both nodes to be idle; logs in {directory}", 30)
        yield directory
    finally:
        end(psutil.Process().children(recursive=True))
        remove(directory)


def write_config(directory: Path) -> None:
    for name in ("state", *(f"spool-{node}" for node in NODES)):
        (directory / name).mkdir()
    key = directory / "munge.key"
    key.touch(0o600)
    key.write_bytes(os.urandom(128))
    ETC.mkdir(exist_ok=True)
    values = {"mark": MARK, "directory": directory, "host": socket.gethostname(), "ports": free_ports(3)}
    for file, text in zip(FILES, (SLURM_CONF, GRES_CONF), strict=True):
        file.write_text(text.format(**values, nodes=NODES))


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        return [stack.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1] for _ in range(count)]


def start(directory: Path, *command: str) -> None:
    """Starts a daemon in the foreground, as a child of this process."""
    with (directory / "daemons.log").open("ab") as log:
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)


def start_node(directory: Path, node: str) -> None:
    """Starts a node's slurmd."""
    start(directory, "slurmd", "-D", "-N", node)


def idle_nodes() -> set[str]:
    done = subprocess.run(["sinfo", "--noheader", "--Node", "--states=idle", "--format=%N"], capture_output=True, text=True)
    return set(done.stdout.split())


def end(processes: list[psutil.Process]) -> None:
    """Kills processes, and waits until they are gone."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, 10)


def reap() -> None:
    """Takes note of children that ended, adopted ones among them."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def remove(directory: Path) -> None:
    """The files of a cluster that is down."""
    for file in FILES:
        file.unlink(missing_ok=True)
    shutil.rmtree(directory, ignore_errors=True)


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout_s:g} s for {what}")
        time.sleep(0.1)


if __name__ == "__main__":
    main()
