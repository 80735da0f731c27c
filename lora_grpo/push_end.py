"""How a push ends where it does not end well."""

from lora_grpo.terminal import FailedError


class PushError(FailedError):
    """The Hub failed, or does not hold what was sent; the message says what to do."""


class PushRefused(ValueError):
    """The user, or the want of one to ask, said no; nothing was changed."""
