"""Errors of this package."""


class UnsupportedModelError(ValueError):
    """
    M2PT cannot adapt a model, or a part of it.

    Raised before anything in the model is changed. The message names the module and the fields of [`M2PTConfig`] that
    help.
    """


class ConversionError(ValueError):
    """
    A checkpoint cannot be converted.

    The message names the file or the tensor, what was expected and what was found.
    """
