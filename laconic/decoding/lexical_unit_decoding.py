"""Lexical Unit Decoding: a model that was fine-tuned for it says several tokens at once where it is sure of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from laconic.budget import Budget
from laconic.decoding.base import Drafter, DraftMethod, Setting, Step
from laconic.decoding.sampling import Text
from laconic.decoding.tree import NONE, DraftTree, PromptRows, TreeShape
from laconic.errors import LaconicError
from laconic.method import parameter
from laconic.registry import register

MARK = "lexical_units"  # what a fine-tuned model has in its configuration


class _Spans(Drafter):
    def __init__(self, method: LexicalUnitDecoding, setting: Setting) -> None:
        super().__init__(method, setting)
        known = getattr(setting.model.config, MARK, None)
        if not known:
            raise LaconicError(
                f"{method.id} needs a model that was fine-tuned for it: make one with python -m "
                "laconic.models.train_lexical_units --model MODEL --data DIR --out DIR."
            )
        pad = torch.tensor(known["pad"], device=setting.model.device)
        self.pad = setting.model.get_input_embeddings()(pad)
        self._start(setting.text)

    def _start(self, text: Text) -> None:
        self.text = text
        self.spans: list[list[int]] = [[] for _ in text.rows]  # what is said behind the newest token of each text

    def propose(self, text: Text, room: int) -> DraftTree:
        """The span as a chain, and behind its last token the PAD rows."""
        if text is not self.text:
            self._start(text)
        spans = [[] if done else span[:room] for span, done in zip(self.spans, text.done, strict=True)]
        nodes = 1 + max(len(span) for span in spans)
        pads = min(self.method.nodes, room - min(len(span) for span in spans))
        tokens = torch.zeros(len(spans), nodes, dtype=torch.int64)
        whole = torch.full((len(spans), nodes + pads), NONE)
        self.first = nodes
        for row, span in enumerate(spans):
            here = 0 if text.done[row] else min(pads, room - len(span))
            tokens[row, : len(span) + 1] = torch.tensor([text.rows[row][-1], *span])
            whole[row, : len(span) + 1] = torch.arange(NONE, len(span))
            above = [len(span), *range(nodes, nodes + here - 1)][:here]
            whole[row, nodes : nodes + here] = torch.tensor(above, dtype=torch.int64)
        if not pads:
            return DraftTree(tokens, TreeShape(whole))
        rows = PromptRows(TreeShape(whole), self.pad.expand(len(spans), pads, -1))
        return DraftTree(tokens, TreeShape(whole[:, :nodes].clone()), prompts=rows)

    def observe(self, step: Step, text: Text) -> None:
        """The next span: what the PAD rows say, up to the first of which the model is not sure or that repeats what is before."""
        self._start(text)
        end = step.verdict.path.amax(-1)  # nodes of a path ascend
        if step.tree.prompts is None:
            return
        every = torch.arange(len(end), device=end.device)
        pads = step.output.logits[:, self.first :]
        laws = torch.cat([step.output.logits[every, end][:, None], pads], dim=1).float().softmax(-1)
        confidence, said = laws.max(-1)
        said[:, 0] = step.verdict.token
        whole = step.tree.prompts.shape.real[:, self.first :].to(end.device)
        last = step.tree.shape.depths.argmax(-1) == end  # the node that the PAD rows stand behind
        sure = (confidence >= self.method.confidence).cumprod(-1).bool()[:, 1:] & whole & last[:, None]
        new = (said[:, 1:] != said[:, :-1]).cumprod(-1).bool()
        counts = (sure & new).sum(-1).tolist()
        self.spans = [row[:count] for row, count in zip(said[:, 1:].tolist(), counts, strict=True)]


@register
@dataclass(frozen=True, kw_only=True)
class LexicalUnitDecoding(DraftMethod):
    """Says as many tokens at once as the model is sure of, and does not look back. Lossy.

    PAD tokens behind the text make a model that was fine-tuned for it say the next tokens, too. The next token is always taken;
    those after it as long as each, the first included, has at least ``confidence``, and none is the same as the one before it.
    They are fed, with new PAD tokens, to the next forward. With verifier=match that forward checks them as well, and the text is
    the fine-tuned model's own. The budget is the number of PAD tokens. Fine-tune with ``python -m
    laconic.models.train_lexical_units``, which makes a new model.
    """

    id: ClassVar[str] = "lexical_unit_decoding"
    paper: ClassVar[str] = (
        "Decoding at the Speed of Thought: Harnessing Parallel Decoding of Lexical Units for LLMs (LREC-COLING 2024)"
    )
    needs: ClassVar[str] = "training"
    guarantee: ClassVar[str] = "lossy"
    verifiers: ClassVar[tuple[str, ...]] = ("trust", "match", "typical")

    budget: Budget = parameter(Budget(amount=3), "PAD tokens in each forward, and so the most drafted tokens")  # noqa: RUF009
    confidence: float = parameter(
        0.9, "probability from which on a token is said unread; above 1 none is", least=0, search=(0.5, 0.7, 0.8, 0.95, 0.99)
    )

    @property
    def promise(self) -> str:
        return DraftMethod.guarantee if self.verifier == "match" else self.guarantee

    def drafter(self, setting: Setting) -> Drafter:
        return _Spans(self, setting)
