"""Programs of a step plan: operations and transfers of every stage for every micro-batch.

Their counters are added up as the engine's records have them.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from expertlane.balance.copies import CopyChoice
from expertlane.balance.holding import Placements
from expertlane.balance.placement import Placement
from expertlane.cost.routing import RoutingSource
from expertlane.cost.step.batch_sizes import PartSizes
from expertlane.cost.step.counts import StageMesh, TokenCounts, count_dispatch
from expertlane.cost.step.layer import (
    arrival_steps,
    embedding_steps,
    head_steps,
    layer_steps,
    projection_steps,
)
from expertlane.cost.step.operation import OUTSIDE, HandOver, Ints, NumberTypes, Operation, Step
from expertlane.cost.step.step_list import ENGINE, KernelSet, StepList, StepWriter
from expertlane.results.step_record import RankCounts
from expertlane.schedule.plan import Batch, StepPlan
from expertlane.spec.deployment import (
    DispatchForm,
    DispatchMode,
    DispatchTable,
    PayloadType,
    is_by_node_on,
)
from expertlane.spec.layout import Layout
from expertlane.spec.model import LayerKind, ModelConfig
from expertlane.spec.names import Link, Phase, Stage, Traffic


@dataclass(frozen=True, eq=False)
class Section:
    """The steps of a layer, or of embedding or head.

    Attributes:
        layer: hidden layer, or `OUTSIDE`.
        steps: layers that do the same share one tuple.
        counts: of the layer's dispatch; None for a dense layer.
    """

    layer: int
    steps: tuple[Step, ...]
    counts: TokenCounts | None = None


@dataclass(frozen=True, eq=False)
class StageProgram:
    """A micro-batch on one pipeline stage.

    Attributes:
        parts: their layers; run in turn, switching at every transfer, where there are two.
        hand_over: the message to the next stage, sent when all parts are done; None on the last.
    """

    mesh: StageMesh
    parts: tuple[tuple[Section, ...], ...]
    hand_over: HandOver | None

    def sections(self) -> Iterator[Section]:
        """The sections of all parts."""
        return itertools.chain.from_iterable(self.parts)

    def distinct_steps(self) -> Iterator[tuple[Step, int]]:
        """Each distinct step with how often it is done: layers that do the same share theirs."""
        shared = {id(section.steps): section.steps for section in self.sections()}
        times = Counter(id(section.steps) for section in self.sections())
        return ((step, times[key]) for key, steps in shared.items() for step in steps)


@dataclass(frozen=True, eq=False)
class StepProgram:
    """A step of one replica.

    Attributes:
        stages: [pp][num_micro_batches].
    """

    stages: tuple[tuple[StageProgram, ...], ...]

    def of_stages(self) -> Iterator[StageProgram]:
        """All micro-batches on all stages."""
        return itertools.chain.from_iterable(self.stages)


@dataclass(frozen=True, eq=False)
class _Part:
    """A part of a micro-batch, and where its tokens stand in their source of routing.

    Attributes:
        first, before: arguments of `RoutingSource.topk_ids`.
        record: also count how far tokens spread (`FanOut`), for a record.
    """

    form: DispatchForm
    sizes: PartSizes
    routing: RoutingSource
    first: int
    before: Ints
    record: bool


@dataclass(eq=False, repr=False)
class ProgramBuilder:
    """Makes programs of step plans for one deployment.

    Args:
        placements: [num_hidden_layers]; None for a dense layer.
        dispatch: form and overlap by the number of tokens.
        block_size: positions of a block of the paged cache.
        kernels: kernels of the engine, or of others to be priced.
        num_drafts: draft tokens of multi-token prediction: layers that the last stage holds guess
            as many for every decode, and the next step verifies them (`multi_token`).
    """

    model: ModelConfig
    layout: Layout
    placements: Placements
    _: KW_ONLY
    types: NumberTypes = field(default_factory=NumberTypes)
    dispatch: DispatchTable = field(default_factory=lambda: DispatchTable.fixed("all_to_all"))
    payload: PayloadType = "model"
    ranks_per_node: int = 8
    block_size: int = 16
    kernels: KernelSet = ENGINE
    num_drafts: int = 0
    _choices: dict[tuple[int, int], CopyChoice] = field(default_factory=dict, init=False)
    _meshes: dict[tuple[int, int], StageMesh] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.layout.check_model(self.model)

    def _mesh(self, replica: int, pp_rank: int) -> StageMesh:
        """A pipeline stage of a replica."""
        key = replica, pp_rank
        if key not in self._meshes:
            self._meshes[key] = StageMesh.of(self.layout, *key, self.ranks_per_node)
        return self._meshes[key]

    def _mode(self, micro_batch: tuple[Batch, ...], phase: Phase) -> DispatchMode:
        """Dispatch form and overlap of a micro-batch; all ranks choose alike."""
        most = max(batch.num_tokens for batch in micro_batch)
        can_split = any(batch.num_seqs > 1 for batch in micro_batch)
        return self.dispatch.choose(-(-most // self.layout.tp), can_split, phase)

    def build(
        self,
        plan: StepPlan,
        routing: RoutingSource,
        *,
        first_token: int = 0,
    ) -> StepProgram:
        """The programs of a step.

        Args:
            first_token: tokens computed before, from which the routing goes on.
        """
        by_micro_batch: list[tuple[DispatchForm, list[PartSizes]]] = []
        for micro_batch in plan.micro_batches:
            mode = self._mode(micro_batch, plan.phase)
            by_dp_rank = [batch.split(1 + mode.overlap) for batch in micro_batch]
            parts = [
                PartSizes.of(batches, self.layout.tp, self.block_size, self.num_drafts)
                for batches in zip(*by_dp_rank, strict=True)
                if any(batch.num_tokens for batch in batches)
            ]
            by_micro_batch.append((mode.form, parts))
        return self.build_sized(
            by_micro_batch,
            routing,
            replica=plan.replica,
            first_token=first_token,
            record=plan.record,
        )

    def build_sized(
        self,
        micro_batches: Sequence[tuple[DispatchForm, Sequence[PartSizes]]],
        routing: RoutingSource,
        *,
        replica: int = 0,
        first_token: int = 0,
        record: bool = False,
    ) -> StepProgram:
        """The programs of a step of which only sizes are known.

        Args:
            micro_batches: dispatch form and parts of each; two parts with overlap.
            record: also count how far tokens spread (`FanOut`), for a record.
        """
        before = np.zeros(self.layout.stage_size, dtype=np.int64)
        by_micro_batch: list[list[_Part]] = []
        for form, of_parts in micro_batches:
            by_micro_batch.append([])
            for sizes in of_parts:
                filled = sizes.with_dummies() if self.kernels.dummy_batches else sizes
                part = _Part(form, filled, routing, first_token, before, record)
                by_micro_batch[-1].append(part)
                before = before + filled.owned
        stages = []
        for pp_rank in range(self.layout.pp):
            mesh = self._mesh(replica, pp_rank)
            programs = []
            for parts in by_micro_batch:
                made = tuple(self._sections(mesh, pp_rank, part) for part in parts)
                programs.append(StageProgram(mesh, made, self._hand_over(mesh, pp_rank, parts)))
            stages.append(tuple(programs))
        return StepProgram(tuple(stages))

    def _hand_over(self, mesh: StageMesh, pp_rank: int, parts: Sequence[_Part]) -> HandOver | None:
        if not parts or pp_rank == self.layout.pp - 1:
            return None
        owned = np.sum([part.sizes.owned for part in parts], axis=0)
        there = (mesh.first_rank + mesh.size + np.arange(mesh.size)) // self.ranks_per_node
        row_bytes = self.model.carried_size * self.types.activation_bytes
        return HandOver(owned * row_bytes, there != mesh.node)

    def _sections(self, mesh: StageMesh, pp_rank: int, part: _Part) -> tuple[Section, ...]:
        """A part on one pipeline stage."""
        model = self.model
        sections = [self._outside(arrival_steps if pp_rank else embedding_steps, mesh, part)]
        if not sections[0].steps:
            sections.clear()
        built: dict[object, Section] = {}
        for layer in self.layout.layers_of_stage(model.num_hidden_layers, pp_rank):
            placement, kind = self.placements[layer], model.kind_of_layer(layer)
            key: object = kind
            if placement is not None:
                key = key, id(placement), part.routing.sample_of(layer)
            if key not in built:
                built[key] = self._layer(layer, kind, mesh, part)
            sections.append(replace(built[key], layer=layer))
        if pp_rank == self.layout.pp - 1:
            sections.append(self._outside(head_steps, mesh, part))
            sections += self._drafts(mesh, part)
        return tuple(sections)

    def _layer(self, layer: int, kind: LayerKind, mesh: StageMesh, part: _Part) -> Section:
        placement = self.placements[layer] if kind.mlp == "experts" else None
        counts, owned = None, part.sizes.owned
        if placement is not None:
            counts = count_dispatch(
                part.routing.topk_ids(layer, part.first, part.before, owned, part.sizes.num_new),
                owned,
                self._choice(placement, mesh),
                mesh,
                by_node=is_by_node_on(self.layout, part.form),
                fan_out=part.record,
            )
        out = StepList(mesh, self.types, part.form, self.kernels)
        layer_steps(out, self.model, kind, part.sizes, counts, self.payload)
        return Section(layer, tuple(out.steps), counts)

    def _choice(self, placement: Placement, mesh: StageMesh) -> CopyChoice:
        key = id(placement), mesh.first_rank % self.ranks_per_node
        if key not in self._choices:
            of_ranks = mesh.ep_rank, mesh.nodes_of_ep_group
            self._choices[key] = CopyChoice(placement, *of_ranks)
        return self._choices[key]

    def _drafts(self, mesh: StageMesh, part: _Part) -> Iterator[Section]:
        """The drafts for the next step, on the last stage: passes of their layers and the head.

        The first takes all tokens of the step, so that the layers have their keys and values. Their
        experts are placed and chosen as in the model's last layer with experts.
        """
        like = (self.model.moe_layers or [self.model.num_hidden_layers - 1])[-1]
        for draft in range(self.num_drafts):
            sizes = part.sizes.further(draft) if draft else part.sizes
            if not sizes.num_new.size:
                return
            drafting = replace(part, sizes=sizes, record=False)
            yield self._outside(projection_steps, mesh, drafting)
            for kind in self.model.draft_kinds:
                yield self._layer(like, kind, mesh, drafting)
            chosen = replace(part, sizes=part.sizes.further(draft))
            yield self._outside(head_steps, mesh, chosen)

    def _outside(
        self,
        steps: Callable[[StepWriter, ModelConfig, PartSizes], None],
        mesh: StageMesh,
        part: _Part,
    ) -> Section:
        """The section before a stage's layers, or after them."""
        out = StepList(mesh, self.types, part.form, self.kernels)
        steps(out, self.model, part.sizes)
        return Section(OUTSIDE, tuple(out.steps))


