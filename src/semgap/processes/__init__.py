"""Processes: starting, pinning and ending them on this machine, over ssh and under Slurm."""
