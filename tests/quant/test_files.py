"""4-bit files: read by bitsandbytes and transformers, written by them, and every way in which one can be incomplete."""

import json
import weakref
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from graft.quant import (
    NF4Linear,
    WeightStream,
    dequantize_nf4,
    nf4_from_tensors,
    nf4_to_tensors,
    quantization_config,
    quantize_4bit,
    quantize_linears_,
    quantize_nf4,
    quantized_names,
    read_quantization_config,
)

CASES = [("nf4", True), ("nf4", False), ("fp4", True)]


def their_linear(weight: torch.Tensor, quant_type: str = "nf4", nested: bool = True) -> bnb.nn.Linear4bit:
    """bitsandbytes' layer with this weight, quantized by it."""
    out_features, in_features = weight.shape
    layer = bnb.nn.Linear4bit(in_features, out_features, False, compress_statistics=nested, quant_type=quant_type)
    layer.weight = bnb.nn.Params4bit(weight.clone(), compress_statistics=nested, quant_type=quant_type, module=layer)
    return layer.to("cpu")


@pytest.mark.parametrize(("quant_type", "nested"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_same_file_as_bitsandbytes(tmp_path: Path, dtype: torch.dtype, quant_type: str, nested: bool) -> None:
    """Parity: for the same weight both libraries write the same keys with the same bytes, the JSON included."""
    weight = (torch.randn(96, 128) * 0.02).to(dtype)
    ours = nf4_to_tensors("x.weight", quantize_4bit(weight, quant_type, double_quant=nested))
    theirs = {f"x.{key}": value for key, value in their_linear(weight, quant_type, nested).state_dict().items()}
    for path, tensors in ((tmp_path / "ours", ours), (tmp_path / "theirs", theirs)):
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    assert load_file(tmp_path / "ours").keys() == load_file(tmp_path / "theirs").keys()
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


@pytest.mark.parametrize(("quant_type", "nested"), CASES)
def test_bitsandbytes_reads_ours(quant_type: str, nested: bool) -> None:
    """Parity: Params4bit.from_prequantized takes our tensors and dequantizes them to our values."""
    packed, state = quantize_4bit(torch.randn(64, 128), quant_type, double_quant=nested)
    tensors = nf4_to_tensors("x.weight", (packed, state))
    stats = {key: tensor for key, tensor in tensors.items() if key != "x.weight"}
    theirs = bnb.nn.Params4bit.from_prequantized(tensors["x.weight"], stats, device="cpu")
    assert torch.equal(bnb.functional.dequantize_4bit(theirs.data, theirs.quant_state), dequantize_nf4(packed, state))


@pytest.mark.parametrize(("quant_type", "nested"), CASES)
def test_we_read_theirs(quant_type: str, nested: bool) -> None:
    """Parity: what bitsandbytes wrote becomes the same packed weight and state here."""
    layer = their_linear(torch.randn(64, 128).bfloat16(), quant_type, nested)
    packed, state = nf4_from_tensors("weight", layer.state_dict())
    expected = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    assert state.dtype == torch.bfloat16
    assert torch.equal(dequantize_nf4(packed, state), expected)


def test_another_storage_dtype() -> None:
    """Parity: bitsandbytes may keep the bytes in a tensor of another dtype (quant_storage)."""
    weight = torch.randn(64, 64)
    layer = bnb.nn.Linear4bit(64, 64, False, quant_type="nf4", quant_storage=torch.bfloat16)
    layer.weight = bnb.nn.Params4bit(weight, quant_type="nf4", quant_storage=torch.bfloat16, module=layer)
    packed, _ = nf4_from_tensors("weight", layer.to("cpu").state_dict())
    assert torch.equal(packed, quantize_nf4(weight)[0])


def tiny_model(double_quant: bool = True, device: str | None = None) -> nn.Module:
    model = nn.ModuleDict(
        {"mlp": nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 32, bias=False)), "lm_head": nn.Linear(32, 8)}
    )
    model = model.to(device) if device else model
    quantize_linears_(model, double_quant=double_quant)
    return model


