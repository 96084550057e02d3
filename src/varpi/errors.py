"""The one exception that is the user's to read: bad input, said in a line."""


class VarpiError(ValueError):
    """Input that varpi refuses. The message is one line: what is wrong, where, and what to do."""
