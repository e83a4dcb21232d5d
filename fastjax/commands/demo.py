"""`fastjax demo`: the main job on any machine."""

from fastjax.cli_flags import Call, parsed


def run(call: Call) -> None:
    """Runs the demo."""
    from fastjax.demo import DemoArgs, run_demo

    run_demo(parsed(DemoArgs, call))
