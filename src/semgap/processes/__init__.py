"""Processes: who starts, pins and ends whom, on this machine, over ssh and under Slurm."""
