"""Worked by hand, law and parity with an independent fit: ratings from battles, pass@k, majority vote."""

import json
import math
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch

from graft.finetune.align.arena import (
    Battle,
    battle_lines,
    majority_vote,
    pass_at_k,
    play,
    ratings,
    read_battles,
    win_rates,
)


def games(a: str, b: str, wins: int, losses: int, ties: int = 0) -> list[Battle]:
    return [Battle(a, b, score) for score, n in ((1.0, wins), (0.0, losses), (0.5, ties)) for _ in range(n)]


def test_two_players():
    """3 wins of 4 are odds of 3: 400 log10(3) = 190.85 points apart, around 1000. Ties are half wins: 2 wins and 2 ties too."""
    for battles in (games("a", "b", 3, 1), games("a", "b", 2, 0, 2), games("b", "a", 1, 3)):
        first, second = ratings(battles, prior=0)
        assert (first.player, second.player, first.n_battles) == ("a", "b", 4)
        assert first.rating - second.rating == pytest.approx(400 * math.log10(3))
        assert first.rating + second.rating == pytest.approx(2000)
        assert first.low <= first.rating <= first.high


def test_prior():
    """One win, one prior tie each with an average player: the maximum of log s(2x) + log s(x) + log s(-x) over x, where
    2 s(-2x) = 2 s(x) - 1: with u = e^x, 2 / (1 + u^2) = (u - 1) / (u + 1), so u^3 - u^2 - u - 3 = 0: u = 2.1304."""
    (u,) = (r.real for r in np.roots([1, -1, -1, -3]) if abs(r.imag) < 1e-9)
    first, second = ratings(games("a", "b", 1, 0), prior=1.0)
    assert first.rating - second.rating == pytest.approx(2 * 400 * math.log10(u))


def test_parity_with_gradient_descent():
    """Many players, uneven games: the fit maximizes the likelihood that torch's own optimizer maximizes."""
    rng = np.random.default_rng(0)
    true = {"a": 1.0, "b": 0.3, "c": 0.0, "d": -1.2}
    battles = [
        Battle(p, q, float(rng.random() < 1 / (1 + math.exp(true[q] - true[p]))))
        for p, q in combinations(true, 2)
        for _ in range(int(rng.integers(5, 60)))
    ]
    x = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    at = {name: i for i, name in enumerate(true)}
    i, j = (
        torch.tensor([at[name] for name in names])
        for names in zip(*((b.first, b.second) for b in battles), strict=True)
    )
    score = torch.tensor([b.score for b in battles], dtype=torch.float64)
    optimizer = torch.optim.LBFGS([x], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-14)

    def loss():
        optimizer.zero_grad()
        value = torch.nn.functional.binary_cross_entropy_with_logits(x[i] - x[j], score, reduction="sum")
        value.backward()
        return value

    optimizer.step(loss)
    want = (x - x.mean()).detach() * 400 / math.log(10) + 1000
    for rating in ratings(battles, prior=0):
        assert rating.rating == pytest.approx(float(want[at[rating.player]]), abs=1e-3)


def test_intervals_cover():
    """Law: of 40 tournaments between players 150 points apart, the 90% interval holds the true rating in at least 30, and more
    battles make it narrower. (90% is 36; 30 is 3.2 binomial standard deviations below.)"""
    rng, hits, widths = np.random.default_rng(0), 0, []
    p = 1 / (1 + 10 ** (-150 / 400))
    for seed in range(40):
        battles = [Battle("a", "b", float(rng.random() < p)) for _ in range(150)]
        rated = ratings(battles, prior=0.1, n_bootstrap=100, level=0.9, seed=seed)
        [a] = [r for r in rated if r.player == "a"]
        hits += a.low <= 1075 <= a.high
        widths.append(rated[0].high - rated[0].low)
    assert hits >= 30
    few = ratings([Battle("a", "b", float(rng.random() < p)) for _ in range(20)], prior=0.1, level=0.9)
    assert few[0].high - few[0].low > np.mean(widths)


def test_same_seed_same_intervals():
    battles = games("a", "b", 40, 30, 31)
    assert ratings(battles, seed=1) == ratings(battles, seed=1)
    assert ratings(battles, seed=1) != ratings(battles, seed=2)


def test_play_swaps_the_order():
    """A judge that likes the first place says nothing about the answers: all ties, every verdict turned. One that likes the
    longer answer is the same both ways; equal answers are its tie."""
    prompts = ["p", "q"]
    answers = {"short": ["a", "b"], "long": ["aaa", "b"]}
    battles, turned = play(lambda prompt, first, second: "first", prompts, answers)
    assert [b.score for b in battles] == [0.5, 0.5]
    assert turned == 1.0

    def longer(prompt, first, second):
        return "tie" if len(first) == len(second) else "first" if len(first) > len(second) else "second"

    battles, turned = play(longer, prompts, answers)
    assert [(b.first, b.second, b.score) for b in battles] == [("short", "long", 0.0), ("short", "long", 0.5)]
    assert turned == 0.0


