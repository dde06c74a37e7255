"""`RayHosts`: commands that run on the nodes of a Ray cluster, one in each bundle of a placement group.

Ray chooses the nodes, spread as far as they go, and starts a command again, on another node if need be, when it ends or
its node is lost. Everything else is as where somebody starts the same commands by hand: they join this host.
Needs the extra: pip install 'orcaserve[ray]'.
"""

from __future__ import annotations

import os
import subprocess  # an argument list, never a shell
import sys
import threading
from collections.abc import Sequence

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from orcaserve.core.config import ModelError

PLACE_SECONDS = 60.0  # until the cluster has room for all bundles
SECRET = "{secret}"  # stands in a command for the path of a file with the secret  # noqa: S105


class _Command:
    """An actor: owner of one process, with which it ends, and which ends with it."""

    def __init__(self, arguments: Sequence[str], secret: bytes) -> None:
        fd = os.memfd_create("orcaserve-secret")
        os.write(fd, secret)
        path = f"/proc/self/fd/{fd}"
        command = [sys.executable, "-m", "orcaserve", *(path if word == SECRET else word for word in arguments)]
        process = subprocess.Popen(command, pass_fds=(fd,), stdin=subprocess.DEVNULL)  # noqa: S603
        threading.Thread(target=lambda: os._exit(process.wait() or 1), daemon=True).start()

    def node(self) -> str:
        """The id of the node that it is on."""
        return str(ray.get_runtime_context().get_node_id())


def address_of(cluster: str) -> str:
    """Joins a cluster; this host's address in it. cluster: as `ray.init` takes it: "auto", or HOST:PORT.

    Raises ModelError, in one line, if there is none.
    """
    try:
        ray.init(address=cluster, namespace="orcaserve", log_to_driver=True, logging_level="ERROR")
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ModelError(f"there is no Ray cluster at {cluster}: {str(error).splitlines()[0]}") from error
    return str(ray.util.get_node_ip_address())


class RayHosts:
    """Owner of the placement group and its actors, and of this process's place in the cluster."""

    def __init__(self, commands: Sequence[Sequence[str]], cpus: int, secret: bytes) -> None:
        """commands: arguments of `orcaserve`. cpus: of each bundle.

        Raises ModelError, in one line, if there is too little room in the cluster.
        """
        self._group = placement_group([{"CPU": cpus}] * len(commands), strategy="SPREAD")
        if not self._group.wait(PLACE_SECONDS):
            free = ray.available_resources().get("CPU", 0)
            self.close()
            raise ModelError(
                f"the Ray cluster has no room for {len(commands)} × {cpus} CPUs ({free:g} are free): add nodes, or "
                "take fewer threads or replicas"
            )
        actor = ray.remote(max_restarts=-1, num_cpus=cpus)(_Command)
        self._actors = [
            actor.options(
                scheduling_strategy=PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=index)
            ).remote(list(arguments), secret)
            for index, arguments in enumerate(commands)
        ]

    @property
    def nodes(self) -> list[str]:
        """The id of the node that each command is on."""
        return list(ray.get([actor.node.remote() for actor in self._actors]))

    def close(self) -> None:
        """Ends the commands and leaves the cluster."""
        remove_placement_group(self._group)
        ray.shutdown()
