"""Who answers better: battles between answers -> Bradley-Terry ratings with bootstrap intervals; pass@k; majority vote.

Battles as a file (`graft arena FILE`; the server's page writes the same lines) are JSONL, one object a line:

    {"a": "base", "b": "polite", "winner": "a" | "b" | "tie"}

a and b name two different players, a the one that was shown first. Other fields (prompt, answers, when, who) are kept by whoever
writes them and not read here. A judge that saw both orders may say so with a second line, a and b swapped, and the same
`id`: lines of one id are one battle, a tie where the verdicts disagree (a position's bias, which is counted).
"""

import json
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import comb
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np

ELO = 400 / np.log(10)  # rating points a unit of log-odds: 400 points are odds of 10 to 1
Verdict = Literal["first", "second", "tie"]
Answer = TypeVar("Answer", bound=Hashable)
Judge = Callable[[str, str, str], Verdict]  # (prompt, first answer, second answer) -> which is better


@dataclass(frozen=True)
class Battle:
    first: str  # a player's name
    second: str
    score: float  # of the first: 1 won, 0.5 tie, 0 lost


@dataclass(frozen=True)
class Rating:
    player: str
    rating: float  # Elo points; the players' mean is 1000
    low: float  # bounds of the bootstrap interval
    high: float
    n_battles: int


def read_battles(path: Path | str) -> tuple[list[Battle], int, int]:
    """The battles of a file, how many of them were judged in both orders, and in how many of those the verdict turned.

    Raises OSError, or ValueError naming the file and the line that is no battle.
    """
    path = Path(path)
    by_id: dict[str, list[Battle]] = {}
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                key, battle = _parse_battle(line, f"{path.name} line {number}")
                by_id.setdefault(f"line {number}" if key is None else repr(key), []).append(battle)
    if not by_id:
        raise ValueError(f'{path} holds no battles; give lines such as {{"a": "base", "b": "polite", "winner": "b"}}')
    battles, n_both, n_turned = [], 0, 0
    for key, lines in by_id.items():
        first = lines[0]
        if any({one.first, one.second} != {first.first, first.second} for one in lines):
            raise ValueError(f"{path.name}: id {key} names different players; lines of one id are one battle")
        scores = {one.score if one.first == first.first else 1 - one.score for one in lines}
        both = len({one.first for one in lines}) == 2
        n_both, n_turned = n_both + both, n_turned + (both and len(scores) > 1)
        battles.append(Battle(first.first, first.second, scores.pop() if len(scores) == 1 else 0.5))
    return battles, n_both, n_turned


