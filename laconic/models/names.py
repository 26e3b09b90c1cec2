"""Invented code names: the keys and values of the retrieval tasks.

Names are pronounceable, capitalised, six letters long and occur in no ordinary text, so that a key or a value can
be found in a haystack only where a task put it. The built-in tokenizer holds the first ``SINGLE_TOKENS`` names as
one token each; with any other tokenizer a name simply takes several tokens.
"""

from __future__ import annotations

import random
from functools import lru_cache

SINGLE_TOKENS = 512

_STARTS = (
    "Bel", "Cor", "Dar", "Fen", "Gal", "Hul", "Jor", "Kel", "Lom", "Mir", "Nar", "Pol", "Quo", "Rud", "Sel", "Tar",
    "Vel", "Wex", "Yor", "Zan", "Bru", "Dru", "Gri", "Kra", "Pli", "Sto", "Tra", "Vro", "Oth", "Ulf", "Ist", "Arv",
)  # fmt: skip
_ENDS = (
    "bax", "cim", "dun", "fik", "gos", "hep", "jil", "kov", "lum", "mor", "nax", "pel", "rik", "sut", "tov", "vek",
    "wil", "xan", "yub", "zid", "bro", "dra", "fli", "gru", "kta", "mpo", "nde", "rvi", "sko", "tru", "lza", "qui",
)  # fmt: skip


@lru_cache(maxsize=1)
def _all_names() -> tuple[str, ...]:
    names = [start + end for start in _STARTS for end in _ENDS]
    random.Random(20).shuffle(names)
    return tuple(names)


def code_names(count: int = SINGLE_TOKENS) -> list[str]:
    """The first ``count`` code names, always in the same order and without a leading space.

    At most 1,024 exist. Raises ValueError above that.
    """
    names = _all_names()
    if not 0 <= count <= len(names):
        raise ValueError(f"count must lie between 0 and {len(names)}, not {count}")
    return list(names[:count])
