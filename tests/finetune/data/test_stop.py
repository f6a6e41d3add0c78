"""What ends a turn: one answer for generation, evaluation and every reader of a written folder."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

from graft.base.model.config import ModelConfig
from graft.base.model.huggingface import load_config, save_model
from graft.base.model.transformer import Transformer, initialize_
from graft.base.tokenizer.tokenizer import Tokenizer
from graft.finetune.data.chat import ChatTemplate, encode_prompt, end_of_turn
from graft.finetune.data.stop import stop_ids, write_endings
from graft.finetune.data.templates import CHATML, TEMPLATES
from graft.finetune.evaluation.run import run_evaluate
from graft.finetune.folders import carry_over
from graft.finetune.sft import run_sft

OWN = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + ('[/INST]' if m.role == 'assistant' else '\n') }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def model_of(tokenizer: Tokenizer) -> Transformer:
    config = ModelConfig(
        tokenizer.vocab_size, d_model=64, n_layers=2, n_heads=2, n_kv_heads=1, d_head=32, d_ff=128, max_seq_len=64,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model = Transformer(config)
    initialize_(model, seed=0)
    return model


@pytest.mark.parametrize("name", list(TEMPLATES))
def test_what_is_taught_is_where_generation_stops(name: str, tokenizer: Tokenizer) -> None:
    template = ChatTemplate.of(tokenizer, TEMPLATES[name])
    stops = stop_ids(model_of(tokenizer).config, tokenizer, template)
    assert end_of_turn(tokenizer, template) in stops
    assert tokenizer.eos_token_id in stops


def test_stops_by_hand(tokenizer: Tokenizer) -> None:
    """The model's files name 3 and 5, the tokenizer <|endoftext|>, the template [/INST]: all four."""
    config = replace(model_of(tokenizer).config, eos_token_id=(3, 5))
    special = tokenizer.special_tokens
    found = stop_ids(config, tokenizer, ChatTemplate.of(tokenizer, OWN))
    assert found == {3, 5, special["<|endoftext|>"], special["[/INST]"]}
    assert stop_ids(config, tokenizer, ChatTemplate("{{ messages[-1].content }}")) == {3, 5, special["<|endoftext|>"]}


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Path:
    """A tiny base, fully fine-tuned on one conversation with a template of its own until it knows it by heart."""
    place = tmp_path_factory.mktemp("taught")
    tokenizer = Tokenizer.load(folder)
    tokenizer.chat_template = OWN
    save_model(model_of(tokenizer), place / "base")
    tokenizer.save(place / "base")
    generation = json.loads((place / "base/generation_config.json").read_text())
    (place / "base/generation_config.json").write_text(
        json.dumps(generation | {"temperature": 0.6, "top_p": 0.9, "do_sample": True})
    )
    rows = [
        {"messages": [{"role": "user", "content": f"{n} ?"}, {"role": "assistant", "content": f"It is {n}."}]}
        for n in "24"
    ]
    (place / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run_sft(
        base=place / "base", data=place / "rows.jsonl", out=place / "out", method="full", device="cpu", progress=False,
        settings={"steps": 60, "batch_size": 2, "learning_rate": 5e-3},
    )  # fmt: skip
    return place


def test_every_file_names_the_end(taught: Path, tokenizer: Tokenizer) -> None:
    """Worked by hand: [/INST] first, <|endoftext|> still there, the base's sampling defaults carried over."""
    own, text = tokenizer.special_tokens["[/INST]"], tokenizer.special_tokens["<|endoftext|>"]
    generation = json.loads((taught / "out/generation_config.json").read_text())
    assert generation["eos_token_id"] == [own, text]
    assert (generation["temperature"], generation["top_p"], generation["do_sample"]) == (0.6, 0.9, True)
    assert json.loads((taught / "out/config.json").read_text())["eos_token_id"] == [own, text]
    assert json.loads((taught / "out/tokenizer_config.json").read_text())["eos_token"] == "[/INST]"
    assert load_config(taught / "out").eos_token_id == (own, text)
    assert json.loads((taught / "base/tokenizer_config.json").read_text())["eos_token"] == "<|endoftext|>"


def test_transformers_stops_there(taught: Path) -> None:
    """Parity: greedy decoding by transformers with the folder's own settings gives the answer and ends."""
    model = transformers.AutoModelForCausalLM.from_pretrained(taught / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(taught / "out")
    assert theirs.eos_token == "[/INST]"
    ids = encode_prompt([{"role": "user", "content": "4 ?"}], Tokenizer.load(taught / "out")).tolist()
    out = model.generate(torch.tensor([ids]), max_new_tokens=30, do_sample=False, temperature=None, top_p=None)
    assert theirs.decode(out[0, len(ids) :]) == "It is 4.[/INST]"


def test_evaluation_stops_there(taught: Path) -> None:
    """Once accuracy 0.0 at a loss of nearly nothing: with an own end token the answer never ended."""
    figures = run_evaluate(taught / "out", taught / "rows.jsonl", device="cpu")
    assert figures["loss"] < 0.1
    assert figures["accuracy"] == 1.0


def test_eos_stays_where_the_template_writes_it(tokenizer: Tokenizer) -> None:
    """A template that ends turns on one token and writes eos_token elsewhere would change if eos became that token."""
    source = CHATML + "{%- if not add_generation_prompt %}{{ eos_token }}{% endif %}"
    own = Tokenizer(tokenizer.definition)
    model = model_of(own)
    write_endings(model, own, ChatTemplate.of(own, source))
    assert own.definition.eos == "<|endoftext|>"
    assert model.config.eos_token_id == (own.special_tokens["<|im_end|>"], own.special_tokens["<|endoftext|>"])
    write_endings(model, own, ChatTemplate.of(own, CHATML))
    assert own.definition.eos == "<|im_end|>"


def test_training_on_strings_changes_no_end(tokenizer: Tokenizer) -> None:
    own = Tokenizer(tokenizer.definition)
    model = model_of(own)
    write_endings(model, own, None)
    assert (own.definition.eos, model.config.eos_token_id) == ("<|endoftext|>", own.special_tokens["<|endoftext|>"])


def test_sampling_defaults_without_a_base_file(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    carry_over(tmp_path / "base", tmp_path)
    assert not (tmp_path / "generation_config.json").exists()
