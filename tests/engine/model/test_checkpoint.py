import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cli.screen import tells
from engine.model.families import FAMILIES, load_model, make_model
from engine.model.quantised import COMPRESSED, save_compressed, save_fp8, save_mxfp4
from engine.ops.test_staging import Device
from expertlane.engine.model import checkpoint as checkpoint_module
from expertlane.engine.model import stored_tensors
from expertlane.engine.model.checkpoint import Checkpoint
from expertlane.engine.model.weights import CheckpointWeights
from expertlane.engine.ops.device import Staging
from expertlane.errors import SpecError
from expertlane.spec.tensors import tensor_names, tensor_shape

_LAYER = "model.layers.3"


def _assert_same_tensors(checkpoint, other):
    for name in tensor_names(checkpoint.model):
        assert torch.equal(checkpoint.tensor(name), other.tensor(name)), name


def test_tensors_by_hand(checkpoints):
    """One of each kind, against the parameters of transformers' model."""
    mixtral, loaded = (
        Checkpoint(checkpoints.folder("mixtral")),
        load_model(checkpoints.folder("mixtral")),
    )
    gate_up = loaded.model.layers[3].mlp.experts.gate_up_proj  # [experts, gate then up, hidden]
    assert torch.equal(mixtral.tensor("layers.3.experts.5.gate"), gate_up[5, :32])
    assert torch.equal(mixtral.tensor("layers.3.experts.5.up"), gate_up[5, 32:])
    down = loaded.model.layers[3].mlp.experts.down_proj
    assert torch.equal(mixtral.tensor("layers.3.experts.5.down"), down[5])
    assert torch.equal(mixtral.tensor("embedding"), loaded.model.embed_tokens.weight)
    assert torch.equal(mixtral.tensor("head"), loaded.lm_head.weight)
    assert torch.equal(mixtral.tensor("layers.0.router"), loaded.model.layers[0].mlp.gate.weight)

    gpt_oss = Checkpoint(checkpoints.folder("gpt_oss"))
    experts = load_model(checkpoints.folder("gpt_oss")).model.layers[2].mlp.experts
    assert torch.equal(gpt_oss.tensor("layers.2.experts.1.gate"), experts.gate_up_proj[1, :, ::2].T)
    assert torch.equal(gpt_oss.tensor("layers.2.experts.1.up"), experts.gate_up_proj[1, :, 1::2].T)
    bias = experts.gate_up_proj_bias
    assert torch.equal(gpt_oss.tensor("layers.2.experts.1.up_bias"), bias[1, 1::2])
    assert torch.equal(gpt_oss.tensor("layers.2.experts.7.down"), experts.down_proj[7].T)
    assert torch.equal(gpt_oss.tensor("layers.2.experts.7.down_bias"), experts.down_proj_bias[7])


@pytest.mark.parametrize("family", FAMILIES)
def test_slices_are_slices_of_the_whole(checkpoints, family):
    checkpoint = Checkpoint(checkpoints.folder(family))
    for name in tensor_names(checkpoint.model):
        whole = checkpoint.tensor(name)
        assert whole.shape == tensor_shape(checkpoint.model, name)
        assert whole.is_contiguous()
        half = len(whole) // 2
        for rows in (range(0, half), range(half, len(whole)), range(1, 1)):
            part = checkpoint.tensor(name, rows)
            assert torch.equal(part, whole[rows.start : rows.stop])
            assert part.untyped_storage().nbytes() == part.nbytes  # its own, not the file's
        if whole.dim() == 2:
            columns = range(1, whole.shape[1] - 1)
            part = checkpoint.tensor(name, range(0, 1), columns)
            assert torch.equal(part, whole[:1, columns.start : columns.stop])
            part = checkpoint.tensor(name, columns=columns, dtype=torch.bfloat16)
            assert torch.equal(part, whole[:, columns.start : columns.stop].bfloat16())


@pytest.mark.parametrize("family", FAMILIES)
def test_other_ways_to_save(checkpoints, tmp_path, family):
    expected = Checkpoint(checkpoints.folder(family))
    model = make_model(family)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="200KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    _assert_same_tensors(expected, Checkpoint(tmp_path / "sharded"))
    assert Checkpoint(tmp_path / "sharded").check() == expected.check() == []
    model.save_pretrained(tmp_path / "fused", save_original_format=False)
    assert any(
        ".experts.gate_up_proj" in k for k in load_file(tmp_path / "fused/model.safetensors")
    )
    _assert_same_tensors(expected, Checkpoint(tmp_path / "fused"))
    assert Checkpoint(tmp_path / "fused").check() == []


