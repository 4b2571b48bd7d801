"""What a Program costs on a Device: time, memory, traffic. Import as `graphopt.cost_models`."""

if __name__ != "graphopt.cost_models":
    raise ImportError(f"import this package as graphopt.cost_models, not as {__name__}")
