"""What holds in every process: the same draws, and no torch where none is needed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

import semgap
from semgap.engine.sampling import Draw, draw
from semgap.policy import SamplingRule

SOURCE = Path(semgap.__file__).parents[1]
SAMPLE = SamplingRule("sample")


def test_another_process_draws_the_same() -> None:
    code = """
import json, numpy as np
from semgap.policy import SamplingRule
from semgap.engine.sampling import draw
logits = np.random.default_rng(2).normal(scale=3, size=5000).astype(np.float32)
rules = [SamplingRule("sample"), SamplingRule("sample", 0.7, 50, 0.9), SamplingRule("sample", top_p=0.8)]
got = [draw(logits, rule, 7, 1, position) for rule in rules for position in range(40)]
print(json.dumps([[each.token, each.others] for each in got]))
"""
    printed = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": str(SOURCE)}, capture_output=True, check=True)
    logits = np.random.default_rng(2).normal(scale=3, size=5000).astype(np.float32)
    rules = [SAMPLE, SamplingRule("sample", 0.7, 50, 0.9), SamplingRule("sample", top_p=0.8)]
    here = [draw(logits, rule, 7, 1, position) for rule in rules for position in range(40)]
    assert [Draw(token, tuple(others)) for token, others in json.loads(printed.stdout)] == here


def test_prompts_load_neither_torch_nor_transformers() -> None:
    code = "import sys, semgap.client.prompts; assert not {'torch', 'transformers'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
