"""Our balancer beside the published greedy one, on made-up routing traces.

Evenness: power-law traces; both plan on the first half of the tokens, and max/mean of rank loads is
given for that half and for the other one. Loads are those of the engine's choice among copies (own
rank, own node, any) with tokens spread evenly over ranks; beside them, as `even_shares`, those of
copies that each take an equal share. By each measure the yardstick is the better of its two forms.
It may put copies of an expert on one rank, which an engine can't use: it then counts as if each
took its turn, or as if there were one, whichever is better for it. It needs equal slots on all
ranks; points where it has none are left out. Crossings: traces with topics, and copies of tokens
that reach a remote node per token and layer, all on the second half. Made-up traces: their topics
say what placement can gain, not what a given model's will.

    python benchmarks/bench_balance.py [--experts 64 128 256] [--ranks 8 16 32 64] [--seeds 3]
"""

import argparse
import json
import time
from collections.abc import Iterator
from itertools import product

import numpy as np
from greedy_yardstick import (
    can_run,
    global_plan,
    hierarchical_plan,
    sender_max_over_mean,
    slot_max_over_mean,
)
from rich.console import Console
from rich.table import Table
from routing_traces import halves, routing_trace

from expertlane import __version__
from expertlane.balance.judge import coactivation, cross_node_copies, spread_sources
from expertlane.balance.placement import Placement
from expertlane.balance.planner import plan_placement
from expertlane.balance.trace import RoutingTrace

RANKS_PER_NODE = 8
NUM_GROUPS = 8  # of experts, for the yardstick's hierarchical form
SKEWS = (0.6, 1.0, 1.2)
NUM_REDUNDANT = (0, 16, 32, 64)
NUM_TOKENS = 20_000
NUM_TOPIC_TOKENS = 60_000
NUM_TOPICS = 16
AFFINITIES = (10.0, 30.0)
TOP_K = 8

Row = dict[str, float | int]
Plan = list[list[int]]


def yardsticks(load: np.ndarray, ep: int, num_slots: int) -> list[Plan]:
    """Its two forms, or the one that can run."""
    plans = [global_plan(load, ep, num_slots)]
    num_nodes = ep // RANKS_PER_NODE
    if can_run(len(load), ep, num_slots, NUM_GROUPS, num_nodes):
        plans.append(hierarchical_plan(load, ep, num_slots, NUM_GROUPS, num_nodes))
    return plans


def sent(plan: Plan, load: np.ndarray) -> float:
    return sender_max_over_mean(plan, load, RANKS_PER_NODE)


def slots_of(placement: Placement) -> Plan:
    return [list(rank) for rank in placement.experts_of_rank]


def evenness(asked: argparse.Namespace) -> Iterator[Row]:
    for skew, num_experts, seed in product(SKEWS, asked.experts, range(asked.seeds)):
        trace = routing_trace(
            num_layers=1,
            num_experts=num_experts,
            num_experts_per_tok=TOP_K,
            num_tokens=NUM_TOKENS,
            skew=skew,
            seed=seed,
        )
        seen, held_out = (half.load().astype(float) for half in halves(trace))
        for ep, num_redundant in product(asked.ranks, NUM_REDUNDANT):
            num_slots = num_experts + num_redundant
            if not can_run(num_experts, ep, num_slots, 1, 1):
                continue
            forms = yardsticks(seen[0], ep, num_slots)
            greedy = min(forms, key=lambda plan: sent(plan, seen[0]))
            ours = slots_of(plan_placement(seen, ep, RANKS_PER_NODE, num_redundant)[0])
            yield {
                "skew": skew,
                "num_experts": num_experts,
                "seed": seed,
                "ep": ep,
                "num_redundant": num_redundant,
                "greedy": sent(greedy, seen[0]),
                "ours": sent(ours, seen[0]),
                "greedy_held_out": sent(greedy, held_out[0]),
                "ours_held_out": sent(ours, held_out[0]),
                "greedy_even_shares": min(slot_max_over_mean(plan, seen[0]) for plan in forms),
                "ours_even_shares": slot_max_over_mean(ours, seen[0]),
            }


