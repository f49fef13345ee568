"""Converts checkpoints of the official M2PT code. Only the command line imports it."""

from .converter import convert_checkpoint


__all__ = ["convert_checkpoint"]
