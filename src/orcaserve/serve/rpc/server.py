"""`start`: the gRPC server in the frontend's event loop: the service, health (grpc.health.v1), reflection and keys."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from orcaserve.serve import errors
from orcaserve.serve.frontend import Frontend
from orcaserve.serve.keys import Keys
from orcaserve.serve.rpc import shapes
from orcaserve.serve.rpc.service import Service, metadata_of, refuse

_HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
_LOOK_SECONDS = 0.5  # how often Watch looks whether something has changed


async def start(frontend: Frontend) -> tuple[Any, int]:
    """A server that listens, and its port. Raises OSError if it cannot listen there, or read the certificate."""
    options = frontend.options
    keys = Keys(options.api_keys)
    server = grpc.aio.server(
        interceptors=(_Lock(keys),),
        options=(("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", options.max_body_bytes)),
    )
    service = Service(frontend, keys)
    methods = {
        "Generate": grpc.unary_stream_rpc_method_handler(
            service.generate,
            request_deserializer=shapes.GenerateRequest.FromString,
            response_serializer=shapes.GenerateReply.SerializeToString,
        ),
        "Abort": grpc.unary_unary_rpc_method_handler(
            service.abort,
            request_deserializer=shapes.AbortRequest.FromString,
            response_serializer=shapes.AbortReply.SerializeToString,
        ),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(shapes.SERVICE, methods),))
    health_pb2_grpc.add_HealthServicer_to_server(_Health(frontend), server)
    reflection.enable_server_reflection((shapes.SERVICE, _HEALTH, reflection.SERVICE_NAME), server)
    host = f"[{options.host}]" if ":" in options.host else options.host
    address = f"{host}:{options.grpc_port or 0}"
    try:
        if options.ssl_certfile is not None and options.ssl_keyfile is not None:
            pair = Path(options.ssl_keyfile).read_bytes(), Path(options.ssl_certfile).read_bytes()
            port = server.add_secure_port(address, grpc.ssl_server_credentials([pair]))
        else:
            port = server.add_insecure_port(address)
    except RuntimeError:
        raise OSError(f"gRPC cannot listen on {address}") from None
    if not port:
        raise OSError(f"gRPC cannot listen on {address}")
    await server.start()
    return server, port


class _Lock(grpc.aio.ServerInterceptor):
    """Lets calls in that have a valid API key, and those of probes."""

    def __init__(self, keys: Keys) -> None:
        self._keys = keys

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], details: Any) -> Any:
        authorization = metadata_of(details.invocation_metadata).get(b"authorization", b"")
        is_probe = details.method.startswith(f"/{_HEALTH}/")
        if is_probe or not self._keys.are_required or self._keys.tenant(authorization) is not None:
            return await continuation(details)
        return grpc.unary_unary_rpc_method_handler(_turn_away)


async def _turn_away(request: Any, context: Any) -> None:
    await refuse(context, errors.unauthorized())


class _Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """Serving means that requests are taken and that an engine makes progress: /ready and /health together."""

    def __init__(self, frontend: Frontend) -> None:
        self._frontend = frontend

    async def Check(self, request: Any, context: Any) -> Any:
        status = self._status(request.service)
        if status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN:
            await context.abort(grpc.StatusCode.NOT_FOUND, "There is no such service.")
        return health_pb2.HealthCheckResponse(status=status)

    async def Watch(self, request: Any, context: Any) -> None:
        told = None
        while True:
            status = self._status(request.service)
            if status != told:
                await context.write(health_pb2.HealthCheckResponse(status=status))
                told = status
            await asyncio.sleep(_LOOK_SECONDS)

    def _status(self, service: str) -> int:
        kinds = health_pb2.HealthCheckResponse
        if service not in ("", shapes.SERVICE):
            return int(kinds.SERVICE_UNKNOWN)
        is_ready = self._frontend.state in ("ready", "restarting") and not self._frontend.is_stuck
        return int(kinds.SERVING if is_ready else kinds.NOT_SERVING)
