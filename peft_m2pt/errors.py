"""The errors that this package raises."""

from __future__ import annotations

from collections.abc import Sequence

from .tested import newer_than_tested


MAX_PROBLEMS = 8


def list_problems(problems: Sequence[str]) -> str:
    """Lists problems, one per line, up to `MAX_PROBLEMS` of them."""
    more = [f"and {len(problems) - MAX_PROBLEMS} more"] if len(problems) > MAX_PROBLEMS else []
    return "\n".join(f"- {problem}" for problem in [*problems[:MAX_PROBLEMS], *more])


class M2PTError(ValueError):
    """
    Base class of the errors of this package.

    If an installed package is newer than the tested versions, the message ends with a line that says so.
    """

    @property
    def reason(self) -> str:
        """The message without that line, to quote in another message."""
        return super().__str__()

    def __str__(self) -> str:
        line = newer_than_tested()
        if line is None:
            return self.reason
        # At the end only, even if this error quotes another one.
        return self.reason.replace(f"\n{line}", "") + f"\n{line}"


class UnsupportedModelError(M2PTError):
    """
    M2PT cannot adapt a model, or a part of it.

    Raised before anything in the model is changed if the code of the model shows it, otherwise when the model is
    called. The message names the module and the fields of [`M2PTConfig`] that help.
    """


class ConversionError(M2PTError):
    """
    A checkpoint cannot be converted.

    The message names the file or the tensor, what was expected and what was found.
    """


class BundleError(M2PTError):
    """
    A base model and an adapter cannot be bundled.

    The message names the field, the file or the tensor. Nothing has been written.
    """


class AdapterFileError(M2PTError):
    """
    A file of a saved adapter is damaged, or not a file of an adapter.

    The message names the file and what is wrong with it. The model is as it was.
    """
