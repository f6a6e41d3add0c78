"""Stop strings, repetition penalty and log-probabilities of the answers."""

import itertools
from pathlib import Path

import pytest
import torch
import transformers

from graft.base.generate.sampling import Sampling, penalize
from graft.base.tokenizer.tokenizer import Tokenizer
from graft.finetune.generate import TextUntil, generate_answers
from graft.finetune.loading import load_model
from graft.finetune.session import Session


def test_stop_strings_by_hand() -> None:
    """Law: however the text is cut into pieces, what comes out is the text up to the first stop string, and nothing that
    could begin one comes out early."""
    text, stops = "one\n\ntwo###", ["\n\nt", "###"]
    for n_cuts in range(3):
        for cuts in itertools.combinations(range(1, len(text)), n_cuts):
            bounds = [0, *cuts, len(text)]
            found = TextUntil(stops)
            out = [found.push(text[a:b]) for a, b in itertools.pairwise(bounds)]
            assert "".join(out) == "one" == found.text
            assert found.ended
    never = TextUntil(["##!"])
    assert [never.push(piece) for piece in ("a#", "#", "b#")] == ["a", "", "##b"]
    assert (never.flush(), never.text, never.ended) == ("#", "a##b#", False)
    with pytest.raises(ValueError, match="a stop string is empty"):
        TextUntil([""])


def test_a_stop_string_ends_a_row(base_dir: Path) -> None:
    """Law: the answer is the unstopped one up to the string; the row beside it goes on as before."""
    model, tokenizer = load_model(base_dir), Tokenizer.load(base_dir)
    prompts = [tokenizer.encode(text).tolist() for text in ("the cat", "a bird sang")]
    whole = generate_answers(model, tokenizer, prompts, Sampling(max_new_tokens=12))
    assert [answer.finished for answer in whole] == ["length", "length"]
    cut = whole[0].text[5:8]
    pieces: dict[int, str] = {0: "", 1: ""}

    def note(row: int, piece: str) -> None:
        pieces[row] += piece

    stopped = generate_answers(model, tokenizer, prompts, Sampling(max_new_tokens=12), stop=[cut], on_text=note)
    assert stopped[0].text == whole[0].text[: whole[0].text.find(cut)]
    assert stopped[0].finished == "stop"
    assert len(stopped[0].ids) < 12
    assert stopped[1].text == whole[1].text.partition(cut)[0]
    assert pieces == {row: answer.text for row, answer in enumerate(stopped)}


def test_the_repetition_penalty_is_transformers() -> None:
    """Parity: logits after the penalty equal RepetitionPenaltyLogitsProcessor's, row by row."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 50, generator=generator)
    before = logits.clone()
    ids = torch.randint(0, 50, (2, 9), generator=generator)
    seen = torch.zeros(2, 50, dtype=torch.bool).scatter(1, ids, True)
    found = penalize(logits, [seen[0], None], [Sampling(repetition_penalty=1.3), Sampling()])
    expected = transformers.RepetitionPenaltyLogitsProcessor(1.3)(ids, logits)  # pyright: ignore[reportArgumentType]
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], logits[1])
    assert torch.equal(logits, before)
    for wrong in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"repetition_penalty=.* must be > 0 and finite"):
            Sampling(repetition_penalty=wrong)


def test_the_penalty_counts_prompt_and_answer(base_dir: Path) -> None:
    """Parity with transformers' generate: greedy ids with a penalty are the same."""
    model, tokenizer = load_model(base_dir), Tokenizer.load(base_dir)
    prompt = tokenizer.encode("the cat sat").tolist()
    [answer] = generate_answers(model, tokenizer, [prompt], Sampling(max_new_tokens=20, repetition_penalty=100.0))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
    out = theirs.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False, repetition_penalty=100.0)
    assert answer.ids == out[0, len(prompt) :].tolist()[: len(answer.ids)]
    [plain] = generate_answers(model, tokenizer, [prompt], Sampling(max_new_tokens=20))
    assert plain.ids != answer.ids


def test_log_probabilities_are_the_models(base_dir: Path) -> None:
    """Worked out apart: each token's log-softmax, one call a token."""
    session = Session(base_dir, dtype="float32", device="cpu", chat=None)
    turns = [{"role": "user", "content": "the cat"}]
    [answer] = session.answers([turns], sampling=Sampling(max_new_tokens=6))
    ids, expected = session.tokenizer.encode("the cat").tolist(), []
    for token in answer.ids:
        with torch.no_grad():
            expected.append(session.model(torch.tensor([ids]))[0, -1].log_softmax(-1)[token].item())
        ids.append(token)
    assert session.log_probabilities(turns, answer.ids) == pytest.approx(expected, abs=1e-5)  # float32 sums elsewhere
    assert session.log_probabilities(turns, []) == []
