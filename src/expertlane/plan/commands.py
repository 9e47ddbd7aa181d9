"""A deployment as others take it: an experiment file, and the command lines of vLLM and SGLang.

Options as documented for vLLM 0.14 (docs.vllm.ai, "Expert Parallel Deployment") and SGLang
(docs.sglang.io, "Expert Parallelism"). Replicas are servers of their own; each command is for one.
"""

import shlex
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

import tomli_w

from expertlane.cost.number_types import NumberTypes
from expertlane.plan.candidates import Candidate, PlanRequest
from expertlane.results.results import ServeCommand
from expertlane.spec.deployment import DISPATCH_FORMS, FormTraits, Options
from expertlane.spec.files import strict_json
from expertlane.spec.hf_config import Quantization
from expertlane.spec.model import PRESETS, ModelConfig
from expertlane.spec.workload import Workload


@dataclass(frozen=True)
class ServeTarget:
    """What the other systems shall load.

    Attributes:
        model: a hub id or a folder.
        quantization: of its weights as stored; None where they are not quantised.
    """

    model: str
    quantization: Quantization | None = None


def serve_commands(
    candidate: Candidate, served: ServeTarget, types: NumberTypes, max_model_len: int, nodes: int
) -> list[ServeCommand]:
    """The commands of both systems for one replica.

    Args:
        nodes: that a replica spans.
    """
    return [
        _vllm(candidate, served, types, max_model_len, nodes),
        _sglang(candidate, served, types, max_model_len, nodes),
    ]


def _vllm(
    candidate: Candidate, served: ServeTarget, types: NumberTypes, max_model_len: int, nodes: int
) -> ServeCommand:
    layout, options = candidate
    if layout.ep > 1 and layout.etp > 1:
        why = (
            f"vLLM spreads experts over all dp × tp = {layout.stage_size} ranks; ep={layout.ep} "
            f"with experts sharded over {layout.etp} cannot be expressed"
        )
        return ServeCommand("vLLM", None, why)
    words = ["vllm", "serve", served.model, "--tensor-parallel-size", str(layout.tp)]
    if layout.dp > 1:
        words += ["--data-parallel-size", str(layout.dp)]
    if layout.pp > 1:
        words += ["--pipeline-parallel-size", str(layout.pp)]
    if layout.ep > 1:
        words += ["--enable-expert-parallel", "--all2all-backend"]
        words += [_form(options).vllm]
        if options.num_redundant_experts:
            config = strict_json({"num_redundant_experts": options.num_redundant_experts})
            words += ["--enable-eplb", "--eplb-config", config]
        if options.overlap:
            words += ["--enable-dbo"]
    words += _weights(types, served)
    words += ["--kv-cache-dtype", "fp8"] if types.kv == "float8" else []
    words += ["--max-model-len", str(max_model_len)]
    notes = _kept_weights(types, served)
    if nodes > 1 and layout.dp > 1:
        notes.append(
            f"on {nodes} nodes: add --data-parallel-size-local, --data-parallel-address and, on "
            "all but the first, --headless with --data-parallel-start-rank"
        )
    elif nodes > 1:
        notes.append(f"on {nodes} nodes: start it inside a Ray cluster or with --nnodes")
    if options.overlap and layout.ep == 1:
        notes.append("it overlaps two batches only under expert parallelism")
    return ServeCommand("vLLM", shlex.join(words), "; ".join(notes))


def _form(options: Options) -> FormTraits:
    assert options.dispatch != "auto", "a candidate has one form"
    return DISPATCH_FORMS[options.dispatch]


def _weights(types: NumberTypes, served: ServeTarget) -> list[str]:
    """Both systems quantise to float8 as they load; what is stored so already needs no word."""
    if types.weights == types.kept:
        return ["--dtype", types.weights]
    return (
        ["--quantization", "fp8"] if types.weights == "float8" and not served.quantization else []
    )


