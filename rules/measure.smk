"""Measuring: the reference of each phase, then one job a trial; the exactness of each mode; the codecs on tensors of the model.

Inputs: a model's digest. Outputs, in results/ or a named experiment's results/NAME/: networks/ (each was probed), reference/ (local's
tokens and logits), capacity/ (of the mode of which a load's arrivals are shares), trials/ (tables and a manifest each), exactness/ (a mode each), tensors/ and codecs/ (a model each).
`bench` is capped at 1 in the profiles, so that one trial measures at a time; the trial itself holds a lock of the machine besides.
"""


rule open_block:
    output:
        f"{OWN}/blocks/model={{model}}/network={{network}}/trial={{trial}}.json",
    log:
        f"{OWN}/logs/open_block/model={{model}}/network={{network}}/trial={{trial}}.log",
    priority: FIRST
    localrule: True
    conda:
        "../envs/semgap.yaml"
    params:
        generation=block_generation,
    message:
        "opening block {wildcards.model} {wildcards.network} trial {wildcards.trial}"
    shell:
        "echo '{{\"generation\": {params.generation}}}' > {output} 2> {log}"


rule check_network:
    output:
        f"{OWN}/networks/network={{network}}.json",
    log:
        f"{OWN}/logs/check_network/network={{network}}.log",
    priority: FIRST
    conda:
        "../envs/semgap.yaml"
    resources:
        bench=1,
    params:
        cell=network_cell,
    message:
        "checking network {wildcards.network}"
    script:
        "../workflow/scripts/check_network.py"


rule compute_reference:
    input:
        model=f"{MODELS}/{{model}}/digest.json",
    output:
        f"{OWN}/reference/model={{model}}/phase={{phase}}.npz",
    log:
        f"{OWN}/logs/compute_reference/model={{model}}/phase={{phase}}.log",
    priority: FIRST
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


rule measure_capacity:
    input:
        model=f"{MODELS}/{{model}}/digest.json",
        reference=f"{OWN}/reference/model={{model}}/phase={{phase}}.npz",
    output:
        f"{OWN}/capacity/model={{model}}/network={{network}}/phase={{phase}}.json",
    log:
        f"{OWN}/logs/measure_capacity/model={{model}}/network={{network}}/phase={{phase}}.log",
    priority: FIRST
    conda:
        "../envs/semgap.yaml"
    resources:
        bench=1,
    params:
        cell=capacity_cell,
    message:
        "measuring the capacity behind the arrivals of {wildcards.phase} ({wildcards.model}, {wildcards.network})"
    script:
        "../workflow/scripts/measure_capacity.py"


rule measure_trial:
    input:
        model=f"{MODELS}/{{model}}/digest.json",
        reference=f"{OWN}/reference/model={{model}}/phase={{phase}}.npz",
        block=f"{OWN}/blocks/model={{model}}/network={{network}}/trial={{trial}}.json",
        network=network_check,
        capacity=capacity_file,
    output:
        requests=ensure(f"{TRIAL}/requests.parquet", non_empty=True),
        steps=ensure(f"{TRIAL}/steps.parquet", non_empty=True),
        control=ensure(f"{TRIAL}/control.parquet", non_empty=True),
        load=ensure(f"{TRIAL}/load.parquet", non_empty=True),
        batches=ensure(f"{TRIAL}/batches.parquet", non_empty=True),
        ledger=ensure(f"{TRIAL}/ledger.parquet", non_empty=True),
        tcp=ensure(f"{TRIAL}/tcp.parquet", non_empty=True),
        relay=ensure(f"{TRIAL}/relay.parquet", non_empty=True),
        gpu=ensure(f"{TRIAL}/gpu.parquet", non_empty=True),
        dmon=ensure(f"{TRIAL}/dmon.parquet", non_empty=True),
        host=ensure(f"{TRIAL}/host.parquet", non_empty=True),
        manifest=ensure(f"{TRIAL}/manifest.json", non_empty=True),
    log:
        f"{OWN}/logs/measure_trial/{GRID.wildcard_pattern}.log",
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


rule compute_exactness_reference:
    input:
        model=f"{MODELS}/{{model}}/digest.json",
    output:
        drawn=f"{OWN}/exactness/model={{model}}/reference_drawn.npz",
        text=f"{OWN}/exactness/model={{model}}/reference_text.npz",
    log:
        f"{OWN}/logs/compute_exactness_reference/model={{model}}.log",
    conda:
        "../envs/semgap.yaml"
    resources:
        bench=1,
    params:
        cell=exactness_reference_cell,
    message:
        "computing the exactness reference of {wildcards.model}"
    script:
        "../workflow/scripts/compute_exactness_reference.py"


rule check_exactness:
    input:
        model=f"{MODELS}/{{model}}/digest.json",
        drawn=f"{OWN}/exactness/model={{model}}/reference_drawn.npz",
        text=f"{OWN}/exactness/model={{model}}/reference_text.npz",
    output:
        f"{OWN}/exactness/model={{model}}/mode={{mode}}.json",
    log:
        f"{OWN}/logs/check_exactness/model={{model}}/mode={{mode}}.log",
    conda:
        "../envs/semgap.yaml"
    resources:
        bench=1,
    params:
        cell=exactness_cell,
    message:
        "checking what {wildcards.mode} keeps ({wildcards.model})"
    script:
        "../workflow/scripts/check_exactness.py"


rule dump_tensors:
    input:
        model=f"{MODELS}/{{model}}/digest.json",
    output:
        f"{OWN}/tensors/model={{model}}/tensors.safetensors",
    log:
        f"{OWN}/logs/dump_tensors/model={{model}}.log",
    conda:
        "../envs/semgap.yaml"
    resources:
        bench=1,
    params:
        cell=tensors_cell,
    message:
        "dumping tensors of {wildcards.model} for the codecs"
    script:
        "../workflow/scripts/dump_tensors.py"


rule measure_codecs:
    input:
        model=f"{MODELS}/{{model}}/digest.json",
        tensors=f"{OWN}/tensors/model={{model}}/tensors.safetensors",
    output:
        f"{OWN}/codecs/model={{model}}.parquet",
    log:
        f"{OWN}/logs/measure_codecs/model={{model}}.log",
    conda:
        "../envs/semgap.yaml"
    resources:
        bench=1,
    params:
        cell=codecs_cell,
    message:
        "measuring codecs on tensors of {wildcards.model}"
    script:
        "../workflow/scripts/measure_codecs.py"
