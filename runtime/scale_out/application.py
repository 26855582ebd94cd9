"""The application for Ray Serve: an ingress, and replicas that each have a server process.

`serve run belle_compile.runtime.scale_out.application:app engine=artifacts/belle-7b-cpu`, or a Serve configuration file with
`import_path: belle_compile.runtime.scale_out.application:app` and `args`, runs it; so does belle-run scale-out.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

from prometheus_client.parser import text_string_to_metric_families
from ray import serve
from ray.exceptions import RayActorError, RayError
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig
from ray.serve.exceptions import DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle

from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.scale_out import autoscaling
from belle_compile.runtime.scale_out.ingress import Ingress
from belle_compile.runtime.scale_out.options import Arguments
from belle_compile.runtime.scale_out.process import Forwarded, Head, Lost, ServerProcess, serve_command
from belle_compile.runtime.server.metrics import PREFIX

_ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
_POLICY = "belle_compile.runtime.scale_out.autoscaling:QueueTimePolicy"
_SURGE_PERCENT = 25  # of the replicas, rounded up, that are started before old ones go
_HEALTH_PERIOD_S = 2.0
_STOP_S = 15.0  # beyond the time to drain, for the process to end
_INGRESS_CPUS = 0.1
_INGRESS_REQUESTS = 4096
_LOOK_BACK_S = 15.0
_HEADER = "X-Replica"


class ReplicaDeployment:
    """A replica: one server process of the engine, or the launcher of its ranks."""

    async def __init__(self, arguments: Arguments) -> None:  # type: ignore[misc]  # Ray awaits it
        self._id = serve.get_replica_context().replica_id.unique_id
        self._queue_times = autoscaling.QueueTimes()
        self._stop_s = arguments.server_options().drain_timeout_s + _STOP_S
        self._server = ServerProcess(serve_command(arguments.engine, arguments.serve))
        try:
            await self._server.wait_ready(arguments.options.start_timeout_s)
        except EngineError as error:
            await self._server.stop(self._stop_s)
            raise RuntimeError(str(error)) from None  # Ray shows the sentence of one that can be made from it

    async def forward(self, request: Forwarded) -> AsyncIterator[Head | bytes | Lost]:
        """Yield the response of the server, and in its head which replica this is."""
        async for message in self._server.forward(request):
            yield replace(message, headers=(*message.headers, (_HEADER, self._id))) if isinstance(message, Head) else message

    async def check_health(self) -> None:
        """Raise `RuntimeError` where the server has ended or is not ready; Ray then replaces the replica."""
        if not await self._server.ready():
            raise RuntimeError("the server of the replica has ended or is not ready")

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """The mean queue time of the requests that ended since the last call."""
        samples = _samples(await self._server.text("/metrics"))
        name = f"{PREFIX}request_queue_time_seconds"
        total_s, requests = samples[f"{name}_sum"], samples[f"{name}_count"]
        return {autoscaling.QUEUE_TIME: self._queue_times.update(total_s, requests, samples[f"{PREFIX}num_requests_waiting"])}

    async def __del__(self) -> None:
        """Called by Ray once the requests of the replica have ended."""
        await self._server.stop(self._stop_s)


class IngressDeployment:
    """An entrance as Ray Serve knows it."""

    def __init__(self, replicas: DeploymentHandle, arguments: Arguments) -> None:
        self._replicas, self._arguments = replicas.options(stream=True), arguments

    def __serve_build_asgi_app__(self) -> Ingress:
        return Ingress(self._route, self._arguments.options.affinity_chars, self._arguments.server_options().max_body_bytes)

    async def _route(self, request: Forwarded, key: str) -> AsyncIterator[Head | bytes | Lost]:
        handle = self._replicas.options(session_id=key) if key else self._replicas
        try:
            async for message in handle.forward.remote(request):
                yield message
        except (ReplicaUnavailableError, DeploymentUnavailableError):
            yield Lost("There is no replica.", sent=False)
        except RayActorError:
            yield Lost("The replica was lost.", sent=True)
        except RayError as error:
            yield Lost(f"The replica failed ({type(error).__name__}).", sent=True)


def _samples(text: str) -> dict[str, float]:
    """The values of metrics in Prometheus' text format by their names; those with several values have their sums."""
    samples: dict[str, float] = {}
    for metric in text_string_to_metric_families(text):
        for sample in metric.samples:
            samples[sample.name] = samples.get(sample.name, 0.0) + sample.value
    return samples


def app(arguments: dict[str, Any]) -> serve.Application:
    """Return the application for `engine`, a list `serve` of options for belle-run serve, and `options` of scale-out."""
    return build(Arguments.from_plain(arguments))


def build(arguments: Arguments) -> serve.Application:
    """Return the application."""
    options, drain_s = arguments.options, arguments.server_options().drain_timeout_s
    least, most = options.bounds
    policy = AutoscalingPolicy(
        policy_function=_POLICY,
        policy_kwargs={"target_s": options.target_queue_time_s, "max_requests": options.max_requests},
    )
    replicas = serve.deployment(
        name="replicas",
        autoscaling_config=AutoscalingConfig(
            min_replicas=least, max_replicas=most, initial_replicas=least, policy=policy,
            upscale_delay_s=options.upscale_delay_s, downscale_delay_s=options.downscale_delay_s,
            look_back_period_s=_LOOK_BACK_S,
        ),
        request_router_config=RequestRouterConfig(
            request_router_class=_ROUTER, request_router_kwargs={"num_fallback_replicas": most - 1}
        ),
        max_ongoing_requests=options.max_requests,
        max_surge_percent=_SURGE_PERCENT,
        ray_actor_options={"num_cpus": options.cpus, "num_gpus": options.gpus},
        health_check_period_s=_HEALTH_PERIOD_S,
        graceful_shutdown_timeout_s=2 * drain_s + 2 * _STOP_S,  # Ray waits for requests, then the server does
        graceful_shutdown_wait_loop_s=1.0,
    )(ReplicaDeployment)  # fmt: skip
    ingress = serve.deployment(
        name="ingress",
        num_replicas=options.ingresses,
        max_ongoing_requests=_INGRESS_REQUESTS,
        max_surge_percent=_SURGE_PERCENT,
        ray_actor_options={"num_cpus": _INGRESS_CPUS},
        graceful_shutdown_timeout_s=drain_s + _STOP_S,
    )(serve.ingress()(IngressDeployment))
    return ingress.bind(replicas.bind(arguments), arguments)
