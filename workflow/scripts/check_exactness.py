"""Check what one mode keeps of local's result."""

import json
from pathlib import Path

from semgap.logs import log_to
from semgap.trial import Place, run_exactness

with log_to(snakemake.log[0]):
    place = Place(Path(snakemake.input.model).parent, Path.cwd())
    result = run_exactness(snakemake.params.cell, place, Path(snakemake.input.drawn), Path(snakemake.input.text))
    Path(snakemake.output[0]).write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")
