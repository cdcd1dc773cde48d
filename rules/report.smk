"""Tables and figures, and their places in `snakemake --report`.

Inputs: every file of every trial, of the exactness of each mode, and of the codecs. Outputs: results/tables/, results/figures/ and, of the
trials alone, results/explorer.html.
"""


report: "../workflow/report/workflow.rst"


rule make_tables:
    input:
        result_files(),
    output:
        table_files("parquet", "md", "tex"),
        f"{OWN}/tables/answer.txt",
        *(f"{OWN}/tables/{table}.{ending}" for table in TABLES for ending in ("html", "csv") if not is_reported(table)),
        *(
            report(
                f"{OWN}/tables/{table}.{ending}",
                category="Tables",
                labels={"table": table, "format": ending},
                caption=f"../workflow/report/{table}.rst",
            )
            for table in filter(is_reported, TABLES)
            for ending in ("html", "csv")
        ),
    log:
        f"{OWN}/logs/make_tables.log",
    conda:
        "../envs/semgap.yaml"
    params:
        analysis=analysis("make_tables.py", TABLE_CODE),
    message:
        "making the tables"
    script:
        "../workflow/scripts/make_tables.py"


rule plot_figures:
    input:
        result_files(),
    output:
        figure_files("png", "pdf"),
        *(f"{OWN}/figures/{figure}.svg" for figure in FIGURES if not is_reported(figure)),
        *(
            report(
                f"{OWN}/figures/{figure}.svg",
                category="Figures",
                labels={"figure": figure},
                caption=f"../workflow/report/{figure}.rst",
            )
            for figure in filter(is_reported, FIGURES)
        ),
    log:
        f"{OWN}/logs/plot_figures.log",
    conda:
        "../envs/semgap.yaml"
    params:
        analysis=analysis("plot_figures.py", FIGURE_CODE),
    message:
        "plotting the figures"
    script:
        "../workflow/scripts/plot_figures.py"


rule make_explorer:
    input:
        all_trial_files(),
    output:
        report(
            f"{OWN}/explorer.html",
            category="Explorer",
            labels={"page": "prices over any link"},
            caption="../workflow/report/explorer.rst",
        ),
    log:
        f"{OWN}/logs/make_explorer.log",
    conda:
        "../envs/semgap.yaml"
    params:
        analysis=collection("make_explorer.py", EXPLORER_CODE) | dict(exactness={}, codecs={}, modes=marks()),
    message:
        "making the explorer"
    script:
        "../workflow/scripts/make_explorer.py"
