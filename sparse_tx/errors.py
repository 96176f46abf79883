"""The one exception for mistakes that a user can mend."""


class UserError(Exception):
    """A mistake in the command, the config or the user's files: the message names the value and what would be right."""
