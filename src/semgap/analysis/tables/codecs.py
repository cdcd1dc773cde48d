"""Table codecs: ratio, speed and loss of each codec on tensors of the real model."""

import pandas as pd

from semgap.analysis.results import Results
from semgap.analysis.tables.render import Column, View


def table(results: Results) -> pd.DataFrame:
    """The measured codecs (`results.load_codecs`): one row per model, tensor, dtype, codec and device."""
    return results.codecs


VIEWS = (
    View(
        "Codecs",
        (
            Column("dtype", "dtype"),
            Column("codec", "codec"),
            Column("device", "on"),
            Column("payload_bytes", "payload (B)", "count", reason="reason"),
            Column("ratio", "ratio", "digits", reason="ratio_reason"),
            Column("ratio_to_fp16", "against fp16", "digits", null="-"),
            Column("ratio_to_fp16_zlib", "against fp16 + zlib", "digits", null="-"),
            Column("entropy_ratio", "order-0 ratio", "digits", null="-"),
            Column("encode_mb_per_s", "encode (MB/s)", "digits", reason="speed_reason", null="-"),
            Column("decode_mb_per_s", "decode (MB/s)", "digits", reason="speed_reason", null="-"),
            Column("exact", "exact", "yes_no", null="-"),
            Column("kl_nats", "mean KL (nats)", "small", reason="kl_reason", null="-"),
            Column("max_abs_diff", "max abs. difference of logits", "small", null="-"),
        ),
        "Ratio: raw bytes of the same dtype / payload. Against fp16: fp16 bytes / payload. Against fp16 + zlib: payload of the original "
        "experiment's codec / payload. Order-0 ratio: the limit of a coder without context, by the entropy of the byte planes. Speeds: raw "
        "bytes, one thread or the GPU, without copies over PCIe. KL and difference: logits against those of the untouched tensor in the "
        "run's dtype, row by row; for KV, logits of the text that follows.",
        by=("model", "tensor"),
    ),
)
