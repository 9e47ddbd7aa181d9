"""Dispatch and combine beside the bare transfers of the same bytes, which are their limit.

Local ranks, one expert-parallel group, no expert computation: experts read rows where they arrived
and write results where combine wants them, so a form ends where rows and pairs are known, and
begins again with results that are there. `bare` are the form's own collectives, counts too, on
buffers that are there already; `naive` is a flat all-to-all with a collective for each tensor and
plain torch operations, which sorts rows by expert and back. All take turns over the same routing; a
time is that of the slowest rank, the median of the rounds. `cpu` is the ratio of the processor time
of all ranks, `cpu ms`, which other programs on the machine disturb less. `hierarchical` has two
nodes of half the ranks. Sixteen ranks on a few cores are slow and noisy, since they wait for one
another more than for bytes; that says nothing of a cluster. `EXPERTLANE_TRANSPORT=gloo` measures
gloo. Run it with nothing else on the machine:

    python benchmarks/bench_dispatch.py [--ranks 2 8] [--tokens 256 1024] [--top-k 2 4]
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from bench_ranks import MeasureDispatch, start_ranks
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from expertlane import __version__
from expertlane.balance.placement import Placement
from expertlane.engine.comm.clocks import HostClock
from expertlane.engine.comm.collectives import Group, interleave
from expertlane.engine.comm.mesh import ParallelMesh
from expertlane.engine.comm.recorder import Recorder
from expertlane.engine.comm.transport import Work
from expertlane.engine.moe.dispatch import CopyChooser, Dispatcher, Payload, RoutedTokens
from expertlane.engine.moe.forms import make_dispatcher
from expertlane.engine.stage.context import RankContext
from expertlane.spec.deployment import DISPATCH_FORMS
from expertlane.spec.layout import Layout

HIDDEN_SIZE, NUM_EXPERTS = 1024, 32
FORMS = tuple(DISPATCH_FORMS)
NUM_ROUNDS, SAMPLE_TOKENS = 5, 1024  # a sample repeats few tokens up to so many
MOST_TOKENS = 16384  # of all ranks; all_gather holds them on each rank, four times over


class Point(NamedTuple):
    """What is measured; `num_tokens` are those of each rank."""

    num_ranks: int
    num_tokens: int
    top_k: int


@torch.inference_mode()
def measure(
    context: RankContext, command: MeasureDispatch
) -> dict[str, dict[str, list[list[float]]]]:
    """Runs on every rank."""
    num_ranks, num_tokens = command.num_ranks, command.num_tokens
    random = torch.Generator().manual_seed(context.rank)
    inputs = RoutedTokens(
        torch.randn(num_tokens, HIDDEN_SIZE, generator=random).bfloat16(),
        torch.rand(num_tokens, NUM_EXPERTS, generator=random).topk(command.top_k).indices,
        torch.rand(num_tokens, command.top_k, generator=random),
        [num_tokens] * num_ranks,
    )
    layout, per_node = Layout(dp=num_ranks, ep=num_ranks), num_ranks // 2
    context.meshes.make(layout, per_node)
    recorder = Recorder(context.rank, 1, 1, context.progress, HostClock(), num_ranks)
    mesh = ParallelMesh(layout, context.meshes, context.rank, per_node, recorder)
    placement = Placement.linear(NUM_EXPERTS, num_ranks)
    choice = CopyChooser(mesh, placement, torch.device("cpu"))
    seconds, expected = {}, naive(inputs, mesh)
    for form in FORMS:
        dispatcher = make_dispatcher(form, mesh, placement, choice, Payload("model", recorder))
        with capturing(mesh) as transfers:
            arrived, pairs, sent = interleave([dispatcher.dispatch(inputs)])[0]
            rows = arrived.index_select(0, pairs.rows)
            results = torch.empty_like(rows).index_copy_(0, pairs.order, rows)
            combined = interleave([dispatcher.combine(sent, results)])[0]
        torch.testing.assert_close(combined, expected, rtol=0.05, atol=0.05)  # bfloat16 sums
        variants = {
            "form": partial(round_trip, dispatcher, inputs, results),
            "bare": lambda transfers=transfers: [begin().wait() for begin in transfers],
        }
        if form == "all_to_all":
            variants["naive"] = partial(naive, inputs, mesh)
        seconds[form] = take_turns(context, mesh, variants, max(1, SAMPLE_TOKENS // num_tokens))
    return seconds


def round_trip(dispatcher: Dispatcher, inputs: RoutedTokens, results: Tensor) -> Tensor:
    rows, pairs, sent = interleave([dispatcher.dispatch(inputs)])[0]
    room = dispatcher.room(len(pairs.rows), rows)  # where experts would have written them
    return interleave([dispatcher.combine(sent, results if room is None else room)])[0]


@contextmanager
def capturing(mesh: ParallelMesh) -> Iterator[list[Callable[[], Work]]]:
    """Collect what begins the transfers that are begun inside, with buffers like theirs."""
    transfers: list[Callable[[], Work]] = []
    links = list({id(each): each for each in (group._link for group in groups_of(mesh))}.values())

    def captured(begin: Callable[..., Work], *given: Any) -> Work:
        buffers = [torch.ones_like(each) if isinstance(each, Tensor) else each for each in given]
        transfers.append(partial(begin, *buffers))
        return begin(*given)

    def captured_parts(link: Any, rows: Tensor, send: list[int], receive: list[int]) -> Work:
        buffers = torch.ones_like(rows), send, rows.new_empty(sum(receive), rows.shape[1]), receive
        transfers.append(partial(type(link).all_to_all, link, *buffers))
        return type(link).all_to_all_parts(link, rows, send, receive)

    for link in links:
        parts = partial(captured_parts, link)
        for name in ("all_to_all", "all_gather"):
            setattr(link, name, partial(captured, getattr(link, name)))
        link.all_to_all_parts = parts
    mesh.recorder.is_interleaved = True  # or transfers would be begun and waited for in one call
    try:
        yield transfers
    finally:
        mesh.recorder.is_interleaved = False
        for link in links:
            del link.all_to_all, link.all_gather, link.all_to_all_parts


def groups_of(mesh: ParallelMesh) -> list[Group]:
    groups = [mesh.ep, mesh.stage, mesh.ep_inter, mesh.ep_intra]
    return [group for group in groups if group.size > 1]


def take_turns(
    context: RankContext,
    mesh: ParallelMesh,
    variants: dict[str, Callable[[], object]],
    num_repeats: int,
) -> dict[str, list[list[float]]]:
    seconds: dict[str, list[list[float]]] = {name: [] for name in variants}
    for number in range(-1, NUM_ROUNDS):  # the first is not counted
        for name, variant in list(variants.items())[:: 1 if number % 2 else -1]:
            mesh.stage.all_gather(torch.zeros(1, 1), [1] * mesh.stage.size).wait()
            began = time.perf_counter(), time.process_time()
            for _ in range(num_repeats):
                variant()
            ended = time.perf_counter(), time.process_time()
            context.progress.touch()
            if number >= 0:
                pairs = zip(began, ended, strict=True)
                seconds[name].append([(end - begin) / num_repeats for begin, end in pairs])
    return seconds


def naive(inputs: RoutedTokens, mesh: ParallelMesh) -> Tensor:
    """A flat all-to-all as first written: nothing packed, counts of rows and of pairs apart."""
    x, topk_ids, weights, *_ = inputs
    size, (num_tokens, top_k) = mesh.ep.size, topk_ids.shape
    experts_a_rank = NUM_EXPERTS // size

    def exchange(rows: Tensor, send: list[int], receive: list[int]) -> Tensor:
        flat = rows.reshape(len(rows), -1)
        received = mesh.ep.all_to_all(flat, send, receive).wait()
        return received.view(-1, *rows.shape[1:])

    ranks = topk_ids // experts_a_rank
    reached = torch.zeros(num_tokens, size, dtype=torch.bool).scatter_(1, ranks, True)
    num_rows, num_pairs = reached.sum(0), torch.bincount(ranks.flatten(), minlength=size)
    each = [1] * size
    (rows_to, pairs_to), (rows_from, pairs_from) = zip(
        *(
            (counts.tolist(), exchange(counts, each, each).tolist())
            for counts in (num_rows, num_pairs)
        ),
        strict=True,
    )
    rank, token = reached.t().nonzero(as_tuple=True)
    local = torch.where(ranks[token] == rank[:, None], topk_ids[token] % experts_a_rank, -1)
    ids = exchange(local, rows_to, rows_from)
    exchange(weights[token], rows_to, rows_from)
    rows = exchange(x[token], rows_to, rows_from)
    row, choice = (ids >= 0).nonzero(as_tuple=True)
    order = torch.argsort(ids[row, choice], stable=True)
    results = rows[row[order]]  # what experts would take and give
    back = torch.empty_like(results)
    back[order] = results
    back = exchange(back, pairs_from, pairs_to)
    of_pair = torch.empty_like(back)
    of_pair[torch.argsort(ranks.flatten(), stable=True)] = back
    weighted = of_pair.view(num_tokens, top_k, -1).float() * weights[..., None]
    return weighted.sum(1).to(x.dtype)


def summary(point: Point, form: str, by_rank: list[dict[str, list[list[float]]]]) -> dict[str, Any]:
    """One line of the table: seconds of the slowest rank."""
    times = {name: torch.tensor([rank[name] for rank in by_rank]) for name in by_rank[0]}
    walls = {name: statistics.median(of[:, :, 0].amax(0).tolist()) for name, of in times.items()}
    cpu = {name: statistics.median(of[:, :, 1].sum(0).tolist()) for name, of in times.items()}
    return {
        **point._asdict(),
        "form": form,
        **{f"{name}_s": wall for name, wall in walls.items()},
        "ratio": walls["form"] / walls["bare"],
        "cpu_ratio": cpu["form"] / cpu["bare"],
        "cpu_s": cpu["form"],
    }


def show(console: Console, rows: list[dict[str, Any]]) -> None:
    names = ["ranks", "tokens", "top-k", "form", "ms", "bare ms", "ratio", "cpu", "cpu ms", "naive"]
    table = Table(*names, title=f"dispatch and combine, hidden {HIDDEN_SIZE}, bfloat16")
    for row in rows:
        naive_s = row.get("naive_s")
        table.add_row(
            *(str(row[name]) for name in ("num_ranks", "num_tokens", "top_k", "form")),
            *(f"{1e3 * row[name]:.2f}" for name in ("form_s", "bare_s")),
            *(f"{row[name]:.2f}" for name in ("ratio", "cpu_ratio")),
            f"{1e3 * row['cpu_s']:.2f}",
            f"{naive_s / row['form_s']:.2f} ×" if naive_s else "",
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--tokens", type=int, nargs="+", default=[16, 64, 256, 1024, 4096])
    parser.add_argument("--top-k", type=int, nargs="+", default=[2])
    asked = parser.parse_args()
    points = [
        Point(num_ranks, num_tokens, top_k)
        for num_ranks in asked.ranks
        for top_k in asked.top_k
        for num_tokens in asked.tokens
        if num_ranks * num_tokens <= MOST_TOKENS
    ]
    rows, console = [], Console(width=100)
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("points", total=len(points))
        for num_ranks in asked.ranks:
            with start_ranks(num_ranks) as pool:
                for point in points:
                    if point.num_ranks == num_ranks:
                        by_rank = pool.call(MeasureDispatch(*point))
                        rows += [summary(point, f, [of[f] for of in by_rank]) for f in FORMS]
                        progress.advance(task)
    show(console, rows)
    line = {"benchmark": "dispatch", "version": __version__, "torch": torch.__version__}
    console.out(json.dumps(line | {"rows": rows}), highlight=False)


if __name__ == "__main__":
    main()
