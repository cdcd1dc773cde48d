"""The examples of docs/extending.md work as they stand there."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import yaml

from semgap.codecs import CODECS, Codec, CodecError, encode
from semgap.experiment.config import check_config
from semgap.policy import policy_from
from semgap.tensors import DType, Tensor, TensorClass

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/extending.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """The fenced code of that language on the page, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


CODEC, REGISTRATION = blocks("python")


@pytest.fixture(scope="module")
def codec() -> Codec:
    """The example's codec, out of a module that was made of its code."""
    module = ModuleType("shuffle")
    exec(compile(CODEC, "docs/extending.md", "exec"), vars(module))
    return module.ShuffleZlib()


@pytest.mark.parametrize("dtype", DType)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (5,), (2, 3, 7)])
def test_the_example_codec_gives_back_the_very_bytes(codec: Codec, dtype: DType, shape: tuple[int, ...]) -> None:
    bits = np.random.default_rng(1).integers(0, 256, (*shape, dtype.itemsize), dtype=np.uint8)
    tensor = Tensor(TensorClass.KV, dtype, shape, memoryview(bits.tobytes()))
    encoded = encode(tensor, codec)
    payload = b"".join(encoded.buffers)
    assert (encoded.codec, encoded.nbytes) == (codec.code, len(payload))
    assert bytes(codec.decode(memoryview(payload), dtype, shape)) == bits.tobytes()


def test_the_example_codec_makes_floats_of_one_size_smaller(codec: Codec) -> None:
    logits = Tensor.from_numpy(np.random.default_rng(1).normal(0, 1, 4096).astype(np.float32), TensorClass.LOGITS)
    assert encode(logits, codec).nbytes < logits.data.nbytes


@pytest.mark.parametrize("shape", [(4095,), (4097,), (0,)])
def test_the_example_codec_refuses_a_payload_of_another_tensor(codec: Codec, shape: tuple[int, ...]) -> None:
    payload = b"".join(encode(Tensor.from_numpy(np.zeros(4096, dtype=np.float32), TensorClass.LOGITS), codec).buffers)
    with pytest.raises(CodecError, match="exactly"):
        codec.decode(memoryview(payload), DType.F32, shape)


@pytest.mark.parametrize("damage", [lambda payload: payload[:-1], lambda payload: payload + b"x", lambda payload: b"\0" + payload[1:]])
def test_the_example_codec_refuses_a_damaged_payload(codec: Codec, damage: Any) -> None:
    tensor = Tensor.from_numpy(np.arange(64, dtype=np.float32), TensorClass.LOGITS)
    payload = b"".join(encode(tensor, codec).buffers)
    with pytest.raises(CodecError):
        codec.decode(memoryview(damage(payload)), tensor.dtype, tensor.shape)


def test_the_example_codec_s_name_and_number_are_free(codec: Codec) -> None:
    assert codec.name not in CODECS
    assert codec.code not in {each.code for each in CODECS.values()}


def test_a_codec_registered_as_the_page_says_is_one_that_config_takes(tmp_path: Path) -> None:
    """In a copy of the package, with the lines of the page in place of those that are there."""
    package = tmp_path / "semgap"
    shutil.copytree(ROOT / "src/semgap", package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "codecs/shuffle.py").write_text(CODEC)
    imported, entries = (line for line in REGISTRATION.splitlines() if line)
    init = package / "codecs/__init__.py"
    changed, count = re.subn(r"^_ALL = \(.*?\)$", f"{imported}\n\n{entries}", init.read_text(), flags=re.MULTILINE)
    assert count == 1
    init.write_text(changed)
    program = (
        "import json; from semgap.codecs import CODECS, codec_of; from semgap.policy import policy_from\n"
        "policy_from({'codec': {'kv': 'shuffle_zlib', 'reply': 'shuffle_zlib'}}, 'mine')\n"
        "print(json.dumps([list(CODECS), codec_of(10).name]))"
    )
    done = subprocess.run([sys.executable, "-c", program], env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [[*CODECS, "shuffle_zlib"], "shuffle_zlib"]


def test_the_example_mode_runs_on_top_of_the_default_config() -> None:
    (block,) = blocks("yaml")
    (name, row), *others = yaml.safe_load(block)["define"]["modes"].items()
    raw = yaml.safe_load((ROOT / "config/config.yaml").read_text())
    raw["define"]["modes"][name] = row
    raw["modes"] = ["local", "remote_cache", name]
    config = check_config(raw, ROOT)
    policy = policy_from(config.policy(name), name)
    assert not others
    assert (policy.reply.kind, policy.reply.k, policy.codec.tokens, policy.keeps) == ("topk", 50, "compact", "lossy")
    assert config.phases_of(name) == ["decode"]
    assert f"modes=local,remote_cache,{name}" in PAGE


def test_the_example_mode_takes_five_lines() -> None:
    (block,) = blocks("yaml")
    assert block.startswith("define:\n  modes:\n")
    assert len(block.splitlines()) - 2 == 5
