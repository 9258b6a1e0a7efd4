"""edge-csp: vision-language models on small machines, with a KV cache that keeps only the cells that matter.

    from edge_csp import open_session

    with open_session("model.gguf", budget="20%") as session:
        for piece in session.ask("What is in this picture?", [load_picture("cat.jpg")]):
            print(piece, end="", flush=True)

Names are imported when they are first used, so that importing this package costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from edge_csp.budget import Budget, parse_budget
    from edge_csp.context import Context
    from edge_csp.embeddings import EmbeddingCache
    from edge_csp.errors import EdgeCspError
    from edge_csp.images import Picture, load_picture
    from edge_csp.model import VisionModel
    from edge_csp.opening import open_session
    from edge_csp.policy import Observation, Policy, make_policy
    from edge_csp.pruning import Pruning
    from edge_csp.sampling import Sampling
    from edge_csp.session import Session

__all__ = [
    "Budget",
    "Context",
    "EdgeCspError",
    "EmbeddingCache",
    "Observation",
    "Picture",
    "Policy",
    "Pruning",
    "Sampling",
    "Session",
    "VisionModel",
    "load_picture",
    "make_policy",
    "open_session",
    "parse_budget",
]

_MODULES = {
    "edge_csp.budget": ("Budget", "parse_budget"),
    "edge_csp.context": ("Context",),
    "edge_csp.embeddings": ("EmbeddingCache",),
    "edge_csp.errors": ("EdgeCspError",),
    "edge_csp.images": ("Picture", "load_picture"),
    "edge_csp.model": ("VisionModel",),
    "edge_csp.opening": ("open_session",),
    "edge_csp.policy": ("Observation", "Policy", "make_policy"),
    "edge_csp.pruning": ("Pruning",),
    "edge_csp.sampling": ("Sampling",),
    "edge_csp.session": ("Session",),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module 'edge_csp' has no attribute {name!r}")
