"""Two network namespaces as a link: shaped both ways, without root, refused with the missing part named, and gone after a crash."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from semgap.network.namespaces import Namespaces, namespaces, queues
from semgap.network.spec import Network, NetworkError

SHOW = """
import subprocess, sys
from semgap.network.namespaces import namespaces
from semgap.network.spec import Network
with namespaces(Network("netns", rate="1Gbit")) as spaces:
    for side in (spaces.client, spaces.worker):
        subprocess.run([*side, "tc", "qdisc", "show", "dev", "semgap"], check=True)
    subprocess.run([*spaces.client, "bash", "-c", f"echo > /dev/tcp/{spaces.worker_address}/9"])
    print(spaces.client, spaces.worker, flush=True)
    sys.stdin.read()
"""
# Keeps only root's right to read files, to find Python anywhere.
FILES_ALONE = "+dac_read_search"
AS_NOBODY = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", f"--inh-caps={FILES_ALONE}", f"--ambient-caps={FILES_ALONE}"]
WITHOUT_RIGHTS = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"]
TOOLS = ("unshare", "nsenter", "ip", "tc", "setpriv")
pytestmark = [
    pytest.mark.alone,
    pytest.mark.skipif(any(shutil.which(tool) is None for tool in TOOLS), reason=f"not all of {', '.join(TOOLS)} are here"),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to make namespaces with and without it"),
]


@pytest.fixture
def made() -> Iterator[Namespaces]:
    try:
        with namespaces(Network("netns", rate="100Mbit")) as spaces:
            yield spaces
    except NetworkError as error:
        pytest.skip(str(error))


def _show(within: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    command = [*within, sys.executable, "-c", SHOW]
    return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60)


def test_each_side_sends_at_the_rate(made: Namespaces) -> None:
    for side in (made.client, made.worker):
        shown = subprocess.run([*side, "tc", "qdisc", "show", "dev", "semgap"], capture_output=True, text=True, check=True).stdout
        assert re.search(r"qdisc tbf .* rate 100Mbit ", shown), shown


def test_the_sides_see_each_other_and_nothing_else(made: Namespaces) -> None:
    names = [subprocess.run([*side, "ip", "-br", "link"], capture_output=True, text=True).stdout for side in (made.client, made.worker)]
    assert [re.findall(r"^(\w+)", text, re.MULTILINE) for text in names] == [["lo", "semgap"]] * 2
    refused = subprocess.run([*made.client, "bash", "-c", f"echo > /dev/tcp/{made.worker_address}/9"], capture_output=True, text=True)
    assert "Connection refused" in refused.stderr


def test_they_can_be_had_without_root_in_a_user_namespace() -> None:
    done = _show(AS_NOBODY)
    if "kind netns needs the right" in done.stderr:
        pytest.skip(done.stderr.splitlines()[-1])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("rate 1Gbit") == 2 and "--user=" in done.stdout and "Connection refused" in done.stderr


def test_without_the_right_to_make_them_the_error_says_so_and_what_to_do() -> None:
    done = _show(WITHOUT_RIGHTS)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and "kind netns needs the right to make network namespaces" in last and "or use kind: relay" in last


@pytest.mark.parametrize(("key", "value"), [("delay_ms", 5.0), ("loss_percent", 1.0)])
def test_a_kernel_without_netem_refuses_delay_and_loss_and_names_it(key: str, value: float) -> None:
    network = Network("netns", rate="1Gbit", **{key: value})  # type: ignore[arg-type]
    try:
        with namespaces(network) as spaces:
            shown = subprocess.run([*spaces.worker, "tc", "qdisc", "show", "dev", "semgap"], capture_output=True, text=True).stdout
            assert "netem" in shown and "tbf" in shown  # this kernel has it
    except NetworkError as error:
        assert str(error).startswith(f"{key} of kind netns needs the kernel's netem, which this one lacks (tc qdisc add")
        assert "or use kind: relay" in str(error)


def test_netem_has_room_for_all_that_a_long_fat_link_holds_and_hands_on_to_tbf() -> None:
    delaying, shaping = queues(Network("netns", delay_ms=50, rate="10Gbit", loss_percent=0.5))
    assert delaying[:3] == ["root", "handle", "1:"] and "netem" in delaying
    assert int(delaying[delaying.index("limit") + 1]) * 1514 >= 2 * 1.25e9 * 50e-3
    assert delaying[-4:] == ["delay", "50000us", "loss", "0.5%"]
    assert shaping[:3] == ["parent", "1:1", "handle"] and shaping[shaping.index("rate") + 1] == "10000000000bit"
    assert queues(Network("netns", rate="1Gbit"))[0][:4] == ["root", "handle", "1:", "tbf"] and queues(Network("netns")) == []


def test_killing_their_creator_leaves_no_namespaces(wait_until: Callable[..., None], tmp_path: Path) -> None:
    maker = subprocess.Popen(
        [sys.executable, "-c", SHOW], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert maker.stdin and maker.stdout
    lines = [maker.stdout.readline() for _ in range(3)]
    pids = [int(pid) for pid in re.findall(r"/proc/(\d+)/ns/net", lines[-1])]
    assert len(pids) == 2 and all(psutil.pid_exists(pid) for pid in pids)
    maker.kill()
    maker.wait()
    wait_until(lambda: not any(psutil.pid_exists(pid) for pid in pids), "the processes that hold the namespaces end")
    maker.stdin.close()
    maker.stdout.close()


def test_a_missing_tool_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with (
        pytest.raises(NetworkError, match="kind netns needs unshare, which is not on PATH; install util-linux"),
        namespaces(Network("netns")),
    ):
        pass
