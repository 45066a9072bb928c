"""Other libraries, run in environments of their own to be compared with."""
