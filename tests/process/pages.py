"""Pages in a browser: Debian's chromium, headless."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from typing import Any

import pytest

DESKTOP, PHONE = {"width": 1400, "height": 1000}, {"width": 375, "height": 800}
NARROW = ({"width": 1200, "height": 800}, {"width": 1280, "height": 720})
Opened = Callable[..., Any]


def chromium() -> str:
    """The browser's path. Installs Debian's package as root where it is missing; skips where that cannot be."""
    if shutil.which("chromium") is None:
        if os.geteuid() or shutil.which("apt-get") is None:
            pytest.skip("no chromium here, and no root with apt-get to install Debian's")
        environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        for arguments in (["update"], ["install", "--yes", "--no-install-recommends", "chromium"]):
            command = ["apt-get", "--quiet", *arguments]
            done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"{' '.join(command)} failed: {done.stderr.strip().rpartition(chr(10))[2]}")
    return str(shutil.which("chromium"))


def drawn(page: Any) -> None:
    page.wait_for_selector("body[data-drawn]")
