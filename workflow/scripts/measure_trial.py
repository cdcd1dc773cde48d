"""Measure one trial and write its tables and manifest, in a fork of a process that has loaded the code (semgap.processes.pristine)."""

from pathlib import Path

from semgap.processes.pristine import run_program

run_program(
    "semgap.experiment.measure_trial",
    {
        "cell": snakemake.params.cell,
        "model_directory": str(Path(snakemake.input.model).parent),
        "root": str(Path(snakemake.scriptdir).parents[1]),
        "reference": snakemake.input.reference,
        "capacity": snakemake.input.get("capacity") or None,
        "output": str(Path(snakemake.output.manifest).parent),
        "log": snakemake.log[0],
    },
)