def count(program: StepProgram, num_layers: int, num_experts: int) -> list[RankCounts]:
    """[ranks of the replica]; counters of computing and sending."""
    counts: list[RankCounts] = []
    for of_micro_batches in program.stages:
        counters = _StageCounters(of_micro_batches[0].mesh, num_layers, num_experts)
        for stage in of_micro_batches:
            counters.add(stage)
        counts += counters.of_ranks()
    return counts


class _StageCounters:
    """Counters of the ranks of one pipeline stage, R."""

    def __init__(self, mesh: StageMesh, num_layers: int, num_experts: int) -> None:
        num_ranks, num_stages = mesh.size, len(Stage)
        self._mesh = mesh
        self._flops: npt.NDArray[Any] = np.zeros((num_stages, num_ranks), dtype=np.int64)
        self._weight_bytes = np.zeros_like(self._flops)
        self._num_collectives = np.zeros_like(self._flops)
        self._kv_bytes: npt.NDArray[Any] = np.zeros(num_ranks, dtype=np.int64)
        shape = num_ranks, num_stages, len(Traffic), mesh.layout.world_size
        self._sent_bytes: npt.NDArray[Any] = np.zeros(shape, dtype=np.int64)
        stage = slice(mesh.first_rank, mesh.first_rank + num_ranks)
        self._sent_inside = self._sent_bytes[..., stage]  # a view
        self._tokens = np.zeros((num_ranks, num_layers, num_experts), dtype=np.int64)
        self._reached = np.zeros((2, num_ranks, mesh.layout.world_size + 1), dtype=np.int64)
        self._remote = np.zeros((2, num_ranks), dtype=np.int64)

    def add(self, stage: StageProgram) -> None:
        """A micro-batch's programs."""
        for step, num in stage.distinct_steps():
            self._add_step(step, num)
        for section in stage.sections():
            self._add_routing(section)
        if stage.hand_over is not None:
            self._add_hand_over(stage.hand_over)

    def _add_step(self, step: Step, num: int) -> None:
        """A step done `num` times."""
        if isinstance(step, Operation):
            self._flops[step.stage] += num * step.flops
            self._weight_bytes[step.stage] += num * step.weight_bytes
            self._kv_bytes += num * step.kv_bytes
        else:
            self._num_collectives[step.stage] += num
            self._sent_inside[:, step.stage] += num * step.sent_bytes.transpose(1, 0, 2)

    def _add_hand_over(self, hand_over: HandOver) -> None:
        there = self._mesh.first_rank + self._mesh.size + np.arange(self._mesh.size)
        sent = self._sent_bytes[:, Stage.HAND_OVER, Traffic.PAYLOAD]
        sent[np.arange(self._mesh.size), there] += hand_over.sent_bytes
        self._num_collectives[Stage.HAND_OVER] += hand_over.sent_bytes > 0

    def _add_routing(self, section: Section) -> None:
        counts, mesh = section.counts, self._mesh
        if counts is None:
            return
        # One rank of an expert tensor-parallel group tells them.
        self._tokens[mesh.etp_rank == 0, section.layer] += counts.num_tokens_per_expert
        if counts.fan_out is not None:
            fan_out, width = counts.fan_out, mesh.layout.ep + 1
            self._reached[0, :, :width] += fan_out.by_ranks_reached
            self._reached[1, :, :width] += fan_out.by_nodes_reached
            self._remote[0] += fan_out.num_remote_rank_copies
            self._remote[1] += fan_out.num_remote_node_copies

    def of_ranks(self) -> list[RankCounts]:
        """[R]."""
        return [
            RankCounts(
                rank=self._mesh.first_rank + place,
                flops=self._flops[:, place],
                weight_bytes=self._weight_bytes[:, place],
                kv_bytes=int(self._kv_bytes[place]),
                sent_bytes=self._sent_bytes[place],
                num_collectives=self._num_collectives[:, place],
                num_tokens_per_expert=self._tokens[place],
                tokens_by_ranks_reached=self._reached[0, place],
                tokens_by_nodes_reached=self._reached[1, place],
                num_remote_rank_copies=int(self._remote[0, place]),
                num_remote_node_copies=int(self._remote[1, place]),
            )
            for place in range(self._mesh.size)
        ]


