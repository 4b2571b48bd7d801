"""Kernels for the hot regions of a Program, and their backends. Import as `graphopt.codegen`."""

if __name__ != "graphopt.codegen":
    raise ImportError(f"import this package as graphopt.codegen, not as {__name__}")
