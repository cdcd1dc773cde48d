"""The tables codecs and break_even, the figure codecs, and loading measured codecs."""

from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest
from figure_texts import unreadable_texts
from hypothesis import given
from hypothesis import strategies as st

from semgap.analysis.figures import codecs as codecs_figure
from semgap.analysis.load import AlteredError, StaleTrialError, Trials
from semgap.analysis.results import Results, load_codecs
from semgap.analysis.stats import geometric_mean_interval
from semgap.analysis.tables import break_even, codecs
from semgap.analysis.tables.break_even import bandwidth_mb_per_s
from semgap.analysis.tables.render import to_markdown
from semgap.experiment.measure_codecs import sealed_codecs
from semgap.seal import place_of

REASON = "the weights were dequantised from GGUF Q4_1: their ratios are not a trained model's"


def row(codec: str, tensor: str = "kv_prompt", dtype: str = "float32", **changes: Any) -> dict[str, Any]:
    cls = tensor.partition("_")[0]
    return {
        "model": "smollm2-135m",
        "tensor": tensor,
        "tensor_class": cls,
        "dtype": dtype,
        "run_dtype": dtype == "float32",
        "shape": "30x2",
        "codec": codec,
        "device": "cpu",
        "tensors": 1,
        "raw_bytes": 4_000_000,
        "payload_bytes": 2_000_000,
        "ratio": 2.0,
        "ratio_to_fp16": 1.0,
        "ratio_to_fp16_zlib": 1.1,
        "entropy_bits_per_element": 26.0,
        "entropy_ratio": 1.2,
        "cold_encode_mb_per_s": [450.0, 500.0, 550.0],
        "cold_decode_mb_per_s": [1000.0, 1000.0, 1000.0],
        "warm_encode_mb_per_s": [600.0, 600.0, 600.0],
        "warm_decode_mb_per_s": [2000.0, 2100.0, 2200.0],
        "speed_reason": None,
        "exact": True,
        "kl_nats": 0.0,
        "max_abs_diff": 0.0,
        "rows_compared": 16,
        "kl_reason": None,
        "ratio_meaningful": True,
        "ratio_reason": None,
        "reason": None,
    } | changes


def measured(*rows: dict[str, Any]) -> Results:
    """Results with measured codecs only."""
    nothing = pd.DataFrame()
    return Results(Trials((), *[nothing] * 9), *[nothing] * 5, pd.DataFrame(list(rows)), {}, nothing, {})


HANDED_ON = {**dict.fromkeys(codecs.SPEEDS), "speed_reason": "handed on"}
RAW = row("raw", ratio=1.0, ratio_to_fp16=0.5, **HANDED_ON)


@given(ratio=st.floats(1.001, 100), encode=st.floats(1, 1e5), decode=st.floats(1, 1e5))
def test_at_break_even_a_transfer_takes_the_same_time_with_and_without_the_codec(ratio: float, encode: float, decode: float) -> None:
    bandwidth = bandwidth_mb_per_s(ratio, encode, decode)
    assert bandwidth is not None
    assert 1 / bandwidth == pytest.approx(1 / (ratio * bandwidth) + 1 / encode + 1 / decode)


def test_a_codec_of_one_speed_breaks_even_at_its_speed_times_1_minus_1_over_r() -> None:
    assert bandwidth_mb_per_s(4.0, 200.0, None) == pytest.approx(200 * (1 - 1 / 4))


def test_a_codec_that_does_not_shrink_never_pays_and_says_so() -> None:
    table = break_even.table(measured(row("zstd", ratio=0.98)))
    assert pd.isna(table.loc[0, "break_even_mb_per_s"])
    assert table.loc[0, "break_even_mb_per_s_reason"] == "it does not make the tensor smaller"


def test_break_even_is_given_in_bytes_and_bits_per_second_and_leaves_raw_out() -> None:
    table = break_even.table(measured(RAW, row("fp16")))
    assert table["codec"].tolist() == ["fp16"]
    for end in ("", "_low", "_high"):
        assert table.loc[0, f"break_even_gbit_per_s{end}"] == pytest.approx(table.loc[0, f"break_even_mb_per_s{end}"] * 8e6 / 1e9)


def test_break_even_is_a_mean_over_processes_of_each_ones_cold_speeds() -> None:
    bounds = geometric_mean_interval([0.5 / (1 / encode + 1 / 1000) for encode in (450, 500, 550)])
    found = break_even.table(measured(row("fp16"))).loc[0]
    assert [found[f"break_even_mb_per_s{end}"] for end in ("", "_low", "_high")] == [bounds.value, bounds.low, bounds.high]


def test_a_way_that_hands_memory_on_takes_no_time_in_break_even() -> None:
    found = break_even.table(measured(row("fp16", cold_decode_mb_per_s=None)))
    assert found.loc[0, "break_even_mb_per_s"] == pytest.approx(0.5 * (450 * 500 * 550) ** (1 / 3))
    neither = break_even.table(measured(row("fp16", **HANDED_ON)))
    assert neither.loc[0, "break_even_mb_per_s_reason"] == "neither way takes time that could be measured"


