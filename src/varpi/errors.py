"""What is the user's to read: bad input, said in a line, and a stop that was asked for."""


class VarpiError(ValueError):
    """Input that varpi refuses. The message is one line: what is wrong, where, and what to do.

    Several mistakes found at once are several arguments, a line each.
    """

    def __str__(self) -> str:
        return "\n".join(map(str, self.args))


class Stopped(Exception):
    """A run was stopped by a signal and saved what it had; the message says where and how to go on."""

    def __init__(self, signal: int, message: str) -> None:
        super().__init__(signal, message)
        self.signal = int(signal)

    def __str__(self) -> str:
        return self.args[1]


def printable(text: object) -> str:
    """One line of a message, with control characters and undecodable bytes as escapes.

    A file's name can hold anything; what is printed must neither move a terminal's cursor nor forge a line.
    """
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))
