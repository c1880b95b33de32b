"""How Ray's workers learn which ranks they are; the ranks themselves join each other (ranks.py).

Ray's own TorchConfig would import torch in the driver and in the controller, one after the other, before
any worker is asked for, and after a fault ask ranks that wait for a lost one to leave their group.
"""

from __future__ import annotations

import os

import ray.train
from ray.train._internal.utils import get_address_and_port
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.execution.callback import RayTrainCallback
from ray.train.v2._internal.execution.worker_group import WorkerGroup
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer


class RanksTrainer(DataParallelTrainer):  # type: ignore[misc]
    """Without what serves datasets of Ray to the workers: each group would start a process for it, for seconds."""

    def _create_default_callbacks(self) -> list[RayTrainCallback]:
        return [made for made in super()._create_default_callbacks() if not isinstance(made, DatasetsCallback)]


class RanksConfig(BackendConfig):  # type: ignore[misc]
    """For DataParallelTrainer: every worker is a rank."""

    @property
    def backend_cls(self) -> type[Backend]:
        return RanksBackend


class RanksBackend(Backend):  # type: ignore[misc]
    """In the controller's process."""

    share_cuda_visible_devices = True
    """A local rank is the number of a device among those of all ranks of the node."""

    def on_start(self, worker_group: WorkerGroup, backend_config: BackendConfig) -> None:
        address, port = worker_group.execute_single(0, get_address_and_port)
        worker_group.execute(_tell_rank, address, port)


def _tell_rank(address: str, port: int) -> None:
    context = ray.train.get_context()
    os.environ.update(
        RANK=str(context.get_world_rank()),
        LOCAL_RANK=str(context.get_local_rank()),
        WORLD_SIZE=str(context.get_world_size()),
        LOCAL_WORLD_SIZE=str(context.get_local_world_size()),
        MASTER_ADDR=address,
        MASTER_PORT=str(port),
    )
