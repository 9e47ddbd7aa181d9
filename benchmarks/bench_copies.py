"""Copies chosen anew in every step beside each rank's own choice, on made-up routing traces.

Two traces: one whose popularity stays, and one in which a quarter of the experts exchange theirs
nine times. Experts are placed, and copies added, by the first fifth of each (or, unplanned, as they
come); what follows is cut into steps. Of each step: pairs of the fullest rank over the mean by the
nearest copy (own rank, own node, any, in turns) and by balanced ones, the optimum of the linear
program (scipy's HiGHS), the processor time of our C++ on this machine, and the step's time on a
modelled cluster, in which sharing is priced too. It is off where a step gains less than it costs.

    python benchmarks/bench_copies.py [--ranks 16] [--steps 8]
"""

import argparse
import json
import time
from dataclasses import dataclass
from functools import cached_property
from itertools import product

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from routing_traces import drifting_trace, routing_trace
from scipy.optimize import linprog

from expertlane import __version__
from expertlane.balance.copies import CopyChoice
from expertlane.balance.even_copies import BalancedCopies
from expertlane.balance.placement import Placement
from expertlane.balance.planner import plan_placement
from expertlane.balance.trace import RoutingTrace
from expertlane.cost.laws.execution import LIKELY, Execution, Terms
from expertlane.cost.laws.profile import read_profile
from expertlane.cost.number_types import NumberTypes
from expertlane.cost.pricing import Pricing
from expertlane.cost.routing import TraceRouting
from expertlane.cost.step.batch_sizes import PartSizes
from expertlane.cost.step.counts import StageMesh
from expertlane.cost.step.kernel_sets import GPU_LIBRARIES
from expertlane.cost.step.program import ProgramBuilder
from expertlane.cost.timeline import Timeline
from expertlane.engine.ops.backend import backend_for
from expertlane.spec.deployment import CopyMethod
from expertlane.spec.layout import Layout
from expertlane.spec.model import PRESETS

NUM_EXPERTS, TOP_K, RANKS_PER_NODE, NUM_LAYERS = 128, 8, 8, 4
COPIES = (1.0, 1.125, 1.25, 1.5)  # physical experts over logical ones
SKEW = 0.8
PHASES = {"decode": 64, "prefill": 2048}  # tokens of a rank in a step
CONTEXT = 2000
MODEL = PRESETS["paper"].with_overrides(
    name="paper-128",
    num_experts=NUM_EXPERTS,
    num_experts_per_tok=TOP_K,
    moe_intermediate_size=2048,
)
OPS = backend_for(torch.device("cpu"))
Row = dict[str, float | int | str | bool]