@pytest.mark.parametrize("double_quant", [True, False])
def test_state_dict_round_trip(double_quant: bool) -> None:
    """Law: state_dict -> load_state_dict is the identity, also onto a placeholder of the other format."""
    torch.manual_seed(0)
    model = tiny_model(double_quant)
    for other in (tiny_model(), tiny_model(False), tiny_model(device="meta")):
        other["lm_head"] = nn.Linear(32, 8)
        other.load_state_dict(model.state_dict())
        x = torch.randn(3, 64)
        for a, b in ((model, other),):
            assert torch.equal(a["lm_head"](a["mlp"](x)), b["lm_head"](b["mlp"](x)))
        assert other.state_dict().keys() == model.state_dict().keys()


def test_load_state_dict_reports_keys() -> None:
    """Law: strict loading names what is missing, what is too much, and what does not fit."""
    model = tiny_model()
    state = dict(model.state_dict())
    del state["mlp.0.weight.nested_absmax"], state["mlp.0.bias"]
    state["mlp.1.weight.absmax2"] = torch.zeros(1)
    result = model.load_state_dict(state, strict=False)
    assert sorted(result.missing_keys) == ["mlp.0.bias", "mlp.0.weight.nested_absmax"]
    assert result.unexpected_keys == ["mlp.1.weight.absmax2"]
    state = dict(model.state_dict())
    state["mlp.0.weight"] = state["mlp.0.weight"][:5]
    with pytest.raises(RuntimeError, match=r"mlp.0.weight has 5 elements, its weight's shape needs 1536"):
        model.load_state_dict(state)


def test_full_precision_state_dict_is_quantized() -> None:
    """Law: loading full-precision weights into a 4-bit layer quantizes them."""
    linear = nn.Linear(64, 32)
    layer = NF4Linear(64, 32, bias=True, device="meta")
    layer.load_state_dict(linear.state_dict())
    x = torch.randn(2, 64)
    assert torch.equal(layer(x), NF4Linear.from_linear(linear)(x))


@pytest.mark.parametrize("quantized", [True, False])
def test_stream(quantized: bool) -> None:
    """Law: a meta model filled tensor by tensor, in any order, is the model quantized at once."""
    torch.manual_seed(0)
    plain = nn.ModuleDict(
        {"mlp": nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 32, bias=False)), "lm_head": nn.Linear(32, 8)}
    )
    tensors = dict(plain.state_dict())
    quantize_linears_(plain)
    if quantized:
        tensors = dict(plain.state_dict())
    meta = tiny_model(device="meta")
    stream = WeightStream(meta)
    left = [name for name in sorted(tensors, reverse=True) if not stream.take(name, tensors[name])]
    stream.finish()
    assert sorted(left) == ["lm_head.bias", "lm_head.weight"]
    x = torch.randn(3, 64)
    assert torch.equal(meta["mlp"](x), plain["mlp"](x))
    assert not stream.parts


def test_stream_keeps_no_full_precision_weight() -> None:
    """Law: once taken, a weight lives on in 4 bits alone, so that a model larger than memory can stream through."""
    stream = WeightStream(tiny_model(device="meta"))
    weight = torch.randn(48, 64)
    gone = weakref.ref(weight)
    assert stream.take("mlp.0.weight", weight)
    del weight
    assert gone() is None


def test_stream_names_what_is_missing() -> None:
    source = dict(tiny_model().state_dict())
    del source["mlp.0.weight.absmax"]
    stream = WeightStream(tiny_model(device="meta"))
    for name, tensor in source.items():
        if not name.startswith("mlp.1"):
            stream.take(name, tensor)
    with pytest.raises(ValueError, match=r"the checkpoint lacks mlp.0.weight.absmax, mlp.1.weight; it is incomplete"):
        stream.finish()