def test_speeds_are_means_over_processes_with_intervals_and_null_with_the_reason() -> None:
    table = codecs.table(measured(RAW, row("fp16"))).set_index("codec")
    interval = geometric_mean_interval([450, 500, 550])
    assert [table.loc["fp16", f"cold_encode_mb_per_s{end}"] for end in ("", "_low", "_high")] == [
        interval.value,
        interval.low,
        interval.high,
    ]
    assert pd.isna(table.loc["raw", "warm_decode_mb_per_s"]) and table.loc["raw", "warm_decode_mb_per_s_reason"] == "handed on"


def test_a_ratio_that_means_nothing_keeps_its_number_and_is_marked() -> None:
    table = break_even.table(measured(row("zstd", "weights_sample", ratio_meaningful=False, ratio_reason=REASON)))
    assert table.loc[0, "break_even_mb_per_s"] > 0
    assert table.loc[0, "break_even_mb_per_s_reason"] == f"the ratio is not meaningful: {REASON}"


def test_a_codec_that_refused_a_tensor_is_null_with_its_reason() -> None:
    refused = dict.fromkeys(("ratio", "ratio_to_fp16", *codecs.SPEEDS, "exact", "kl_nats", "payload_bytes"))
    found = measured(row("fp16"), row("int8", **refused, reason="KV values must be finite"))
    assert break_even.table(found).loc[1, "break_even_mb_per_s_reason"] == "KV values must be finite"
    assert "KV values must be finite" in to_markdown(codecs.table(found), codecs.VIEWS)


def test_the_readable_tables_mark_ratios_without_meaning_and_lossy_codecs() -> None:
    found = measured(RAW, row("int8", exact=False, kl_nats=9.5e-6), row("zstd", "weights_sample", ratio_reason=REASON))
    shown = to_markdown(codecs.table(found), codecs.VIEWS)
    assert "9.5e-06" in shown
    assert REASON in shown
    assert "Break-even: model smollm2-135m, tensor kv_prompt" in to_markdown(break_even.table(found), break_even.VIEWS)


def written(path: Path, digest: str) -> Path:
    path.write_bytes(sealed_codecs(pa.Table.from_pylist([row("zstd")]), digest, place_of(path)))
    return path


def test_codecs_measured_under_another_configuration_are_refused(tmp_path: Path) -> None:
    file = written(tmp_path / "model=m.parquet", "then")
    with pytest.raises(StaleTrialError, match="digest then"):
        load_codecs([file], {str(file): "now"})
    assert len(load_codecs([file], {str(file): "then"})) == 1


def test_a_damaged_file_of_codecs_is_named(tmp_path: Path) -> None:
    file = written(tmp_path / "model=m.parquet", "now")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(AlteredError, match=r"model=m\.parquet is not as it was written"):
        load_codecs([file], {str(file): "now"})


def test_no_texts_of_the_figure_collide_and_reasons_stand_below() -> None:
    rows = [
        row(codec, tensor, dtype, ratio_to_fp16=ratio, exact=codec != "int8", kl_nats=1e-5)
        for tensor in ("logits_all", "hidden_last", "kv_prompt")
        for dtype in ("float32", "float16", "bfloat16")
        for codec, ratio in (("fp16", 1.0), ("fp16_zlib", 1.1), ("planes_zstd", 1.3), ("int8", 90.0))
    ]
    rows += [row("zstd", "weights_sample", dtype, ratio_meaningful=False, ratio_reason=REASON) for dtype in ("float32", "float16")]
    figure = codecs_figure.plot(measured(*rows, RAW))
    assert unreadable_texts(figure) == []
    assert any(REASON in text.get_text() for text in figure.texts)
    assert "KL 1e-5" in [text.get_text() for ax in figure.axes for text in ax.texts]


def test_token_ids_are_in_the_table_and_not_in_the_figure() -> None:
    tokens = row("compact", "tokens_prompt", "int64", ratio_to_fp16=None)
    figure = codecs_figure.plot(measured(row("fp16"), tokens))
    assert len(figure.axes) == 2


def test_a_codec_on_cpu_and_gpu_has_two_lines_in_the_figure_and_an_unmeasured_one_none() -> None:
    unmeasured = row("nvcomp_ans", device="cuda", ratio=None, reason="there is no usable GPU")
    found = measured(row("int8"), row("int8", device="cuda"), row("zstd"), unmeasured)
    assert codecs_figure._labelled(found.codecs)["codec"].tolist() == ["int8", "int8 (GPU)", "zstd"]
    one_device = measured(row("int8"), row("nvcomp_ans", device="cuda"))
    assert codecs_figure._labelled(one_device.codecs)["codec"].tolist() == ["int8", "nvcomp_ans"]
    assert break_even.table(found)["device"].tolist() == ["cpu", "cuda", "cpu", "cuda"]
