"""A mode is a row of config: checked as a whole, refused by name."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from semgap.experiment.config_checks import policy_row
from semgap.policy import KV_CODECS, Policy, PolicyError, coded_by, policy_from, refused_codec
from semgap.tensors import TensorClass

ROOT = Path(__file__).resolve().parents[2]


def test_every_mode_of_the_default_config_is_a_policy() -> None:
    config = yaml.safe_load((ROOT / "config/config.yaml").read_text())
    policies = {name: policy_from(policy_row(config, name), name) for name in config["modes"]}
    assert policies["local"].is_local and not policies["naive"].is_local
    assert policies["naive"].is_stateless and not policies["remote_cache"].is_stateless
    assert policies["remote_cache"] == policies["remote_cache_again"]
    assert policies["sys_simulated"].keeps == "lossy"


def test_an_empty_row_is_the_plain_remote_mode() -> None:
    assert policy_from({}, "m") == Policy("remote", "once", "resident", keeps="bitwise")


WAY_OUT = (
    "it chooses the codec of blocks of a resident cache that move one by one: use recovery: delta or auto, or prefix: fetch_blocks or "
    "auto, or name a codec, e.g. raw, planes_zstd, int8, int4"
)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"placement": "elsewhere"}, "mode 'm': Invalid enum value 'elsewhere' - at `$.placement`"),
        ({"weight": "once"}, "mode 'm': Object contains unknown field `weight`"),
        ({"codec": {"logits": "raw"}}, "unknown field `logits` - at `$.codec`"),
        ({"reply": {"kind": "telepathy"}}, "'telepathy'"),
        ({"codec": {"reply": "gzip"}}, "codec.reply 'gzip' is not known; use one of raw, fp16, fp16_zlib"),
        ({"codec": {"reply": "fp16"}}, "promises keeps: bitwise, but loses in reply fp16; say keeps: lossy"),
        ({"codec": {"weights": "fp16"}, "keeps": "tokens"}, "promises keeps: tokens, but loses in weights fp16"),
        ({"weights": "every_step"}, "weights every_step leaves no model for a resident cache; use kv_cache: every_step"),
        ({"max_steps": 0}, "max_steps is 0; it must be 1 or more"),
        ({"window": 2, "reply": {"kind": "token"}, "keeps": "lossy"}, "fed the reference's tokens one by one, use window: 1"),
        ({"window": 2}, "window 2 needs reply.kind token, since logits_all leaves the draw to the client"),
        ({"reply": {"kind": "token"}}, "promises keeps: bitwise, but the client sees no logits of a token reply; say keeps: tokens"),
        ({"reply": {"kind": "token"}, "keeps": "tokens", "coalesce": 2}, "window 1, coalesce 2; 1 <= coalesce <= window is needed"),
        ({"reply": {"kind": "token"}, "keeps": "tokens", "kv_cache": "every_step"}, "reply.kind token needs a cache that stays"),
        ({"reply": {"kind": "topk"}, "keeps": "lossy"}, "reply.kind topk lacks reply.k; say how many logits it sends, e.g. k: 50"),
        ({"reply": {"kind": "logits_last", "k": 5}}, "reply.k is 5 with reply.kind 'logits_last'"),
        ({"reply": {"kind": "topk", "k": 5}}, "promises keeps: bitwise, but topk drops logits; say keeps: lossy"),
        ({"placement": "local", "reply": {"kind": "token"}, "keeps": "tokens"}, "placement local with reply.kind 'token'; use logits_last"),
        ({"codec": {"tokens": "planes_zstd", "kv": "compact"}}, "codec 'compact' does not accept kv; use one of raw, fp16, "),
        ({"codec": {"reply": "int8"}, "keeps": "lossy"}, "codec 'int8' does not accept reply"),
        ({"codec": {"reply": "auto"}}, "codec.reply 'auto' is not known; use one of raw, fp16"),
        ({"codec": {"kv": "auto"}}, f"codec.kv 'auto' with kv_cache resident, recovery reload, prefix recompute; {WAY_OUT}"),
        (
            {"codec": {"kv": "auto"}, "recovery": "recompute"},
            "codec.kv 'auto' with kv_cache resident, recovery recompute, prefix recompute",
        ),
        ({"codec": {"kv": "auto"}, "kv_cache": "every_step"}, "codec.kv 'auto' with kv_cache every_step, recovery reload"),
        ({"codec": {"kv": "auto"}, "placement": "local", "reply": {"kind": "logits_last"}}, "codec.kv 'auto' with placement local; it"),
        (
            {"codec": {"kv": "auto"}, "prefix": "fetch_whole", "shadow": "kvhost", "reply": {"kind": "logits_last"}},
            "codec.kv 'auto' with kv_cache resident, recovery reload, prefix fetch_whole; it chooses the codec of blocks",
        ),
    ],
)
def test_a_contradictory_mode_is_refused_with_its_name_and_field(row: dict[str, Any], message: str) -> None:
    with pytest.raises(PolicyError, match=re.escape(message)):
        policy_from(row, "m")


@pytest.mark.parametrize("row", [{"recovery": "delta"}, {"recovery": "auto"}, {"prefix": "fetch_blocks"}, {"prefix": "auto"}])
def test_keeps_bounds_the_codecs_among_which_a_mode_chooses(row: dict[str, Any]) -> None:
    row = row | {"codec": {"kv": "auto"}, "shadow": "kvhost", "reply": {"kind": "logits_last"}}
    for keeps in ("bitwise", "tokens"):
        policy = policy_from(row | {"keeps": keeps}, "m")
        assert policy.kv_codecs == ("raw", "planes_zstd") and policy.lossy_kv is None
    policy = policy_from(row | {"keeps": "lossy"}, "m")
    assert policy.kv_codecs == KV_CODECS and policy.lossy_kv == "auto"
    assert policy_from({}, "m").kv_codecs == ("raw",)
    assert coded_by(policy, "worker") == {"reply": "raw", "tokens": "raw", "weights": "raw"} and refused_codec(policy, "worker") is None


def test_token_ids_lose_nothing_in_a_lossy_codec() -> None:
    assert policy_from({"codec": {"tokens": "fp16_zlib"}}, "m").keeps == "bitwise"


def test_each_class_crosses_in_its_own_codec_and_what_is_left_in_the_replys() -> None:
    choice = policy_from({"codec": {"tokens": "fp16", "reply": "fp16_zlib"}, "keeps": "lossy"}, "m").codec
    names = {cls: choice.of(cls) for cls in TensorClass}
    assert names[TensorClass.TOKENS] == "fp16"
    assert names[TensorClass.WEIGHTS] == names[TensorClass.KV] == "raw"
    assert names[TensorClass.LOGITS] == names[TensorClass.HIDDEN] == "fp16_zlib"


@pytest.mark.parametrize("shape", [{"window": 1}, {"window": 4, "coalesce": 4}])
def test_only_windows_of_several_frames_can_be_requested_ahead(shape: dict) -> None:
    with pytest.raises(PolicyError, match="mode 'm': ahead with"):
        policy_from({"reply": {"kind": "token"}, "keeps": "tokens", "ahead": True, **shape}, "m")
