"""The model that a command is given: found, laid out, checked, priced."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from expertlane.cli.output import print_message
from expertlane.errors import CapacityError, UserError, naming, require_extra
from expertlane.spec.deployment import Deployment, Options
from expertlane.spec.from_hf import read_model
from expertlane.spec.hf_config import Quantization, quantization_of, read_config, resolve_model
from expertlane.spec.layout import Layout
from expertlane.spec.model import PRESETS, ModelConfig
from expertlane.spec.names import CacheType

if TYPE_CHECKING:
    from expertlane.cli.options import ProjectionOptions
    from expertlane.cost.laws.profile import ModelledCluster
    from expertlane.cost.routing import RoutingChoice
    from expertlane.cost.step.operation import NumberTypes
    from expertlane.spec.experiment import Projection


_WIDER = 1.1  # times as many bytes as the checkpoint's own are worth a word


class OnCluster(NamedTuple):
    """A cluster with corrections, and the number types and routing on it.

    Attributes:
        skew: exponent of the popularity of experts, as asked for or corrected; None for the
            model's usual one, and where routing was recorded.
    """

    cluster: "ModelledCluster"
    types: "NumberTypes"
    routing: "RoutingChoice"
    skew: float | None = None


@dataclass(frozen=True)
class FoundModel:
    """A model before it is loaded.

    Attributes:
        name: name or path, as the user gave it.
        folder: folder of the checkpoint; None for a preset.
        quantization: quantisation of the checkpoint's weights; None where there is none.
    """

    name: str
    config: ModelConfig
    folder: Path | None
    quantization: Quantization | None = None

    def lay_out(self, layout: str, *, is_modelled: bool = False) -> Layout:
        """Read a layout.

        Args:
            is_modelled: see `Layout.parse`.

        Raises:
            UserError: it is none, or the model cannot be laid out so.
        """
        chosen = Layout.parse(layout, is_modelled=is_modelled)
        chosen.check_model(self.config)
        return chosen

    def check(
        self, layout: Layout, options: Options, ranks_per_node: int, *, is_modelled: bool = False
    ) -> None:
        """Check what can be known before ranks are started.

        Args:
            is_modelled: see `check_deployment`.

        Raises:
            UserError: experts cannot be placed or reached so.
        """
        from expertlane.balance.holding import check_deployment

        deployment = Deployment(self.name, layout, options)
        check_deployment(self.config, deployment, ranks_per_node, is_modelled=is_modelled)

    def number_types(
        self, dtype: str | None, kv_dtype: CacheType, cluster: "ModelledCluster"
    ) -> "NumberTypes":
        """The number types asked for, else the checkpoint's own.

        A preset is in float16, as in the paper, or in what the devices have if they lack it: a
        profile of `expertlane calibrate` has one type.

        Raises:
            UserError: the devices do not compute in it.
        """
        from expertlane.cost.step.operation import NumberTypes

        known = cluster.profile.device.flops_per_s
        own: str = self.config.dtype if self.folder else "float16"
        if not self.folder and own not in known:
            own = next(iter(known))
        stored = self.quantization.number_type if self.quantization is not None else None
        if stored is not None and (stored == "float8" or stored in known):
            own = stored  # a narrower one is priced wider, with a word
        kv: str = kv_dtype
        if kv == "model" and self.quantization is not None and self.quantization.has_float8_cache:
            kv = "float8"
        types = NumberTypes.asked(dtype or own, kv)
        if stored == types.weights and self.quantization is not None:
            others = self.quantization.others
            types = replace(types, others=others if others in known else None)
        if types.weights not in known:
            raise UserError(
                f"{cluster.profile.device.name} does not compute in {types.weights}; valid for "
                f"--dtype on {cluster}: {', '.join(known)}"
            )
        return types

    def on_cluster(
        self,
        asked: "ProjectionOptions | Projection",
        cluster: "ModelledCluster",
        seed: int,
        *,
        dtype: str | None = None,
        has_drafts: bool = False,
    ) -> OnCluster:
        """The model on a cluster, by the options of a projection.

        Args:
            seed: seed of the routing.
            dtype: number type of weights if none is asked for; None for the checkpoint's own.

        Raises:
            UserError: an option names what there is not, or two contradict each other.
        """
        from expertlane.cost.laws.corrections import corrected, read_corrections
        from expertlane.cost.laws.frameworks import served_by
        from expertlane.cost.routing import choose_routing

        last = self.config.draft_kinds[0]
        if has_drafts and not self.config.draft and (last.mixing is None or last.mlp == "none"):
            raise UserError(
                f"--mtp: the last layer of {self.name} is a mixer or an MLP alone, so what its "
                "layers that draft cost is not known; leave it out"
            )
        trace = None if asked.routing_trace is None else Path(asked.routing_trace)
        corrections, skew = None, asked.skew
        if asked.corrections is not None:
            with naming("--corrections"):
                corrections = read_corrections(Path(asked.corrections))
            if skew is None and trace is None:
                skew = corrections.skew
        routing = choose_routing(self.config, trace, skew, seed)
        if routing.note:
            print_message(f"{trace}: {routing.note}")
        types = self.number_types(asked.dtype or dtype, asked.kv_dtype, cluster)
        weights, framework = types.weights, asked.framework
        served = served_by(cluster, framework, self.config, weights, has_drafts=has_drafts)
        if corrections is not None:
            served = corrected(served, corrections)
        return OnCluster(served, types, routing, skew)

    def cautions(self, types: "NumberTypes", cluster: "ModelledCluster") -> tuple[str, ...]:
        """A sentence where a checkpoint's weights are narrower than what they are priced as."""
        from expertlane.cost.step.operation import WEIGHT_BYTES

        device, float8 = cluster.profile.device, WEIGHT_BYTES["float8"]

        stored = self.quantization
        if stored is None:
            return ()
        priced = WEIGHT_BYTES[types.weights]
        own = WEIGHT_BYTES.get(stored.number_type or "", 0.0)  # one unknown is narrow
        if priced < _WIDER * own or (own == 0.0 and priced <= float8):
            return ()
        nearer, is_lacking = "", stored.number_type not in (None, *device.flops_per_s)
        if stored.number_type in device.flops_per_s:
            nearer = f"; --dtype {stored.number_type} is what they are"
        elif priced > float8 and "float8" in device.flops_per_s:
            nearer = "; --dtype float8 comes nearer"
        lacking = f", in which {device.name} does not compute, and" if is_lacking else " but"
        return (
            f"The checkpoint's weights are {stored.number_type or stored.method}{lacking} priced "
            f"as {types.weights}: their memory and reads come out too large{nearer}.",
        )

    @contextmanager
    def cautioning(self, types: "NumberTypes", cluster: "ModelledCluster") -> Iterator[None]:
        """Add the cautions to the text that says that memory is too small.

        Raises:
            CapacityError: the one that was raised.
        """
        try:
            yield
        except CapacityError as error:
            said = ". ".join((str(error), *self.cautions(types, cluster)))
            raise CapacityError(said.removesuffix(".")) from None


def find_model(name: str, *, weights: bool = True, is_run_here: bool | None = None) -> FoundModel:
    """Find a preset or a checkpoint, downloaded first if need be.

    Args:
        weights: False where a checkpoint's configuration is enough.
        is_run_here: our engine will read the weights, not another one's server; by default where
            they are needed.

    Raises:
        UserError: there is none, or its configuration cannot be read.
        MissingExtraError: it is to run here, and the extra `engine` is not installed.
    """
    is_run_here = weights if is_run_here is None else is_run_here
    if is_run_here:
        require_extra("engine", "running models")
    if name in PRESETS:
        return FoundModel(name, PRESETS[name], None)
    folder = resolve_model(name, weights=weights)
    config = read_model(folder, name, weights=is_run_here)
    return FoundModel(name, config, folder, quantization_of(read_config(folder)))
