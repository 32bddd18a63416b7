"""A merged network as files: safetensors and JSON, no pickle."""

from .load import load
from .save import save

__all__ = ["load", "save"]
