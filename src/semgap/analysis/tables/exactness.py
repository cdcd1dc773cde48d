"""Table exactness: the promise of each mode, and the result of its check against local; local's own, against transformers."""

import numpy as np
import pandas as pd

from semgap.analysis.results import Results
from semgap.analysis.tables.render import Column, View


def table(results: Results) -> pd.DataFrame:
    """The checks (`results.load_exactness`), and the change of the text's cross entropy (nats) and perplexity (ratio - 1)."""
    checks = results.exactness
    change = checks["text_cross_entropy_nats"] - checks["text_reference_cross_entropy_nats"]
    return checks.assign(cross_entropy_change_nats=change, perplexity_change=np.expm1(change))


VIEWS = (
    View(
        "Exactness, tokens",
        (
            Column("mode", "mode"),
            Column("keeps", "keeps"),
            Column("promise_kept", "kept", "yes_no"),
            Column("tokens_compared", "compared", "count"),
            Column("tokens_equal", "equal", "count"),
            Column("first_difference", "first difference (step)", "count", null="-"),
            Column("edge_draws", "edge draws", "count"),
        ),
        "Against local, without timing; local itself against transformers, in one pass a prompt. Compared and equal tokens: the mode "
        "continues from its own tokens; after the first difference its path is another one, and the count of equal tokens means little. "
        "Edge draw: a sample within 1e-5 of a CDF edge that fell on its other side; the rest of its request is not compared.",
        by=("model",),
    ),
    View(
        "Exactness, logits",
        (
            Column("mode", "mode"),
            Column("logits_bitwise", "bitwise equal", "yes_no", reason="text_reason"),
            Column("max_abs_diff", "largest difference", "small", reason="text_reason"),
            Column("text_mean_kl_nats", "mean KL (nats)", "small", reason="text_reason"),
            Column("text_max_kl_nats", "max KL (nats)", "small", reason="text_reason"),
            Column("perplexity_change", "perplexity (%)", "signed_percent", reason="text_reason"),
        ),
        "Over a text that both read. Largest difference: of two logits, absolute. Perplexity: its change.",
        by=("model",),
    ),
)
