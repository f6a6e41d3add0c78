"""`graft config recipes`: what there is, for which GPU, and how much memory it will take."""

import json

import typer
from rich.console import Console
from rich.table import Table

from . import load_recipe, recipe_names


def print_recipes(*, as_json: bool = False) -> None:
    """A row for each recipe."""
    recipes = [load_recipe(name) for name in recipe_names()]
    if as_json:
        typer.echo(json.dumps({recipe.name: dict(recipe.settings) for recipe in recipes}))
        return
    table = Table("recipe", "base", "method", "records of", "GPU", "predicted peak", title="graft sft --recipe NAME")
    for recipe in sorted(recipes, key=lambda recipe: (recipe.base, recipe.gpu_gb, recipe.method)):
        length = f"{recipe.settings['max_seq_len']:,} tokens"
        peak = f"{recipe.predicted_gib:.2f} GiB"
        table.add_row(recipe.name, recipe.base, recipe.method, length, f"{recipe.gpu_gb} GB", peak)
    Console().print(table)
