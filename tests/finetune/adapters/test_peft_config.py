"""adapter_config.json: a fuzz against PEFT's own merge, and by-name refusals of what would change the result."""

import copy
import json
import random
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from graft.finetune.adapters.bank import AdapterBank
from graft.finetune.adapters.files import read_adapter
from graft.finetune.adapters.merge import merge
from graft.finetune.loading import load_model

# PEFT's own warnings: about transformers' names, tied heads, patterns and keys that match nothing.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:peft"),
]
LEAVES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PATTERNS = [
    "q_proj",
    "proj",
    ".*_proj",
    "self_attn.*",
    r"layers\.1\..*",
    "model.layers.0.mlp.up_proj",
    "^model.*q_proj",
]


def random_options(draw: random.Random) -> dict[str, Any]:
    """Options of PEFT's LoraConfig that graft claims to read."""
    options: dict[str, Any] = {
        "r": draw.randint(1, 6),
        "lora_alpha": draw.choice([1, 3, 8, 16, 2.5]),
        "use_rslora": draw.random() < 0.4,
        "lora_dropout": draw.choice([0.0, 0.3]),
        "target_modules": draw.choice(
            [draw.sample(LEAVES, draw.randint(1, 4)), ["self_attn.q_proj", "mlp.up_proj"], "all-linear", r".*\.(q|up)_proj",
             r"model\.layers\.1\..*_proj", ["model.layers.0.self_attn.v_proj", "o_proj"]]
        ),
    }  # fmt: skip
    for key, values in (("rank_pattern", range(1, 6)), ("alpha_pattern", (1, 5, 7.5, 32))):
        if draw.random() < 0.5:
            options[key] = {p: draw.choice(list(values)) for p in draw.sample(PATTERNS, draw.randint(1, 3))}
    if draw.random() < 0.3:
        options["exclude_modules"] = draw.choice(
            [["k_proj"], r".*layers\.0\.self_attn.*", ["model.layers.1.mlp.up_proj"]]
        )
    if isinstance(options["target_modules"], list) and draw.random() < 0.4:
        options["layers_to_transform"] = draw.choice([0, 1, [0], [1], [0, 1], []])
        if draw.random() < 0.5:
            options["layers_pattern"] = draw.choice(["layers", ["layers"], ["h", "layers"], []])
    options["use_dora"] = draw.random() < 0.4
    beside = draw.random()
    if beside < 0.25:
        options["modules_to_save"] = draw.choice(
            [["norm"], ["embed_tokens", "lm_head"], ["model.norm", "lm_head"], ["0.input_layernorm"], ["embed_tokens"]]
        )
        options["ensure_weight_tying"] = "embed_tokens" in options["modules_to_save"] and draw.random() < 0.5
    elif beside < 0.5:
        options["trainable_token_indices"] = draw.choice(
            [[5, 2, 280], {"embed_tokens": [7]}, {"lm_head": [1, 2]}, {"embed_tokens": [7], "lm_head": [7, 8]}]
        )
    return options


def edit(config: dict[str, Any], draw: random.Random) -> None:
    """What another program or hand may have changed in the file, so that weights and options no longer agree."""
    kind = draw.randrange(8)
    if kind == 0:
        config["lora_alpha"] = draw.choice([4, 0, -2])
    elif kind == 1:
        config["use_rslora"] = not config["use_rslora"]
    elif kind == 2:
        config["r"] += 1
    elif kind == 3:
        config["target_modules"] = draw.choice([["q_proj"], None, "all-linear", ["mlp.up_proj"]])
    elif kind == 4:
        config["alpha_pattern"] = {draw.choice(PATTERNS): 11}
    elif kind == 5:
        config["use_dora"] = not config["use_dora"]
    elif kind == 6:
        config["modules_to_save"], config["trainable_token_indices"] = draw.choice([(["norm"], None), (None, [3])])
    else:
        config["bias"], config["fan_in_fan_out"] = draw.choice([("none", True), ("all", False), ("lora_only", False)])


