"""Find out whether a network can be had, and say what was asked of it."""

import json
from pathlib import Path

from semgap.experiment.check_network import check_network
from semgap.processes.job_log import log_to

with log_to(snakemake.log[0]):
    found = check_network(snakemake.params.cell, Path.cwd())
    print(json.dumps(found))
    # Not what was measured, which is another number each time: a check that is run anew makes no trial stale.
    Path(snakemake.output[0]).write_text(json.dumps({key: found[key] for key in ("network", "asked")}) + "\n")
