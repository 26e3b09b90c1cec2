"""Fewer forwards: drafting and verification, parallel and diffusion decoding, controlled sampling."""
