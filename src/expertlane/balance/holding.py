"""Weights that each rank holds: layers, heads, experts, slices.

`Holding` is computed for a rank when asked; whoever needs to know which weights a rank has asks it.
Bytes are `cost.memory`'s. Which experts a rank holds is the placement's matter; all else follows
from the layout (`Layout`).

When the layout changes, ranks go on with what they hold: `keeping` gives a placement for more or
fewer ranks in which experts stay where they can, `over_survivors` one for those left after a loss.

Below: placements of a whole model, their JSON file, and those that deployments begin with.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path, PurePath
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from expertlane.balance.placement import Placement
from expertlane.errors import SpecError, UserError, naming
from expertlane.spec.deployment import Deployment, Options
from expertlane.spec.experiment import Experiment
from expertlane.spec.files import CONFIG_BYTES, build, read_json, strict_json, write_text
from expertlane.spec.from_hf import lacking_in_engine
from expertlane.spec.layout import Coordinates, Layout, Members, part_of
from expertlane.spec.model import ModelConfig
from expertlane.spec.ranges import Strict, shown, take, take_fields
from expertlane.spec.tensors import (
    EMBEDDING,
    HEAD,
    HEAD_BIAS,
    cut_dim,
    expert_name,
    expert_shapes,
    layer_name,
    layer_shapes,
    outside_shapes,
    tensor_shape,
)

Placements = tuple[Placement | None, ...]  # of each hidden layer; None for a dense one

_OF_QUERIES = {
    *("query", "query_bias", "query_b", "output", "output_a", "output_b", "kv_b", "sinks"),
    "head_gate",
}
_OF_KEYS = {"key", "key_bias", "value", "value_bias"}
_ADDED_ONCE = {"output_bias", "down_bias"}  # to partial sums, by the first rank


class Slices(NamedTuple):
    """A rank's place in tensor and in expert tensor parallelism: which slice of a tensor it holds.

    Ranks with equal ones hold equal slices.
    """

    tp: int = 1
    tp_rank: int = 0
    etp: int = 1
    etp_rank: int = 0

    @classmethod
    def of(cls, layout: Layout, at: Coordinates) -> "Slices":
        """The slices at a place of a layout."""
        return cls(layout.tp, at.tp_rank, layout.etp, at.etp_rank)

    def heads(self, model: ModelConfig, *, has_window: bool = False) -> range:
        """The query heads of a layer, with or without a window."""
        num = model.heads_of(has_window=has_window).num // self.tp
        return range(self.tp_rank * num, (self.tp_rank + 1) * num)

    def kv_heads(self, model: ModelConfig, *, has_window: bool = False) -> range:
        """The key/value heads in the cache; a latent counts as one, which all ranks hold.

        Of heads fewer than `tp`, consecutive ranks hold the same one.
        """
        if model.latent is not None:
            return range(1)
        num_kv = model.heads_of(has_window=has_window).num_kv
        num, copies = max(1, num_kv // self.tp), max(1, self.tp // num_kv)
        first = self.tp_rank // copies * num
        return range(first, first + num)

    def of_tensor(self, model: ModelConfig, name: str) -> range:
        """The slice of a tensor, in the dimension `cut_dim`; all of it if no layout cuts it.

        Empty where another rank has it: biases that are added once, and more ranks than rows.

        Args:
            name: numbers of layer and expert do not matter and may be left out.
        """
        size = tensor_shape(model, name)[cut_dim(name)]
        of_expert, part = "experts" in name.split("."), name.rpartition(".")[2]
        if model.state is not None and ".state." in name:
            return model.state.cut(part, size, self.tp, self.tp_rank)
        if part in _ADDED_ONCE:
            is_first = (self.etp_rank if of_expert else self.tp_rank) == 0
            return range(size if is_first else 0)
        if of_expert:
            return part_of(size, self.etp, self.etp_rank)
        if name in (HEAD, HEAD_BIAS) or ".dense." in name or ".shared." in name:
            return part_of(size, self.tp, self.tp_rank)
        is_norm_of_all, has_window = model.qk_norm == "full", ".window." in name
        if part in _OF_QUERIES or (part == "query_norm" and is_norm_of_all):
            heads = self.heads(model, has_window=has_window)
            width = size // model.heads_of(has_window=has_window).num
        elif part in _OF_KEYS or (part == "key_norm" and is_norm_of_all):
            heads = self.kv_heads(model, has_window=has_window)
            width = size // model.heads_of(has_window=has_window).num_kv
        elif part == "index_query" and model.indexer is not None and model.indexer.by_group:
            heads, width = self.kv_heads(model), model.indexer.head_dim
        else:
            return range(size)
        return range(heads.start * width, heads.stop * width)


@dataclass(frozen=True, eq=False)
class Holding:
    """A rank's part of a model: its layers, heads and experts, and its slice of every tensor.

    Attributes:
        rank: in the layout.
        placements: [num_hidden_layers]; of the rank's replica.
    """

    model: ModelConfig
    layout: Layout
    rank: int
    placements: Placements

    @classmethod
    def of_members(
        cls, model: ModelConfig, members: Members, placements: tuple[Placements, ...]
    ) -> dict[int, "Holding"]:
        """Each process's part of a model, by its number, in the order of ranks.

        Args:
            placements: [replicas][num_hidden_layers].
        """
        layout = members.layout
        return {
            number: cls(model, layout, rank, placements[rank // layout.replica_size])
            for rank, number in enumerate(members.numbers)
        }

    @cached_property
    def at(self) -> Coordinates:
        """The rank's coordinates."""
        return self.layout.coordinates(self.rank)

    @cached_property
    def slices(self) -> Slices:
        """Which slice of each tensor the rank holds."""
        return Slices.of(self.layout, self.at)

    @cached_property
    def layers(self) -> range:
        """The layers of the rank's pipeline stage."""
        return self.layout.layers_of_stage(self.model.num_hidden_layers, self.at.pp_rank)

    @property
    def outside_layers(self) -> tuple[str, ...]:
        """Names of the tensors outside layers: of the first stage, and of the last.

        The head is its own tensor, also where it has the embedding's weights.
        """
        first, last = self.at.pp_rank == 0, self.at.pp_rank == self.layout.pp - 1
        names = outside_shapes(self.model)
        return tuple(name for name in names if (first if name == EMBEDDING else last))

    def experts(self, layer: int) -> tuple[int, ...]:
        """The logical expert in each of the rank's slots of a layer; none of another stage's."""
        placement = self.placements[layer]
        if placement is None or layer not in self.layers:
            return ()
        return placement.experts_of_rank[self.at.ep_rank]

    def tensors(self) -> dict[str, range]:
        """All tensors of which the rank holds a part, and `Slices.of_tensor` of each."""
        model, own = self.model, self.slices
        held = {name: own.of_tensor(model, name) for name in self.outside_layers}
        of_kind = {
            kind: {
                part: own.of_tensor(model, layer_name(0, part))
                for part in layer_shapes(model, kind)
            }
            for kind in set(map(model.kind_of_layer, self.layers))
        }
        of_expert = {
            part: own.of_tensor(model, expert_name(0, 0, part)) for part in expert_shapes(model)
        }
        for layer in self.layers:
            for part, rows in of_kind[model.kind_of_layer(layer)].items():
                held[layer_name(layer, part)] = rows
            for expert in self.experts(layer):
                for part, rows in of_expert.items():
                    held[expert_name(layer, expert, part)] = rows
        return {name: rows for name, rows in held.items() if rows}


