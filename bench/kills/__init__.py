"""Kills runs at chosen points and resumes them: each must end bit-identical to an uninterrupted run, or refuse with one line."""
