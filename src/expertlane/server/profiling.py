"""HTTP routes that start and stop torch's profiler on a server's ranks."""

from collections.abc import Callable
from functools import partial

from fastapi import FastAPI, Response

from expertlane.engine.profiler import Profiler, ProfileTraces
from expertlane.errors import UserError
from expertlane.server.errors import ApiError, json_response
from expertlane.server.service import Service, ended


def add_profiling(app: FastAPI, service: Service) -> None:
    """Add `/start_profile` and `/stop_profile`; without `--profile-dir` they answer 404."""

    def profiler() -> Profiler:
        service.check_running()
        if (found := service.model.profiler) is None:
            text = "this server writes no torch profiler traces; start it with --profile-dir DIR"
            raise ApiError(404, text, code="no_profiler")
        return found

    async def run(action: Callable[[], None]) -> None:
        """Run an action between two steps; ranks that were lost are replaced."""
        try:
            await service.engine.between_steps(partial(service.model.engine.guarded, action))
        except UserError as error:
            raise ApiError(409, str(error), code="not_profiled") from None
        except Exception as error:
            raise ended(error) from None

    @app.post("/start_profile")
    async def start_profile() -> Response:
        """Start torch's profiler on all ranks; it slows steps."""
        await run(profiler().start)
        return json_response({"is_profiling": True})

    @app.post("/stop_profile")
    async def stop_profile() -> Response:
        """Stop the profiler, and write each rank's trace to a new subfolder of `--profile-dir`."""
        own, found = profiler(), list[ProfileTraces]()
        await run(lambda: found.append(own.stop()))
        if not found:
            raise ApiError(409, "ranks were lost meanwhile; profile again", code="not_profiled")
        profiled = found[0]
        traces = profiled.traces
        return json_response(
            {
                "is_profiling": False,
                "folder": profiled.folder.name,
                "traces": {rank: each.name for rank, each in traces.items() if each.name},
                "num_steps": {rank: each.num_steps for rank, each in traces.items() if each.name},
                "missing": {rank: each.why_not for rank, each in traces.items() if each.why_not},
            }
        )
