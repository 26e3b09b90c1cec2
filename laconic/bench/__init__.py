"""The speed suite: ours against the stock path of transformers, both in one run. ``laconic bench`` is its command."""
