"""Tensors of the real model on which codecs are measured: those that cross in a prefill and a decode step, and a sample of the weights."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from semgap.client.prompts import load_passages, make_prompt
from semgap.codecs.arrays import from_wire, to_wire
from semgap.engine.device import choose_device, limit_threads
from semgap.engine.eager import EagerExecutor
from semgap.engine.model import build_model
from semgap.engine.model_files import ModelDigest, ModelFiles, load_digest
from semgap.engine.weights import Weights
from semgap.experiment.cell import Cell
from semgap.experiment.trial_setup import Paths, check_model, cores
from semgap.processes.lifetime import end_with_workflow
from semgap.processes.machine import measuring
from semgap.seal import BLANK, KEY, require_sealed, write_sealed
from semgap.tensors import TensorClass

DUMPED_PROMPT_TOKENS = 128
DUMPED_STEPS = 16

GROUPS: Mapping[str, TensorClass] = {
    "tokens_prompt": TensorClass.TOKENS,
    "tokens_step": TensorClass.TOKENS,
    "logits_all": TensorClass.LOGITS,
    "logits_last": TensorClass.LOGITS,
    "hidden_last": TensorClass.HIDDEN,
    "kv_prompt": TensorClass.KV,
    "weights_sample": TensorClass.WEIGHTS,
}
"""The dumped groups by name: one or more tensors that cross together."""

_FOLLOWING = "text_following"
_SAMPLED_WEIGHTS = 8
_SAMPLED_BYTES = 2 << 20  # of each of them at most


@dataclass(frozen=True)
class Dump:
    """Tensors by group (`GROUPS`), on the CPU in the run's dtype, and the tokens (n,), int64, that follow the prompt in the text."""

    groups: Mapping[str, tuple[torch.Tensor, ...]]
    following: np.ndarray

    @classmethod
    def read(cls, path: Path) -> Dump:
        """Reads a file of `dump_tensors`. SealError if it was altered."""
        require_sealed(path)
        tensors = load_file(path)
        members: dict[str, list[str]] = {}
        for name in sorted(tensors):
            members.setdefault(name.partition(".")[0], []).append(name)
        groups = {group: tuple(tensors[name] for name in members[group]) for group in GROUPS}
        return cls(groups, tensors[f"{_FOLLOWING}.0"].numpy())


def dump_tensors(raw: Mapping[str, Any], paths: Paths, output: Path) -> None:
    """Runs a prompt of the config's text and writes the tensors that would cross, as safetensors in the run's dtype: 'GROUP.INDEX'.

    The prompt has 128 tokens, or fewer if max_length leaves no room for 16 more.
    """
    end_with_workflow()
    cell = Cell.of(raw)
    with measuring():
        digest = check_model(paths.model_directory, cell)
        executor = load_executor(cell, paths)
        prompt, following = _text(cell, paths)
        groups = _run(executor, prompt, following) | {"weights_sample": sample_weights(executor, digest)}
    named = {f"{group}.{index}": tensor for group, tensors in groups.items() for index, tensor in enumerate(tensors)}
    named[f"{_FOLLOWING}.0"] = torch.from_numpy(following)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in named.items()}
    write_sealed(output, lambda path: save_file(tensors, path, {KEY: BLANK}))


def load_executor(cell: Cell, paths: Paths) -> EagerExecutor:
    """Loads the cell's model. Pins this process to a trial's computing cores and limits its threads."""
    computing, _ = cores(cell)
    os.sched_setaffinity(0, computing)
    limit_threads(cell.threads)
    model = ModelFiles(paths.model_directory, load_digest(paths.model_directory))
    weights = Weights(model.specs(), choose_device(cell.device))
    weights.read_file(model.weights_file, [tensor.offset for tensor in model.digest.tensors])
    return EagerExecutor(build_model(model.config, weights, cell.dtype), cell.max_length)


def sample_weights(executor: EagerExecutor, digest: ModelDigest) -> tuple[torch.Tensor, ...]:
    """Matrices spread evenly over the weights file, the first rows of each up to 2 MiB."""
    matrices = [tensor.name for tensor in digest.tensors if len(tensor.shape) == 2]
    chosen = np.unique(np.linspace(0, len(matrices) - 1, min(_SAMPLED_WEIGHTS, len(matrices))).round().astype(int))
    state = executor.model.state_dict()
    weights = [state[matrices[index]] for index in chosen]
    return tuple(weight[: max(1, _SAMPLED_BYTES // (weight.shape[1] * weight.itemsize))].clone() for weight in weights)


def _text(cell: Cell, paths: Paths) -> tuple[np.ndarray, np.ndarray]:
    """A prompt, and the tokens that follow it in the text."""
    steps = min(DUMPED_STEPS, cell.max_length - 1)
    length = min(DUMPED_PROMPT_TOKENS, cell.max_length - steps)
    tokenizer = Tokenizer.from_file(str(paths.model_directory / "tokenizer.json"))
    tokens = make_prompt(tokenizer, load_passages(paths.root / cell.prompts), 0, length + steps)
    return tokens[:length], tokens[length:]


def _run(executor: EagerExecutor, prompt: np.ndarray, following: np.ndarray) -> dict[str, tuple[torch.Tensor, ...]]:
    cache = executor.new_cache()
    hidden = executor.forward(prompt, cache)
    return {
        "tokens_prompt": (torch.from_numpy(prompt),),
        "tokens_step": (torch.from_numpy(following[:1].copy()),),
        "logits_all": (executor.logits(hidden),),
        "logits_last": (executor.logits(hidden[-1:]),),
        "hidden_last": (hidden[-1:].clone(),),
        "kv_prompt": (from_wire(to_wire(cache.export(), TensorClass.KV, cache.pool.dtype), "cpu"),),
    }