def expert_loads(program: StepProgram, num_layers: int, num_experts: int) -> tuple[Ints, float]:
    """Tokens of each expert, [num_layers, num_experts], and the imbalance of ranks.

    Returns:
        The second: pairs of a layer's busiest rank over the mean, mean over layers; 1 where there
        are no experts.
    """
    tokens = np.zeros((num_layers, num_experts), dtype=np.int64)
    over_mean = []
    for section in (each for stage in program.of_stages() for each in stage.sections()):
        if section.counts is not None:
            tokens[section.layer] += section.counts.num_tokens_per_expert.sum(axis=0)
            pairs = section.counts.pairs_of_ep_rank
            over_mean.append(pairs.max() / max(pairs.mean(), 1e-9))
    return tokens, float(np.mean(over_mean)) if over_mean else 1.0


def sent_bytes(program: StepProgram) -> Ints:
    """[num_links, num_kinds_of_traffic]; bytes that all ranks send to others in a step."""
    sent = np.zeros((len(Link), len(Traffic)), dtype=np.int64)
    for stage in program.of_stages():
        is_far = stage.mesh.node[:, None] != stage.mesh.node
        for step, num in stage.distinct_steps():
            if not isinstance(step, Operation):
                everything = step.sent_bytes.sum(axis=(1, 2))
                far = (step.sent_bytes * is_far).sum(axis=(1, 2))
                sent[Link.INTER_NODE] += num * far
                sent[Link.INTRA_NODE] += num * (everything - far)
        if stage.hand_over is not None:
            of_ranks, is_remote = stage.hand_over.sent_bytes, stage.hand_over.is_remote
            sent[Link.INTER_NODE, Traffic.PAYLOAD] += of_ranks[is_remote].sum()
            sent[Link.INTRA_NODE, Traffic.PAYLOAD] += of_ranks[~is_remote].sum()
    return sent


def most_weight_bytes(programs: Sequence[StepProgram]) -> int:
    """Bytes of weights read by the rank that reads most, over all micro-batches."""
    most = 0.0
    for stage in range(len(programs[0].stages)):
        of_rank = np.zeros(programs[0].stages[stage][0].mesh.size)
        for each in (each for program in programs for each in program.stages[stage]):
            for step, num in each.distinct_steps():
                if isinstance(step, Operation):
                    of_rank += num * step.weight_bytes
        most = max(most, float(of_rank.max()))
    return int(most)
