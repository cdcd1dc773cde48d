"""The sampling rule of sampling.py in torch, without a round trip to the host, for captured graphs. Draws differ only near an edge."""

import torch

from semgap.policy import SamplingRule

NOT_A_DISTRIBUTION = -1  # the token if no logit is finite, or one is NaN or +infinity


def draw_on_device(logits: torch.Tensor, rule: SamplingRule, uniform: torch.Tensor) -> torch.Tensor:
    """The token, int64 (1,), that `rule` draws from logits (vocab,) by a uniform, float64 (1,), all on one device.

    NOT_A_DISTRIBUTION if sampling.draw raises ValueError. Weights and sums are float64, kept tokens are in the order of their ids.
    No Python number becomes a tensor here: that would be a copy from the host, which ends a capture.
    """
    if rule.kind == "greedy":
        return torch.argmax(logits, keepdim=True)
    wide = logits.double()
    top = wide.max()
    edges = torch.cumsum(_kept(wide, torch.exp((wide - top) / rule.temperature), rule), 0)
    total = edges[-1:]
    last = torch.searchsorted(edges, total)  # the last token with any weight
    token = torch.minimum(torch.searchsorted(edges, uniform * total, right=True), last)
    return token.masked_fill_(~torch.isfinite(top), NOT_A_DISTRIBUTION)


def _kept(logits: torch.Tensor, weights: torch.Tensor, rule: SamplingRule) -> torch.Tensor:
    """The weights (vocab,) of the tokens that top_k and then top_p keep; 0 for the others."""
    count = rule.top_k if 0 < rule.top_k < logits.numel() else logits.numel()
    if count == logits.numel() and rule.top_p == 1:
        return weights
    order = torch.sort(logits, descending=True, stable=True).indices[:count]  # the lowest ids first among equals
    falling = weights[order]
    if rule.top_p < 1:
        sums = torch.cumsum(falling, 0) / falling.sum()
        kept = torch.arange(count, device=logits.device) <= (sums < rule.top_p).sum()
        falling = falling * kept
    return torch.zeros_like(weights).scatter(0, order, falling)
