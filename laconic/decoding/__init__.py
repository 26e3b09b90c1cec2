"""Decoding: fewer forwards, and fewer computed rows, per token."""