def test_fuzz_against_peft(base_dir: Path, tmp_path: Path) -> None:
    """Parity: of 200 seeded configurations, a third edited after saving, each that graft takes merges to PEFT's weights.

    A refusal is no failure for an edited file; for an unedited one it is, unless PEFT refuses too. Sums are in float32 on both
    sides: 1e-6 is rounding.
    """
    plain = transformers.AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
    model = load_model(base_dir, dtype=None)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tied = model.config
    n_taken = n_edited_taken = n_dora = n_own = 0
    for seed in range(200):
        draw = random.Random(seed)
        options, edited = random_options(draw), draw.random() < 0.34
        folder = tmp_path / str(seed)
        torch.manual_seed(seed)
        try:
            made = peft.get_peft_model(
                copy.deepcopy(plain), peft.LoraConfig(**options, init_lora_weights=False, task_type="CAUSAL_LM")
            )
        except ValueError:
            continue  # no module is left to adapt
        made.save_pretrained(folder)
        file = folder / "adapter_config.json"
        config = json.loads(file.read_text()) | {"init_lora_weights": True}  # B = 0 in what the file lacks
        if edited:
            edit(config, draw)
        file.write_text(json.dumps(config))
        try:
            adapter = read_adapter(folder)
            model.config, model.lm_head.weight = tied, model.model.embed_tokens.weight  # a merge may have parted them
            model.load_state_dict(before)
            merge(model, adapter)
        except ValueError:
            if not edited:  # PEFT sorts the patterns when it saves, so that another may be the first to match
                with pytest.raises(RuntimeError, match="size mismatch"):
                    peft.PeftModel.from_pretrained(copy.deepcopy(plain), folder)
            continue
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(plain), folder).merge_and_unload().state_dict()
        n_taken, n_edited_taken = n_taken + 1, n_edited_taken + edited
        n_dora, n_own = n_dora + bool(adapter.magnitudes), n_own + bool(adapter.modules or adapter.token_rows)
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(tensor, theirs[name], atol=1e-6, rtol=1e-5, msg=f"seed {seed}, {name}: {config}")
    assert n_taken > 120
    assert n_edited_taken > 10
    assert min(n_dora, n_own) > 40


@pytest.fixture
def folder(base_dir: Path, tmp_path: Path) -> Path:
    """An adapter of PEFT's on q_proj and the (tied) head, with PEFT's copy of the head beside it."""
    base = transformers.AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
    options = peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False, task_type="CAUSAL_LM")
    peft.get_peft_model(base, options).save_pretrained(tmp_path / "a")
    return tmp_path / "a"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, r"has not both A, B and lora_magnitude_vector; the file is incomplete"),
        ({"lora_bias": True}, "lora_bias=True is not covered"),
        ({"trainable_token_indices": [1]}, "trainable_tokens_delta, which trainable_token_indices stands for; the file is incomp"),
        ({"trainable_token_indices": [-1]}, r"trainable_token_indices=\[-1\]; expected a list of token ids"),
        ({"modules_to_save": "norm"}, "modules_to_save='norm'; expected a list of names"),
        ({"megatron_config": {"a": 1}}, "megatron_config={'a': 1} is not covered"),
        ({"corda_config": {"a": 1}}, "corda_config={'a': 1} is not covered"),
        ({"eva_config": {"rho": 2.0}}, "eva_config={'rho': 2.0} without"),
        ({"loftq_config": {"loftq_bits": 4}}, "loftq_config={'loftq_bits': 4} is not covered"),
        ({"alora_invocation_tokens": [1, 2]}, r"alora_invocation_tokens=\[1, 2\] is not covered"),
        ({"layer_replication": [[0, 2]]}, r"layer_replication=\[\[0, 2\]\] is not covered"),
        ({"target_parameters": ["x"]}, r"target_parameters=\['x'\] is not covered"),
        ({"kasa_config": {"a": 1}}, "kasa_config={'a': 1} is not covered"),
        ({"ensure_weight_tying": True}, "ensure_weight_tying with a target_modules that names the head is not covered"),
        ({"init_lora_weights": "mica"}, "init_lora_weights='mica' is not covered"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4' is not covered"),
        ({"brand_new": {"on": True}}, r"unknown key brand_new={'on': True} may change the result"),
        ({"use_dora": "no"}, "use_dora='no'; expected true or false"),
        ({"r": "8"}, "r='8'; expected a whole number"),
        ({"r": True}, "r=True; expected a whole number"),
        ({"r": 0}, "r=0; expected a whole number of at least 1"),
        ({"r": 3}, r"lora_A \(2, 64\) and lora_B \(\d+, 2\), but adapter_config.json gives it rank 3"),
        ({"lora_alpha": None}, "lora_alpha=None; expected a finite number"),
        ({"lora_alpha": float("nan")}, "lora_alpha=nan; expected a finite number"),
        ({"alpha_pattern": [1]}, r"alpha_pattern=\[1\]; expected an object"),
        ({"rank_pattern": {"(": 2}}, r"rank_pattern holds .* no regular expression"),
        ({"rank_pattern": {"q_proj": 2.5}}, r"rank_pattern=\{'q_proj': 2.5\}; expected an object"),
        ({"target_modules": 3}, "target_modules=3; expected a list of names"),
        ({"target_modules": ["q_proj", None]}, r"target_modules=\['q_proj', None\]; expected"),
        ({"target_modules": "("}, r"target_modules holds '\(', no regular expression"),
        ({"layers_to_transform": "1"}, "layers_to_transform='1'; expected a layer's number"),
        ({"target_modules": ".*q_proj", "layers_to_transform": 1}, "can't be used with a target_modules that is one string"),
        ({"layers_pattern": "layers"}, "layers_pattern needs layers_to_transform"),
        ({"use_rslora": 1}, "use_rslora=1; expected true or false"),
    ],
)  # fmt: skip
def test_uncovered_options_are_refused_by_name(folder: Path, change: dict[str, object], message: str) -> None:
    """Law: an option that would change the result, known or not, is never passed over."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        read_adapter(folder)


def test_every_key_of_pefts_config_has_a_meaning() -> None:
    """Parity: the three tables together name exactly the fields of the installed PEFT's LoraConfig, or more."""
    from graft.finetune.adapters.peft_config import NEUTRAL, NO_EFFECT, READ, check_config

    default = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]).to_dict()
    known = {*NEUTRAL, *NO_EFFECT, *READ}
    assert not set(default) - known, "PEFT has new options: decide for each what it means here"
    check_config(json.loads(json.dumps(default | {"target_modules": ["q_proj"]})), where="x")
    check_config({"peft_type": "LORA", "brand_new": None, "another": False, "third": []}, where="x")


