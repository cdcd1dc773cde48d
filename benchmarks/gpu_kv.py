"""Writes KV of the default model for `make gpu-check`, which has no trained model: `python gpu_kv.py OUTPUT.safetensors`.

Three prompts of the config's text through SmolLM2-135M in fp32, their caches rounded to bf16: about 9 MB. A ratio on them is that of a
real model's activations.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from semgap.client.prompts import make_prompts
from semgap.experiment.cell import Cell
from semgap.experiment.config import Coordinates, read_config
from semgap.experiment.dump_tensors import load_executor
from semgap.experiment.trial_setup import Paths, check_model, client_spec

ROOT = Path(__file__).resolve().parents[1]
PROMPTS = 3


def main(output: Path) -> None:
    """Runs the prompts and writes 'kv.INDEX' [layers, 2, heads, positions, head_dim], bf16, of each."""
    config = read_config([], ROOT, {"device": "cpu"})
    model = config["models"][0]
    raw = config.cell(Coordinates(model, config["networks"][0], "local", "decode", 1))
    raw["phase_spec"] |= {"requests": PROMPTS}
    cell = Cell.of(raw)
    place = Paths(ROOT / "resources/models" / model, ROOT)
    check_model(place.model_directory, cell)
    executor = load_executor(cell, place)
    prompts, _ = make_prompts(client_spec(cell, place, ROOT))
    caches = {}
    for index, prompt in enumerate(prompts):
        cache = executor.new_cache()
        executor.forward(prompt, cache)
        caches[f"kv.{index}"] = cache.export().to(torch.bfloat16).contiguous()
    output.parent.mkdir(parents=True, exist_ok=True)
    save_file(caches, output, metadata={"model": model, "prompt_tokens": str(len(prompts[0]))})
    print(f"{output}: KV of {len(prompts)} prompts of {len(prompts[0])} tokens, {model}, {output.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
