"""What `accelerate launch --config_file` puts into the environment of the processes that it starts."""

from collections.abc import Mapping

from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

from tests.command import CONF


def environment(sharding: str, processes: int = 2) -> Mapping[str, str]:
    """Of the shipped configuration `sharding`, without what the present environment has already."""
    import os

    file = str(CONF / "accelerate" / f"{sharding}.yaml")
    parser = launch_command_parser()
    words = ["--config_file", file, "--num_processes", str(processes), "--main_process_port", "0"]  # any that is free
    args = parser.parse_args([*words, "-m", "selfdistill.train"])
    args, defaults, _ = _validate_launch_command(args)
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        _, found = prepare_deepspeed_cmd_env(args)
    else:
        found = prepare_multi_gpu_env(args)
    return {name: value for name, value in found.items() if os.environ.get(name) != value}
