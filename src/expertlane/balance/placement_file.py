"""Placements of a whole model: their JSON file, and those that deployments begin with."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePath

from expertlane.balance.placement import Placement
from expertlane.errors import SpecError, UserError, naming
from expertlane.spec.deployment import Deployment, Options
from expertlane.spec.experiment import Experiment
from expertlane.spec.files import CONFIG_BYTES, build, read_json, strict_json, write_text
from expertlane.spec.layout import Layout
from expertlane.spec.model import ModelConfig
from expertlane.spec.ranges import Strict, shown, take, take_fields

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


Placements = tuple[Placement | None, ...]


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
    placements = placements_of(model, layout, options)
    has_copies = any(each is not None and each.num_slots > each.num_experts for each in placements)
    if options.copies == "balanced" and not has_copies:
        raise UserError(
            f"copies are to be balanced, but in layout {layout} no expert has two; add some with "
            "num_redundant_experts (--num-redundant-experts), or leave copies out"
        )
    return placements


def check_experiment(experiment: Experiment, ranks_per_node: int = 0) -> list[Placements]:
    """Check all deployments of an experiment; gives where experts begin in each.

    Args:
        ranks_per_node: for experiments that do not give it; 0 where only the launcher will know.

    Raises:
        UserError: for the first deployment that is not valid; the text begins with its name.
    """
    placements = []
    for each in experiment.deployments + experiment.scaling:
        with naming(f"deployment {each.name!r}"):
            known = experiment.cluster.ranks_per_node or ranks_per_node
            placements.append(check_deployment(experiment.model, each, known))
    return placements
