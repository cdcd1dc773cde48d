"""The check of a network before the first trial over it."""

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from semgap.client.session import require_same_threads
from semgap.client.spec import ClientError
from semgap.experiment.cell import Cell
from semgap.experiment.trial_link import TrialLink, link_up, of_kv_link, spaces_of
from semgap.experiment.trial_setup import TrialError, cores
from semgap.network.spec import NetworkError, asked_of, measured_of, require_as_asked
from semgap.processes.lifetime import end_with_workflow
from semgap.processes.machine import measuring
from semgap.processes.scratch import scratch_directory
from semgap.wire.tcp import congestion_control


def check_network(raw: Mapping[str, Any], root: Path) -> dict[str, Any]:
    """Probes the link between client and worker, and that between worker and KV host. Gives what the config asks for and the findings.

    TrialError says what is missing, who does not answer, or by how much the link is off.
    """
    end_with_workflow()
    cell = Cell.of(raw)
    with measuring(), scratch_directory("network") as scratch, contextlib.ExitStack() as stack:
        try:
            _require_congestion(cell.network.congestion)
            spaces = spaces_of(cell, stack)
            link = link_up(cell, root, scratch, stack, spaces)
            probe = _probed(cell, link, spaces.client if spaces else ())
            require_same_threads(link.worker.address, probe["threads"], cell.threads)
            require_as_asked(cell.network, probe)
            if cell.kv_network:
                with of_kv_link(cell):
                    require_as_asked(cell.kv_network, probe["kv"])
        except (NetworkError, ClientError, TrialError) as error:
            raise TrialError(f"network {cell.network_name!r}: {error} (snakemake --keep-going measures over the others)") from error
    found = {"network": cell.network_name, "asked": vars(asked_of(cell.network)), "measured": measured_of(probe)}
    if cell.kv_network:
        found["kv"] = {"network": cell.network.kv, "asked": vars(asked_of(cell.kv_network)), "measured": measured_of(probe["kv"])}
    return found


def _require_congestion(wanted: str | None) -> None:
    """NetworkError if this machine lacks the congestion control."""
    with socket.socket() as sock:
        try:
            congestion_control(sock, wanted)
        except ValueError as error:
            available = Path("/proc/sys/net/ipv4/tcp_available_congestion_control").read_text().split()
            raise NetworkError(f"{error}; available: {', '.join(available)}") from error


def _probed(cell: Cell, link: TrialLink, within: Sequence[str]) -> dict[str, Any]:
    """The probe of `semgap ping`, run by the command `within`: in the client's place."""
    secret = ["--secret-file", link.worker.secret_file] if link.worker.secret_file else []
    secret += ["--tls"] if link.worker.tls else []
    command = [*within, sys.executable, "-m", "semgap", "ping", link.worker.address, *secret, "--json"]
    command += ["--round-trips", str(cell.probe.round_trips), "--payload-bytes", str(cell.probe.payload_bytes)]
    command += ["--kv"] if cell.kv_network else []
    command += ["--cpus", ",".join(map(str, cores(cell)[1])), "--parent-pid", str(os.getpid())]
    limit_s = cell.timeouts.trial_s
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s)
    except subprocess.TimeoutExpired:
        raise NetworkError(
            f"its probe took longer than timeouts.trial_s {limit_s:g} s: what listens at {link.worker.address} does not answer, or the "
            "link is too slow for it; raise timeouts.trial_s, or lower probe.payload_bytes"
        ) from None
    if done.returncode:
        raise NetworkError(done.stderr.strip())
    return json.loads(done.stdout)
