"""Models: fetched once into resources/models/NAME/, from any source.

Inputs: none. Outputs: model.safetensors, tokenizer and config, and digest.json, on which the trials depend.
"""


rule fetch_model:
    output:
        digest="resources/models/{model}/digest.json",
        weights="resources/models/{model}/model.safetensors",
        config="resources/models/{model}/config.json",
        tokenizer="resources/models/{model}/tokenizer.json",
    log:
        "results/logs/fetch_model/{model}.log",
    priority: FIRST
    conda:
        "../envs/semgap.yaml"
    params:
        model=lambda wildcards: CONFIG.model_cell(wildcards.model),
    message:
        "fetching model {wildcards.model}"
    script:
        "../workflow/scripts/fetch_model.py"
