"""Which linears of a model an adapter's settings name."""

import re
from collections.abc import Iterator, Sequence

from torch import nn

from .config import ALL_LINEAR, LoraConfig, is_regex, pattern_value


def linears(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of every linear of any kind, wrapped or not; the insides of a linear are not visited."""
    for name, child in model.named_children():
        if hasattr(child, "in_features") and hasattr(child, "out_features"):
            yield name, child
        else:
            for path, module in linears(child):
                yield f"{name}.{path}", module


def names(target: str, path: str) -> bool:
    """Whether a target means the linear at this path: by its end, by the whole path or by a regular expression."""
    if target == ALL_LINEAR:
        return path != "lm_head"
    if is_regex(target):
        return re.fullmatch(target, path) is not None
    return path == target or path.endswith(f".{target}")


def matching(paths: Sequence[str], targets: Sequence[str], *, what: str = "lora targets") -> list[str]:
    """The paths that the targets name. Raises ValueError that lists the model's linears when a target names none."""
    unmatched = [target for target in targets if not any(names(target, path) for path in paths)]
    if unmatched:
        known = ", ".join(dict.fromkeys(path.rpartition(".")[2] for path in paths))
        raise ValueError(f"{what} {set(unmatched)} match no linear; this model has {known}")
    return [path for path in paths if any(names(target, path) for target in targets)]


def layer_number(path: str, lists: Sequence[str] = ()) -> int | None:
    """The number of the layer that a path lies in, as PEFT finds it; `lists` names the lists of layers, none given: any."""
    if not lists:
        found = re.match(r".*?\.[^.]*\.(?P<idx>\d+)\.", path)
    else:
        tried = (re.match(rf"(?:^|.*?\.){name}\.(?P<idx>\d+)\.", path) for name in lists)
        found = next((match for match in tried if match), None)
    return int(found["idx"]) if found else None


def chosen(paths: Sequence[str], config: LoraConfig) -> list[str]:
    """The linears that get an adapter: named by targets, in the chosen layers, not excluded.

    Raises ValueError for a target, an exclusion, a layer or a pattern that names nothing, and where nothing is left.
    """
    found = matching(paths, config.targets)
    if config.exclude_modules:
        excluded = set(matching(found, config.exclude_modules, what="exclude_modules"))
        found = [path for path in found if path not in excluded]
    if config.layers_to_transform:
        numbers = {path: layer_number(path, config.layers_pattern) for path in found}
        known = sorted({number for number in numbers.values() if number is not None})
        if missing := sorted(set(config.layers_to_transform) - set(known)):
            shown = f"{known[0]} to {known[-1]}" if known else "none"
            raise ValueError(f"layers_to_transform names layer {missing[0]}; the targets' layers are {shown}")
        found = [path for path in found if numbers[path] in config.layers_to_transform]
    if not found:
        raise ValueError("exclude_modules leaves no linear to adapt; widen targets, or exclude less")
    for name, patterns in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        for pattern in patterns or {}:
            if not any(pattern_value({pattern: 1}, path, 0) for path in found):
                raise ValueError(f"{name}: {pattern!r} matches none of the adapted linears, such as {found[0]}")
    return found


def ranks_and_scales(paths: Sequence[str], config: LoraConfig) -> dict[str, tuple[int, float]]:
    """Path -> rank and scale."""
    found = {}
    for path in paths:
        rank = int(pattern_value(config.rank_pattern, path, config.rank))
        found[path] = rank, config.scale_of(rank, pattern_value(config.alpha_pattern, path, config.alpha))
    return found