def keeping_placements(before: Mapping[int, Holding], wanted: Mapping[int, Holding]) -> Placements:
    """Placements for another layout in which processes keep the experts that they hold.

    They are `keeping` of each layer, by the ranks of the first replica.

    Args:
        before, wanted: by the number of a process; what it holds, and is to hold.
    """
    replica = {number: own for number, own in wanted.items() if not own.at.replica}
    found = list(next(iter(replica.values())).placements)
    etps = {own.slices.etp for own in (*before.values(), *replica.values())}
    if len(etps) > 1:  # no rank has the part of an expert that it needs
        return tuple(found)
    for layer, placement in enumerate(found):
        if placement is None:
            continue
        held: list[Sequence[int]] = [()] * placement.ep
        for number, own in replica.items():
            was = before.get(number)
            if was is None or layer not in own.layers:
                continue
            if own.at.etp_rank == was.at.etp_rank == 0:
                held[own.at.ep_rank] = was.experts(layer)
        found[layer] = keeping(placement, held)
    return tuple(found)


def keeping(wanted: Placement, held: Sequence[Sequence[int]]) -> Placement:
    """A placement with the same numbers of slots and copies, in which ranks keep what they can.

    What no rank keeps goes where slots are free, in order. The wanted one where copies of an expert
    would meet on a rank.

    Args:
        held: [ep]; experts that each rank has now, in order; none of a new one.
    """
    num_left = np.bincount(np.concatenate(wanted.experts_of_rank), minlength=wanted.num_experts)
    capacity = [len(experts) for experts in wanted.experts_of_rank]
    kept: list[list[int]] = [[] for _ in capacity]
    for own, has, num in zip(kept, held, capacity, strict=True):
        for expert in has:
            if num_left[expert] and len(own) < num:
                own.append(expert)
                num_left[expert] -= 1
    # The most numerous first: they have the fewest ranks left.
    for expert in np.argsort(-num_left, kind="stable").tolist():
        free = [r for r, own in enumerate(kept) if len(own) < capacity[r] and expert not in own]
        free.sort(key=lambda rank: len(kept[rank]) - capacity[rank])
        if len(free) < num_left[expert]:
            return wanted
        for rank in free[: num_left[expert]]:
            kept[rank].append(expert)
    return Placement(wanted.num_experts, tuple(tuple(sorted(own)) for own in kept))


