"""`expertlane list`: what a command can be given."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import typer

from expertlane.cli import output
from expertlane.cli.help import Command, Group, Panel
from expertlane.cli.model import find_model
from expertlane.cli.option_groups import takes_groups
from expertlane.cli.options import (
    KV_DTYPE,
    MAX_MODEL_LEN,
    ModelArgument,
    cluster_option,
    dtype_option,
)
from expertlane.cli.output import PrintOptions
from expertlane.spec.files import strict_json
from expertlane.spec.names import CacheType, NumberType

if TYPE_CHECKING:
    from expertlane.report.document import Column, Table

_MOST_ROWS = 24  # rows of an answer

app = typer.Typer(cls=Group, rich_markup_mode=None, help="List what a command can be given.")


@app.callback(invoke_without_command=True)
def _list(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def _command(function: Any) -> Any:
    short = function.__doc__.partition("\n")[0]
    return app.command(cls=Command, short_help=short)(takes_groups(function))


@_command
def models(print_options: PrintOptions) -> None:
    """Models that come with expertlane.

    Presets have random weights. Any other MODEL is a checkpoint's folder or a hub id (org/name).
    """
    from expertlane.report.document import number
    from expertlane.report.numbers import whole
    from expertlane.spec.model import PRESETS
    from expertlane.spec.tensors import num_active_params, num_params

    columns = [
        number("parameters", _of("num_parameters"), lambda of: f"{of / 1e6:,.1f} M"),
        number("active", _of("num_active_parameters"), lambda of: f"{of / 1e6:,.1f} M"),
        number("layers", _of("num_hidden_layers")),
        number("experts", _of("num_experts")),
        number("top-k", _of("num_experts_per_tok")),
        number("hidden", _of("hidden_size"), whole),
        number("tokens at most", _of("max_position_embeddings"), whole),
    ]
    sizes = "num_hidden_layers num_experts num_experts_per_tok hidden_size max_position_embeddings"
    rows = [
        {
            "name": name,
            "num_parameters": num_params(model),
            "num_active_parameters": num_active_params(model),
        }
        | {size: getattr(model, size) for size in sizes.split()}
        for name, model in PRESETS.items()
    ]
    families = "Families of checkpoints: expertlane list families."
    headline = f"{len(rows)} presets: {', '.join(PRESETS)}."
    _show(headline, "Models | random weights", "preset", columns, rows, print_options, [families])


@_command
def families(print_options: PrintOptions) -> None:
    """Families of checkpoints, and what each can do.

    Plan: plan, simulate and list layouts take its config.json. Draft: its checkpoints have layers
    for multi-token prediction, which plan and simulate price with --mtp. Tools, reasoning: the
    formats that serve reads, where published chat templates have them.
    """
    from expertlane.report.document import Table, text
    from expertlane.spec.hf_config import FAMILIES

    rows: list[dict[str, Any]] = [
        {
            "name": name,
            "architectures": [each.architecture, *each.wrappers],
            "mixers": each.mixers,
            "plan": True,
            "run": not each.is_planned_only,
            "serve": not each.is_planned_only,
            "draft": each.has_drafts,
            "tools": [] if each.is_planned_only else each.calls,
            "reasoning": [] if each.is_planned_only else each.thoughts,
        }
        for name, each in FAMILIES.items()
    ]

    def can(what: str) -> "Column[Mapping[str, Any]]":
        return text(what, lambda row: "yes" if row[what] else "–")

    def marks(what: str) -> "Column[Mapping[str, Any]]":
        return text(what, lambda row: ", ".join(row[what]) or "–")

    def starred(row: Mapping[str, Any]) -> str:
        return f"{row['name']}{'*' if row['draft'] else ''}"

    mixers, formats = text("mixers", _of("mixers")), (marks("tools"), marks("reasoning"))
    columns = [mixers, can("plan"), can("run"), can("serve"), can("draft"), *formats]
    run, planned = ([row for row in rows if row["run"] is does] for does in (True, False))
    by_mixers: dict[str, list[str]] = {}
    for row in planned:
        by_mixers.setdefault(row["mixers"], []).append(starred(row))
    listed = [{"mixers": each, "names": ", ".join(names)} for each, names in by_mixers.items()]
    title = "Plan, run and serve (*: has draft layers, priced by --mtp and not run)"
    parts = (
        Table.of(title, [text("family", starred), mixers, *formats], run),
        Table.of("Plan alone", [mixers, text("families", _of("names"))], listed),
    )
    headline = f"{len(run)} families run and are served; {len(planned)} more can be planned."
    setting = "Families of checkpoints | --json names their architectures"
    _show(headline, setting, "family", columns, rows, print_options, parts=parts)


@_command
def profiles(print_options: PrintOptions) -> None:
    """Profiles of devices, for --cluster, --links and --compute.

    expertlane calibrate writes one of this machine, to be given as a file.
    """
    from expertlane.cost.laws import shipped_profiles
    from expertlane.cost.laws.profile import read_profile
    from expertlane.report.document import number, text
    from expertlane.report.numbers import bytes_si, rate_si

    devices = {name: read_profile(name).device for name in shipped_profiles()}
    rows = [
        {
            "name": name,
            "device": device.name,
            "memory_bytes": device.memory_bytes,
            "memory_bytes_per_s": device.memory_bytes_per_s,
            "flops_per_s": dict(device.flops_per_s),
        }
        for name, device in devices.items()
    ]
    columns = [
        text("device", _device),
        number("memory", _of("memory_bytes"), bytes_si),
        number("bandwidth", _of("memory_bytes_per_s"), partial(rate_si, unit="B")),
        *(
            number(dtype, _of("flops_per_s", dtype), partial(rate_si, unit="FLOP"))
            for dtype in ("bfloat16", "float8", "nvfp4")
        ),
    ]
    headline = f"{len(rows)} profiles: {', '.join(devices)}."
    setting = "Devices | dense rates of their datasheets"
    _show(headline, setting, "profile", columns, rows, print_options)


@_command
def clusters(print_options: PrintOptions) -> None:
    """Clusters of the profiles: nodes and links.

    A cluster is a profile, x, and its number of devices: h100x16 for example.
    """
    from expertlane.cost.laws import shipped_profiles
    from expertlane.cost.laws.profile import read_profile
    from expertlane.report.document import number
    from expertlane.report.numbers import rate_si

    found = {name: read_profile(name) for name in shipped_profiles()}
    rows = [
        {
            "name": f"{name}xN",
            "devices_per_node": profile.ranks_per_node,
            "link_bytes_per_s": {
                link.name.lower(): sheet.bytes_per_s for link, sheet in profile.links.items()
            },
        }
        for name, profile in found.items()
    ]
    per_second = partial(rate_si, unit="B")
    columns = [
        number("devices per node", _of("devices_per_node")),
        number("inside a node", _of("link_bytes_per_s", "intra_node"), per_second),
        number("between nodes", _of("link_bytes_per_s", "inter_node"), per_second),
    ]
    note = "Or of a profile that expertlane calibrate wrote: laptop.tomlx2."
    headline = f"N devices of a profile: {', '.join(f'{name}xN' for name in found)}."
    setting = "Clusters | rates of links per device and direction"
    _show(headline, setting, "cluster", columns, rows, print_options, [note])


@_command
def frameworks(print_options: PrintOptions) -> None:
    """Serving frameworks, for --framework.

    How they schedule prompts, and on how many public measurements they were judged. Without
    --framework a projection is of no framework: steps take what the laws of kernels say.
    """
    from expertlane.cost.laws import frameworks as known
    from expertlane.planner.engines import ENGINES
    from expertlane.report.document import number, text
    from expertlane.report.numbers import whole

    num_rows = Counter[str]()
    for each in known.judged_groups():
        num_rows[each.framework] += each.num_rows
    listed = "title engine max_num_batched_tokens phases_apart prompt_wait_steps"
    rows = [
        {"name": name}
        | {field: getattr(each, field) for field in listed.split()}
        | {"num_rows": num_rows[name]}
        for name, each in known.frameworks().items()
    ]

    def prompts(row: Mapping[str, Any]) -> str:
        if row["phases_apart"]:
            return "in steps of their own"
        held = row["prompt_wait_steps"]
        return f"with decodes; wait ≤ {held} steps" if held else "with decodes"

    columns = [
        text("engine", lambda row: ENGINES[row["engine"]].title),
        number("tokens per step", _of("max_num_batched_tokens"), whole),
        text("prompts", prompts),
        number("rows judged", _of("num_rows"), whole),
    ]
    headline = f"{len(rows)} frameworks: {', '.join(known.frameworks())}."
    setting = "Serving frameworks | corrections fitted to public measurements"
    notes = [
        "Rows judged: not fitted to, in kinds of ten and more. dynamo-: disaggregated.",
        "Wait: with data-parallel attention, until every rank has a prompt.",
    ]
    _show(headline, setting, "framework", columns, rows, print_options, notes)


@dataclass(frozen=True, kw_only=True)
class _Options:
    panel: ClassVar = Panel.DEPLOYMENT
    cluster: str = cluster_option(...)
    dtype: NumberType | None = dtype_option("the checkpoint's, float16 for a preset")
    kv_dtype: CacheType = KV_DTYPE
    max_model_len: int | None = MAX_MODEL_LEN


@_command
def layouts(model: ModelArgument, own: _Options, print_options: PrintOptions) -> None:
    """Valid layouts of a model on a cluster, and what they hold.

    Memory of the fullest rank: weights, activations of a step of at most 8,192 tokens, the KV cache
    (and states) of one sequence of full length, and how many such sequences all ranks hold at once.

    \b
    Examples:
      expertlane list layouts paper --cluster h100x16
      expertlane list layouts ./my-checkpoint --cluster h100x8 --dtype float8
    """
    from expertlane.balance.holding import placements_of
    from expertlane.cost.laws.profile import parse_cluster
    from expertlane.cost.memory import FREE_SHARE, RANK_STEP_TOKENS, PlacedModel
    from expertlane.planner.candidates import check_plan_size, valid_layouts
    from expertlane.report.document import number
    from expertlane.report.numbers import bytes_si, counted, whole
    from expertlane.spec.deployment import Options

    found, cluster = find_model(model, weights=False), parse_cluster(own.cluster)
    check_plan_size(cluster)
    types = found.number_types(own.dtype, own.kv_dtype, cluster)
    full_len = own.max_model_len or found.config.max_position_embeddings
    device_bytes = cluster.profile.device.memory_bytes
    rows: list[dict[str, Any]] = []
    for layout in sorted(valid_layouts(found.config, cluster.num_devices), key=lambda of: -of.ep):
        placements = placements_of(found.config, layout, Options())
        placed = PlacedModel(found.config, layout, types, placements)
        room = placed.capacity(device_bytes, full_len, min(full_len, RANK_STEP_TOKENS))
        rows.append(
            {
                "layout": str(layout),
                "weight_bytes": room.memory.weight_bytes,
                "activation_bytes": room.memory.activation_bytes,
                "sequence_bytes": room.memory.kv_bytes,
                "num_sequences": room.num_resident,
                "fits": room.max_seqs > 0,
            }
        )
    rows.sort(key=lambda row: (-row["num_sequences"], row["weight_bytes"]))
    shown = _of_all_kinds(rows)
    columns = [
        number("weights per rank", _of("weight_bytes"), bytes_si),
        number("activations per rank", _of("activation_bytes"), bytes_si),
        number("KV per sequence", _of("sequence_bytes"), bytes_si),
        number("sequences", lambda row: row["num_sequences"] if row["fits"] else None, whole),
    ]
    num_fitting = sum(row["fits"] for row in rows)
    setting = (
        f"{found.name} on {cluster} | weights {types.weights}, KV cache {types.kv} | sequences of "
        f"{full_len:,} tokens"
    )
    headline = (
        f"{counted(len(rows), 'valid layout')} on all devices; {num_fitting} fit in "
        f"{bytes_si(FREE_SHARE * device_bytes)} per rank."
    )
    cautions = found.cautions(types, cluster)
    _show(headline, setting, "layout", columns, rows, print_options, cautions, shown)


def _of_all_kinds(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Up to `_MOST_ROWS` layouts, in order: the first of each set of axes, then others."""
    kinds = [tuple(part.split("=")[0] for part in row["layout"].split(",")) for row in rows]
    by_kind = sorted(range(len(rows)), key=lambda place: kinds.index(kinds[place]) != place)
    return [rows[place] for place in sorted(by_kind[:_MOST_ROWS])]


