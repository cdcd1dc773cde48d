"""Models: fetched once into resources/models/NAME/, from any source; those of a named experiment into resources/EXPERIMENT/models/NAME/.

Inputs: none. Outputs: model.safetensors, tokenizer and config, and digest.json, on which the trials depend.
"""


rule fetch_model:
    output:
        digest=f"{MODELS}/{{model}}/digest.json",
        weights=f"{MODELS}/{{model}}/model.safetensors",
        config=f"{MODELS}/{{model}}/config.json",
        tokenizer=f"{MODELS}/{{model}}/tokenizer.json",
    log:
        f"{OWN}/logs/fetch_model/{{model}}.log",
    priority: FIRST
    conda:
        "../envs/semgap.yaml"
    params:
        model=lambda wildcards: CONFIG.model_cell(wildcards.model),
    message:
        "fetching model {wildcards.model}"
    script:
        "../workflow/scripts/fetch_model.py"
