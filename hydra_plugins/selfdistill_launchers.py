"""Hydra's plugins of this program, in the one namespace where Hydra looks for them; they work in selfdistill.runs."""

from collections.abc import Sequence
from typing import Any

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

try:
    from hydra_plugins.hydra_submitit_launcher.submitit_launcher import BaseSubmititLauncher
except ImportError:  # it comes with the extra `sweep`
    BaseSubmititLauncher = object


class ProcessLauncher(Launcher):
    """Each job in a process of its own, with a GPU of its own where there are any.

    Args:
        n_jobs: jobs at once; None takes one for each GPU, or one on the CPU.
    """

    def __init__(self, n_jobs: int | None = None) -> None:
        self.n_jobs = n_jobs

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from selfdistill.runs.sweep_launch import launch_forked  # plugins are imported by every command

        return launch_forked(
            self.hydra_context, self.task_function, self.config, job_overrides, initial_job_idx, self.n_jobs
        )


class SlurmLauncher(BaseSubmititLauncher):
    """hydra-submitit-launcher's, of whose jobs one that fails or is killed does not end the others' record."""

    _EXECUTOR = "slurm"

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        import submitit
        from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf

        from selfdistill.runs.sweep_launch import launch_submitted

        params: dict[str, Any] = dict(self.params)
        folder, retries = params.pop("submitit_folder"), params.pop("max_num_timeout", 0)
        own = {f"{self._EXECUTOR}_max_num_timeout": retries}
        executor = submitit.AutoExecutor(folder=folder, cluster=self._EXECUTOR, **own)
        shared = BaseQueueConf.__dataclass_fields__
        executor.update_parameters(
            **{name if name in shared else f"{self._EXECUTOR}_{name}": value for name, value in params.items()}
        )
        return launch_submitted(self, executor, job_overrides, initial_job_idx)


class LocalLauncher(SlurmLauncher):
    """The same on this machine, to try it."""

    _EXECUTOR = "local"
