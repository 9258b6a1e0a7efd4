"""Errors of edge-csp.

Every error a user can cause is an `EdgeCspError` whose message is one line that names the file, the value and the
limit. Programs print the message and stop; they never need a traceback to say what is wrong.
"""

__all__ = [
    "BenchError",
    "BudgetError",
    "ContextError",
    "DownloadError",
    "EdgeCspError",
    "ImageError",
    "ModelError",
    "NativeError",
    "PolicyError",
    "SamplingError",
    "TemplateError",
]


class EdgeCspError(Exception):
    """Base of all errors of edge-csp.

    The message is always one printable line: line breaks in `message` become spaces, and other unprintable characters
    (of a hostile file name, say) are written as escapes.
    """

    def __init__(self, message: str) -> None:
        line = " ".join(part.strip() for part in message.splitlines())
        super().__init__("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line))


class ModelError(EdgeCspError):
    """A model file is missing, damaged, of the wrong kind, or does not fit the other file."""


class ImageError(EdgeCspError):
    """A picture is missing, damaged, too large, or of an unsupported format."""


class BudgetError(EdgeCspError):
    """A budget cannot be read, or cannot be met."""


class ContextError(EdgeCspError):
    """A prompt does not fit into the context."""


class DownloadError(EdgeCspError):
    """A model cannot be found on the Hugging Face hub or in its cache."""


class TemplateError(EdgeCspError):
    """A chat template is damaged, refuses the messages, or loses a picture."""


class PolicyError(EdgeCspError, ValueError):
    """A pruning policy is unknown, or cannot be used with these settings or cells."""


class SamplingError(EdgeCspError):
    """A sampling setting is out of range, or a grammar or JSON schema cannot be used."""


class NativeError(EdgeCspError):
    """The native library refused a call; `status` is its status code (negative)."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class BenchError(EdgeCspError):
    """A benchmark cannot be run as asked for."""
