"""Published families: their models, and what their mixers and those of transformers compute."""

import json
from pathlib import Path

from expertlane.balance.holding import placements_of
from expertlane.cost.memory import PlacedModel
from expertlane.cost.step.attention import mixer_steps
from expertlane.cost.step.batch_sizes import PartSizes
from expertlane.cost.step.counts import StageMesh
from expertlane.cost.step.operation import NumberTypes, Operation
from expertlane.cost.step.step_list import GPU_LIBRARIES, StepList
from expertlane.spec.deployment import Options
from expertlane.spec.from_hf import from_hf
from expertlane.spec.layout import Layout
from expertlane.spec.mixers import Mixing

_SPEC = Path(__file__).parent.parent / "spec"
PUBLISHED, MIXERS, GROUPED = (
    json.loads((_SPEC / f"{file}.json").read_text(encoding="utf-8"))
    for file in ("published", "published_mixers", "published_grouped")
)
CONFIGS = PUBLISHED | MIXERS | GROUPED
TYPES = NumberTypes()


def published(name, **changes):
    return from_hf(CONFIGS[name], name, weights=False).with_overrides(**changes)


def placed(model, layout=None, types=TYPES):
    """With linear placements, on one rank unless told."""
    layout = layout or Layout()
    return PlacedModel(model, layout, types, placements_of(model, layout, Options()))


def mixer(
    model, mixing, num_seqs, num_new, num_cached=0, tp=1, *, dcp=1, types=TYPES, num_drafts=0
):
    """Steps of a layer's mixer, on a tensor-parallel group alone."""
    mesh = StageMesh.of(Layout(tp=tp, dcp=dcp), 0, 0, 8)
    out = StepList(mesh, types, "all_gather", GPU_LIBRARIES)
    mixing = Mixing(mixing) if isinstance(mixing, str) else mixing
    part = PartSizes.even(1, tp, num_seqs, num_new, num_cached, num_drafts)
    mixer_steps(out, model, mixing, part)
    return out.steps


def operations(*given, **more):
    """Those of `mixer` that are no transfers."""
    return [step for step in mixer(*given, **more) if isinstance(step, Operation)]


def only(steps, kind):
    (found,) = (each for each in steps if each.kind is kind)
    return found


def flops(operations, *kinds):
    """Of the first rank, of these kinds or of all."""
    return sum(int(each.flops[0]) for each in operations if not kinds or each.kind in kinds)


def their_flops(make, call):
    """FLOPs that torch counts in `call` of the module that `make` gives, both without memory."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        module = make().eval().requires_grad_(False)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            call(module)
    return counter.get_total_flops()
