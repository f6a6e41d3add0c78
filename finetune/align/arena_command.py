"""`graft arena`: ratings of players from battles, played here between adapters or read from a file."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from .arena import Battle
    from .compare import Player


def arena(
    file: Annotated[Path | None, typer.Argument(help='JSONL of battles: {"a": "x", "b": "y", "winner": "a"}.')] = None,
    base: Annotated[Path | None, typer.Option("--base", help="Instead of FILE: the base of the adapters.")] = None,
    adapter: Annotated[list[Path] | None, typer.Option("--adapter", help="A player; repeat it for more.")] = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="Held-out preference rows, or prompts with --reward-model.")
    ] = None,
    reward_model: Annotated[
        Path | None, typer.Option("--reward-model", help="Judge greedy answers by this folder, from graft reward.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="Of a judged answer.")] = 64,
    prior: Annotated[float, typer.Option("--prior", help="Ties with an average player that each starts with.")] = 1.0,
    seed: Annotated[int, typer.Option("--seed", help="Of the intervals' resamples.")] = 0,
    out: Annotated[
        Path | None, typer.Option("--out", help="Write the played battles there, for a later arena.")
    ] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Rate players by Bradley-Terry with 95% intervals: from a file of votes, or adapters on held-out rows.

    Example: graft arena --base runs/sft --adapter runs/dpo --adapter runs/ipo --data held.jsonl
    """
    from .arena import battle_lines, ratings, read_battles, win_rates

    if out is not None and out.exists():  # before the battles, which may take an hour
        raise ValueError(_is_there(out))
    notes: list[str] = []
    players: list[Player] = []
    if file is not None:
        if base or adapter or data or reward_model:
            raise ValueError(f"give {file}, or --base, --adapter and --data to play battles here, not both")
        battles, n_both, n_turned = read_battles(file)
        if n_both:
            notes.append(f"{n_both:,} battles were judged in both orders; in {n_turned:,} the verdict turned: ties")
    else:
        battles, players = _played(base, adapter, data, reward_model, max_new_tokens, device, notes)
    rated = ratings(battles, prior=prior, seed=seed)
    if out is not None:
        _write_new(out, battle_lines(battles))
    if as_json:
        import json
        from dataclasses import asdict

        rates = [{"player": a, "other": b, "win_rate": rate} for (a, b), rate in win_rates(battles).items()]
        figures = {
            "ratings": [asdict(one) for one in rated],
            "win_rates": rates,
            "players": [asdict(p) for p in players],
        }
        typer.echo(json.dumps(figures))
        return
    for line in notes:
        typer.echo(line)
    for player in players:
        typer.echo(f"{player.name}: prefers chosen in {player.accuracy:.1%} of rows, margin {player.margin:.2f} nats")
    for one in rated:
        span = f"{one.low:.0f} to {one.high:.0f}"
        typer.echo(f"{one.rating:6.0f}  ({span}, 95%)  {one.player}, {one.n_battles:,} battles")
    for (a, b), rate in win_rates(battles).items():
        if rate >= 0.5 and (rate > 0.5 or a < b):
            typer.echo(f"{a} wins {rate:.1%} against {b}")


def _played(
    base: Path | None,
    adapters: list[Path] | None,
    data: Path | None,
    reward_model: Path | None,
    max_new_tokens: int,
    device: str,
    notes: list[str],
) -> "tuple[list[Battle], list[Player]]":
    if base is None or not adapters or data is None:
        raise ValueError("give a FILE of battles, or --base, at least one --adapter, and --data")
    from ...base.device import resolve_device
    from .compare import compare_by_reward, compare_on_pairs

    options: dict[str, Any] = {"device": resolve_device(device)}
    if reward_model is None:
        players, battles = compare_on_pairs(base, adapters, data, **options)
        return battles, players
    options["max_new_tokens"] = max_new_tokens
    return compare_by_reward(base, adapters, data, reward_model, notes=notes, **options), []


def _write_new(path: Path, text: str) -> None:
    """Refuses to overwrite."""
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise ValueError(_is_there(path)) from None


def _is_there(path: Path) -> str:
    return f"--out {path} is there already; choose another file, or remove it"
