"""The experiment: one file a rule of the workflow, and what they share."""
