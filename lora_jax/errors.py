"""The one exception that means "your input can't be used as it is"."""


class InputError(ValueError):
    """Something the caller passed in can't be used.

    The message names every offender at once and says what to do about each. The command
    line prints it without a traceback and exits with status 2; library callers can catch it
    as a ``ValueError``.

    >>> raise InputError("rank must be at least 1, got 0: pass LoraConfig(rank=8)")
    Traceback (most recent call last):
    ...
    lora_jax.errors.InputError: rank must be at least 1, got 0: pass LoraConfig(rank=8)
    """
