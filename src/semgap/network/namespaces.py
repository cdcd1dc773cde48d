"""An emulated network in the kernel: network namespaces joined by veth pairs, with tbf for the rate and netem for delay and loss.

The namespaces have no names: each lives as long as its processes. Its first process ends with its standard input, and so with its
creator, however that ends. Needs this process's own rights, or else a user namespace (`unshare -Ur`).
"""

import contextlib
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from semgap.network.spec import Network, NetworkError

_TOOLS = {"unshare": "util-linux", "nsenter": "util-linux", "ip": "iproute2", "tc": "iproute2"}
_CLIENTS = ("semgap", "10.213.77.1", "10.213.77.2")  # device at both ends, and their addresses; no conflicts: the namespaces are new
_KV = ("semgap-kv", "10.213.78.1", "10.213.78.2")
_HERE = "127.0.0.1"
_HOLD = "echo; exec cat"
_SECONDS = 20.0
# Burst of tbf: above a segment of 64 KiB at 1 Gbit (tbf cuts larger ones into packets, which costs more than it is worth).
_BURST_S, _LEAST_BURST_BYTES = 0.6e-3, 3200
_QUEUE_S, _LEAST_QUEUE_BYTES = 50e-3, 1 << 20  # of the bottleneck, beyond bandwidth x delay
_PACKET_BYTES = 1514
_LEAST_QUEUE_PACKETS = 10_000  # netem's default of 1,000 would cap a long fat link


@dataclass(frozen=True)
class Namespaces:
    """Command prefixes that run a command in each place, and the addresses there of worker and KV host."""

    client: tuple[str, ...]
    worker: tuple[str, ...]
    kv_host: tuple[str, ...]
    worker_address: str
    kv_host_address: str


@contextlib.contextmanager
def namespaces(network: Network, kv: Network | None = None) -> Iterator[Namespaces]:
    """The places of client, worker and KV host; they end with this context. NetworkError names what the machine lacks.

    A link of another kind than netns (`network` between client and worker, `kv` between worker and KV host) joins no two namespaces: its
    ends share one.
    """
    _require_tools()
    with contextlib.ExitStack() as stack:
        first, own_users = _first(stack)
        client = worker = host = _enter(first, own_users)
        _up(client, "lo")
        worker_address = host_address = _HERE
        if network.kind == "netns":
            worker, worker_address = _beyond(stack, client, network, _CLIENTS, own_users)
            host = worker
        if kv is not None and kv.kind == "netns":
            host, host_address = _beyond(stack, worker, kv, _KV, own_users)
        yield Namespaces(client, worker, host, worker_address, host_address)


def _beyond(
    stack: contextlib.ExitStack, enter_near: tuple[str, ...], network: Network, pair: tuple[str, str, str], own_users: bool
) -> tuple[tuple[str, ...], str]:
    """The prefix of a new namespace at the other end of the network, and its address."""
    far = stack.enter_context(_held([*enter_near, "unshare", "--net"]))
    enter_far, (device, *addresses) = _enter(far, own_users), pair
    _up(enter_far, "lo")
    _run([*enter_near, "ip", "link", "add", device, "type", "veth", "peer", "name", device, "netns", str(far)])
    for enter, address in zip((enter_near, enter_far), addresses, strict=True):
        _run([*enter, "ip", "addr", "add", f"{address}/24", "dev", device])
        _up(enter, device)
        _shape(enter, network, device)
    return enter_far, addresses[1]


def _require_tools() -> None:
    for tool, package in _TOOLS.items():
        if shutil.which(tool) is None:
            raise NetworkError(f"kind netns needs {tool}, which is not on PATH; install {package}, or use kind: relay")


def _first(stack: contextlib.ExitStack) -> tuple[int, bool]:
    """The pid that holds the first namespace, and whether it has a user namespace of its own."""
    try:
        return stack.enter_context(_held(["unshare", "--net"])), False
    except _NotAllowed as error:
        try:
            return stack.enter_context(_held(["unshare", "--user", "--map-root-user", "--net"])), True
        except _NotAllowed as again:
            raise NetworkError(
                f"kind netns needs the right to make network namespaces, which this process lacks ({error}; {again}); run as root, "
                "allow user namespaces (sysctl user.max_user_namespaces, kernel.apparmor_restrict_unprivileged_userns), or use "
                "kind: relay"
            ) from error


class _NotAllowed(Exception):
    """`unshare` failed; the message is from unshare."""


@contextlib.contextmanager
def _held(unshare: Sequence[str]) -> Iterator[int]:
    """The pid of a process that holds a new namespace, until the context ends or this process does."""
    command = [*unshare, "sh", "-c", _HOLD]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout and process.stderr
        if not process.stdout.readline():
            raise _NotAllowed(process.stderr.read().decode().strip())
        yield process.pid


def _enter(pid: int, own_users: bool) -> tuple[str, ...]:
    """Prefix that runs a command in the namespaces of `pid`. It replaces itself: the command's parent is the caller."""
    user = (f"--user=/proc/{pid}/ns/user", "--preserve-credentials") if own_users else ()
    return ("nsenter", *user, f"--net=/proc/{pid}/ns/net")


def _up(enter: Sequence[str], device: str) -> None:
    _run([*enter, "ip", "link", "set", device, "up"])


def _shape(enter: Sequence[str], network: Network, device: str) -> None:
    """Shapes the packets that one side sends: netem delays and loses, tbf limits the rate. Each side needs its own (egress)."""
    for queue in queues(network):
        try:
            _run([*enter, "tc", "qdisc", "add", "dev", device, *queue])
        except NetworkError as error:
            if "netem" not in queue:
                raise
            asked = " and ".join(key for key in ("delay_ms", "rtt_ms", "loss_percent") if getattr(network, key))
            raise NetworkError(
                f"{asked} of kind netns needs the kernel's netem, which this one lacks ({error}); load it (modprobe sch_netem), leave "
                f"{asked} out, which leaves the rate, or use kind: relay, which delays in user space"
            ) from error


def queues(network: Network) -> list[list[str]]:
    """The arguments of `tc qdisc add dev DEVICE` that make one direction of a network."""
    made, per_s = [], (network.bits_per_s or 0) / 8
    held_bytes = per_s * (network.one_way_ms or 0) * 1e-3 + max(_LEAST_QUEUE_BYTES, per_s * _QUEUE_S)
    if network.one_way_ms or network.loss_percent:
        limit = max(_LEAST_QUEUE_PACKETS, int(2 * held_bytes / _PACKET_BYTES)) if per_s else 100 * _LEAST_QUEUE_PACKETS
        shape = ["delay", f"{1000 * (network.one_way_ms or 0):.0f}us", "loss", f"{network.loss_percent:g}%"]
        made.append(["root", "handle", "1:", "netem", "limit", str(limit), *shape])
    if network.bits_per_s:
        parent = ["parent", "1:1", "handle", "2:"] if made else ["root", "handle", "1:"]
        burst = max(_LEAST_BURST_BYTES, int(per_s * _BURST_S))
        made.append([*parent, "tbf", "rate", f"{network.bits_per_s:.0f}bit", "burst", f"{burst}b", "limit", f"{held_bytes:.0f}b"])
    return made


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
    if done.returncode:
        words = command[next(index for index, word in enumerate(command) if word in ("ip", "tc")) :]
        raise NetworkError(f"{' '.join(words)}: {(done.stderr or done.stdout).strip()}")
