"""Samplers of the host, of NVML and of `nvidia-smi dmon` that write Parquet.

`semgap.telemetry.samplers` is the one interface that a trial and a worker use: it starts each source as a
process of its own (`semgap.telemetry.sampler_process`), pinned away from what is measured. This package imports
nothing else of semgap, and importing `semgap.telemetry.samplers` loads the standard library alone.
"""
