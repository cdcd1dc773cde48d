"""The relay: every byte, in order, no earlier than due and no faster than the rate; senders wait for receivers; ends pass through."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import random
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from semgap import cli
from semgap.network import delay_line
from semgap.network.delay_line import DelayLine, Lateness, SharedLine
from semgap.network.relay import Connection, RelayOptions, relay
from semgap.network.relay_report import lateness, require_in_time
from semgap.network.spec import Network, NetworkError
from semgap.wire.ledger import Direction

pytestmark = pytest.mark.alone

MIB = 1 << 20
_KERNEL = tuple(int(part) for part in re.findall(r"\d+", platform.release())[:2])


@dataclass
class Route:
    """A client's socket and, behind the relay, the worker's."""

    near: socket.socket
    far: socket.socket
    listener: socket.socket
    process: subprocess.Popen[bytes]
    report_file: Path

    def finish(self) -> dict[str, Any]:
        """Ends the relay; gives its report."""
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(10) == 0
        return json.loads(self.report_file.read_text())


@pytest.fixture
def through(tmp_path: Path) -> Iterator[Callable[..., Route]]:
    """A connection through a relay with given options."""
    with contextlib.ExitStack() as stack:

        def make(*options: str) -> Route:
            listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            report = tmp_path / "report.json"
            command = [sys.executable, "-m", "semgap", "relay", "--to", f"127.0.0.1:{listener.getsockname()[1]}"]
            command += ["--report", str(report), "--parent-pid", str(os.getpid()), *options]
            process = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE))
            stack.callback(process.kill)
            assert process.stdout
            host, port = json.loads(process.stdout.readline())["address"].split(":")
            near = stack.enter_context(socket.create_connection((host, int(port)), timeout=60))
            far = stack.enter_context(listener.accept()[0])
            far.settimeout(60)
            for sock in (near, far):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return Route(near, far, listener, process, report)

        yield make


def _read_all(sock: socket.socket) -> bytes:
    parts = []
    while part := sock.recv(1 << 16):
        parts.append(part)
    return b"".join(parts)


def _send_in_pieces(sock: socket.socket, data: bytes, seed: int) -> None:
    sizes, at = random.Random(seed), 0
    while at < len(data):
        size = sizes.choice([1, 60, 4096, 200_000])
        sock.sendall(data[at : at + size])
        at += size
    sock.shutdown(socket.SHUT_WR)


def test_a_relay_that_has_no_descriptor_left_for_a_client_goes_on_with_the_others(
    through: Callable[..., Route], capfd: pytest.CaptureFixture[str]
) -> None:
    path, trips, complaint = through(), 100, "could not take a connection"
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.prlimit(path.process.pid, resource.RLIMIT_NOFILE, (psutil.Process(path.process.pid).num_fds(), before[1]))
    with socket.create_connection(path.near.getpeername(), timeout=10) as waiting:
        said = ""
        while complaint not in said:
            said += capfd.readouterr().err
        for _ in range(trips):
            path.near.sendall(b"there")
            assert path.far.recv(10) == b"there"
            path.far.sendall(b"back")
            assert path.near.recv(10) == b"back"
        said += capfd.readouterr().err
        assert said.count(complaint) < trips / 2  # it looks once in a while; each look in between would be a pause for all
        resource.prlimit(path.process.pid, resource.RLIMIT_NOFILE, before)
        waiting.sendall(b"me too")
        with path.listener.accept()[0] as far:
            assert far.recv(10) == b"me too"


def test_both_directions_at_once_bring_every_byte_in_order_and_then_the_end(through: Callable[..., Route]) -> None:
    path = through("--delay-ms", "3", "--rate", "400Mbit")
    up, down = random.Random(1).randbytes(4 * MIB), random.Random(2).randbytes(3 * MIB)
    senders = [threading.Thread(target=_send_in_pieces, args=(sock, data, len(data))) for sock, data in ((path.near, up), (path.far, down))]
    for sender in senders:
        sender.start()
    received: dict[str, bytes] = {}
    reader = threading.Thread(target=lambda: received.update(far=_read_all(path.far)))
    reader.start()
    assert hashlib.sha256(_read_all(path.near)).digest() == hashlib.sha256(down).digest()
    for thread in (*senders, reader):
        thread.join(60)
    assert hashlib.sha256(received["far"]).digest() == hashlib.sha256(up).digest()
    (connection,) = path.finish()["connections"]
    for way, data in (("up", up), ("down", down)):
        assert connection[way]["bytes_in"] == connection[way]["bytes_out"] == len(data)
        assert connection[way]["ended"] and connection[way]["kernel_timestamps"]


@pytest.mark.skipif(_KERNEL < (6, 12), reason="Linux before 6.12 lets no process choose its slice")
@pytest.mark.skipif(platform.machine() not in ("x86_64", "aarch64"), reason="the system call's number is known on x86_64 and aarch64")
def test_short_slices_let_the_relay_run_before_computing_on_its_core(through: Callable[..., Route]) -> None:
    path = through("--rate", "1Gbit")
    path.near.close()
    path.far.close()
    found = path.finish()
    assert found["slice_s"] == 0.0001
    assert found["run_queue_s"] > 0  # the scheduler counts its waits for a core


@pytest.mark.parametrize("policy", [os.SCHED_BATCH, os.SCHED_IDLE])
def test_a_scheduling_policy_that_somebody_chose_stays(policy: int) -> None:
    script = (
        f"import os; from semgap.network.relay import take_short_slices as take; os.sched_setscheduler(0, {policy}, os.sched_param(0)); "
        f"assert take() is None and os.sched_getscheduler(0) == {policy}"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_late_sends_of_a_held_up_relay_are_recorded(through: Callable[..., Route]) -> None:
    path = through("--delay-ms", "50")
    begin = time.monotonic()
    path.near.sendall(b"question")
    time.sleep(0.01)  # it is in the line
    path.process.send_signal(signal.SIGSTOP)
    time.sleep(0.25)
    path.process.send_signal(signal.SIGCONT)
    assert path.far.recv(100) == b"question"
    late_s = time.monotonic() - begin - 0.05
    assert 0.15 < path.finish()["max_lateness_s"] <= late_s


@pytest.mark.parametrize(
    ("messages", "held_up_ns", "idle"), [(2, 20_000_000, True), (1, 20_000_000, True), (2, 0, True), (2, 20_000_000, False)]
)
def test_messages_that_waited_together_for_a_relay_that_was_held_up_may_be_late(
    tcp_pair: tuple[socket.socket, socket.socket], messages: int, held_up_ns: int, idle: bool
) -> None:
    """The kernel stamps the last one. Bytes that would have waited for earlier ones are not late."""
    sender, source = tcp_pair
    sink, receiver = socket.socketpair()
    with sink, receiver:
        shared = SharedLine(0, 0.125, free_ns=0 if idle else time.monotonic_ns() + 10**9)
        line = DelayLine(source, sink, Direction.UP, shared, Lateness())
        for _ in range(messages):
            sender.sendall(bytes(40))
            time.sleep(0.015)
        source.settimeout(None)
        line.take(held_up_ns)
        while line.bytes_out < 40 * messages:
            line.release()
        assert (line.lateness.max_ns >= 20_000_000) == (messages == 2 and held_up_ns > 0 and idle)


def test_a_report_that_could_not_be_written_is_refused_before_it_relays(tmp_path: Path) -> None:
    with pytest.raises(NetworkError, match=f"--report {tmp_path}/no/r.json: there is no directory {tmp_path}/no; make it first"):
        relay(RelayOptions("127.0.0.1:1", report=tmp_path / "no" / "r.json"))


def test_each_direction_is_in_time_by_itself() -> None:
    """Punctual requests and earlier sends make up for none of it."""
    network = Network("relay", delay_ms=5)
    in_time = [{"t_s": 1 + i / 100, "direction": "up", "late_s": 1e-5, "sends": 8, "bytes": 400} for i in range(100)]
    late = [{"t_s": 1 + i / 100, "direction": "down", "late_s": 0.03, "sends": 1, "bytes": 40} for i in range(0, 100, 10)]
    before = [{"t_s": 0.97, "direction": "down", "late_s": 1e-5, "sends": 1000, "bytes": 10**6}]
    found = lateness({"lateness": [*before, *in_time, *late]}, 1.0, 2.0)
    assert found["up"]["sends"] == 800 and found["down"] == {"sends": 10, "p50_s": 0.03, "p95_s": 0.03, "max_s": 0.03}
    with pytest.raises(NetworkError, match=r"the relay was late: of 10 sends down .* the 95th percentile is 30.00 ms"):
        require_in_time(network, found)
    require_in_time(network, lateness({"lateness": in_time}, 1.0, 2.0))


def test_a_byte_at_a_low_rate_is_due_when_it_is_whole(tcp_pair: tuple[socket.socket, socket.socket]) -> None:
    """Otherwise the relay would wait for it awake, and count it as late."""
    sender, source = tcp_pair
    sink, receiver = socket.socketpair()
    with sink, receiver:
        line = DelayLine(source, sink, Direction.UP, SharedLine(0, 1e3 / 8e9), Lateness())
        sender.sendall(bytes(100))
        begin_ns = time.monotonic_ns()
        line.take()
        due_ns = line.due_ns()
        assert due_ns is not None and due_ns - begin_ns >= 7_000_000


def test_a_thread_that_is_held_up_between_two_clocks_reads_them_again(monkeypatch: pytest.MonkeyPatch) -> None:
    wall, delays = time.time_ns, iter([0.005])

    def held_up_once() -> int:
        read_ns = wall()
        for delay_s in delays:
            time.sleep(delay_s)
        return read_ns

    monkeypatch.setattr(time, "time_ns", held_up_once)
    now_ns, wall_ns = delay_line._both_clocks_ns()
    assert abs((wall_ns - now_ns) - (wall() - time.monotonic_ns())) < 1_000_000


def test_a_small_message_takes_the_delay_each_way_and_no_less(through: Callable[..., Route]) -> None:
    path = through("--delay-ms", "20", "--rate", "1Gbit")
    trips = []
    for _ in range(5):
        begin = time.perf_counter()
        path.near.sendall(b"x" * 60)
        assert path.far.recv(100) == b"x" * 60
        arrived = time.perf_counter()
        path.far.sendall(b"y" * 60)
        assert path.near.recv(100) == b"y" * 60
        trips.append((arrived - begin, time.perf_counter() - arrived))
    assert all(way >= 0.020 for trip in trips for way in trip)
    assert min(sum(trip) for trip in trips) < 0.060


def test_bulk_takes_its_bytes_over_the_rate_plus_one_delay(through: Callable[..., Route]) -> None:
    path = through("--delay-ms", "20", "--rate", "100Mbit")
    begin = time.perf_counter()
    sender = threading.Thread(target=_send_in_pieces, args=(path.near, bytes(2 * MIB), 3))
    sender.start()
    assert len(_read_all(path.far)) == 2 * MIB
    least_s = 0.020 + 2 * MIB * 8 / 100e6
    assert least_s <= time.perf_counter() - begin < 2 * least_s
    sender.join()


def test_a_receiver_that_does_not_read_stops_the_sender_and_the_relay_stays_small(through: Callable[..., Route]) -> None:
    path = through("--delay-ms", "5", "--rate", "1Gbit")
    before, sent = psutil.Process(path.process.pid).memory_info().rss, 0
    path.near.settimeout(0.5)
    with contextlib.suppress(TimeoutError):
        while sent < 400 * MIB:
            sent += path.near.send(bytes(MIB))
    assert sent < 100 * MIB  # kernel buffers of two connections, and the line
    assert psutil.Process(path.process.pid).memory_info().rss - before < 8 * MIB
    path.near.settimeout(60)
    threading.Thread(target=lambda: path.near.shutdown(socket.SHUT_WR)).start()
    assert len(_read_all(path.far)) == sent
    up = path.finish()["connections"][0]["up"]
    assert up["blocked_s"] > 0 and up["held_bytes"] > 0 and up["bytes_out"] == sent


def test_bytes_held_back_by_a_receiver_enter_the_line_when_it_reads(tcp_pair: tuple[socket.socket, socket.socket]) -> None:
    """Otherwise all bytes would be due at once when the receiver reads again, and pass faster than the rate."""
    source, sink = tcp_pair
    line = DelayLine(source, sink, Direction.UP, SharedLine(0, 0.125), Lateness())
    line._blocked_ns = time.monotonic_ns()
    line.release()
    assert line._arrival_ns([]) >= line._floor_ns > 0
    old = time.time_ns() - 5 * 10**9
    stamp = (old // 10**9).to_bytes(8, "little") + (old % 10**9).to_bytes(8, "little")
    assert line._arrival_ns([(socket.SOL_SOCKET, 35, stamp)]) == line._floor_ns


def test_a_receiver_that_runs_before_the_send_returns_makes_nothing_late(tcp_pair: tuple[socket.socket, socket.socket]) -> None:
    """It wakes on the relay's core, and the relay goes on after its computing."""

    class Preempted(socket.socket):
        def sendmsg(self, *arguments: Any) -> int:
            sent = super().sendmsg(*arguments)
            time.sleep(0.2)
            return sent

    (sender, source), (sink, receiver) = tcp_pair, socket.socketpair()
    with receiver, Preempted(fileno=sink.detach()) as preempted:
        line = DelayLine(source, preempted, Direction.DOWN, SharedLine(0, None), Lateness())
        sender.sendall(b"answer")
        line.take()
        line.release()
        assert receiver.recv(100) == b"answer"
    assert line.bytes_out == 6 and 0 < line.lateness.max_ns < 200_000_000


