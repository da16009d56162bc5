"""The error that is a user's to mend."""


class UserError(Exception):
    """Something the user asked for cannot be done; the message is one line that says what would do."""
