"""Faults of a trial that lie in its surroundings, not in the mode: such a trial is measured again."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from semgap.client.report import LoadLevel, Measured
from semgap.experiment.cell import Cell
from semgap.experiment.trial_relay import CLIENTS, KV_HOSTS
from semgap.experiment.trial_tables import Outcome
from semgap.network.relay_report import require_in_time
from semgap.network.spec import Network, NetworkError, require_as_asked

MOST_STEAL = 0.15
"""Of this machine's CPU time during the measured requests, the share that a hypervisor may take."""

MOST_LATE_S = 0.01
"""A trial is at fault if more than 1 of 20 of a level's requests were sent later than this."""


def faults(cell: Cell, outcome: Outcome, steal: float | None) -> list[str]:
    """The disturbances of a trial from outside, a line each: a link off its tolerance, CPU time lost to a hypervisor, a late load."""
    levels = outcome.report.load.levels if outcome.report.load else ()
    return [*_link_faults(cell, outcome), *_steal_faults(steal), *late_faults(levels)]


def late_faults(levels: Sequence[LoadLevel]) -> Iterator[str]:
    """The levels whose requests were sent late: their latencies would say what the generator did."""
    for level in levels:
        if level.late_p95_s > MOST_LATE_S:
            late = f"more than 5% of its requests by over {1e3 * MOST_LATE_S:g} ms, the 95th percentile is {1e3 * level.late_p95_s:.1f} ms"
            yield f"the load generator was late in level {level.level}: {late}; stop other work on this machine"


def steal_share(host: pa.Table, measured: Measured, cpus: int) -> float | None:
    """The share of this machine's CPU time that was stolen during the measured requests; None without two samples in them."""
    inside = host.filter((pc.field("side") == "client") & (pc.field("t_s") >= measured.start_s) & (pc.field("t_s") <= measured.end_s))
    inside = inside.filter(pc.is_valid(inside["steal_s"]))
    if inside.num_rows < 2:
        return None
    stolen, times = (pc.min_max(inside[name]) for name in ("steal_s", "t_s"))
    return (stolen["max"].as_py() - stolen["min"].as_py()) / (times["max"].as_py() - times["min"].as_py()) / cpus


def _link_faults(cell: Cell, outcome: Outcome) -> Iterator[str]:
    session = outcome.report.session
    if session is None:
        return
    yield from faults_of(f"network {cell.network_name!r}", cell.network, session.probe, outcome.relays.get(CLIENTS))
    if cell.kv_network and session.kv_probe:
        name = f"the link to the KV host (network {cell.network.kv!r})"
        yield from faults_of(name, cell.kv_network, session.kv_probe, outcome.relays.get(KV_HOSTS))


def faults_of(name: str, network: Network, probe: Mapping[str, float], relay: Mapping[str, Any] | None) -> Iterator[str]:
    """The faults of one link, by `name`: of its probe, or of the lateness of its relay, if any."""
    try:
        require_as_asked(network, probe)
        if relay:
            require_in_time(network, relay["measured_lateness"])
    except NetworkError as error:
        yield f"{name}: {error}"


def _steal_faults(steal: float | None) -> Iterator[str]:
    if steal is not None and steal > MOST_STEAL:
        yield f"a hypervisor took {100 * steal:.1f}% of this machine's CPU time, more than {100 * MOST_STEAL:g}%"
