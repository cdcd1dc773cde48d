"""From trial directories to tables and figures. Reads only files; imports of semgap only network.spec and experiment.trial_schemas."""
