"""The exactness of local's executor: the same prompts through transformers itself, with its own loading, cache and attention."""

import numpy as np

from semgap.client.prompts import make_prompts
from semgap.client.spec import ClientSpec
from semgap.engine.device import choose_device, limit_threads
from semgap.engine.sampling import draw
from semgap.experiment.exactness import Logits


def by_transformers(spec: ClientSpec, drawn: Logits, text: Logits) -> tuple[Logits, Logits]:
    """The logits of transformers after the tokens that local drew, and over the text. Each is one pass a prompt, without steps."""
    import torch
    from transformers import AutoModelForCausalLM

    limit_threads(spec.threads)
    dtype = getattr(torch, spec.dtype)
    model = AutoModelForCausalLM.from_pretrained(spec.model_directory, dtype=dtype).eval().to(choose_device(spec.device))
    prompts, warmups = make_prompts(spec)

    def given(fed: np.ndarray) -> Logits:
        """The results for `fed` (requests, steps + 1). The last token of each request is not fed: no logits follow it."""
        rows, tokens = [], []
        for number, (prompt, following) in enumerate(zip(prompts, fed, strict=True)):
            ids = torch.from_numpy(np.concatenate([prompt, following[:-1]]))[None].to(model.device)
            with torch.inference_mode():
                logits = model(input_ids=ids).logits[0, len(prompt) - 1 :].float().cpu().numpy()
            seed, request = spec.drawing.seed, len(warmups) + number
            tokens.append([draw(row, spec.drawing.rule, seed, request, at).token for at, row in enumerate(logits, len(prompt))])
            rows.append(logits)
        return Logits(np.array(tokens), last_logits=np.stack(rows))

    assert text.text is not None
    over_text = given(text.text)
    return given(drawn.tokens), Logits(over_text.tokens, last_logits=over_text.last_logits, text=text.text)
