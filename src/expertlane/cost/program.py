"""A step plan as programs: what every pipeline stage does with every part of a micro-batch."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

import numpy as np

from expertlane.balance.deployed import Placements
from expertlane.balance.placement import Placement
from expertlane.cost.batch_sizes import PartSizes
from expertlane.cost.copies import CopyChoice
from expertlane.cost.dispatch_counts import DispatchCounts, count_dispatch
from expertlane.cost.layer import embedding_steps, head_steps, layer_steps
from expertlane.cost.number_types import NumberTypes
from expertlane.cost.operation import OUTSIDE, HandOver, Ints, Step
from expertlane.cost.routing import RoutingSource
from expertlane.cost.stage_mesh import StageMesh
from expertlane.schedule.plan import Batch, StepPlan
from expertlane.spec.deployment import DispatchForm, PayloadType
from expertlane.spec.dispatch_table import DispatchMode, DispatchTable
from expertlane.spec.layout import Layout
from expertlane.spec.model import ModelConfig


@dataclass(frozen=True, eq=False)
class Section:
    """The steps of a layer, or of embedding or head.

    Attributes:
        layer: hidden layer, or `OUTSIDE`.
        steps: layers that do the same share one tuple, so that its steps may name another layer.
        counts: how tokens spread over experts; None where there are none.
    """

    layer: int
    steps: tuple[Step, ...]
    counts: DispatchCounts | None = None


@dataclass(frozen=True, eq=False)
class PartProgram:
    """A part of a micro-batch on one pipeline stage."""

    sections: tuple[Section, ...]

    def steps(self) -> Iterator[Step]:
        """All steps in order, each with its own layer's number."""
        for section in self.sections:
            for step in section.steps:
                yield step if step.layer == section.layer else replace(step, layer=section.layer)


@dataclass(frozen=True, eq=False)
class StageProgram:
    """A micro-batch on one pipeline stage.

    Attributes:
        parts: run in turn, switching at every transfer, where there are two.
        hand_over: to the next stage, when all parts are done; None on the last.
    """

    mesh: StageMesh
    micro_batch: int
    parts: tuple[PartProgram, ...]
    hand_over: HandOver | None


@dataclass(frozen=True, eq=False)
class StepProgram:
    """A step of one replica.

    Attributes:
        stages: [pp][num_micro_batches].
    """

    stages: tuple[tuple[StageProgram, ...], ...]


