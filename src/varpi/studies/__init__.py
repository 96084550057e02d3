"""Many runs under one protocol, on one page."""
