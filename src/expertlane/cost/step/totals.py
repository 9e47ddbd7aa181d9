"""Counters of programs, added up as the engine's records have them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from expertlane.cost.step.operation import HandOver, Ints, Operation, Step
from expertlane.cost.step.program import Section, StageProgram, StepProgram
from expertlane.cost.step.stage_mesh import StageMesh
from expertlane.results.step_record import RankCounts
from expertlane.spec.names import Link, Stage, Traffic


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
        self._num_pairs_saved = 0

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
        self._num_pairs_saved += counts.num_pairs_saved
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
                num_pairs_saved=self._num_pairs_saved,
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
