"""Recipes: each is a config that graft sft takes, and its predicted memory is what the prediction says."""

import re
from pathlib import Path

import pytest

from graft.base.model.presets import preset
from graft.finetune.memory.predict import predict_run
from graft.finetune.recipes import load_recipe, read_recipe, recipe_names
from graft.finetune.sft_config import resolve

FOLDER = Path(__file__).parents[3] / "finetune/recipes"


@pytest.mark.parametrize("name", recipe_names())
def test_the_predicted_memory_is_recomputed(name: str) -> None:
    """Law: the comment, the table and the prediction agree, and with CUDA's context the peak is below the GPU's memory."""
    recipe = load_recipe(name)
    settings = {key: value for key, value in recipe.settings.items() if key not in ("base", "method")}
    run = resolve({**settings, "steps": 100}, method=recipe.method, n_rows=100)
    n_bytes = predict_run(
        preset(recipe.preset),
        method=recipe.method,
        train=run.train,
        seq_len=run.data.max_seq_len - 1,
        lora=run.lora,
        double_quant=run.quant.double_quant,
        optimizer=run.train.optimizer,
        device="cuda",
    )
    assert n_bytes / 2**30 == pytest.approx(recipe.predicted_gib, abs=0.006)  # written with two digits
    [comment] = re.findall(r"Predicted peak: ([\d.]+) GiB", (FOLDER / f"{name}.toml").read_text())
    assert float(comment) == recipe.predicted_gib
    assert n_bytes + 0.5e9 < recipe.gpu_gb * 1e9
    assert name == f"{recipe.preset}-{recipe.method}-{recipe.gpu_gb}gb"


def test_what_the_recipes_cover() -> None:
    """Three sizes, three methods, three GPUs."""
    recipes = [load_recipe(name) for name in recipe_names()]
    assert {recipe.preset for recipe in recipes} == {"smollm2-135m", "qwen3-0.6b", "llama-3.1-8b"}
    assert {recipe.method for recipe in recipes} == {"full", "lora", "qlora"}
    assert {recipe.gpu_gb for recipe in recipes} == {8, 24, 80}


def test_an_unknown_recipe_names_near_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown recipe 'llama-8b-qlora'; near are .*llama-3.1-8b-qlora"):
        read_recipe("llama-8b-qlora")