def test_stream_names_what_does_not_fit() -> None:
    stream = WeightStream(tiny_model(device="meta"))
    with pytest.raises(ValueError, match=r"mlp.0.weight: 3072 of 3072 values are not finite"):
        stream.take("mlp.0.weight", torch.full((48, 64), float("nan")))
    with pytest.raises(ValueError, match=r"mlp.0.weight: weight is \(3, 4\), this layer takes \(48, 64\)"):
        stream.take("mlp.0.weight", torch.zeros(3, 4))
    with pytest.raises(ValueError, match=r"mlp.1.bias is in the file, but the layer was built without"):
        stream.take("mlp.1.bias", torch.zeros(32))


@pytest.mark.parametrize(
    "key", ["", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", ".quant_state.bitsandbytes__nf4"]
)
def test_missing_keys_are_named(key: str) -> None:
    tensors = nf4_to_tensors("a.weight", quantize_nf4(torch.randn(8, 64)))
    del tensors[f"a.weight{key}"]
    with pytest.raises(ValueError, match=f"4-bit weight a.weight lacks a.weight{key}; the file is incomplete"):
        nf4_from_tensors("a.weight", tensors)


def spoiled(about: dict[str, object]) -> dict[str, torch.Tensor]:
    tensors = nf4_to_tensors("a.weight", quantize_nf4(torch.randn(8, 64)))
    key = "a.weight.quant_state.bitsandbytes__nf4"
    content = json.loads(bytes(tensors[key].tolist())) | about
    return tensors | {key: torch.tensor(list(json.dumps(content).encode()), dtype=torch.uint8)}


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({"dtype": "int8"}, "dtype 'int8' is not supported; float32, float16, bfloat16 are"),
        ({"nested_blocksize": 128}, "nested_blocksize 128 is not supported; bitsandbytes writes 256"),
        ({"shape": None}, "is not bitsandbytes' JSON"),
        ({"shape": [8, 65]}, "a.weight has 256 elements, its weight's shape needs 260"),
        ({"shape": [8, True]}, r"JSON: shape \[8, True\] is not supported; a list of sizes above 0 is"),
        ({"shape": [-8, -64]}, "shape"),
        ({"shape": [2**40, 2**40]}, "shape"),
        ({"shape": "64"}, "shape '64'"),
        ({"blocksize": 64.0}, "blocksize 64.0 is not supported"),
        ({"blocksize": [64]}, "blocksize"),
        ({"dtype": ["float32"]}, "dtype"),
        ({"quant_type": "fp4"}, "a.weight.quant_state.bitsandbytes__nf4 holds quant_type 'fp4'"),
        ({"quant_type": None}, "quant_type None is not supported"),
        ({"nested_offset": "0.1"}, "nested_offset '0.1' is not supported; a finite number is"),
        ({"nested_offset": 10**400}, "nested_offset 1000"),
        ({"nested_offset": float("nan")}, "nested_offset nan"),
        ({"nested_dtype": "float16"}, "nested_dtype 'float16' is not supported"),
        ({"nested_blocksize": {"a": [1]}}, "nested_blocksize {'a'"),
        ({"blocksize": 128}, "a.weight.absmax has 8 elements, its weight's shape needs 4"),
    ],
)
def test_damaged_json(about: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        nf4_from_tensors("a.weight", spoiled(about))


@pytest.mark.parametrize("field", ["quant_type", "blocksize", "dtype", "shape", "nested_offset"])
def test_missing_fields_are_named(field: str) -> None:
    tensors = spoiled({})
    key = "a.weight.quant_state.bitsandbytes__nf4"
    content = {name: value for name, value in json.loads(bytes(tensors[key].tolist())).items() if name != field}
    tensors[key] = torch.tensor(list(json.dumps(content).encode()), dtype=torch.uint8)
    with pytest.raises(ValueError, match=rf"^{key} is not bitsandbytes' JSON \('{field}' is missing\)"):
        nf4_from_tensors("a.weight", tensors)


@pytest.mark.parametrize("key", ["absmax", "quant_map", "nested_absmax", "nested_quant_map"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float16, torch.float64])
def test_dtypes_are_checked(key: str, dtype: torch.dtype) -> None:
    """int64 scales would be read as addresses of foreign memory."""
    tensors = nf4_to_tensors("a.weight", quantize_nf4(torch.randn(8, 64)))
    tensors[f"a.weight.{key}"] = tensors[f"a.weight.{key}"].to(dtype)
    with pytest.raises(ValueError, match=rf"^a.weight.{key}: expected \w+, got {str(dtype)[6:]}; the file is damaged"):
        nf4_from_tensors("a.weight", tensors)


def test_int4_has_no_file() -> None:
    with pytest.raises(ValueError, match=r"a.weight: int4 has no file format; store nf4 or fp4"):
        nf4_to_tensors("a.weight", quantize_4bit(torch.randn(8, 64), "int4"))


@pytest.mark.slow
def test_transformers_reads_our_folder_and_we_read_its(tmp_path: Path) -> None:
    """Parity: a Llama quantized here, saved and loaded by transformers + bitsandbytes gives our logits; and back."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    ours = LlamaForCausalLM(config).eval()
    assert len(quantize_linears_(ours)) == 14
    ids = torch.arange(24)[None]
    config_json = config.to_dict() | {"quantization_config": quantization_config(compute_dtype=torch.float32)}
    config_json["architectures"] = ["LlamaForCausalLM"]
    (tmp_path / "config.json").write_text(json.dumps(config_json))
    save_file(dict(ours.state_dict()), tmp_path / "model.safetensors", metadata={"format": "pt"})
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert isinstance(theirs.model.layers[0].mlp.up_proj, bnb.nn.Linear4bit)
    with torch.no_grad():
        expected = ours(ids).logits
        theirs.train()  # in eval mode their CPU path repacks the weight and multiplies in bfloat16
        assert torch.allclose(theirs(ids).logits, expected, atol=1e-5)
    # transformers 5.23 can't save_pretrained what it loaded in 4 bits (NotImplementedError); its state dict is the same
    back = LlamaForCausalLM(config)
    quantize_linears_(back)
    stream = WeightStream(back)
    rest = {name: tensor for name, tensor in theirs.state_dict().items() if not stream.take(name, tensor)}
    stream.finish()
    back.load_state_dict(rest, strict=False)
    with torch.no_grad():
        assert torch.equal(back.eval()(ids).logits, expected)


def test_names_of_the_quantized() -> None:
    assert quantized_names(tiny_model().state_dict()) == ["mlp.0", "mlp.1"]


def test_bits_a_weight() -> None:
    """Law: 4 + 32 / 64 = 4.5 bits without and 4 + 8 / 64 + 32 / (64 * 256) = 4.127 with double quantization, as stored."""
    for double_quant, limit in ((False, 4.5), (True, 4.13)):
        tensors = nf4_to_tensors("w", quantize_nf4(torch.randn(1024, 1024), double_quant=double_quant))
        bits = sum(t.nbytes for key, t in tensors.items() if "map" not in key and "state" not in key) * 8 / 2**20
        assert limit - 0.01 < bits <= limit


def test_config_is_transformers() -> None:
    """Parity: the dict is BitsAndBytesConfig's own, and reads back as quantize_linears_'s arguments."""
    from transformers import BitsAndBytesConfig

    ours = quantization_config(compute_dtype=torch.bfloat16)
    theirs = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["lm_head"],
    ).to_dict()
    assert {key: ours.get(key) for key in theirs} == theirs
    assert read_quantization_config({"quantization_config": ours}) == {
        "keep": ("lm_head",),
        "double_quant": True,
        "compute_dtype": torch.bfloat16,
        "quant_type": "nf4",
    }
    assert read_quantization_config({}) is None


@pytest.mark.parametrize(
    "about", [{"quant_method": "gptq", "bits": 4}, {"quant_method": "bitsandbytes", "load_in_8bit": True}]
)
def test_other_quantizations_are_refused(about: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"method '{about['quant_method']}' with load_in_4bit=None is not supported"):
        read_quantization_config({"quantization_config": about})


def test_unknown_compute_dtype() -> None:
    about = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_compute_dtype": "int8"}
    with pytest.raises(ValueError, match="bnb_4bit_compute_dtype 'int8' is none of float32"):
        read_quantization_config({"quantization_config": about})