def over_survivors(
    placement: Placement,
    survivors: Sequence[int],
    load: npt.NDArray[np.number] | None = None,
) -> Placement:
    """The placement over some of its ranks: every expert that they hold keeps its slot.

    A rank that is left alone has all in their order, which computes in fewest calls.

    An expert that none of them holds gets one slot more, the heaviest first, on the rank with the
    least load of those that then hold no more than the fullest rank has to. So where every expert
    has a copy left, nothing moves.

    Args:
        survivors: [ep of the new placement]; which rank each was.
        load: [num_experts]; all alike if not given.
    """
    held = [list(placement.experts_of_rank[rank]) for rank in survivors]
    left = set().union(*held)
    missing = [expert for expert in range(placement.num_experts) if expert not in left]
    weights = np.ones(placement.num_experts)
    if load is not None and load.any():
        weights = np.asarray(load, dtype=np.float64)
    num_copies = np.bincount([e for rank in held for e in rank], minlength=placement.num_experts)
    loads = [sum(weights[e] / num_copies[e] for e in rank) for rank in held]
    most = max(max(map(len, held)), -(-(sum(map(len, held)) + len(missing)) // len(held)))
    for expert in sorted(missing, key=lambda expert: (-weights[expert], expert)):
        rank = min(
            (rank for rank in range(len(held)) if len(held[rank]) < most),
            key=lambda rank: (loads[rank], len(held[rank]), rank),
        )
        held[rank].append(expert)
        loads[rank] += weights[expert]
    if len(held) == 1:
        held = [sorted(held[0])]
    return Placement(placement.num_experts, tuple(map(tuple, held)))


SCHEMA_VERSION = 1


@dataclass(frozen=True)
class ModelPlacement:
    """The placement of every MoE layer of a model.

    Attributes:
        model: its name.
        num_experts: logical experts of a layer.
        layers: by index among the hidden layers, ascending; dense layers have none.

    Raises:
        SpecError: no layer, a negative index, or layers that differ in experts or ranks.
    """

    model: str
    num_experts: int
    layers: Mapping[int, Placement]

    def __post_init__(self) -> None:
        if not self.layers:
            raise SpecError("placement: there is no layer")
        if min(self.layers) < 0:
            raise SpecError(f"placement: layer {min(self.layers)}; layers are counted from 0")
        for layer, placement in self.layers.items():
            if placement.num_experts != self.num_experts:
                raise SpecError(
                    f"placement: layer {layer} has {placement.num_experts} experts; "
                    f"the model has {self.num_experts}"
                )
            if placement.ep != self.ep:
                raise SpecError(
                    f"placement: layer {layer} is for {placement.ep} ep ranks; "
                    f"the first layer is for {self.ep}"
                )
        object.__setattr__(self, "layers", dict(sorted(self.layers.items())))

    @property
    def ep(self) -> int:
        """Expert-parallel ranks."""
        return next(iter(self.layers.values())).ep

    def check(
        self,
        where: Path | str,
        *,
        num_experts: int,
        layers: Iterable[int],
        ep: int,
        model: str | None = None,
    ) -> None:
        """Check that it is for a certain model and number of ranks.

        Args:
            where: the file it came from, for the message.
            num_experts, layers: the model's experts, and the indices of its MoE layers.
            ep: ranks that will hold it.
            model: its name. Only the last part counts, since a checkpoint's path can be spelled
                in several ways. None does not compare.

        Raises:
            UserError: it is not.
        """
        if model is not None and PurePath(self.model).name != PurePath(model).name:
            raise UserError(f"{where} is a placement of {self.model}; here the model is {model}")
        if self.num_experts != num_experts:
            raise UserError(
                f"{where} is a placement of {self.model}, which has {self.num_experts} experts per "
                f"layer; here there are {num_experts}"
            )
        wanted = set(layers)
        if wanted != set(self.layers):
            difference = min(wanted ^ set(self.layers))
            which = "lacks" if difference in wanted else "has"
            raise UserError(
                f"{where} is a placement of {len(self.layers)} MoE layers of {self.model}; here "
                f"there are {len(wanted)} (it {which} layer {difference})"
            )
        if self.ep != ep:
            raise UserError(f"{where} is a placement on {self.ep} ep ranks; here there are {ep}")


@dataclass(frozen=True)
class _Layer(Strict):
    layer: int
    experts_of_rank: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        take_fields(self)


@dataclass(frozen=True)
class _File(Strict):
    schema_version: int
    model: str
    num_experts: int
    ep: int
    layers: tuple[_Layer, ...]

    def __post_init__(self) -> None:
        take_fields(self)


def write_placement(placement: ModelPlacement, path: Path) -> None:
    """Write a placement as JSON, one line a layer.

    Raises:
        UserError: the folder can't be written to.
    """
    head = {
        "schema_version": SCHEMA_VERSION,
        "model": placement.model,
        "num_experts": placement.num_experts,
        "ep": placement.ep,
    }
    lines = ",\n".join(
        "    " + strict_json({"layer": layer, "experts_of_rank": of_layer.experts_of_rank})
        for layer, of_layer in placement.layers.items()
    )
    opening = strict_json(head, indent=2, ensure_ascii=False).removesuffix("\n}")
    text = f'{opening},\n  "layers": [\n{lines}\n  ]\n}}\n'
    write_text(path, text)


def read_placement(path: Path) -> ModelPlacement:
    """Read what `write_placement` wrote, or what was written by hand in its form.

    Raises:
        UserError: the file is missing or damaged, of another schema version, or breaks a rule of
            a placement; one line that names the file.
    """
    data = read_json(path, CONFIG_BYTES)
    with naming(path):
        return _parse(data)


def _parse(data: object) -> ModelPlacement:
    if not isinstance(data, dict) or "schema_version" not in data:
        raise UserError("not a placement file: it has no schema_version")
    version = data["schema_version"]
    if type(version) is not int or version != SCHEMA_VERSION:
        raise UserError(
            f"schema_version is {shown(version)}; this expertlane reads {SCHEMA_VERSION}"
        )
    file = build(_File, data)
    if not file.model.isprintable():
        raise UserError(f"model is {shown(file.model)}; it must be a name, one line of text")
    layers: dict[int, Placement] = {}
    for each in file.layers:
        if each.layer in layers:
            raise UserError(f"layer {each.layer} is given twice")
        if len(each.experts_of_rank) != file.ep:
            raise UserError(
                f"layer {each.layer} has {len(each.experts_of_rank)} ranks; ep is {file.ep}"
            )
        with naming(f"layer {each.layer}"):
            layers[each.layer] = Placement(file.num_experts, each.experts_of_rank)
    return ModelPlacement(file.model, file.num_experts, layers)


def placements_of(model: ModelConfig, layout: Layout, options: Options) -> Placements:
    """[num_hidden_layers]; the placement each layer begins with; None for a dense layer.

    A placement by load turns on traffic, which is not known here: `cost.routing.placed` makes it.

    Raises:
        UserError: the placement file is damaged or for another model or number of ranks, or there
            are more redundant experts than ranks could hold.
    """
    layers = [not model.is_dense(layer) for layer in range(model.num_hidden_layers)]
    if options.placement_file is not None:
        path = Path(options.placement_file)
        placed = read_placement(path)
        moe_layers = [layer for layer, is_moe in enumerate(layers) if is_moe]
        placed.check(path, num_experts=model.num_experts, layers=moe_layers, ep=layout.ep)
        return tuple(placed.layers.get(layer) for layer in range(len(layers)))
    assert options.placement != "load", "it turns on traffic"
    make = Placement.linear if options.placement == "linear" else Placement.round_robin
    placement = make(model.num_experts, layout.ep, options.num_redundant_experts)
    return tuple(placement if is_moe else None for is_moe in layers)


def check_deployment(
    model: ModelConfig, deployment: Deployment, ranks_per_node: int, *, is_modelled: bool = False
) -> Placements:
    """Check a deployment; gives the placement that its experts begin with; linear for one by load.

    Args:
        ranks_per_node: 0 where only the launcher will know.
        is_modelled: it is only modelled, so it may use what the engine does not support.

    Raises:
        UserError: the layout does not suit the model, or its experts cannot be placed or moved, or
            its hidden states sent, as the options say.
    """
    layout, options = deployment.layout, deployment.options
    layout.check_model(model)
    if (lacking := lacking_in_engine(model)) is not None and not is_modelled:
        raise UserError(
            f"{model.name} has {lacking}, which the engine does not run; plan and simulate take it"
        )
    if layout.dcp > 1 and not is_modelled:
        raise UserError(
            f"layout {layout}: decode context parallelism is modelled by plan and simulate; the "
            "engine does not run it; valid here: dcp=1"
        )
    take("ranks_per_node", ranks_per_node)
    if options.is_by_node and ranks_per_node:
        layout.ep_ranks_per_node(ranks_per_node)
    if options.rebalance_steps and layout.ep == 1:
        raise UserError(
            f"rebalance_steps is {options.rebalance_steps}, but layout {layout} has ep=1, where no "
            "expert can move; valid: 0, or a layout with ep=2 or more"
        )
    if options.payload == "float8" and model.hidden_size % 4:
        raise UserError(
            f"payload float8 needs a hidden_size that is a multiple of 4; it is {model.hidden_size}"
        )
    if options.placement == "load":
        if not is_modelled:
            raise UserError(
                "placement by load is modelled by plan, simulate and compare --project; to run it, "
                "let experts move while requests run with rebalance_steps (--rebalance-steps), or "
                "give a file of expertlane balance"
            )
        options = replace(options, placement="linear")  # with as many slots on every rank
    return placements_of(model, layout, options)


def check_experiment(
    experiment: Experiment, ranks_per_node: int = 0, *, is_modelled: bool = False
) -> list[Placements]:
    """Check all deployments of an experiment; gives where experts begin in each.

    Args:
        ranks_per_node: for experiments that do not give it; 0 where only the launcher will know.
        is_modelled: see `check_deployment`.

    Raises:
        UserError: for the first deployment that is not valid; the text begins with its name.
    """
    placements = []
    for each in experiment.deployments + experiment.scaling:
        with naming(f"deployment {each.name!r}"):
            known = experiment.cluster.ranks_per_node or ranks_per_node
            placements.append(
                check_deployment(experiment.model, each, known, is_modelled=is_modelled)
            )
    return placements