def test_experts_of_qwen3_vl_as_they_are_published(checkpoints, rewrite):
    """[experts, in, out] under the names of [experts, out, in], or each expert by itself."""
    expected, stored = checkpoints.folder("qwen3_vl_moe"), {}
    tensors = load_file(expected / "model.safetensors")
    fused = {name: tensors[name] for name in tensors if ".mlp.experts." in name}
    for name, tensor in fused.items():
        stored[name] = tensor.transpose(1, 2).contiguous()
    _assert_same_tensors(Checkpoint(expected), Checkpoint(rewrite("qwen3_vl_moe", stored)))
    stored = dict.fromkeys(fused)
    for name, tensor in fused.items():
        prefix, kind = name.rsplit(".", 1)
        parts = (
            {"down": tensor}
            if kind == "down_proj"
            else dict(zip(("gate", "up"), tensor.chunk(2, dim=1), strict=True))
        )
        for part, experts in parts.items():
            for index, expert in enumerate(experts):
                stored[f"{prefix}.{index}.{part}_proj.weight"] = expert.contiguous()
    _assert_same_tensors(Checkpoint(expected), Checkpoint(rewrite("qwen3_vl_moe", stored)))


def test_large_reads_in_small_blocks(checkpoints, monkeypatch):
    folder = checkpoints.folder("gpt_oss")
    names = ["layers.0.query", "layers.0.sinks", "layers.1.experts.3.up", "layers.1.experts.3.down"]
    expected = [Checkpoint(folder).tensor(name, range(1, 8)) for name in names]
    for max_bytes in (1, 700):
        monkeypatch.setattr(stored_tensors, "MAX_MAPPED_BYTES", max_bytes)
        monkeypatch.setattr(checkpoint_module, "STAGED_BYTES", max_bytes)
        checkpoint = Checkpoint(folder)
        for name, tensor in zip(names, expected, strict=True):
            assert torch.equal(checkpoint.tensor(name, range(1, 8)), tensor)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_stored_types(checkpoints, tmp_path, dtype):
    model = make_model("deepseek_v3").to(getattr(torch, dtype))
    model.save_pretrained(tmp_path)
    checkpoint, expected = Checkpoint(tmp_path), Checkpoint(checkpoints.folder("deepseek_v3"))
    assert checkpoint.model.dtype == dtype
    for name in tensor_names(checkpoint.model):
        narrow = expected.tensor(name).to(getattr(torch, dtype))
        assert torch.equal(checkpoint.tensor(name), narrow)
        assert torch.equal(checkpoint.tensor(name, dtype=torch.float32), narrow.float())


def _assert_slices_of_meaning(quantised, plain):
    assert quantised.check() == []
    for name in tensor_names(quantised.model):
        whole = plain.tensor(name)
        assert torch.equal(quantised.tensor(name, dtype=torch.float32), whole), name
        if whole.dim() == 2:
            rows, columns = range(3, len(whole) - 2), range(5, whole.shape[1] - 1)
            part = quantised.tensor(name, rows, columns, torch.bfloat16)
            whole = whole[rows.start : rows.stop, columns.start : columns.stop]
            assert torch.equal(part, whole.bfloat16()), name
            assert part.untyped_storage().nbytes() == part.nbytes


def test_block_scaled_fp8(checkpoints, tmp_path):
    source = checkpoints.folder("deepseek_v3")
    save_fp8(source, tmp_path / "fp8", tmp_path / "plain", (16, 12))
    stored = load_file(tmp_path / "fp8" / "model.safetensors")
    assert stored[f"{_LAYER}.mlp.experts.0.up_proj.weight"].dtype == torch.float8_e4m3fn
    assert stored[f"{_LAYER}.self_attn.q_a_proj.weight_scale_inv"].shape == (2, 6)
    _assert_slices_of_meaning(Checkpoint(tmp_path / "fp8"), Checkpoint(tmp_path / "plain"))


