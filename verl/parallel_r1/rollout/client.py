"""LLM server client that keeps a rollout on one server.

verl's client asks the load balancer before every request. A rollout makes one request per segment, all with a shared
prefix: on one server the prefix cache serves them, and one question to the balancer is enough.
"""

from __future__ import annotations

from typing import Any

from ray.actor import ActorHandle
from verl.workers.rollout.llm_server import LLMServerClient


class RolloutClient(LLMServerClient):
    """``request_id`` names the rollout; call :meth:`finish` with it when the rollout is over."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._servers: dict[str, tuple[str, ActorHandle]] = {}

    async def _acquire_server(self, request_id: str, **extra: Any) -> tuple[str, ActorHandle]:
        if request_id not in self._servers:
            server = await super()._acquire_server(request_id, **extra)
            self._servers.setdefault(request_id, server)
        return self._servers[request_id]

    def _release_server(self, server_id: str, request_id: str | None = None) -> None:
        """Nothing: the server stays with the rollout."""

    def finish(self, request_id: str) -> None:
        """Give the rollout's server back to the balancer."""
        if request_id in self._servers:
            server_id, _ = self._servers.pop(request_id)
            super()._release_server(server_id, request_id=request_id)
