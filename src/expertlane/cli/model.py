"""The model that a command is given: found, laid out, checked, loaded, priced."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from expertlane.cli.modelled import ProjectionOptions
from expertlane.cli.options import EngineOptions
from expertlane.cli.output import print_message, task_on_stderr
from expertlane.engine.checkpoint_folder import resolve_model
from expertlane.errors import UserError
from expertlane.spec.deployment import Deployment, Options
from expertlane.spec.from_hf import read_model
from expertlane.spec.hf_config import Quantization, quantization_of, read_config
from expertlane.spec.layout import Layout
from expertlane.spec.model import PRESETS, ModelConfig

if TYPE_CHECKING:
    from expertlane.cost.laws.profile_file import ModelledCluster
    from expertlane.cost.number_types import NumberTypes
    from expertlane.engine.commands import RankMachine
    from expertlane.engine.llm import LLM


def _platform_text(machine: "RankMachine") -> str:
    """The instruction set, or why kernels are not ours; GPUs that ranks share, or leave idle."""
    kernels = machine.kernels
    text = f"computing with {kernels}" if "(" in kernels else ""
    if kernels.startswith("torch ("):
        text += "; expertlane's own kernels are faster"
    if machine.ranks_on_device > 1:
        text = text or f"computing with {kernels}"
        text += f"; {machine.ranks_on_device} ranks share a GPU ({machine.backend})"
    elif machine.num_idle_gpus:
        text = text or f"computing with {kernels}"
        text += (
            f"; on the CPU: there are fewer GPUs ({machine.num_idle_gpus}) than ranks "
            f"({machine.ranks_per_node}), which EXPERTLANE_TRANSPORT=shared_memory lets share them"
        )
    return text


@dataclass(frozen=True)
class FoundModel:
    """A model before it is loaded.

    Attributes:
        name: as the user gave it.
        folder: of the checkpoint; None for a preset.
        quantization: of the checkpoint's weights; None where they are as computed with.
    """

    name: str
    config: ModelConfig
    folder: Path | None
    quantization: Quantization | None = None

    def lay_out(self, layout: str) -> Layout:
        """Read a layout.

        Raises:
            UserError: it is none, or the model cannot be laid out so.
        """
        chosen = Layout.parse(layout)
        chosen.check_model(self.config)
        return chosen

    def check(
        self, layout: Layout, options: Options, ranks_per_node: int, *, is_modelled: bool = False
    ) -> None:
        """Check what can be known before ranks are started.

        Args:
            is_modelled: as `check_deployment` takes it.

        Raises:
            UserError: experts cannot be placed or reached so.
        """
        from expertlane.engine.launch import check_deployment

        deployment = Deployment(self.name, layout, options)
        check_deployment(self.config, deployment, ranks_per_node, is_modelled=is_modelled)

    def load(self, layout: Layout, engine: EngineOptions, *, record_routing: bool = False) -> "LLM":
        """Start the ranks and load the model, saying so on stderr.

        Raises:
            UserError: it cannot be laid out so, or does not fit.
            RankError: a rank died, hung or failed.
        """
        from expertlane.engine.llm import LLM

        ranks = "1 rank" if layout.world_size == 1 else f"{layout.world_size} ranks"
        with task_on_stderr(f"loading {self.name} on {ranks} ({layout})"):
            llm = LLM(
                self.folder or self.name,
                layout=layout,
                record_routing=record_routing,
                **engine.for_llm(),
            )
        if text := _platform_text(llm.machine[0]):
            print_message(text)
        is_narrow = self.quantization is not None and self.quantization.is_narrow
        if (is_narrow or engine.weights != "model") and not llm.machine[0].keeps_narrow:
            dtype = llm.machine[0].dtype
            print_message(
                f"weights of one byte are widened to {dtype}: torch has no product of them"
            )
        return llm

    def number_types(
        self, projection: ProjectionOptions, cluster: "ModelledCluster"
    ) -> "NumberTypes":
        """What was asked for, else the checkpoint's own.

        A preset is in float16, as in the paper, or in what the devices have if they lack it: a
        profile of `expertlane calibrate` has one type.

        Raises:
            UserError: the devices do not compute in it.
        """
        from expertlane.cost.number_types import NumberTypes

        known = cluster.profile.device.flops_per_s
        own: str = self.config.dtype if self.folder else "float16"
        if not self.folder and own not in known:
            own = next(iter(known))
        stored = self.quantization.number_type if self.quantization is not None else None
        if stored is not None and (stored == "float8" or stored in known):
            own = stored  # a narrower one is priced wider, with a word
        types = NumberTypes.asked(projection.dtype or own, projection.kv_dtype)
        if types.weights not in known:
            raise UserError(
                f"{cluster.profile.device.name} does not compute in {types.weights}; valid for "
                f"--dtype on {cluster}: {', '.join(known)}"
            )
        return types

    def cautions(self, types: "NumberTypes") -> tuple[str, ...]:
        """A sentence where a checkpoint's weights are narrower than what they are priced as."""
        stored = self.quantization
        if stored is None or stored.number_type in ("float8", types.weights):
            return ()
        nearer = "" if types.weights == "float8" else "; --dtype float8 comes nearer"
        return (
            f"The checkpoint's weights are {stored.method} but priced as "
            f"{types.weights}, for want of a law of narrower ones: their memory and reads come out "
            f"too large{nearer}.",
        )


def find_model(name: str, *, weights: bool = True) -> FoundModel:
    """Find a preset or a checkpoint, downloaded first if need be.

    Args:
        weights: else a checkpoint's configuration is all that is needed.

    Raises:
        UserError: there is none, or its configuration cannot be read.
    """
    if name in PRESETS:
        return FoundModel(name, PRESETS[name], None)
    folder = resolve_model(name, weights=weights)
    config = read_model(folder, name, weights=weights)
    return FoundModel(name, config, folder, quantization_of(read_config(folder)))
