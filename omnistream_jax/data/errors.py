"""The one error that bad input data raises."""


class DataError(ValueError):
    """Data that cannot be used: a missing, empty, truncated or wrong file, or a setting that does not fit it.

    The message names the file or the field, says what was found and what was expected; it is meant to be
    shown to a person as it is, without a stack trace.
    """
