"""Analysis: all trials, one row each.

Inputs: every file of every trial of the grid, listed one by one; a trial of another digest than the current config's is refused.
Outputs: results/results.csv.
"""


rule collect_trials:
    input:
        all_trial_files(),
    output:
        f"{OWN}/results.csv",
    log:
        f"{OWN}/logs/collect_trials.log",
    conda:
        "../envs/semgap.yaml"
    params:
        analysis=collection("collect_trials.py", COLLECT_CODE),
    message:
        "collecting the trials"
    script:
        "../workflow/scripts/collect_trials.py"
