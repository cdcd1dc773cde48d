"""The Slurm allocation of a trial: its nodes, and commands on them. Also jobs that an earlier run left in the queue."""

import getpass
import os
import shutil
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

_ANSWERS_WITHIN_S = 60.0  # a busy controller is slow
_WAY_OUT = "run the workflow with --workflow-profile profiles/slurm and nodes: 2 (docs/cluster.md), or within `salloc --nodes=2`"


class AllocationError(ValueError):
    """Slurm or this process's allocation is not as needed; names the fault and the way out."""


@dataclass(frozen=True)
class Allocation:
    """A job on two nodes, seen from the node that runs the trial."""

    job_id: str
    here: str
    other: str


def allocation() -> Allocation:
    """This process's allocation. AllocationError unless it has exactly two nodes, this one among them.

    The controller names the nodes: the executor's job step clears the variables that would.
    """
    job_id = os.environ.get("SLURM_JOB_ID")
    if not job_id:
        raise AllocationError(f"worker.launch is 'srun' and this is no Slurm job: SLURM_JOB_ID is not set; {_WAY_OUT}")
    nodes = _ask("scontrol", "show", "hostnames", _ask("squeue", "--noheader", "--format=%N", "--jobs", job_id).strip()).split()
    here = os.environ.get("SLURMD_NODENAME") or socket.gethostname().partition(".")[0]
    if len(nodes) != 2 or here not in nodes:
        raise AllocationError(
            f"worker.launch is 'srun' and Slurm job {job_id} has nodes {', '.join(nodes)}, seen from {here}; it needs two, one for "
            f"the client and one for the worker; {_WAY_OUT}"
        )
    return Allocation(job_id, here, next(node for node in nodes if node != here))


def address_of(node: str) -> str:
    """The IP address at which Slurm reaches a node. AllocationError if it does not resolve."""
    fields = dict(field.partition("=")[::2] for field in _ask("scontrol", "--oneliner", "show", "node", node).split())
    return resolve(fields.get("NodeAddr", node))


def resolve(host: str) -> str:
    """The IP address of a host name as this machine knows it (the host may know itself as 127.0.1.1). AllocationError."""
    try:
        return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
    except socket.gaierror as error:
        why = f"host {host!r} does not resolve here: {error.strerror}"
        raise AllocationError(f"{why}; set worker.address, e.g. '{{node}}-ib0:0'") from error


def on_node(allocated: Allocation, node: str) -> list[str]:
    """Prefix that starts a command on a node, as one task with all of the job's cores, memory and GPUs there.

    `--overlap`: another step may hold them already. The task has this process's standard input.
    """
    task = ("--overlap", "--mem=0", "--nodes=1", "--ntasks=1", "--export=ALL")
    return ["srun", f"--jobid={allocated.job_id}", f"--nodelist={node}", *task]


def cancel_leftovers(directory: Path, timeout_s: float = 60.0) -> list[str]:
    """Cancels this user's jobs that the executor submitted from `directory`, waits until they are gone, and gives their ids.

    The caller holds the directory's lock, so these jobs are of a dead snakemake. The executor sets their comments. Does nothing
    without Slurm, and never cancels this process's own job. AllocationError if a job does not end.
    """
    if shutil.which("squeue") is None:
        return []
    found = _leftovers(directory)
    if found:
        _ask("scancel", *found)
    deadline = time.monotonic() + timeout_s
    while left := [job for job in _leftovers(directory) if job in found]:
        if time.monotonic() > deadline:
            raise AllocationError(f"Slurm jobs {', '.join(left)} of an earlier run here did not end {timeout_s:g} s after scancel")
        time.sleep(1)
    return found


def _leftovers(directory: Path) -> list[str]:
    lines = _ask("squeue", "--noheader", "--user", getpass.getuser(), "--format=%A|%k|%Z").splitlines()
    jobs = [line.split("|", 2) for line in lines]
    own = os.environ.get("SLURM_JOB_ID")
    return sorted(
        {job for job, comment, started_in in jobs if comment.startswith("rule_") and Path(started_in) == directory and job != own}
    )


def _ask(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_ANSWERS_WITHIN_S)
    except FileNotFoundError:
        raise AllocationError(f"{command[0]} is not on this machine's PATH; {_WAY_OUT}") from None
    except subprocess.TimeoutExpired:
        raise AllocationError(f"{' '.join(command)} did not answer within {_ANSWERS_WITHIN_S:g} s") from None
    if done.returncode:
        raise AllocationError(f"{' '.join(command)} failed: {done.stderr.strip()}")
    return done.stdout
