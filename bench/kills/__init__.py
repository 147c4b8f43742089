"""Runs that are killed at chosen points and resumed: each must end bit-identical to a run that was never killed, or refuse in one line."""
