"""Tables of codecs as measured on tensors of the real model, and of the bandwidths below which they pay."""

import pandas as pd

from semgap.analysis.tables.render import Column, View


def codecs(measured: pd.DataFrame) -> pd.DataFrame:
    """`load.load_codecs` as it is: one row per model, tensor, dtype, codec and device."""
    return measured


CODEC_VIEWS = (
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
        ("model", "tensor"),
        "Ratio: raw bytes of the same dtype / payload; against fp16: fp16 bytes / payload; against fp16 + zlib: payload of the original's "
        "codec / payload. Order-0 ratio: what the entropy of the byte planes allows a coder without context. Speeds are of raw bytes, "
        "one thread, or of the GPU, copies over PCIe left out. KL and differences are of logits, against those of the untouched tensor "
        "in the run's dtype: of each row, or for KV of the text that follows.",
    ),
)
