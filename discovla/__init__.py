"""discovla: a GPU-first engine for video-text retrieval.

`discovla.load` opens a run, an export or a plain CLIP, `discovla.Index` searches videos by it. `import
discovla` itself imports nothing: torch is imported when a name is used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from discovla.model import Model, load
    from discovla.retrieval.embeddings import Embeddings
    from discovla.search.index import Index

__version__ = "0.1.0"
__all__ = ["Embeddings", "Index", "Model", "__version__", "load"]

_MODULES = {
    "Embeddings": "discovla.retrieval.embeddings",
    "Index": "discovla.search.index",
    "Model": "discovla.model",
    "load": "discovla.model",
}


def __getattr__(name: str) -> Any:
    """Import a public name at its first use."""
    if name not in _MODULES:
        raise AttributeError(f"module 'discovla' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