def _parse_battle(line: str, where: str) -> tuple[object, Battle]:
    """(id or None, battle) of one line."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error.msg} at column {error.colno})") from None
    first, second = (row.get("a"), row.get("b")) if isinstance(row, dict) else (None, None)
    if not (isinstance(first, str) and isinstance(second, str) and first and second) or first == second:
        raise ValueError(f"{where}: a and b must name two different players, got {line.strip()[:80]}")
    scores = {"a": 1.0, "b": 0.0, "tie": 0.5}
    if row.get("winner") not in scores:
        raise ValueError(f"{where}: winner is {row.get('winner')!r}; write a, b or tie")
    key = row.get("id")
    if key is not None and not isinstance(key, str | int):
        raise ValueError(f"{where}: id is {key!r}; give a string or a number, or leave it out")
    return key, Battle(first, second, scores[row["winner"]])


def battle_lines(battles: Sequence[Battle]) -> str:
    """Battles as a file has them; a score other than 0 and 1 is a tie."""
    words = {1.0: "a", 0.0: "b"}
    rows = [{"a": one.first, "b": one.second, "winner": words.get(one.score, "tie")} for one in battles]
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def win_rates(battles: Sequence[Battle]) -> dict[tuple[str, str], float]:
    """(player, other) -> the share of their battles that the player won, a tie being half a win."""
    totals: dict[tuple[str, str], list[float]] = {}
    for battle in battles:
        totals.setdefault((battle.first, battle.second), []).append(battle.score)
        totals.setdefault((battle.second, battle.first), []).append(1 - battle.score)
    return {pair: sum(scores) / len(scores) for pair, scores in totals.items()}


def play(
    judge: Judge,
    prompts: Sequence[str],
    answers: Mapping[str, Sequence[str]],  # player -> one answer a prompt
) -> tuple[list[Battle], float]:
    """Every pair of players on every prompt, judged in both orders; a verdict that turns with the order is a tie.

    Returns the battles and the share of them whose verdict turned: the judge's bias for a position. Raises ValueError for
    fewer than two players or answers that don't fit the prompts.
    """
    if len(answers) < 2 or not prompts:
        raise ValueError(f"an arena needs two players and a prompt; got {len(answers)} and {len(prompts)}")
    for player, given in answers.items():
        if len(given) != len(prompts):
            raise ValueError(f"{player} has {len(given)} answers to {len(prompts)} prompts; give one each")
    battles, n_turned = [], 0
    scores = {"first": 1.0, "tie": 0.5, "second": 0.0}
    for a, b in combinations(answers, 2):
        for i, prompt in enumerate(prompts):
            straight = scores[judge(prompt, answers[a][i], answers[b][i])]
            swapped = 1 - scores[judge(prompt, answers[b][i], answers[a][i])]
            turned = straight != swapped
            n_turned += turned
            battles.append(Battle(a, b, 0.5 if turned else straight))
    return battles, n_turned / len(battles)


def ratings(
    battles: Sequence[Battle],
    *,
    prior: float = 1.0,  # ties with an average player that each player starts with; 0: none, plain maximum likelihood
    n_bootstrap: int = 200,  # resamples of the battles
    level: float = 0.95,  # share of the resamples inside the interval
    seed: int = 0,
) -> list[Rating]:
    """Bradley-Terry ratings, best first: P(a beats b) = 1 / (1 + 10^((rating_b - rating_a) / 400)) (Bradley and Terry 1952;
    in Elo points as in Chatbot Arena, arXiv:2403.04132). A tie is half a win for each.

    With prior=0 raises ValueError where the likelihood has no maximum: players that won or lost everything against the rest.
    """
    if not battles:
        raise ValueError("no battles to rate players from")
    for battle in battles:
        if not 0 <= battle.score <= 1 or battle.first == battle.second:
            raise ValueError(f"{battle} is not a battle: two different players and a score in [0, 1]")
    if prior < 0 or n_bootstrap < 1 or not 0 < level < 1:
        raise ValueError(f"prior={prior}, n_bootstrap={n_bootstrap}, level={level}: >= 0, >= 1 and inside (0, 1)")
    players = sorted({name for battle in battles for name in (battle.first, battle.second)})
    index = {name: i for i, name in enumerate(players)}
    first = np.array([index[battle.first] for battle in battles])
    second = np.array([index[battle.second] for battle in battles])
    score = np.array([battle.score for battle in battles])
    if prior == 0:
        _check_connected(_wins(first, second, score, len(players)), players)
    best = _fit(_wins(first, second, score, len(players)), prior)
    rng = np.random.default_rng(seed)
    resampled = []
    for _ in range(n_bootstrap):
        pick = rng.integers(len(battles), size=len(battles))
        # A resample can lack what made the maximum exist, so its prior is never quite 0.
        resampled.append(_fit(_wins(first[pick], second[pick], score[pick], len(players)), max(prior, 0.01)))
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2], axis=0)
    best, low, high = (1000 + ELO * strengths for strengths in (best, low, high))
    n_battles = np.bincount(np.concatenate([first, second]), minlength=len(players))
    rated = [
        Rating(name, float(best[i]), float(low[i]), float(high[i]), int(n_battles[i])) for i, name in enumerate(players)
    ]
    return sorted(rated, key=lambda r: (-r.rating, r.player))


def _wins(first: np.ndarray, second: np.ndarray, score: np.ndarray, n: int) -> np.ndarray:
    """(n, n): how often row beat column; a tie is half a win for each."""
    wins = np.zeros((n, n))
    np.add.at(wins, (first, second), score)
    np.add.at(wins, (second, first), 1 - score)
    return wins


def _fit(wins: np.ndarray, prior: float) -> np.ndarray:
    """Strengths (n,) in log-odds, mean 0, that maximize the likelihood: Newton's method with halved steps.

    sum_ij wins_ij log s(x_i - x_j) + prior/2 sum_i [log s(x_i) + log s(-x_i)], s the logistic function
    """
    n, games = len(wins), wins + wins.T

    def likelihood(x: np.ndarray) -> float:
        gaps = x[:, None] - x[None]
        return float(
            -(wins * np.logaddexp(0, -gaps)).sum() - prior / 2 * (np.logaddexp(0, -x) + np.logaddexp(0, x)).sum()
        )

    x = np.zeros(n)
    value = likelihood(x)
    for _ in range(100):
        p, own = 1 / (1 + np.exp(x[None] - x[:, None])), 1 / (1 + np.exp(-x))  # (n, n) that row beats column, (n,)
        gradient = (wins - games * p).sum(1) + prior * (0.5 - own)
        curvature = games * p * (1 - p)
        hessian = np.diag(curvature.sum(1) + prior * own * (1 - own)) - curvature
        step = np.linalg.lstsq(hessian, gradient, rcond=None)[0]  # without a prior only differences are determined
        while (moved := likelihood(x + step)) < value and np.abs(step).max() > 1e-12:
            step = step / 2
        x, value = x + step, moved
        if np.abs(step).max() < 1e-10:
            break
    return x - x.mean()


def _check_connected(wins: np.ndarray, players: Sequence[str]) -> None:
    """Each player must be reachable from each along wins (Ford 1957), or some rating is infinite."""
    reach = (wins > 0) | np.eye(len(wins), dtype=bool)
    for _ in range(len(wins)):
        reach = reach @ reach
    if not reach.all():
        a, b = map(int, np.argwhere(~reach)[0])
        raise ValueError(
            f"{players[a]} never won against {players[b]}, directly or through others, so no finite ratings fit best; "
            "use prior=1 or play more battles"
        )


# --- several samples a problem -------------------------------------------------------------------------------------


def pass_at_k(n_samples: int, n_correct: int, k: int) -> float:
    """P(at least one of k samples is right), estimated from n without bias: 1 - C(n - c, k) / C(n, k) (Chen et al. 2021,
    arXiv:2107.03374, eq. 1). Raises ValueError unless 0 <= n_correct <= n_samples and 1 <= k <= n_samples."""
    if not (0 <= n_correct <= n_samples and 1 <= k <= n_samples):
        raise ValueError(
            f"pass@{k} from {n_correct} right of {n_samples}: needs 0 <= right <= samples, 1 <= k <= samples"
        )
    return 1 - comb(n_samples - n_correct, k) / comb(n_samples, k)


def majority_vote(answers: Sequence[Answer]) -> Answer:
    """The most frequent answer; of equally frequent ones the first to come (self-consistency, arXiv:2203.11171).

    Raises ValueError without an answer.
    """
    if not answers:
        raise ValueError("no answers to vote among")
    return Counter(answers).most_common(1)[0][0]
