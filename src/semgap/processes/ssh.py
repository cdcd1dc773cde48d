"""A worker on another host, started through ssh: the command, the address to listen on, and hints for ssh's errors.

User, port, key and jump host come from the user's ssh config. A secret is never an argument: it goes through ssh's standard input.
The worker ends when that closes.
"""

import shlex
import socket
import subprocess
from collections.abc import Mapping, Sequence

from semgap.network.spec import NetworkError

_CONNECT_S = 10
_OPTIONS = {
    "BatchMode": "yes",  # fails at once instead of asking for a password, a passphrase or a host key
    "ConnectTimeout": str(_CONNECT_S),
    "ServerAliveInterval": "5",
    "ServerAliveCountMax": "3",
    "ControlMaster": "no",  # a shared connection would outlive its first user
    "ForwardAgent": "no",
    "ForwardX11": "no",
}


def ssh_command(host: str, config: str | None, environment: Mapping[str, str], command: Sequence[str]) -> list[str]:
    """The command that runs `command` on `host` with additional `environment`. `config`: a file in place of ~/.ssh/config."""
    there = ["env", *(f"{name}={value}" for name, value in environment.items()), *command]
    return [*_ssh(config), "-T", host, f"exec {shlex.join(there)}"]


def resolved_address(host: str, config: str | None) -> str:
    """IP:0 for the worker to listen on: the host's name in the ssh config, resolved here. NetworkError if it does not resolve."""
    done = subprocess.run([*_ssh(config), "-G", host], capture_output=True, text=True)
    if done.returncode:
        raise NetworkError(f"ssh does not understand its config for host {host!r}: {done.stderr.strip()}")
    name = next(line.split()[1] for line in done.stdout.splitlines() if line.startswith("hostname "))
    try:
        ip = str(socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)[0][4][0])
    except socket.gaierror as error:
        raise NetworkError(
            f"host {host!r} is {name!r} to ssh, which does not resolve here: {error.strerror}; correct worker.host, or set "
            "worker.address to HOST:PORT for the worker to listen on"
        ) from error
    return f"[{ip}]:0" if ":" in ip else f"{ip}:0"


def explain(host: str, log: str) -> str | None:
    """The way out of a failed start on `host`, by the words of its log, or None if the log says it itself."""
    by_hand = f"ssh -o BatchMode=yes {host} true"
    hints = {
        "Permission denied": f"ssh wants a password or a passphrase, and a run has none: give {host} a key without a passphrase, or load "
        f"the key into an agent (ssh-add), until `{by_hand}` prints nothing",
        "Host key verification failed": f"this machine does not know this key of {host}: connect once by hand (ssh {host})",
        "Could not resolve hostname": "correct worker.host, or give it a Host entry in the ssh config",
        "Connection refused": f"nothing answers there: `{by_hand}` must print nothing",
        "timed out": f"nothing answers there: `{by_hand}` must print nothing",
        "No module named": f"set worker.python to the Python of an environment on {host} that has semgap",
        "No such file or directory": f"set worker.python to the Python of an environment on {host} that has semgap",
        "unrecognized arguments": f"{host} has another version of semgap; install this one there",
        "is not an address of this machine": f"set worker.address to HOST:PORT with an address that {host} has and this machine reaches",
    }
    return next((way_out for words, way_out in hints.items() if words in log), None)


def _ssh(config: str | None) -> list[str]:
    return ["ssh", *(("-F", config) if config else ()), *(part for name, value in _OPTIONS.items() for part in ("-o", f"{name}={value}"))]