def test_one_side_may_end_while_the_other_goes_on(through: Callable[..., Route]) -> None:
    path = through("--delay-ms", "2")
    path.near.sendall(b"question")
    path.near.shutdown(socket.SHUT_WR)
    assert _read_all(path.far) == b"question"
    path.far.sendall(b"answer")
    path.far.shutdown(socket.SHUT_WR)
    assert _read_all(path.near) == b"answer"


@pytest.mark.parametrize("broken", ["near", "far"])
def test_a_side_that_breaks_off_breaks_the_other_off(through: Callable[..., Route], broken: str) -> None:
    path = through("--delay-ms", "2")
    path.near.sendall(b"question")
    assert path.far.recv(100) == b"question"
    sides = {"near": path.near, "far": path.far}
    going, staying = sides[broken], sides["far" if broken == "near" else "near"]
    going.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    going.close()
    with pytest.raises(ConnectionResetError):
        staying.recv(100)


def test_an_end_that_the_relay_has_not_read_yet_counts_as_an_end(
    tcp_pair: tuple[socket.socket, socket.socket], wait_until: Callable[..., None]
) -> None:
    """The kernel may count the end as a byte; a connection that is cut short then shows one more than was sent."""
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as worker:
        theirs, _ = listener.accept()
        _, ours = tcp_pair
        connection = Connection(ours, worker, {direction: SharedLine(0, None) for direction in Direction}, Lateness())
        theirs.close()
        wait_until(lambda: worker.recv(1, socket.MSG_PEEK) == b"", "the worker's end arrives")
        found = connection.close(reset=True)
    assert (found["up"]["ended"], found["down"]["ended"]) == (False, True)


