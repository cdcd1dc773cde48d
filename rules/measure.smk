"""Measuring: the reference of each phase, then one job a trial.

Inputs: a model's digest. Outputs: results/reference/ (local's tokens and logits) and results/trials/ (tables and a manifest each).
`bench` is capped at 1 in the profiles, so that one trial measures at a time; the trial itself holds a lock of the machine besides.
"""


rule open_block:
    output:
        "results/blocks/model={model}/network={network}/trial={trial}.json",
    log:
        "results/logs/open_block/model={model}/network={network}/trial={trial}.log",
    localrule: True
    conda:
        "../envs/semgap.yaml"
    params:
        generation=block_generation,
    message:
        "opening block {wildcards.model} {wildcards.network} trial {wildcards.trial}"
    shell:
        "echo '{{\"generation\": {params.generation}}}' > {output} 2> {log}"


rule compute_reference:
    input:
        model="resources/models/{model}/digest.json",
    output:
        "results/reference/model={model}/phase={phase}.npz",
    log:
        "results/logs/compute_reference/model={model}/phase={phase}.log",
    conda:
        "../envs/semgap.yaml"
    resources:
        bench=1,
    params:
        cell=reference_cell,
    message:
        "computing the reference of {wildcards.model}, phase {wildcards.phase}"
    script:
        "../workflow/scripts/compute_reference.py"


rule measure_trial:
    input:
        model="resources/models/{model}/digest.json",
        reference="results/reference/model={model}/phase={phase}.npz",
        block="results/blocks/model={model}/network={network}/trial={trial}.json",
    output:
        requests=ensure(f"{TRIAL}/requests.parquet", non_empty=True),
        steps=ensure(f"{TRIAL}/steps.parquet", non_empty=True),
        ledger=ensure(f"{TRIAL}/ledger.parquet", non_empty=True),
        tcp=ensure(f"{TRIAL}/tcp.parquet", non_empty=True),
        gpu=ensure(f"{TRIAL}/gpu.parquet", non_empty=True),
        dmon=ensure(f"{TRIAL}/dmon.parquet", non_empty=True),
        host=ensure(f"{TRIAL}/host.parquet", non_empty=True),
        manifest=ensure(f"{TRIAL}/manifest.json", non_empty=True),
    log:
        f"results/logs/measure_trial/{GRID.wildcard_pattern}.log",
    priority: trial_priority
    conda:
        "../envs/semgap.yaml"
    resources:
        bench=1,
    params:
        cell=trial_cell,
    message:
        "measuring {wildcards.mode}, {wildcards.phase}, trial {wildcards.trial} ({wildcards.model}, {wildcards.network})"
    script:
        "../workflow/scripts/measure_trial.py"