def _kept_weights(types: NumberTypes, served: ServeTarget) -> list[str]:
    stored = served.quantization
    if stored is None and types.weights in ("nvfp4", "mxfp4"):
        return [f"it needs a checkpoint quantised to {types.weights}"]
    if stored is None or stored.number_type == types.weights:
        return []
    return [f"it serves the stored {stored.method} weights, not {types.weights}"]


def _sglang(
    candidate: Candidate, served: ServeTarget, types: NumberTypes, max_model_len: int, nodes: int
) -> ServeCommand:
    layout, options = candidate
    deepep_mode = _form(options).sglang if layout.ep > 1 else None
    if deepep_mode and layout.etp > 1:
        why = f"with DeepEP, SGLang's ep is all of its ranks; ep={layout.ep} of {layout.stage_size}"
        return ServeCommand("SGLang", None, f"{why} cannot be expressed")
    words = ["python", "-m", "sglang.launch_server", "--model-path", served.model]
    words += ["--tp-size", str(layout.stage_size)]  # its tp is all ranks; attention's is tp / dp
    if layout.dp > 1:
        words += ["--dp-size", str(layout.dp), "--enable-dp-attention"]
    if layout.pp > 1:
        words += ["--pp-size", str(layout.pp)]
    if layout.ep > 1:
        words += ["--ep-size", str(layout.ep)]
    if deepep_mode:
        words += ["--moe-a2a-backend", "deepep", "--deepep-mode", deepep_mode]
        if options.num_redundant_experts:
            words += ["--ep-num-redundant-experts", str(options.num_redundant_experts)]
        if options.overlap:
            words += ["--enable-two-batch-overlap"]
    words += _weights(types, served)
    if types.kv == "float8":
        words += ["--kv-cache-dtype", "fp8_e4m3"]
    words += ["--context-length", str(max_model_len)]
    notes = _kept_weights(types, served)
    if nodes > 1:
        words += ["--nnodes", str(nodes), "--node-rank", "N", "--dist-init-addr", "HOST:PORT"]
        notes.append(f"once on each node, with N from 0 to {nodes - 1}")
    return ServeCommand("SGLang", shlex.join(words), "; ".join(notes))


def experiment_text(
    request: PlanRequest,
    name: str,
    checkpoint: str | None,
    deployments: Sequence[Candidate],
    comment: str,
) -> str:
    """TOML; the first deployment is the baseline.

    Args:
        checkpoint: the model's folder; None for a preset, or a model by its sizes.
        comment: a line that begins the file.
    """
    document = {
        "name": name,
        "seed": 0,
        "model": _model(request.model, checkpoint),
        "workload": sizes_of(request.workload),
        "cluster": {"ranks_per_node": request.cluster.profile.ranks_per_node},
        "deployments": [
            {"name": _named(each), "layout": str(each.layout), **_given(each.options)}
            for each in deployments
        ],
    }
    return f"# {comment}\n\n{tomli_w.dumps(document)}"


def _named(candidate: Candidate) -> str:
    """Its layout, and its options where they are not the default."""
    layout, options = map(str, candidate)
    return layout if options == "plain" else f"{layout}; {options}"


def sizes_of(workload: Workload) -> dict[str, int]:
    """A workload without a seed: a plan draws no prompt."""
    return {key: num for key, num in asdict(workload).items() if key != "seed"}


def _model(model: ModelConfig, checkpoint: str | None) -> dict[str, Any]:
    if checkpoint is not None:
        return {"checkpoint": checkpoint}
    if PRESETS.get(model.name) == model:
        return {"preset": model.name}
    return _given(model)


def _given(settings: ModelConfig | Options) -> dict[str, Any]:
    """The settings that are not the default."""
    values = asdict(settings)
    return {
        each.name: values[each.name]
        for each in fields(settings)
        if each.default is MISSING or getattr(settings, each.name) != each.default
    }
