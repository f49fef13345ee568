"""
Multimodal Prompt Tuning (M2PT, EMNLP 2024, arXiv 2409.15657) as a PEFT method.

Importing this package registers the method with PEFT, and the model type of bundles with transformers, nothing more.
"""

from .bundles.bundler import bundle
from .bundles.loading import register_bundles
from .config import M2PTConfig
from .errors import AdapterFileError, BundleError, ConversionError, UnsupportedModelError
from .layers.attention import M2PTAttention
from .layers.connector import M2PTConnector
from .model import M2PTModel
from .optimizer import get_parameter_groups
from .processing import adapt_processor
from .register import register
from .version import __version__


__all__ = [
    "AdapterFileError",
    "BundleError",
    "ConversionError",
    "M2PTAttention",
    "M2PTConfig",
    "M2PTConnector",
    "M2PTModel",
    "UnsupportedModelError",
    "__version__",
    "adapt_processor",
    "bundle",
    "get_parameter_groups",
]

register(M2PTConfig, M2PTModel)
register_bundles()
