"""HiRED: an early block says how much each part of a picture gets, a late one what stays of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from laconic.method import parameter
from laconic.registry import register
from laconic.vision.base import VisionMethod
from laconic.vision.encoder import Want
from laconic.vision.picture import Picture
from laconic.vision.regions import crop_members, floors, share_out, top_of_regions, whole_cells_of_parts
from laconic.vision.select import top


@register
@dataclass(frozen=True, kw_only=True)
class HiRED(VisionMethod):
    """Gives the whole picture half of the budget and every part a share by how much of interest lies in it.

    Interest is the class token's attention in the first block: the cells of the whole picture that it attends to most are marked,
    and a part's share is the number of marks in its region. What stays of the whole and of each part is what the class token
    attends to in the block before the last. A picture without parts, or a video, keeps the best by that alone. Budgets are exact;
    what one side cannot hold goes to the other. The released code counts the marks in stretches of the whole picture's rows
    instead of the parts' regions, and loses the tokens that rounding down leaves over: ``faithful_code`` does so too.
    """

    id: ClassVar[str] = "hired"
    paper: ClassVar[str] = "HiRED: Attention-Guided Token Dropping for High-Resolution Vision-Language Models (2024)"

    whole: float = parameter(0.5, "share of the budget that goes to the whole picture", least=0, search=(0.25, 0.75))
    faithful_code: bool = parameter(False, "as released: marks counted in stretches of rows, tokens lost to rounding", search=())

    def check(self) -> None:
        super().check()
        self.require(self.whole <= 1, "whole is a share of the budget: give at most 1.")

    def wants(self, depth: int) -> set[Want]:
        return {Want("cls", 0), Want("cls", -2)}

    def choose(self, picture: Picture, k: int) -> torch.Tensor:
        late, members = picture.cls(-2), crop_members(picture.layout)
        if not any(picture.layout.parts):
            return top(late, k, picture.cells)
        caps = torch.tensor([len(part) for part in members[1:]])
        if self.faithful_code:
            whole = min(int(k * self.whole), len(members[0]))
            quotas = floors(self.marks(picture), min(k - whole, int(caps.sum()))).minimum(caps)
            return top_of_regions(late, members, torch.cat([torch.tensor([whole]), quotas]))
        whole = max(min(int(k * self.whole), len(members[0])), k - int(caps.sum()))
        quotas = share_out(self.marks(picture), k - whole, caps)
        return top_of_regions(late, members, torch.cat([torch.tensor([whole]), quotas]))

    def marks(self, picture: Picture) -> torch.Tensor:
        """How many marked cells of the whole picture lie in each part, float ``(parts,)``."""
        layout = picture.layout
        height, width = layout.shapes[0]
        early = torch.zeros(height * width)
        here = layout.crop == 0
        early[layout.row[here] * width + layout.column[here]] = picture.cls(0)[here].cpu()
        marked = torch.zeros(height * width, dtype=torch.bool)
        marked[top(early, int(height * width * (1 - self.whole)), torch.arange(height * width))] = True
        parts = len(layout.shapes) - 1
        if self.faithful_code:
            region = 1 + torch.arange(height * width) * parts // (height * width)
        else:
            region = whole_cells_of_parts(layout)
        return torch.bincount(region[marked], minlength=parts + 1)[1:].double()