def crossings(asked: argparse.Namespace) -> Iterator[Row]:
    sizes = asked.experts, across_nodes(asked), NUM_REDUNDANT, range(asked.seeds)
    points = product(AFFINITIES, SKEWS, *sizes)
    for affinity, skew, num_experts, ep, num_redundant, seed in points:
        num_slots = num_experts + num_redundant
        if not can_run(num_experts, ep, num_slots, 1, 1):
            continue
        seen, held_out = topic_halves(affinity, skew, num_experts, seed)
        load = seen.load()
        together = [coactivation(ids, num_experts) for ids in seen.topk_ids]
        greedy = global_plan(load[0].astype(float), ep, num_slots)
        plans = {
            "linear": [Placement.linear(num_experts, ep, num_redundant)],
            "greedy": [usable(greedy, num_experts)],
            "even": plan_placement(load, ep, RANKS_PER_NODE, num_redundant),
            "ours": plan_placement(load, ep, RANKS_PER_NODE, num_redundant, together),
        }
        row: Row = {
            "affinity": affinity,
            "skew": skew,
            "num_experts": num_experts,
            "seed": seed,
            "ep": ep,
            "num_redundant": num_redundant,
        }
        slots = {name: slots_of(placements[0]) for name, placements in plans.items()}
        slots["greedy"] = greedy
        for name, placements in plans.items():
            row[f"{name}_crossings"] = crossings_per_token(held_out, placements)
            row[name] = sent(slots[name], load[0])
            row[f"{name}_held_out"] = sent(slots[name], held_out.load()[0])
            row[f"{name}_even_shares"] = slot_max_over_mean(slots[name], load[0])
        yield row


def across_nodes(asked: argparse.Namespace) -> list[int]:
    """Those numbers of ranks that are on several nodes."""
    return [ep for ep in asked.ranks if ep > RANKS_PER_NODE]


_traces: dict[tuple[float, float, int, int], tuple[RoutingTrace, RoutingTrace]] = {}


def topic_halves(
    affinity: float, skew: float, num_experts: int, seed: int
) -> tuple[RoutingTrace, RoutingTrace]:
    key = (affinity, skew, num_experts, seed)
    if key not in _traces:
        _traces[key] = halves(
            routing_trace(
                num_layers=1,
                num_experts=num_experts,
                num_experts_per_tok=TOP_K,
                num_tokens=NUM_TOPIC_TOKENS,
                skew=skew,
                seed=seed,
                num_topics=NUM_TOPICS,
                affinity=affinity,
            )
        )
    return _traces[key]


def usable(plan: Plan, num_experts: int) -> Placement:
    """A plan without second copies of an expert on one rank, of which an engine takes one."""
    return Placement(num_experts, tuple(tuple(dict.fromkeys(rank)) for rank in plan))


