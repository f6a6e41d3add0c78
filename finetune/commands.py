"""`graft generate` and `graft chat`."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from ..base.text.printable import printable

Base = Annotated[Path, typer.Option("--base", help="Model folder in Hugging Face's layout.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]
ChatTemplateName = Annotated[
    str | None, typer.Option("--chat-template", help=r"Name or file of a template. \[default: the model's own]")
]
TemplateArg = Annotated[
    list[str] | None, typer.Option("--template-arg", help="key=value for the template; can be repeated.")
]


def generate(
    base: Base,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", help="Text to go on from; - reads it from stdin; can be repeated.")
    ] = None,
    prompt_file: Annotated[
        Path | None, typer.Option("--prompt-file", help="A prompt a line; in .jsonl a JSON string each.")
    ] = None,
    adapter: Annotated[
        Path | None, typer.Option("--adapter", help="Adapter folder in PEFT's layout, or several: A:0.7,B:0.3.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens")] = 64,
    temperature: Annotated[float, typer.Option("--temperature", help="0 takes the most probable token.")] = 0.0,
    top_k: Annotated[int | None, typer.Option("--top-k")] = None,
    top_p: Annotated[float | None, typer.Option("--top-p")] = None,
    min_p: Annotated[float | None, typer.Option("--min-p")] = None,
    repetition_penalty: Annotated[
        float, typer.Option("--repetition-penalty", help="Above 1: what was said becomes less likely.")
    ] = 1.0,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", help="A string that ends a text; can be repeated.")
    ] = None,
    beams: Annotated[
        int, typer.Option("--beams", help="Above 1: beam search, the most probable text of so many candidates.")
    ] = 1,
    length_penalty: Annotated[
        float, typer.Option("--length-penalty", help="Of beams: above 0 favours long texts, 0 compares plain sums.")
    ] = 1.0,
    seed: Annotated[int, typer.Option("--seed")] = 0,
    speculate: Annotated[
        str | None, typer.Option("--speculate", help="Guess tokens ahead: ngram, or the folder of a small model.")
    ] = None,
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--raw", help=r"As a turn of a chat, or not. \[default: as trained]"),
    ] = None,
    chat_template: ChatTemplateName = None,
    template_arg: TemplateArg = None,
    dtype: Annotated[str, typer.Option("--dtype", help="float32, bfloat16 or float16.")] = "float32",
    device: Device = "auto",
    as_json: Annotated[
        bool, typer.Option("--json", help="A JSON object for each prompt: text, how it ended, log-probabilities.")
    ] = False,
) -> None:
    """Continue prompts, with or without an adapter.

    Example: graft generate --base runs/demo/base --prompt "def main" --max-new-tokens 40
    """
    import json

    from ..base.generate.sampling import Sampling
    from .data.commands import parse_template_args
    from .session import Session

    prompts = _prompts(prompt or [], prompt_file)
    sampling = Sampling(
        temperature, top_k, top_p, min_p, max_new_tokens, seed=seed, repetition_penalty=repetition_penalty
    )
    args = parse_template_args(template_arg) if template_arg else None
    session = Session(base, dtype=dtype, device=device, chat=chat, chat_template=chat_template, template_args=args)
    if speculate is not None and beams == 1:
        session.speculate(speculate, dtype=dtype, device=device)
    if adapter is not None:
        session.load(adapter.name or "adapter", adapter)
    talks: list[list[dict[str, object]]] = [[{"role": "user", "content": text}] for text in prompts]
    stops = stop or []
    if beams < 1:
        raise ValueError(f"--beams {beams} must be >= 1")
    if speculate is not None and beams > 1:
        raise ValueError("--speculate is about one text at a time; leave it or --beams out")
    if length_penalty != 1 and beams == 1:
        raise ValueError("--length-penalty is about beams; add --beams N")
    if len(talks) == 1 and not as_json and beams == 1:
        session.answer(talks[0], sampling=sampling, stop=stops, on_text=lambda piece: _write(piece))
        _write("\n")
        return
    answers = session.answers(talks, sampling=sampling, stop=stops, n_beams=beams, length_penalty=length_penalty)
    for text, one, answer in zip(prompts, talks, answers, strict=True):
        if as_json:
            figures = {"prompt": text, "text": answer.text, "finished": answer.finished, "n_tokens": len(answer.ids)}
            log_p = [round(value, 6) for value in session.log_probabilities(one, answer.ids)]
            _write(json.dumps({**figures, "log_probabilities": log_p}, ensure_ascii=False) + "\n")
        elif len(prompts) == 1:
            _write(f"{answer.text}\n")
        else:
            _write(f"{text}\n{answer.text}\n\n")


def _prompts(given: list[str], file: Path | None) -> list[str]:
    """The prompts of --prompt and --prompt-file, in this order. Raises ValueError without any."""
    import json

    prompts = [sys.stdin.read() if text == "-" else text for text in given]
    if file is not None:
        if not (file == Path("-") or file.is_file()):
            raise FileNotFoundError(f"--prompt-file {file} does not exist or is not a regular file")
        try:
            lines = (sys.stdin.read() if file == Path("-") else file.read_text(encoding="utf-8")).split("\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"--prompt-file {file}: not UTF-8 at byte {error.start}") from None
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                value = json.loads(line) if file.suffix == ".jsonl" else line
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{file} line {number}: not JSON ({error})") from None
            value = value.get("prompt") if isinstance(value, dict) else value
            if not isinstance(value, str):
                raise ValueError(f"{file} line {number}: expected a JSON string, or an object with a string prompt")
            prompts.append(value)
    if not prompts:
        raise ValueError("no prompt given; use --prompt TEXT, --prompt - or --prompt-file FILE with at least one line")
    return prompts


def chat(
    base: Base,
    adapter: Annotated[list[str] | None, typer.Option("--adapter", help="NAME=DIR; can be repeated.")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens")] = 128,
    temperature: Annotated[float, typer.Option("--temperature")] = 0.7,
    top_p: Annotated[float, typer.Option("--top-p")] = 0.95,
    repetition_penalty: Annotated[float, typer.Option("--repetition-penalty")] = 1.0,
    seed: Annotated[int, typer.Option("--seed")] = 0,
    chat_template: ChatTemplateName = None,
    template_arg: TemplateArg = None,
    dtype: Annotated[str, typer.Option("--dtype")] = "float32",
    device: Device = "auto",
) -> None:
    """Talk to a base; /adapter NAME swaps, /adapters lists, /base turns them off, /quit ends.

    The first --adapter is in use at the beginning. A line becomes a turn of a conversation, or a prompt of the shape that
    the adapter learned.

    Example: graft chat --base runs/demo/base --adapter spam=runs/demo/adapters/spam
    """
    from ..base.generate.sampling import Sampling
    from .data.commands import parse_template_args
    from .session import Session, named_folders, talk

    sampling = Sampling(
        temperature, top_p=top_p, max_new_tokens=max_new_tokens, seed=seed, repetition_penalty=repetition_penalty
    )
    args = parse_template_args(template_arg) if template_arg else None
    session = Session(base, dtype=dtype, device=device, chat=None, chat_template=chat_template, template_args=args)
    folders = named_folders(adapter or [])
    for name, folder in folders.items():
        session.load(name, folder)
    session.use(next(iter(folders), None))
    talk(session, sampling)


def _write(text: str) -> None:
    """A model's text, at once: as it is into a file or pipe, without control characters onto a terminal."""
    sys.stdout.write(printable(text, keep="\n\t") if sys.stdout.isatty() else text)
    sys.stdout.flush()
