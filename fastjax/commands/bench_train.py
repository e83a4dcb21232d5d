"""`fastjax bench-train`: the training step on random weights, timed."""

from fastjax.cli_flags import Call, parsed, write_yaml


def run(call: Call) -> None:
    """Prints the measurement as YAML."""
    from fastjax.api.benchmark import BenchmarkArgs, run_benchmark

    write_yaml(run_benchmark(parsed(BenchmarkArgs, call)))
