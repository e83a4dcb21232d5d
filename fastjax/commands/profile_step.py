"""`fastjax profile-step`: the time of one training step by kind of kernel."""

from fastjax.cli_flags import Call, parsed, write_yaml


def run(call: Call) -> None:
    """Prints the measurement as YAML."""
    from fastjax.api.step_profile import ProfileArgs, run_profile

    write_yaml(run_profile(parsed(ProfileArgs, call)))