def test_connections_share_the_link(through: Callable[..., Route]) -> None:
    shared = SharedLine(delay_ns=1_000_000, bytes_per_ns=0.125)
    assert shared.enter(125_000, arrival_ns=0) == (1_000_000, 2_000_000)
    assert shared.enter(125_000, arrival_ns=500_000) == (2_000_000, 3_000_000)  # queued behind the first
    assert shared.enter(125, arrival_ns=9_000_000) == (10_000_000, 10_001_000)


def test_a_relay_without_traffic_sleeps(through: Callable[..., Route]) -> None:
    path = through("--delay-ms", "5", "--rate", "1Gbit")
    process = psutil.Process(path.process.pid)
    time.sleep(0.5)  # its work at the begin of a connection is over
    before = sum(process.cpu_times()[:2])
    time.sleep(1.0)
    assert sum(process.cpu_times()[:2]) - before <= 0.1, "it polls: what spins takes a whole core"


def test_a_worker_that_does_not_answer_closes_the_clients_connection(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    command = [sys.executable, "-m", "semgap", "relay", "--to", f"127.0.0.1:{port}", "--parent-pid", str(os.getpid())]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stderr
        host, listening = json.loads(process.stdout.readline())["address"].split(":")
        with contextlib.suppress(ConnectionResetError), socket.create_connection((host, int(listening)), timeout=20) as client:
            assert client.recv(1) == b""
        process.terminate()
        assert f"127.0.0.1:{port} does not answer" in process.stderr.read()


def test_a_relay_does_not_listen_beyond_loopback() -> None:
    with pytest.raises(ValueError, match=r"0.0.0.0:0 is beyond loopback .* a relay takes none: listen on 127.0.0.1"):
        relay(RelayOptions("127.0.0.1:1", listen="0.0.0.0:0"))


@pytest.mark.parametrize("rate", ["1", "1Gb", "0Mbit", "-1Gbit", "1 Gbit", "fast"])
def test_a_rate_without_a_unit_or_above_nothing_is_refused(rate: str) -> None:
    with pytest.raises(
        ValueError, match=rf"rate '{rate}' is not a number above 0 with one of bit, kbit, Mbit, Gbit, e.g. 100Mbit or 1Gbit"
    ):
        relay(RelayOptions("127.0.0.1:1", rate=rate))


@pytest.mark.parametrize(("rate", "delay_ms"), [("9000Gbit", 0.0), ("10Gbit", 1000.0), (None, 1000.0)])
def test_a_link_that_would_hold_more_than_memory_should_is_refused(rate: str | None, delay_ms: float) -> None:
    with pytest.raises(ValueError, match=r"would hold [\d,]+ bytes each way, it holds at most 536,870,912; ask for a lower rate"):
        relay(RelayOptions("127.0.0.1:1", rate=rate, delay_ms=delay_ms))


def test_lateness_is_recorded_as_the_upper_end_of_narrow_buckets() -> None:
    late = Lateness()
    for late_ns in (0, 999, 1000, 50_000, 50_001, 3_000_000):
        late.add(257_000_000, Direction.UP, late_ns, 10)
    rows = late.rows()
    assert sum(row["sends"] for row in rows) == 6 and sum(row["bytes"] for row in rows) == 60
    assert {(row["t_s"], row["direction"]) for row in rows} == {(0.25, "up")}
    assert rows[0]["late_s"] == 1e-6 and rows[0]["sends"] == 3
    assert 50e-6 <= rows[1]["late_s"] < 60e-6 and 3e-3 <= rows[-1]["late_s"] < 3.6e-3 and late.max_ns == 3_000_000


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["serve", "--threads", "0"], "argument --threads: '0' is not a whole number above 0"),
        (["relay", "--to", "localhost:9", "--delay-ms", "-1"], "argument --delay-ms: '-1' is not a delay"),
        (["relay", "--to", "localhost:9", "--delay-ms", "nan"], "argument --delay-ms: 'nan' is not a delay"),
    ],
)
def test_bad_numbers_are_refused_on_the_command_line(command: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(command)
    assert message in capsys.readouterr().err