@dataclass(frozen=True)
class Point:
    """A trace with its placement, and steps of one size.

    Attributes:
        placements: [NUM_LAYERS].
        first: token that the steps begin with.
    """

    trace: RoutingTrace
    placements: list[Placement]
    ranks: int
    tokens: int  # of a rank and step
    first: int
    num_steps: int

    @cached_property
    def mesh(self) -> StageMesh:
        """Ranks on nodes."""
        layout = Layout(dp=self.ranks, ep=self.ranks)
        return StageMesh.of(layout, 0, 0, RANKS_PER_NODE)

    def ids(self, layer: int, step: int) -> np.ndarray:
        """[tokens of all ranks, TOP_K]."""
        size = self.tokens * self.ranks
        begin = self.first + step * size
        return self.trace.topk_ids[layer, begin : begin + size].astype(np.int64)

    def builder(self, copies: CopyMethod) -> ProgramBuilder:
        """Of programs of its steps."""
        layers = MODEL.num_hidden_layers
        return ProgramBuilder(
            MODEL,
            self.mesh.layout,
            tuple(self.placements[layer % NUM_LAYERS] for layer in range(layers)),
            types=NumberTypes.all_of("bfloat16"),
            copies=copies,
            ranks_per_node=RANKS_PER_NODE,
            kernels=GPU_LIBRARIES,
        )

    def step_s(self, copies: CopyMethod) -> float:
        """A step on the modelled cluster; the mean."""
        profile = read_profile("h100")
        terms, builder = Terms.of(profile, Execution.GRAPH), self.builder(copies)
        pricing, routing = Pricing(profile, builder.types), TraceRouting(self.trace)
        is_decode = self.tokens == PHASES["decode"]
        how = (self.tokens, 1, CONTEXT) if is_decode else (1, self.tokens, 0)
        sizes = PartSizes.even(self.ranks, 1, *how)
        seconds = []
        for step in range(self.num_steps):
            first = self.first + step * self.tokens * self.ranks
            program = builder.build_sized([("all_to_all", [sizes])], routing, first_token=first)
            timeline = Timeline(terms, 1, self.ranks)
            seconds.append(float(timeline.run(pricing.work(program), 0.0).end_s[LIKELY]))
        return float(np.mean(seconds))

    def shared(self) -> Row:
        """How even, how near to the optimum, and how long it took."""
        rank = np.arange(self.ranks).repeat(self.tokens)
        owned = [self.tokens] * self.ranks
        before, after, gaps, cpu_s, paths = [], [], [], [], []
        for layer, step in product(range(NUM_LAYERS), range(self.num_steps)):
            placed, ids = self.placements[layer], self.ids(layer, step)
            at = placed, self.mesh.ep_rank, self.mesh.nodes_of_ep_group
            mean = ids.size / self.ranks
            nearest = np.bincount(CopyChoice(*at).ep_ranks(ids, rank).ravel())
            before.append(nearest.max() / mean)
            choice = BalancedCopies(*at)
            if not choice.is_balanced:
                after.append(before[-1])
                continue
            held = placed.slots()[choice.holders.T, np.arange(NUM_EXPERTS)].T
            slots = torch.from_numpy(np.ascontiguousarray(held + 1000 * choice.holders))
            narrow, taken = torch.from_numpy(ids.astype(np.int32)), []
            for _ in range(5):
                began_ns = time.thread_time_ns()
                physical, _ = OPS.balance_copies(narrow, owned, choice, slots)
                taken.append((time.thread_time_ns() - began_ns) / 1e9)
            cpu_s.append(min(taken))
            fullest = np.bincount(physical.numpy().ravel() // 1000).max()
            after.append(fullest / mean)
            if step == 0:
                counts = np.bincount(ids.ravel(), minlength=NUM_EXPERTS)
                gaps.append(fullest - np.ceil(optimum(counts, placed) - 1e-6))
                chooser = (rank[:, None] * NUM_EXPERTS + ids).ravel()
                of_ranks = np.bincount(chooser, minlength=self.ranks * NUM_EXPERTS)
                paths.append(choice.share(of_ranks.reshape(self.ranks, -1)).num_paths)
        return {
            "nearest": float(np.mean(before)),
            "balanced": float(np.mean(after)),
            "gap_pairs": float(max(gaps, default=0.0)),
            "num_programs": len(gaps),
            "most_paths": max(paths, default=0),
            "solve_us": 1e6 * float(np.mean(cpu_s)) if cpu_s else 0.0,
        }


def optimum(counts: np.ndarray, placement: Placement) -> float:
    """The linear program: the least pairs that the fullest rank can have."""
    held = np.argwhere(placement.slots().T >= 0)
    num = len(held)
    of_expert, of_rank = np.zeros((NUM_EXPERTS, num + 1)), np.zeros((placement.ep, num + 1))
    of_expert[held[:, 0], np.arange(num)] = 1.0
    of_rank[held[:, 1], np.arange(num)] = 1.0
    of_rank[:, -1] = -1.0
    goal = np.eye(num + 1)[-1]
    return float(linprog(goal, of_rank, np.zeros(placement.ep), of_expert, counts).fun)


def traces(num_tokens: int) -> dict[str, RoutingTrace]:
    sizes = {
        "num_layers": NUM_LAYERS,
        "num_experts": NUM_EXPERTS,
        "num_experts_per_tok": TOP_K,
        "num_tokens": num_tokens,
        "skew": SKEW,
        "seed": 0,
    }
    return {
        "skewed": routing_trace(**sizes),  # type: ignore[arg-type]
        "drifting": drifting_trace(num_parts=10, share=0.25, **sizes),  # type: ignore[arg-type]
    }


def rows(ranks: int, num_steps: int) -> list[Row]:
    found: list[Row] = []
    most = max(PHASES.values()) * ranks * num_steps
    num_tokens = most * 5 // 4
    by_name = traces(num_tokens)
    by_name["skewed, unplanned"] = by_name["skewed"]
    for name, trace in by_name.items():
        seen = trace.topk_ids[:, : num_tokens // 5]
        load = np.stack([np.bincount(ids.ravel(), minlength=NUM_EXPERTS) for ids in seen])
        for copies, (phase, tokens) in product(COPIES, PHASES.items()):
            redundant = round((copies - 1) * NUM_EXPERTS)
            placements = plan_placement(load, ranks, RANKS_PER_NODE, redundant)
            if name == "skewed, unplanned":
                placements = [Placement.linear(NUM_EXPERTS, ranks, redundant)] * NUM_LAYERS
            span = (num_tokens - num_tokens // 5) // num_steps  # steps spread over all that follows
            every = [
                Point(trace, placements, ranks, tokens, num_tokens // 5 + step * span, 1)
                for step in range(num_steps)
            ]
            shared = [point.shared() for point in every]
            near_s, even_s = (
                float(np.mean([point.step_s(each) for point in every]))
                for each in ("nearest", "balanced")
            )
            row: Row = {"trace": name, "copies": copies, "phase": phase, "tokens": tokens}
            row |= {key: float(np.mean([each[key] for each in shared])) for key in shared[0]}
            row["gap_pairs"] = max(each["gap_pairs"] for each in shared)
            row |= {"nearest_s": near_s, "balanced_s": even_s}
            # What C++ took here, layer by layer, in place of the kernels that the model prices.
            host_s = float(row["solve_us"]) / 1e6 * MODEL.num_hidden_layers
            row |= {"host_s": host_s, "is_on": even_s < near_s}
            found.append(row)
    return found


def table(found: list[Row], ranks: int) -> Table:
    title = f"{ranks} ranks, {NUM_EXPERTS} experts, top {TOP_K}: fullest rank over the mean, steps"
    shown = Table(title=title)
    for heading in (
        *("trace", "copies", "phase", "nearest", "balanced", "gap", "solve µs"),
        *("step ms", "balanced ms", "tokens/s", "with it"),
    ):
        shown.add_column(heading, justify="right")
    for row in found:
        gain = float(row["nearest_s"]) / float(row["balanced_s"]) - 1
        shown.add_row(
            *(str(row["trace"]), f"{row['copies']}", str(row["phase"])),
            *(f"{row['nearest']:.3f}", f"{row['balanced']:.3f}", f"{row['gap_pairs']:.0f}"),
            *(f"{row['solve_us']:.0f}", f"{1e3 * float(row['nearest_s']):.2f}"),
            *(f"{1e3 * float(row['balanced_s']):.2f}", f"{gain:+.1%}"),
            "on" if row["is_on"] else "off",
        )
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=16)
    parser.add_argument("--steps", type=int, default=8)
    asked = parser.parse_args()
    found = rows(asked.ranks, asked.steps)
    console = Console(width=120)
    console.print(table(found, asked.ranks))
    line = {"benchmark": "copies", "version": __version__, "ranks": asked.ranks, "rows": found}
    console.out(json.dumps(line), highlight=False)


if __name__ == "__main__":
    main()
