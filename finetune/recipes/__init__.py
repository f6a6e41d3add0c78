"""Recipes: settings with which a known model fits a GPU, `graft sft --recipe NAME`; a TOML file each, to copy and change.

A file's table [recipe] says what it is for; all other keys are those of `graft config sft`, and base and method.
"""

import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from ...base.settings import flattened


@dataclass(frozen=True)
class Recipe:
    """What `graft config recipes` lists."""

    name: str
    base: str  # Hugging Face id
    method: str
    gpu_gb: int  # that it is for
    preset: str  # the model's sizes, for graft vram estimate --model
    predicted_gib: float  # peak on a GPU, at batches of the longest records; without CUDA's context of about 0.5 GB
    settings: Mapping[str, Any]  # base and method among them


def recipe_names() -> list[str]:
    """The names, sorted."""
    return sorted(file.name.removesuffix(".toml") for file in files(__name__).iterdir() if file.name.endswith(".toml"))


def load_recipe(name: str) -> Recipe:
    """A recipe by its name. Raises ValueError that names the nearest ones."""
    names = recipe_names()
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.3)
        raise ValueError(
            f"unknown recipe {name!r}; {'near are ' + ', '.join(near) if near else 'see graft config recipes'}"
        )
    raw = tomllib.loads(files(__name__).joinpath(f"{name}.toml").read_text(encoding="utf-8"))
    about = raw.pop("recipe")
    settings = flattened(raw, where=f"recipe {name}")
    return Recipe(
        name, settings["base"], settings["method"], about["gpu_gb"], about["preset"], about["predicted_gib"], settings
    )


def read_recipe(name: str) -> dict[str, Any]:
    """A recipe's settings, base and method among them."""
    return dict(load_recipe(name).settings)
