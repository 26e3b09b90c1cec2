"""KV-cache and sparse-attention methods: one file per method, over the bases in ``base.py``."""
