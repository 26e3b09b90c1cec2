"""Fewer forwards: drafting and verification, parallel and diffusion decoding, controlled sampling."""

from laconic.decoding.custom import custom_generate
from laconic.decoding.engine import decode

__all__ = ["custom_generate", "decode"]