@pytest.mark.parametrize("kind", COMPRESSED)
def test_compressed_tensors(checkpoints, tmp_path, kind):
    source = checkpoints.folder("deepseek_v3")
    save_compressed(source, tmp_path / "narrow", tmp_path / "plain", COMPRESSED[kind])
    narrow, plain = Checkpoint(tmp_path / "narrow"), Checkpoint(tmp_path / "plain")
    _assert_slices_of_meaning(narrow, plain)
    name = "layers.0.query_a"
    kept = narrow.narrow(name, range(3, 20), range(5, 40), torch.float32)
    assert kept.values.dtype is (torch.float8_e4m3fn if "float8" in kind else torch.int8)
    assert torch.equal(kept.widened(), plain.tensor(name, dtype=torch.float32)[3:20, 5:40])
    assert narrow.narrow("layers.0.attention_norm") is None
    assert narrow.narrow("head") is None


def test_activations_that_would_be_rounded_are_not(checkpoints, tmp_path):
    """Scales of static ones are there, and not needed."""
    source = checkpoints.folder("mixtral")
    save_compressed(source, tmp_path / "narrow", tmp_path / "plain", COMPRESSED["float8 by tensor"])
    path = tmp_path / "narrow" / "model.safetensors"
    more = {f"{_LAYER}.self_attn.o_proj.input_scale": torch.ones(1)}
    save_file(load_file(path) | more, path)
    assert Checkpoint(tmp_path / "narrow").check() == []


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ("weight_scale", "weight_scale missing"),
        ("weight_packed", "weight_packed [64, 3] [64, 16] config.json"),
    ],
)
def test_compressed_tensors_that_do_not_fit(checkpoints, tmp_path, changed, message):
    source = checkpoints.folder("mixtral")
    save_compressed(source, tmp_path / "narrow", tmp_path / "plain", COMPRESSED["packed by group"])
    path, name = tmp_path / "narrow" / "model.safetensors", f"{_LAYER}.self_attn.o_proj"
    stored = load_file(path)
    if changed == "weight_scale":
        del stored[f"{name}.{changed}"]
    else:
        stored[f"{name}.{changed}"] = stored[f"{name}.{changed}"][:, :3].contiguous()
    save_file(stored, path)
    assert tells(_error(tmp_path / "narrow"), message)
    assert tells(_error(tmp_path / "narrow", "layers.3.output"), message)


def test_mxfp4(checkpoints, tmp_path):
    save_mxfp4(checkpoints.folder("gpt_oss"), tmp_path / "mxfp4", tmp_path / "plain")
    stored = load_file(tmp_path / "mxfp4" / "model.safetensors")
    assert stored[f"{_LAYER}.mlp.experts.gate_up_proj_blocks"].shape == (8, 64, 2, 16)
    _assert_slices_of_meaning(Checkpoint(tmp_path / "mxfp4"), Checkpoint(tmp_path / "plain"))


def test_weights_for_a_rank(checkpoints):
    checkpoint, touches = Checkpoint(checkpoints.folder("gpt_oss")), []
    given = checkpoint.model, torch.bfloat16, torch.device("cpu"), lambda: touches.append(1)
    source = CheckpointWeights(*given, checkpoint=checkpoint)
    name = "layers.0.experts.2.down"
    down = source.take(name, range(8, 24))  # input features
    assert (down.shape, down.dtype) == ((64, 16), torch.bfloat16)
    assert torch.equal(down, checkpoint.tensor(name, dtype=torch.bfloat16)[:, 8:24])
    router = source.take("layers.0.router", dtype=torch.float32)
    assert router.dtype == torch.float32
    assert source.num_bytes == 64 * 16 * 2 + 8 * 64 * 4
    assert len(touches) == 2
    part = source.take("layers.0.query", range(16, 32))
    assert torch.equal(part, checkpoint.tensor("layers.0.query", range(16, 32)).bfloat16())


def _read(folder, name):
    checkpoint = Checkpoint(folder)
    checkpoint.check() if name is None else checkpoint.tensor(name)


def _error(folder, name=None):
    with pytest.raises(SpecError) as error:
        _read(folder, name)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("family", "stored"),
    [
        ("mixtral", f"{_LAYER}.block_sparse_moe.experts.7.w3.weight"),
        ("deepseek_v3", f"{_LAYER}.mlp.gate.e_score_correction_bias"),
        ("gpt_oss", f"{_LAYER}.mlp.experts.gate_up_proj"),
        ("olmoe", "lm_head.weight"),
    ],
)
def test_a_missing_tensor_is_named(rewrite, family, stored):
    folder = rewrite(family, {stored: None})
    assert _error(folder) == f"{folder}: tensor {stored} is missing"