class ProgramBuilder:
    """Makes programs of step plans for one deployment.

    Args:
        placements: [num_hidden_layers]; None for a dense layer.
        dispatch: form and overlap by the number of tokens.
        block_size: positions of a block of the paged cache.
    """

    def __init__(
        self,
        model: ModelConfig,
        layout: Layout,
        placements: Placements,
        *,
        types: NumberTypes | None = None,
        dispatch: DispatchTable | None = None,
        payload: PayloadType = "model",
        ranks_per_node: int = 8,
        block_size: int = 16,
    ) -> None:
        layout.check_model(model)
        self._model = model
        self._layout = layout
        self._types = NumberTypes() if types is None else types
        self._dispatch = DispatchTable.fixed("all_to_all") if dispatch is None else dispatch
        self._payload = payload
        self._ranks_per_node = ranks_per_node
        self._block_size = block_size
        self._meshes: dict[tuple[int, int], StageMesh] = {}
        self.place(placements)

    def place(self, placements: Placements) -> None:
        """Go over to other placements of the experts."""
        self._placements = placements
        self._choices: dict[tuple[int, int], CopyChoice] = {}  # by placement and stage

    def mesh(self, replica: int, pp_rank: int) -> StageMesh:
        """A pipeline stage of a replica."""
        key = replica, pp_rank
        if key not in self._meshes:
            self._meshes[key] = StageMesh.of(self._layout, *key, self._ranks_per_node)
        return self._meshes[key]

    def choice(self, placement: Placement, mesh: StageMesh) -> CopyChoice:
        """How a stage's ranks choose among copies."""
        key = id(placement), mesh.first_rank
        if key not in self._choices:
            self._choices[key] = CopyChoice(placement, mesh)
        return self._choices[key]

    def mode(self, micro_batch: tuple[Batch, ...]) -> DispatchMode:
        """How a micro-batch runs; all ranks choose alike."""
        most = max(batch.num_tokens for batch in micro_batch)
        can_split = any(batch.num_seqs > 1 for batch in micro_batch)
        return self._dispatch.choose(-(-most // self._layout.tp), can_split)

    def build(
        self,
        plan: StepPlan,
        routing: RoutingSource,
        *,
        first_token: int = 0,
        sampled: Collection[int] = (),
    ) -> StepProgram:
        """The programs of a step.

        Args:
            first_token: tokens computed before, where the routing goes on.
            sampled: sequences that ask for more than their likeliest token, at this step.
        """
        by_micro_batch = []
        before = np.zeros(self._layout.stage_size, dtype=np.int64)
        for micro_batch in plan.micro_batches:
            mode = self.mode(micro_batch)
            by_dp_rank = [batch.split(1 + mode.overlap) for batch in micro_batch]
            parts = []
            for batches in zip(*by_dp_rank, strict=True):
                if any(batch.num_tokens for batch in batches):
                    sizes = PartSizes.of(batches, self._layout.tp, sampled, self._block_size)
                    chosen = _Chosen(routing, first_token, before, sizes.owned)
                    parts.append((sizes, chosen))
                    before = before + sizes.owned
            by_micro_batch.append((mode.form, parts))
        return StepProgram(
            tuple(
                tuple(
                    self._stage(self.mesh(plan.replica, pp_rank), number, form, parts, plan.record)
                    for number, (form, parts) in enumerate(by_micro_batch)
                )
                for pp_rank in range(self._layout.pp)
            )
        )

    def _stage(
        self,
        mesh: StageMesh,
        micro_batch: int,
        form: DispatchForm,
        parts: "list[tuple[PartSizes, _Chosen]]",
        record: bool,
    ) -> StageProgram:
        programs = tuple(self._part(mesh, form, *part, record=record) for part in parts)
        pp_rank = mesh.first_rank % self._layout.replica_size // self._layout.stage_size
        hand_over = None
        if parts and pp_rank < self._layout.pp - 1:
            owned = np.sum([sizes.owned for sizes, _ in parts], axis=0)
            row_bytes = self._model.hidden_size * self._types.activation_bytes
            ranks = mesh.first_rank + mesh.size + np.arange(mesh.size)
            there = ranks // self._ranks_per_node
            hand_over = HandOver(owned * row_bytes, there != mesh.node)
        return StageProgram(mesh, micro_batch, programs, hand_over)

    def _part(
        self,
        mesh: StageMesh,
        form: DispatchForm,
        sizes: PartSizes,
        chosen: "_Chosen",
        *,
        record: bool,
    ) -> PartProgram:
        model, types, layout = self._model, self._types, self._layout
        pp_rank = mesh.first_rank % layout.replica_size // layout.stage_size
        sections = []
        if pp_rank == 0:
            sections.append(Section(OUTSIDE, embedding_steps(model, types, mesh, sizes)))
        built: dict[object, Section] = {}
        for layer in layout.layers_of_stage(model.num_hidden_layers, pp_rank):
            placement = self._placements[layer]
            sample = None if placement is None else (id(placement), chosen.routing.sample_of(layer))
            key = model.window_of_layer(layer), sample
            if key not in built:
                counts = None
                if placement is not None:
                    counts = count_dispatch(
                        chosen.topk_ids(layer),
                        sizes.owned,
                        self.choice(placement, mesh),
                        mesh,
                        by_node=form == "hierarchical" and layout.ep > 1,
                        fan_out=record,
                    )
                steps = layer_steps(model, types, mesh, sizes, layer, counts, form, self._payload)
                built[key] = Section(layer, steps, counts)
            sections.append(replace(built[key], layer=layer))
        if pp_rank == layout.pp - 1:
            sections.append(Section(OUTSIDE, head_steps(model, types, mesh, sizes)))
        return PartProgram(tuple(sections))


@dataclass(frozen=True, eq=False)
class _Chosen:
    """The experts of a part's tokens; arguments as `RoutingSource.topk_ids`'s."""

    routing: RoutingSource
    first: int
    before: Ints
    owned: Ints

    def topk_ids(self, layer: int) -> Ints:
        """[T, K]."""
        return self.routing.topk_ids(layer, self.first, self.before, self.owned)
