"""The shipped configurations for `accelerate launch`, as accelerate itself reads them, and the script for SLURM."""

import os
import subprocess
from pathlib import Path

import pytest
from accelerate.utils import FullyShardedDataParallelPlugin

from tests.accelerated import environment
from tests.command import CONF

SETTINGS = {
    "ddp": {"ACCELERATE_USE_FSDP": None, "ACCELERATE_USE_DEEPSPEED": None},
    "fsdp2": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"},
    "zero2": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
    "zero3": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
}


def test_every_configuration_is_tried() -> None:
    assert {file.stem for file in (CONF / "accelerate").glob("*.yaml")} == set(SETTINGS)


@pytest.mark.parametrize("sharding", SETTINGS)
def test_accelerate_takes_the_configuration(sharding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = environment(sharding)
    assert {name: found.get(name) for name in SETTINGS[sharding]} == SETTINGS[sharding]
    if sharding == "fsdp2":
        for name, value in found.items():
            monkeypatch.setenv(name, value)
        plugin = FullyShardedDataParallelPlugin()
        assert (plugin.fsdp_version, plugin.reshard_after_forward, plugin.cpu_ram_efficient_loading) == (2, True, False)


STAND_INS = {
    "scontrol": "echo first-machine; echo second-machine",
    "srun": 'shift; for node in 0 1; do SLURM_NODEID=$node "$@"; done',
    "accelerate": 'printf "%s\\n" "$*"',
    "python": "echo /conf",
}


@pytest.mark.parametrize("continued", [False, True])
def test_slurm_starts_one_launcher_on_every_machine(continued: bool, tmp_path: Path) -> None:
    for name, text in STAND_INS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    if continued:
        (tmp_path / "outputs" / "slurm-7").mkdir(parents=True)
        (tmp_path / "outputs" / "slurm-7" / "config.yaml").touch()
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "x", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "4"}
    variables = os.environ | slurm | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["bash", str(CONF / "accelerate" / "slurm.sh"), *([] if continued else ["experiment=sdft", "name=a b"])]
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, check=True)
    run = "resume=outputs/slurm-7" if continued else "experiment=sdft name=a b hydra.run.dir=outputs/slurm-7"
    assert done.stdout.splitlines() == [
        f"launch --config_file /conf/accelerate/fsdp2.yaml --num_machines 2 --machine_rank {node} --num_processes 8 "
        f"--main_process_ip first-machine --main_process_port 29500 -m selfdistill.train {run}"
        for node in range(2)
    ]