def test_refuses():
    with pytest.raises(ValueError, match="no battles to rate players from"):
        ratings([])
    with pytest.raises(ValueError, match=r"score=2.*is not a battle"):
        ratings([Battle("a", "b", 2)])
    with pytest.raises(ValueError, match=r"is not a battle: two different players"):
        ratings([Battle("a", "a", 1)])
    with pytest.raises(ValueError, match=r"b never won against a, .* use prior=1 or play more battles"):
        ratings(games("a", "b", 5, 0), prior=0)
    with pytest.raises(ValueError, match=r"c never won against a"):
        ratings(games("a", "b", 1, 1) + games("b", "c", 2, 0), prior=0)
    with pytest.raises(ValueError, match=r"level=1"):
        ratings(games("a", "b", 1, 1), level=1)
    with pytest.raises(ValueError, match="two players and a prompt; got 1 and 1"):
        play(lambda *_: "tie", ["p"], {"a": ["x"]})
    with pytest.raises(ValueError, match="b has 0 answers to 1 prompts"):
        play(lambda *_: "tie", ["p"], {"a": ["x"], "b": []})


def test_pass_at_k():
    """2 right of 4: pass@1 = 1/2; pass@2 = 1 - C(2,2)/C(4,2) = 5/6; pass@3 = 1. Parity: the share of all k-subsets with one."""
    assert pass_at_k(4, 2, 1) == pytest.approx(1 / 2)
    assert pass_at_k(4, 2, 2) == pytest.approx(5 / 6)
    assert pass_at_k(4, 2, 3) == 1
    for n, c, k in ((7, 3, 2), (6, 1, 4), (5, 0, 3), (5, 5, 5)):
        subsets = list(combinations([1] * c + [0] * (n - c), k))
        assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))
    with pytest.raises(ValueError, match=r"pass@5 from 1 right of 4"):
        pass_at_k(4, 1, 5)


def test_majority_vote():
    assert majority_vote(["7", "8", "8", "7", "8"]) == "8"
    assert majority_vote(["8", "7", "7", "8"]) == "8"
    with pytest.raises(ValueError, match="no answers to vote among"):
        majority_vote([])


# --- files of battles ----------------------------------------------------------------------------------------------


def written(path: Path, *rows: object) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path


def test_a_file_of_battles(tmp_path: Path) -> None:
    """Worked by hand: a win, a tie, a battle judged in both orders alike, and one whose verdict turned with the order."""
    file = written(
        tmp_path / "votes.jsonl",
        {"a": "x", "b": "y", "winner": "a", "prompt": "hi", "when": 3},
        "",
        {"a": "x", "b": "y", "winner": "tie"},
        {"a": "x", "b": "y", "winner": "a", "id": 7},
        {"a": "y", "b": "x", "winner": "b", "id": 7},
        {"a": "x", "b": "y", "winner": "a", "id": "q"},
        {"a": "y", "b": "x", "winner": "a", "id": "q"},
    )
    battles, n_both, n_turned = read_battles(file)
    assert battles == [Battle("x", "y", score) for score in (1.0, 0.5, 1.0, 0.5)]
    assert (n_both, n_turned) == (2, 1)
    assert win_rates(battles) == {("x", "y"): 0.75, ("y", "x"): 0.25}
    again = tmp_path / "again.jsonl"
    again.write_text(battle_lines(battles), encoding="utf-8")
    assert read_battles(again)[0] == battles


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", r"votes.jsonl line 2: not JSON \(.* at column \d\)"),
        ("[1]", "line 2: a and b must name two different players, got"),
        ({"a": "x", "b": "x", "winner": "a"}, "line 2: a and b must name two different players"),
        ({"a": "x", "winner": "a"}, "line 2: a and b must name"),
        ({"a": "x", "b": "y", "winner": "x"}, "line 2: winner is 'x'; write a, b or tie"),
        ({"a": "x", "b": "y", "winner": "a", "id": [1]}, r"line 2: id is \[1\]; give a string or a number"),
        ({"a": "x", "b": "z", "winner": "a", "id": 1}, "id 1 names different players"),
    ],
)
def test_lines_that_are_no_battle(row: object, message: str, tmp_path: Path) -> None:
    good = {"a": "x", "b": "y", "winner": "a", "id": 1}
    with pytest.raises(ValueError, match=message):
        read_battles(written(tmp_path / "votes.jsonl", good, row))
    with pytest.raises(ValueError, match="holds no battles; give lines such as"):
        read_battles(written(tmp_path / "empty.jsonl", ""))


def test_command(tmp_path: Path) -> None:
    """Law: the command prints ratings, best first, and win rates; what can't be asked together is refused."""
    from typer.testing import CliRunner

    from graft.cli import app

    file = written(tmp_path / "v.jsonl", *[{"a": "x", "b": "y", "winner": w} for w in ("a", "a", "a", "b")])
    said = CliRunner().invoke(app, ["arena", str(file)]).output
    assert said.index("x, 4 battles") < said.index("y, 4 battles")
    assert "x wins 75.0% against y" in said
    figures = json.loads(CliRunner().invoke(app, ["arena", str(file), "--json"]).output)
    assert [one["player"] for one in figures["ratings"]] == ["x", "y"]
    for arguments, message in (
        ([str(file), "--base", "b"], "not both"),
        (["--base", "b"], "give a FILE of battles, or"),
        (["--base", "b", "--adapter", "a", "--data", "d", "--out", str(file)], "v.jsonl is there already"),
    ):
        with pytest.raises(ValueError, match=message):
            CliRunner().invoke(app, ["arena", *arguments], catch_exceptions=False)
