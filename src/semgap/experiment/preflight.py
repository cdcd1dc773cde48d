"""Can this machine run the config: asked before the first job. Networks, and the hosts behind them, have checks of their own."""

import resource
import shutil

from semgap.experiment.config import Config
from semgap.experiment.config_checks import ConfigError
from semgap.policy import policy_from, unrunnable

_LEAST_ADDRESS_SPACE = 2 * 10**9
"""What the libraries of a trial's processes map: 1.5 GB with torch on a CPU, 0.7 GB without it (measured). The model comes on top."""


def require_machine(config: Config) -> None:
    """ConfigError with all that this machine lacks for the chosen modes.

    This machine needs the device even for a worker elsewhere: it computes the reference and the codecs' tensors. Imports torch only for
    a GPU.
    """
    found = [reason for reason in (_address_space(), _device(config), *(_mode(config, mode) for mode in config["modes"])) if reason]
    if found:
        raise ConfigError("\n".join(found))


def require_slurm() -> None:
    """ConfigError if this machine lacks a command to submit jobs or to see how they end."""
    lacking = [command for command in ("sbatch", "squeue", "sacct", "scancel") if shutil.which(command) is None]
    if lacking:
        raise ConfigError(
            f"of Slurm's commands {', '.join(lacking)} cannot be found on PATH: run snakemake with this profile on the cluster's head "
            "node, or without it here"
        )


def _address_space() -> str | None:
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY or limit >= _LEAST_ADDRESS_SPACE:
        return None
    return (
        f"a process may map {limit:,} bytes here (ulimit -v) and a trial's needs {_LEAST_ADDRESS_SPACE:,} before the model's memory; "
        "raise the limit, e.g. ulimit -v unlimited"
    )


def _device(config: Config) -> str | None:
    if config["device"] != "cuda" and config["executor"] in ("auto", "eager"):
        return None
    from semgap.engine.device import choose_device
    from semgap.engine.executor_choice import choose_executor

    try:
        choose_executor(config["executor"], choose_device(config["device"]), config["dtype"], None)
    except ValueError as error:
        return str(error)
    return None


def _mode(config: Config, mode: str) -> str | None:
    runs = bool(config.phases_of(mode))
    return unrunnable(policy_from(config.policy(mode), mode), mode, config["worker"]["launch"]) if runs else None
