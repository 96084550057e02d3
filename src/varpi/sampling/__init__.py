"""Generating tokens free-running: the settings as one object, and `generate`."""