def _device(row: Mapping[str, Any]) -> str:
    """A device's name without its vendor and its memory, which have no need of one or a column."""
    return re.sub(r"^NVIDIA | \d+ GB$", "", row["device"])


def _of(*keys: str) -> Any:
    """A column's getter: the entry of a row under these keys, one inside the other."""

    def get(entry: Any) -> Any:
        for key in keys:
            entry = entry.get(key)
        return entry

    return get


def _show(
    headline: str,
    setting: str,
    heading: str,
    columns: "Sequence[Column[Mapping[str, Any]]]",
    rows: Sequence[Mapping[str, Any]],
    options: PrintOptions,
    notes: Sequence[str] = (),
    shown: Sequence[Mapping[str, Any]] | None = None,
    parts: "tuple[Table | str, ...]" = (),
) -> None:
    """Print a list.

    Args:
        heading: of the first column, which has the names of the rows: their first entry.
        columns: the others.
        shown: rows of an answer; by default the first.
        parts: an answer's, instead of those rows and the notes.
    """
    from expertlane.report import terminal
    from expertlane.report.document import Answer, Report, Section, Table, text

    columns = [text(heading, lambda row: next(iter(row.values()))), *columns]

    first = Table.of("", columns, rows[:_MOST_ROWS] if shown is None else shown)
    num_left_out = len(rows) - len(first.rows)
    omitted = [f"{num_left_out} more are not shown; --full shows all."] if num_left_out else []
    subject, _, details = setting.partition(" | ")
    report = Report(
        title=subject,
        answer=Answer(setting, headline, parts or (first, *omitted, *notes)),
        source="",
        command=output.command_line(),
        created=output.now(),
        sections=(
            Section(headline, (*filter(None, [details]), Table.of("", columns, rows), *notes)),
        ),
    )
    is_all = not (parts or len(rows) > _MOST_ROWS) and not (
        options.full or options.quiet or options.as_json
    )
    if not is_all:
        output.print_report(report, options, None, lambda: strict_json(rows) + "\n")
        return
    with output.printing() as console:
        terminal.draw_answer(report.answer, console)
