"""Benchmarks, and the plain loop they compare with."""