@pytest.mark.parametrize(
    ("family", "stored", "shape", "expected"),
    [
        ("qwen2_moe", f"{_LAYER}.self_attn.k_proj.bias", [31], [32]),
        ("qwen3_moe", f"{_LAYER}.mlp.experts.2.down_proj.weight", [32, 64], [64, 32]),
        ("gpt_oss", f"{_LAYER}.mlp.experts.down_proj", [7, 32, 64], [8, 32, 64]),
        ("gpt_oss", f"{_LAYER}.mlp.experts.gate_up_proj", [8, 64, 32], [8, 64, 64]),
        ("olmoe", "model.norm.weight", [64, 1], [64]),
    ],
)
def test_a_wrong_shape_is_named(rewrite, family, stored, shape, expected):
    folder = rewrite(family, {stored: torch.zeros(shape)})
    assert tells(_error(folder), f"{folder} {stored} {shape} config.json {expected}")


def test_stored_types_that_cannot_be_read(rewrite):
    stored = f"{_LAYER}.mlp.gate.weight"
    folder = rewrite(
        "mixtral", {stored.replace("mlp", "block_sparse_moe"): torch.zeros(8, 64).int()}
    )
    assert tells(_error(folder, "layers.3.router"), "block_sparse_moe.gate.weight I32 F32 BF16 F16")


def test_fp8_without_scales(rewrite):
    stored = f"{_LAYER}.self_attn.o_proj.weight"
    method = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    weight = torch.zeros(64, 64).to(torch.float8_e4m3fn)
    folder = rewrite("mixtral", {stored: weight}, {"quantization_config": method})
    assert _error(folder, "layers.3.output") == (f"{folder}: tensor {stored}_scale_inv is missing")


def test_no_checkpoint(tmp_path, rewrite):
    assert tells(_error(tmp_path), "config.json")
    folder = rewrite("mixtral")
    weights = folder / "model.safetensors"
    data = weights.read_bytes()
    weights.unlink()
    assert tells(_error(folder), f"{folder} model.safetensors model.safetensors.index.json")
    for bad in (b"", b"not safetensors at all", data[:-100]):
        weights.write_bytes(bad)
        assert tells(_error(folder), f"{weights} read")


_MEASURE = """
import sys
from pathlib import Path
import torch
from expertlane.engine.model.checkpoint import Checkpoint

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024

checkpoint = Checkpoint(Path(sys.argv[1]))
checkpoint.tensor("final_norm")
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
before = status("VmRSS")
kept = [checkpoint.tensor("embedding", range(0, 4096)), checkpoint.tensor("head", range(0, 4096))]
for name in ("embedding", "head"):
    for start in range(0, 32768, 4096):
        checkpoint.tensor(name, range(start, start + 4096))
    for start in range(0, 1024, 256):
        checkpoint.tensor(name, columns=range(start, start + 256))
print(status("VmHWM") - before - sum(tensor.nbytes for tensor in kept))
"""


@pytest.mark.full
@pytest.mark.starts_anew
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_reading_slices_needs_little_more_than_the_slices(rewrite):
    """256 MiB in a file; a slice is 16 or 32 MiB, and 80 MiB may be mapped at a time."""
    big = torch.zeros(32768, 1024)
    config = {"vocab_size": 32768, "hidden_size": 1024}
    tensors = {
        "model.embed_tokens.weight": big,
        "lm_head.weight": big.clone(),
        "model.norm.weight": torch.zeros(1024),
    }
    folder = rewrite("mixtral", tensors, config)
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(folder)],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(Path(checkpoint_module.__file__).parents[3])},
    )
    assert int(done.stdout) < 132 * 1024**2  # 80 mapped, slices of 32 and 16, and small things


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_what_goes_through_staging_is_the_same(checkpoints, monkeypatch, family):
    """As on its way to a GPU: whole tensors, and slices of rows and of columns."""
    plain = Checkpoint(checkpoints.folder(family))
    device = Device()
    staging = Staging(device.new_buffer, device.new_event)
    monkeypatch.setattr(checkpoint_module, "copier_to", lambda _: staging.copy)
    staged = Checkpoint(checkpoints.folder(family))
    for name in tensor_names(plain.model):
        assert torch.equal(staged.tensor(name), plain.tensor(name))
        for sides in ((range(1, 3), None), (None, range(1, 3))):
            if sides[1] is None or len(tensor_shape(plain.model, name)) > 1:
                assert torch.equal(staged.tensor(name, *sides), plain.tensor(name, *sides))
    assert ("record", 1) in device.told
