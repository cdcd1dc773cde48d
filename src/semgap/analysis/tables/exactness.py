"""Table exactness: what each mode keeps of local's result."""

import numpy as np
import pandas as pd

from semgap.analysis.tables.render import Column, View


def exactness(checks: pd.DataFrame) -> pd.DataFrame:
    """`load.load_exactness`, and what the mode's losses change in the text's cross entropy (nats) and perplexity (ratio - 1)."""
    change = checks["text_cross_entropy_nats"] - checks["text_reference_cross_entropy_nats"]
    return checks.assign(cross_entropy_change_nats=change, perplexity_change=np.expm1(change))


EXACTNESS_VIEWS = (
    View(
        "Exactness",
        (
            Column("mode", "mode"),
            Column("keeps", "keeps"),
            Column("promise_kept", "kept", "yes_no"),
            Column("tokens_compared", "tokens compared", "count"),
            Column("tokens_equal", "equal", "count"),
            Column("first_difference", "first difference (step)", "count", null="-"),
            Column("edge_draws", "edge draws", "count"),
            Column("logits_bitwise", "logits bitwise equal", "yes_no", reason="text_reason"),
            Column("max_abs_diff", "max abs. difference", "small", reason="text_reason"),
            Column("text_mean_kl_nats", "mean KL over text (nats)", "small", reason="text_reason"),
            Column("text_max_kl_nats", "max KL over text (nats)", "small", reason="text_reason"),
            Column("perplexity_change", "perplexity change (%)", "signed_percent", reason="text_reason"),
        ),
        ("model",),
        "Against local, apart from any timing. Tokens: the mode goes on from its own tokens, and after the first that differs it is on "
        "another path, so the count of equal ones says little then. Text: both are fed the same text. Edge draws: sampled within 1e-5 "
        "of where the draw goes the other way; what follows one in its request is not compared.",
    ),
)