def test_pefts_copy_of_an_adapted_head(folder: Path, base_dir: Path) -> None:
    """Parity: the copy of the base's head is accepted where it equals the base and refused where it doesn't."""
    model = load_model(base_dir, dtype=None)
    bank = AdapterBank(model)
    bank.load("a", folder)
    bank.use("a")
    ids = torch.arange(9)[None]
    base = transformers.AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, folder).eval()
    with torch.no_grad():
        expected = theirs(ids).logits
        torch.testing.assert_close(model(ids), expected, atol=2e-5 * expected.abs().max().item(), rtol=0)
    bank.load("again", folder)  # beside an adapter that wraps the head already
    weights = load_file(folder / "adapter_model.safetensors")
    key = "base_model.model.lm_head.base_layer.weight"
    weights[key] = weights[key].bfloat16()
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    bank.load("rounded", folder)
    weights[key][3, 3] += 1
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"brings a lm_head of its own \(300 x 64\), which differs from this base's"):
        bank.load("b", folder)


def test_weights_and_options_that_disagree(folder: Path, base_dir: Path) -> None:
    """Law: what PEFT would ignore or leave untrained is refused, and so are NaN, wrong shapes, foreign keys, a pickle."""
    bank = AdapterBank(load_model(base_dir, dtype=None))
    file, config_file = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    config, weights = json.loads(config_file.read_text()), load_file(file)
    for change, message in (
        (
            {"target_modules": ["lm_head"]},
            "holds weights for model.layers.0.self_attn.q_proj, which its target_modules",
        ),
        ({"target_modules": ["q_proj", "k_proj", "lm_head"]}, "names model.layers.0.self_attn.k_proj, for which"),
    ):
        config_file.write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=re.escape(message)):
            bank.load("a", folder)
    config_file.write_text(json.dumps(config))
    a = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    for changed, message in (
        ({a: torch.full_like(weights[a], torch.nan)}, f"{a} holds NaN or infinity"),
        ({a: weights[a].int()}, f"{a} holds torch.int32; expected float32"),
        ({a: weights[a][0]}, r"has lora_A (64,) and lora_B (64, 2)"),
        ({"base_model.model.model.norm.weight": torch.ones(64)}, "model.norm.weight' is not covered"),
        ({a.removeprefix("base_model.model."): weights[a].clone()}, "lora_A.weight' is not covered"),
        (
            {a.replace("lora_A", "lora_magnitude_vector"): weights[a].clone()},
            "lora_magnitude_vector.weight' is not covered",
        ),
    ):
        save_file(weights | changed, file, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=re.escape(message)):
            bank.load("a", folder)
    file.unlink()
    torch.save(weights, folder / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"has adapter_model\.bin, a pickle"):
        bank.load("a", folder)
