"""Errors of this package."""


class UnsupportedModelError(ValueError):
    """
    M2PT cannot adapt a model, or a part of it.

    Raised before anything in the model is changed, wherever the code of the model tells; otherwise when it is called.
    The message names the module and the fields of [`M2PTConfig`] that help.
    """


class ConversionError(ValueError):
    """
    A checkpoint cannot be converted.

    The message names the file or the tensor, what was expected and what was found.
    """


class AdapterFileError(ValueError):
    """
    A file of a saved adapter is damaged, or is no such file.

    The message names the file and what is wrong with it. The model is as it was.
    """
