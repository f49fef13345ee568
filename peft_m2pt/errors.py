"""Errors of this package."""

from .tested import newer_than_tested


class M2PTError(ValueError):
    """
    What the errors of this package are.

    Where an installed package is newer than all versions that this one was tested with, messages end with a line that
    says so, since that may be why.
    """

    @property
    def reason(self) -> str:
        """The message without that line, to be quoted in another text."""
        return super().__str__()

    def __str__(self) -> str:
        line = newer_than_tested()
        if line is None:
            return self.reason
        # Once, and at the end, also where this error quotes another one.
        return self.reason.replace(f"\n{line}", "") + f"\n{line}"


class UnsupportedModelError(M2PTError):
    """
    M2PT cannot adapt a model, or a part of it.

    Raised before anything in the model is changed, wherever the code of the model tells; otherwise when it is called.
    The message names the module and the fields of [`M2PTConfig`] that help.
    """


class ConversionError(M2PTError):
    """
    A checkpoint cannot be converted.

    The message names the file or the tensor, what was expected and what was found.
    """


class BundleError(M2PTError):
    """
    A base model and an adapter cannot be bundled.

    The message names the field, the file or the tensor that is in the way. Nothing has been written.
    """


class AdapterFileError(M2PTError):
    """
    A file of a saved adapter is damaged, or is no such file.

    The message names the file and what is wrong with it. The model is as it was.
    """
