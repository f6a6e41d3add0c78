"""Parity with lm-evaluation-harness: its figures with graft's model class are ours, its own class's likelihoods too."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness (pip install 'graftlm[lm-eval]')")
import datasets
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import simple_evaluate

from graft.finetune.evaluation.benchmarks import run_benchmarks
from graft.finetune.evaluation.lm_eval_model import GraftLM
from graft.finetune.generate import generate
from graft.finetune.loading import load_model

WORDS = ["cat", "bird", "sea", "tree", "river", "mat"]
# Each task as the harness's own YAML files have it.
CHOICE = {
    "output_type": "multiple_choice", "doc_to_text": "{{query}}\nAnswer:", "doc_to_target": "{{gold}}",
    "doc_to_choice": "{{choices}}", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}  # fmt: skip
PAIR = {
    "output_type": "multiple_choice", "doc_to_text": "", "doc_to_target": 0,
    "doc_to_choice": "{{[sentence_good, sentence_bad]}}", "metric_list": [{"metric": "acc"}],
}  # fmt: skip
LAST_WORD = {
    "output_type": "loglikelihood", "doc_to_text": "{{context}}", "doc_to_target": "{{' ' + continuation}}",
    "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
}  # fmt: skip
ROWS: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "arc_easy": (CHOICE, [
        {"query": f"Question: the {w} and the {WORDS[i - 1]}", "choices": [w, "sat on the mat", WORDS[i - 2]], "gold": i % 3}
        for i, w in enumerate(WORDS)
    ]),
    "blimp": (PAIR, [
        {"sentence_good": f"the {w} sat", "sentence_bad": f"{w} the sat", "UID": "order", "linguistics_term": "order"}
        for w in WORDS
    ]),
    "lambada": (LAST_WORD, [{"context": f"the {w} sat on the", "continuation": w} for w in WORDS]),
}  # fmt: skip


def harness(model: Any, rows: dict[str, Any] = ROWS) -> dict[str, dict[str, Any]]:
    """The harness's figures on rows held in memory."""
    tasks = [
        ConfigurableTask(
            config={
                "task": name, "dataset_path": "", "test_split": "test", "num_fewshot": 0, **asked,
                "custom_dataset": lambda rows=given, **_: {"test": datasets.Dataset.from_list(rows)},
            }
        )
        for name, (asked, given) in rows.items()
    ]  # fmt: skip
    found = simple_evaluate(model=model, tasks=tasks, bootstrap_iters=0, verbosity="ERROR")
    assert found is not None
    return found["results"]


def test_the_figures_are_the_same(base_dir: Path, tmp_path: Path) -> None:
    """Parity: acc, acc_norm and perplexity of choices, pairs and last words, on the same rows."""
    files = []
    for name, (_, rows) in ROWS.items():
        files.append(tmp_path / f"{name}.jsonl")
        files[-1].write_text("".join(json.dumps(row) + "\n" for row in rows))
    ours = run_benchmarks(base_dir, files, device="cpu")["base"]
    theirs = harness(GraftLM(str(base_dir), device="cpu"))
    for name, metrics in {"arc_easy": ("acc", "acc_norm"), "blimp": ("acc",), "lambada": ("acc", "perplexity")}.items():
        for metric in metrics:
            # Counts are equal; perplexities are sums in another order.
            assert ours[name][metric] == pytest.approx(theirs[name][f"{metric},none"], rel=1e-6), (name, metric)


@pytest.mark.slow
def test_the_likelihoods_are_those_of_its_own_class(base_dir: Path) -> None:
    """Parity with transformers through the harness's class `hf`: sums and greediness of each request, empty contexts too."""
    from lm_eval.models.huggingface import HFLM

    pairs = [("the cat ", "sat"), ("the cat", " sat on"), ("", "a bird"), ("the", " sea")]
    requests = [SimpleNamespace(args=pair) for pair in pairs]
    ours = GraftLM(str(base_dir), device="cpu")
    theirs = HFLM(pretrained=str(base_dir), device="cpu", dtype="float32", batch_size=2)
    for (log_p, greedy), (peer_log_p, peer_greedy) in zip(
        ours.loglikelihood(requests, disable_tqdm=True), theirs.loglikelihood(requests, disable_tqdm=True), strict=True
    ):
        assert log_p == pytest.approx(peer_log_p, abs=1e-4)
        assert greedy == peer_greedy
    texts = [SimpleNamespace(args=("the cat sat on the mat. " * n,)) for n in (1, 20)]
    found = ours.loglikelihood_rolling(texts)
    assert found == pytest.approx(theirs.loglikelihood_rolling(texts, disable_tqdm=True), abs=1e-2)


def test_what_is_generated(base_dir: Path) -> None:
    """Law: greedy text is graft.generate's, up to a stop string; settings that graft hasn't are refused by name."""
    model, tokenizer = load_model(base_dir), GraftLM(str(base_dir), device="cpu")
    [expected] = generate(model, tokenizer._tokenizer, ["the cat"], max_new_tokens=9)
    ask = lambda text, **settings: SimpleNamespace(args=(text, settings))  # noqa: E731
    stop = expected[3:5]
    found = tokenizer.generate_until([
        ask("the cat", until=[], max_gen_toks=9), ask("a bird", until=[], max_gen_toks=5),
        ask("the cat", until=[stop], max_gen_toks=9), ask("the cat " * 200, until=[], max_gen_toks=5),
    ])  # fmt: skip
    assert found[0] == expected
    assert found[2] == expected[: expected.find(stop)]
    assert tokenizer.n_cut == 1
    with pytest.raises(ValueError, match="the generation setting typical_p is not known"):
        tokenizer.generate_until([ask("the", until=[], typical_p=0.5)])
    with pytest.raises(ValueError, match=r"max_gen_toks=96 leaves no context; the model reads 96 tokens"):
        tokenizer.generate_until([ask("the", until=[], max_gen_toks=96)])