def crossings_per_token(trace: RoutingTrace, placements: list[Placement]) -> float:
    sources = spread_sources(trace.num_tokens, placements[0].ep // RANKS_PER_NODE)
    copies = [
        cross_node_copies(ids, placement, RANKS_PER_NODE, sources)
        for ids, placement in zip(trace.topk_ids, placements, strict=True)
    ]
    return sum(copies) / len(copies) / trace.num_tokens


def planning_s(num_experts: int, ep: int) -> Row:
    """CPU seconds of a plan for 61 layers, with a redundant expert on each rank."""
    trace = routing_trace(
        num_layers=61,
        num_experts=num_experts,
        num_experts_per_tok=TOP_K,
        num_tokens=8192,
        skew=1.0,
        seed=0,
        num_topics=NUM_TOPICS,
    )
    load = trace.load()
    together = [coactivation(ids, num_experts) for ids in trace.topk_ids]
    taken: Row = {}
    for name, known in (("even_s", None), ("coactivation_s", together)):
        began = time.process_time()
        plan_placement(load, ep, RANKS_PER_NODE, ep, known)
        taken[name] = time.process_time() - began
    return taken


def column(rows: list[Row], name: str) -> np.ndarray:
    return np.array([row[name] for row in rows])


def evenness_table(rows: list[Row], num_ranks: list[int]) -> Table:
    table = Table(title="max/mean of rank loads, median (worst), greedy then ours")
    for heading in ("skew", "ep", "points", "same load", "held-out", "ours worse, same load"):
        table.add_column(heading, justify="right")
    for skew, ep in product(SKEWS, num_ranks):
        of = [row for row in rows if (row["skew"], row["ep"]) == (skew, ep)]
        cells = []
        for suffix in ("", "_held_out"):
            pair = [column(of, name + suffix) for name in ("greedy", "ours")]
            cells.append(" → ".join(f"{np.median(x):.3f} ({x.max():.2f})" for x in pair))
        table.add_row(f"{skew}", f"{ep}", f"{len(of)}", *cells, f"{num_worse(of)}")
    return table


def num_worse(rows: list[Row], suffix: str = "") -> int:
    ours, greedy = (column(rows, name + suffix) for name in ("ours", "greedy"))
    return int((ours > greedy * (1 + 1e-6)).sum())


def medians(rows: list[Row], suffix: str) -> dict[str, float]:
    return {name: float(np.median(column(rows, name + suffix))) for name in ("greedy", "ours")}


def crossings_table(rows: list[Row], num_ranks: list[int]) -> Table:
    table = Table(title="crossings per token and layer, held-out, medians")
    for heading in (
        *("affinity", "skew", "ep", "points", "linear", "greedy", "even", "ours"),
        *("fewer than greedy", "max/mean greedy → ours"),
    ):
        table.add_column(heading, justify="right")
    for affinity, skew, ep in product(AFFINITIES, SKEWS, num_ranks):
        key = (affinity, skew, ep)
        of = [row for row in rows if (row["affinity"], row["skew"], row["ep"]) == key]
        names = ("linear", "greedy", "even", "ours")
        balance = (np.median(column(of, f"{name}_held_out")) for name in ("greedy", "ours"))
        table.add_row(
            *(f"{affinity:g}", f"{skew}", f"{ep}", f"{len(of)}"),
            *(f"{np.median(column(of, f'{name}_crossings')):.2f}" for name in names),
            f"{np.median(saved(of)):.0%}",
            " → ".join(f"{each:.3f}" for each in balance),
        )
    return table


def saved(rows: list[Row]) -> np.ndarray:
    return 1 - column(rows, "ours_crossings") / column(rows, "greedy_crossings")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--experts", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--seeds", type=int, default=3)
    asked = parser.parse_args()
    even, crossed = list(evenness(asked)), list(crossings(asked))
    console = Console(width=100)
    console.print(evenness_table(even, asked.ranks))
    console.print(crossings_table(crossed, across_nodes(asked)))
    summary = {
        "num_points": len(even),
        "num_worse_same_load": num_worse(even),
        "num_worse_even_shares": num_worse(even, "_even_shares"),
        "num_worse_held_out": num_worse(even, "_held_out"),
        "median_max_over_mean": medians(even, ""),
        "num_crossing_points": len(crossed),
        "num_crossing_points_less_even": num_worse(crossed),
        "num_crossing_points_less_even_shares": num_worse(crossed, "_even_shares"),
        "median_crossings_saved": float(np.median(saved(crossed))),
        "median_held_out_max_over_mean": medians(crossed, "_held_out"),
        "planning": planning_s(max(asked.experts), max(asked.ranks)),
    }
    for name, value in summary.items():
        console.print(f"{name}: {value}")
    line = {"benchmark": "balance", "version": __version__, **summary}
    console.out(json.dumps(line | {"evenness": even, "crossings": crossed}), highlight=False)


if __name__ == "__main__":
    main()
