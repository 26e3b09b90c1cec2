"""How well a model answers when a few of its heads are changed: what profiles of reweighting methods are searched by."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from laconic.attention.base import AttentionMethod

Score = tuple[float, ...]  # higher is better, the first number counts first


@torch.no_grad()
def measure_answers(
    model: torch.nn.Module,
    method: AttentionMethod,
    texts: Sequence[torch.Tensor],
    answers: Sequence[torch.Tensor] | None = None,
) -> Score:
    """With ``answers``: the share of texts whose answer is the greedy one, and its mean log-probability per token.

    Without: minus the entropy of the token after each text, in nats: how sure the model is of what it says.

    Args:
        texts, answers: token ids, one 1-D tensor each; an answer follows its text.
    """
    from laconic.hooks import apply
    from laconic.recipe import Recipe

    right = sure = 0.0
    with apply(model, Recipe((method,))):
        for number, text in enumerate(texts):
            answer = text[:0] if answers is None else answers[number]
            ids = torch.cat([text, answer[:-1]])[None].to(model.device)
            keep = max(1, len(answer))
            logits = model(ids, use_cache=True, logits_to_keep=keep).logits[0, -keep:].float().log_softmax(-1).cpu()
            if answers is None:
                sure += float((logits.exp() * logits).sum())
            else:
                right += float((logits.argmax(-1) == answer).all())
                sure += float(logits.gather(1, answer[:, None]).mean())
    scores = (sure,) if answers is None else (right, sure)
    return tuple(round(value / len(texts), 6) for value in scores)
