"""Probe a network, and write what the config asks of it."""

import json
from pathlib import Path

from semgap.experiment.check_network import check_network
from semgap.processes.job_log import log_to
from semgap.seal import write_sealed_json

with log_to(snakemake.log[0]):
    found = check_network(snakemake.params.cell, Path(snakemake.scriptdir).parents[1])
    print(json.dumps(found))
    # Without the measured numbers, which differ each time: another check makes no trial stale.
    asked = {key: found[key] for key in ("network", "asked")}
    if "kv" in found:
        asked["kv"] = {key: found["kv"][key] for key in ("network", "asked")}
    write_sealed_json(Path(snakemake.output[0]), asked)
