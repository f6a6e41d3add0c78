"""Which of several adapters is better, by held-out preference rows or by a reward model's verdict on their answers."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import torch

from ...base.generate.sampling import Sampling
from ...base.tokenizer.tokenizer import Tokenizer
from ..adapters.bank import AdapterBank
from ..data.chat import ChatTemplate
from ..data.preferences import read_preferences
from ..loading import load_model
from .arena import Battle
from .preference_rows import encode_pairs
from .preferences import PreferenceBatches
from .prompts import Prompt, read_prompts
from .reference import answer_logps
from .run_reward import RewardModel
from .sampler import Sampler

BASE = "base"  # the player without an adapter


@dataclass(frozen=True)
class Player:
    """What `compare_on_pairs` knows of one adapter."""

    name: str
    accuracy: float  # share of pairs whose chosen answer gained more than the rejected one, against the base
    margin: float  # the mean gap between those gains, nats


def players_of(
    base: Path | str, adapters: Sequence[Path | str], *, device: str = "cpu"
) -> tuple[AdapterBank, list[str]]:
    """The base with all adapters loaded, and the players' names: the folders' own, and "base". Raises ValueError for two
    folders of one name."""
    names = [Path(folder).name for folder in adapters]
    if len({*names, BASE}) <= len(names):
        raise ValueError(
            f"adapters {', '.join(names)}: names must differ from each other and from {BASE!r}; rename a folder"
        )
    bank = AdapterBank(load_model(base, device=device))
    for name, folder in zip(names, adapters, strict=True):
        bank.load(name, folder)
    return bank, [BASE, *names]


def _use(bank: AdapterBank, name: str) -> None:
    bank.use(None if name == BASE else name)


@torch.no_grad()
def compare_on_pairs(
    base: Path | str, adapters: Sequence[Path | str], data: Path | str, *, device: str = "cpu", micro_batch: int = 8
) -> tuple[list[Player], list[Battle]]:
    """Held-out accuracy and margin of every adapter, and a battle for each pair of players on each row.

    An adapter's log-ratio on a row is what chosen gained against the base, minus what rejected did; of two players the one
    with the higher log-ratio wins the row (the base's is 0: it ties with an adapter that changes nothing). Prints to stderr
    how many rows were left out or cut.
    """
    bank, names = players_of(base, adapters, device=device)
    tokenizer = Tokenizer.load(base)
    limit = bank.model.config.max_seq_len
    rows = encode_pairs(read_preferences([data]), tokenizer, ChatTemplate.of(tokenizer), limit)
    for line in rows.notes(limit):
        print(f"note: {line}", file=sys.stderr)
    batches = PreferenceBatches(rows.pairs, batch_size=1, max_tokens=2 * micro_batch * rows.longest)
    gaps = {name: _gaps(bank, name, batches, device) for name in names}
    gained = {name: gaps[name] - gaps[BASE] for name in names}
    players = [Player(n, float((g > 0).double().mean()), float(g.mean())) for n, g in gained.items() if n != BASE]
    return players, battles_between(gained)


def _gaps(bank: AdapterBank, name: str, batches: PreferenceBatches, device: str) -> torch.Tensor:
    """(n_pairs,) log p(chosen) - log p(rejected) of one player, nats."""
    _use(bank, name)
    found = torch.empty(len(batches.pairs))
    for batch in batches.micro_batches(range(len(batches.pairs))):
        sums, _ = answer_logps(bank.model, {key: tensor.to(device) for key, tensor in batch.items()})
        found[batch["index"]] = (sums[:, 0] - sums[:, 1]).float().cpu()
    return found


def compare_by_reward(
    base: Path | str,
    adapters: Sequence[Path | str],
    data: Path | str,
    reward_model: Path | str,
    *,
    max_new_tokens: int = 64,
    device: str = "cpu",
    notes: list[str] | None = None,  # gets what the user should know
) -> list[Battle]:
    """Battles between the players' greedy answers to the prompts in `data`: the higher score wins. A score sees one answer at
    a time, so there is no order to swap. Raises ValueError for a reward model of another tokenizer."""
    bank, names = players_of(base, adapters, device=device)
    tokenizer = Tokenizer.load(base)
    template = ChatTemplate.of(tokenizer)
    judge = RewardModel(reward_model, device=device)
    judge.check_tokenizer(Path(base))
    prompts = read_prompts(Path(data), tokenizer, template, bank.model.config.max_seq_len, max_new_tokens)
    sampler = Sampler(bank.model, tokenizer, template, max_batch=32)
    scores = {}
    for name in names:
        texts = _answers(bank, name, sampler, prompts, max_new_tokens)
        given = [judge(prompt.text, text, prompt.row) for prompt, text in zip(prompts, texts, strict=True)]
        scores[name] = torch.tensor(given)
    if judge.n_cut and notes is not None:
        n = len(prompts) * len(names)
        limit = judge.about["max_seq_len"]
        notes.append(
            f"{judge.n_cut:,} of {n:,} answers were scored by their first {limit:,} tokens, all that the reward model reads"
        )
    return battles_between(scores)


def battles_between(scores: Mapping[str, torch.Tensor]) -> list[Battle]:
    """player -> (n,) one number a row; the higher wins the row, equal ones tie."""
    return [
        Battle(a, b, 0.5 + 0.5 * float(sign))
        for a, b in combinations(scores, 2)
        for sign in torch.sign(scores[a] - scores[b])
    ]


def _answers(
    bank: AdapterBank, name: str, sampler: Sampler, prompts: Sequence[Prompt], max_new_tokens: int
) -> list[str]:
    _use(bank, name)
    greedy = Sampling(0.0, max_new_tokens=max_new_tokens)
    return [sampler.text(answer) for answer in sampler.answers(prompts, greedy)]
