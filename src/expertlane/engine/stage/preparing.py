"""Prepares the weights of a place in another layout, on the rank that will have it."""

import os
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from expertlane.engine.comm.clocks import clock_for
from expertlane.engine.comm.mesh import ParallelMesh
from expertlane.engine.comm.progress import NO_LAYER
from expertlane.engine.comm.recorder import Recorder
from expertlane.engine.model.checkpoint import Checkpoint
from expertlane.engine.model.transformer import StageParts, TransformerStage
from expertlane.engine.model.weights import (
    CheckpointWeights,
    HeldWeights,
    SeededWeights,
    WeightSource,
)
from expertlane.engine.ops.backend import Platform
from expertlane.engine.ranks.commands import (
    DropPreparation,
    PreparationProgress,
    Prepare,
    StageSpec,
)
from expertlane.engine.stage.context import RankContext
from expertlane.spec.names import Origin, Stage

_NICE = 10  # of a rank that loads while others serve


def weight_source(spec: StageSpec, platform: Platform, touch: Callable[[], None]) -> WeightSource:
    """The source of a rank's weights: seeded ones, or a checkpoint.

    Args:
        touch: see `WeightSource`.
    """
    of_rank = platform.dtype, platform.device, touch
    given = spec.model, *of_rank, spec.weights, spec.activations
    if spec.checkpoint is None:
        return SeededWeights(*given, spec.seed)
    checkpoint = Checkpoint(Path(spec.checkpoint), spec.model, platform.device)
    return CheckpointWeights(*given, checkpoint=checkpoint)


def parts_of(context: RankContext, spec: StageSpec, place: int, source: WeightSource) -> StageParts:
    """The maker of a stage's parts for a place in a layout, without communication.

    Args:
        place: the rank in the layout.
    """
    model, clock = spec.model, clock_for(context.platform.device)
    sizes = place, model.num_hidden_layers, model.num_experts
    recorder = Recorder(*sizes, context.progress, clock, spec.layout.world_size)
    mesh = ParallelMesh(spec.layout, None, place, spec.ranks_per_node, recorder)
    return StageParts(model, spec.placements, source, mesh)


class _SliceEnded(Exception):
    """The time of this slice is over, or there is no more memory."""


class Preparation:
    """The weights of one place of a layout, made part by part.

    A part that was not finished is begun again, and reuses the weights that were made for it.
    """

    def __init__(self, context: RankContext, spec: StageSpec, place: int) -> None:
        self.spec, self.place = spec, place
        self._source = weight_source(spec, context.platform, context.progress.touch)
        self._source.is_ahead, self._source.before_make = True, self._before_make
        parts = parts_of(context, spec, place, self._source)
        self._to_make: deque[Callable[[], Any]] = deque(
            [partial(parts.layer, layer) for layer in parts.layers]
        )
        self._to_make += [parts.embedding, parts.head]
        self._num_parts = len(self._to_make)
        self._until_s, self._most_bytes = 0.0, 0.0
        self._is_full = self._has_begun = False

    def go_on(
        self, stage: TransformerStage | None, most_s: float | None, most_bytes: int | None
    ) -> PreparationProgress:
        """Make the parts that are missing.

        Args:
            stage: the rank's present stage, whose weights are reused; None without one.
            most_s, most_bytes: see `Prepare`.
        """
        began_s = time.perf_counter()
        self._until_s = began_s + (float("inf") if most_s is None else most_s)
        self._most_bytes = float("inf") if most_bytes is None else most_bytes
        self._is_full = self._has_begun = False
        source = self._source
        source.given = {Origin.AHEAD: source.held}
        if stage is not None:
            source.given[Origin.KEPT] = stage.held_weights()
        try:
            while self._to_make:
                self._to_make[0]()
                self._to_make.popleft()
        except _SliceEnded:
            pass
        source.given = {}
        share = 1.0 if self._is_full else 1 - len(self._to_make) / self._num_parts
        return PreparationProgress(share, source.held.num_bytes, time.perf_counter() - began_s)

    def _before_make(self) -> None:
        self._is_full = self._source.held.num_bytes >= self._most_bytes
        if self._is_full or (self._has_begun and time.perf_counter() >= self._until_s):
            raise _SliceEnded
        self._has_begun = True

    def take(self) -> HeldWeights:
        """The weights made so far."""
        return self._source.held


def prepare(context: RankContext, command: Prepare) -> PreparationProgress:
    """Make the weights of a place that this rank will have, reusing those that it holds."""
    spec, place, given = command.spec, command.place, (command.most_s, command.most_bytes)
    context.progress.enter(Stage.SETUP, NO_LAYER)
    made: Preparation | None = context.preparation
    if made is None or made.place != place or made.spec != spec:
        made = context.preparation = Preparation(context, spec, place)
    if context.deployed is not None:
        prepared = made.go_on(context.deployed.stage, *given)
    else:
        prepared = _beside_others(lambda: made.go_on(None, *given))
    context.progress.enter(Stage.IDLE, NO_LAYER)
    return prepared


def _beside_others(make: Callable[[], PreparationProgress]) -> PreparationProgress:
    """Run `make` in a thread with a higher niceness, which a thread cannot lower again."""

    def be_nicer() -> None:
        thread_id = threading.get_native_id()
        nice = min(19, os.getpriority(os.PRIO_PROCESS, thread_id) + _NICE)
        os.setpriority(os.PRIO_PROCESS, thread_id, nice)

    with ThreadPoolExecutor(1, initializer=be_nicer) as thread:
        return thread.submit(make).result()


def drop_prepared(context: RankContext, command: DropPreparation) -> None:
    """Free the weights that `prepare` has made."""
    context.preparation = None
