"""semgap: what it is worth for an LLM runtime to know what it is sending to a GPU across a network.

Reads and checks the config, then includes the stages in the order in which they run. `snakemake --cores 1` makes everything.
"""

from snakemake.utils import min_version

min_version("9.0")


configfile: f"{workflow.current_basedir}/config/config.yaml"


include: "rules/common.smk"
include: "rules/model.smk"
include: "rules/measure.smk"
include: "rules/analyse.smk"
include: "rules/report.smk"


onstart:
    refuse_what_this_machine_lacks()
    cancel_jobs_of_a_dead_run()


rule all:
    default_target: True
    input:
        f"{OWN}/results.csv",
        table_files("csv", "parquet", "md", "tex"),
        figure_files("svg", "png", "pdf"),
        f"{OWN}/explorer.html",
        result_files(),
    message:
        f"{OWN}/ is up to date"
