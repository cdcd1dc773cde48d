"""Samplers of the host, of NVML and of `nvidia-smi dmon` that write a file each; the trial makes Parquet of them.

Trials and workers use `samplers` alone. It starts each source as a process of its own (`sampler_process`), pinned away from the
measured processes.
"""
