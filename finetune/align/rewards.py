"""Rewards that are functions of the text: `(prompt, completion, row) -> float`, named and weighted by a spec.

    spec       "exact", "exact + 0.2 * format", "-0.001 * length:400 + my_rewards:score", or {"regex:a + b": 0.5, ...}
    exact      1 if the completion's final answer (`#### 72`, `\\boxed{72}`, else all of it) is the row's, else 0
    number     1 if the last number of the completion equals the row's; number:0.01 allows that relative error
    label      1 if completion and row agree but for case and surrounding space
    regex:P    1 if the pattern P is found in the completion
    format     1 if the whole completion is <think>...</think><answer>...</answer>; format:P: if it matches P as a whole
    length:N   0 up to N characters, then falling to -1 at 2 N (the shape of DAPO's soft overlong punishment, eq. 13)
    model:DIR  the score of a reward model's folder, from graft reward (its module, and torch, are imported then)
    M:F        function F of the importable module M, called as F(prompt, completion, row)

The row's answer is its field answer, solution, completion or label, the first that it has. Nothing here imports torch: a
child process that scores starts quickly. Text from completions is never executed.
"""

import math
import re as stdlib_re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import regex

from .reward_child import ChildReward, Reward, Row, import_function

ANSWER_FIELDS = ("answer", "solution", "completion", "label")
THINK_THEN_ANSWER = r"\s*<think>.*?</think>\s*<answer>.*?</answer>\s*"  # DeepSeek-R1's format (arXiv:2501.12948)
REGEX_TIMEOUT_S = 1.0  # a pattern that backtracks without end is an error, not a hang
_NUMBER = r"[-+]?(?:\d[\d,]*\.?\d*|\.\d+)(?:[eE][-+]?\d{1,3})?"


@dataclass(frozen=True)
class Sample:
    """One completion to score."""

    prompt: str
    completion: str
    row: Row
    where: str = "row"  # "train.jsonl line 812", for error messages


@dataclass(frozen=True)
class Term:
    """One reward of a sum."""

    name: str
    weight: float
    function: Reward


@dataclass(frozen=True)
class Scores:
    totals: list[float]  # (B,) the weighted sums
    parts: dict[str, list[float]]  # each reward by its name, (B,), without its weight


def parse_rewards(spec: str | Mapping[str, float], *, timeout_s: float | None = None) -> list[Term]:
    """A spec -> its terms. With timeout_s each `module:function` runs in a child process, bounded to so many seconds a call.

    In a string, terms stand between " + ", a weight before " * "; patterns that hold these go into the mapping. Raises
    ValueError for an unknown name, a missing or bad argument, a weight that isn't finite, or what can't be imported.
    """
    named = dict(spec) if isinstance(spec, Mapping) else _split_spec(spec)
    if not named:
        raise ValueError("no reward given; choose " + _known())
    for name, weight in named.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            raise ValueError(f"reward {name!r} has weight {weight!r}; a weight is a finite number")
    return [Term(name, float(weight), find_reward(name, timeout_s=timeout_s)) for name, weight in named.items()]


def score(terms: Sequence[Term], samples: Sequence[Sample]) -> Scores:
    """Every sample by every term. Raises ValueError naming the row and the reward when one raises, hangs or gives no finite
    number."""
    parts: dict[str, list[float]] = {term.name: [] for term in terms}
    for sample in samples:
        for term in terms:
            parts[term.name].append(_one(term, sample))
    totals = [sum(term.weight * parts[term.name][i] for term in terms) for i in range(len(samples))]
    return Scores(totals, parts)


def _one(term: Term, sample: Sample) -> float:
    said = f"{sample.where}: reward {term.name}"
    try:
        value = term.function(sample.prompt, sample.completion, sample.row)
    except (Exception, SystemExit) as error:
        # Whatever a user's function raises ends the run in one line that says where; sys.exit() would end it without a word.
        raise ValueError(f"{said} failed on {sample.completion!r:.80}: {type(error).__name__}: {error}") from error
    try:
        if isinstance(value, str):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{said} gave {value!r:.80}, not a number; return a float") from None
    if not math.isfinite(number):
        raise ValueError(f"{said} gave {number} on {sample.completion!r:.80}; return a finite float")
    return number


# --- specs -----------------------------------------------------------------------------------------------------------


def _split_spec(spec: str) -> dict[str, float]:
    named: dict[str, float] = {}
    for term in spec.split(" + ") if spec.strip() else ():
        matched = stdlib_re.fullmatch(r"\s*([-+]?[\d.]+(?:[eE][-+]?\d+)?) \* (.*)", term, stdlib_re.DOTALL)
        weight, name = (matched[1], matched[2].strip()) if matched else ("1", term.strip())
        if name in named:
            raise ValueError(f"reward {name!r} stands twice in {spec!r}; add its weights up")
        try:
            named[name] = float(weight)
        except ValueError:
            raise ValueError(f"{weight!r} before reward {name!r} is not a number") from None
    return named


def find_reward(name: str, *, timeout_s: float | None = None) -> Reward:
    """The function of one name. Raises ValueError for names that are not known, or don't import."""
    kind, _, argument = name.partition(":")
    if kind in BUILT_IN:
        return BUILT_IN[kind](argument)
    if not argument or not all(part.isidentifier() for part in (*kind.split("."), argument)):
        raise ValueError(f"unknown reward {name!r}; choose {_known()}")
    if timeout_s is None:
        return import_function(kind, argument)
    return ChildReward(kind, argument, timeout_s=timeout_s)


def _known() -> str:
    return ", ".join((*BUILT_IN, "or module:function of your own"))


# --- what is in the text -------------------------------------------------------------------------------------------


def final_answer(text: str) -> str:
    """What stands in the last \\boxed{...}, else after the last `####` (the number, or the line), else all of the text."""
    boxed = _boxed(text)
    if boxed is not None:
        return boxed.strip()
    _, mark, after = text.rpartition("####")
    line = after.strip().split("\n", 1)[0].strip()
    if not mark:
        return text.strip()
    word = line.split(" ", 1)[0]
    return word if to_number(word) is not None else line  # "#### 18 dollars" is 18, as GSM8K's own check reads it


def _boxed(text: str) -> str | None:
    """The inside of the last complete \\boxed{...}, whose braces may be nested."""
    at = len(text)
    while (at := text.rfind("\\boxed{", 0, at)) >= 0:
        depth, start = 1, at + len("\\boxed{")
        for end in range(start, len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                return text[start:end]
    return None


def to_number(text: str) -> Fraction | None:
    """The exact value of "1,234.50", "$5", "3/4", "12%" (12, the sign being a unit) or "-2e3", or None."""
    stripped = text.strip().rstrip(".").strip("\\$% ")
    numerator, slash, denominator = stripped.partition("/")
    parts = [numerator, denominator] if slash else [numerator]
    if not all(stdlib_re.fullmatch(_NUMBER, part.strip()) for part in parts):
        return None
    try:
        value = [Fraction(part.strip().replace(",", "")) for part in parts]
        return value[0] / value[1] if slash else value[0]
    except (ValueError, ZeroDivisionError):  # more digits than Python reads; a division by 0
        return None


def row_answer(row: Row) -> str:
    """The reference answer of a row. Raises ValueError that lists the row's fields when it has none."""
    for field in ANSWER_FIELDS:
        if row.get(field) is not None:
            return str(row[field])
    raise ValueError(
        f"the row has no answer; it needs one of {', '.join(ANSWER_FIELDS)}, it has {', '.join(row) or 'none'}"
    )


# --- the rewards ---------------------------------------------------------------------------------------------------


def _exact(argument: str) -> Reward:
    _no_argument("exact", argument)

    def exact(prompt: str, completion: str, row: Row) -> float:
        given, wanted = final_answer(completion), final_answer(row_answer(row))
        numbers = to_number(given), to_number(wanted)
        return float(given == wanted or (numbers[0] is not None and numbers[0] == numbers[1]))

    return exact


def _numeric(argument: str) -> Reward:
    tolerance = to_number(argument or "0")
    if tolerance is None or tolerance < 0:
        raise ValueError(f"reward number:{argument} needs a relative error >= 0, such as number:0.01")

    def last_number(text: str) -> Fraction | None:
        answer = final_answer(text)
        found = stdlib_re.findall(_NUMBER, answer)
        whole = to_number(answer)
        return to_number(found[-1]) if whole is None and found else whole

    def numeric(prompt: str, completion: str, row: Row) -> float:
        given, wanted = last_number(completion), last_number(row_answer(row))
        if wanted is None:
            raise ValueError(f"the row's answer {row_answer(row)!r:.60} holds no number; use exact or label")
        return float(given is not None and abs(given - wanted) <= tolerance * abs(wanted))

    return numeric


def _label(argument: str) -> Reward:
    _no_argument("label", argument)
    return lambda prompt, completion, row: float(completion.strip().casefold() == row_answer(row).strip().casefold())


def _regex(argument: str) -> Reward:
    pattern = _compile("regex", argument)
    return lambda prompt, completion, row: float(pattern.search(completion, timeout=REGEX_TIMEOUT_S) is not None)


def _format(argument: str) -> Reward:
    pattern = _compile("format", argument or THINK_THEN_ANSWER)
    return lambda prompt, completion, row: float(pattern.fullmatch(completion, timeout=REGEX_TIMEOUT_S) is not None)


def _length(argument: str) -> Reward:
    if not argument.isdecimal() or int(argument) < 1:
        raise ValueError(f"reward length:{argument} needs a number of characters >= 1, such as length:400")
    limit = int(argument)
    return lambda prompt, completion, row: -min(1.0, max(0, len(completion) - limit) / limit)


def _model(argument: str) -> Reward:
    if not argument:
        raise ValueError("reward model needs a folder, such as model:runs/reward")
    from .run_reward import RewardModel

    return RewardModel(argument)


def _compile(kind: str, pattern: str) -> regex.Pattern[str]:
    if not pattern:
        raise ValueError(f"reward {kind} needs a pattern, such as {kind}:\\d+")
    try:
        return regex.compile(pattern, regex.DOTALL)
    except regex.error as error:
        raise ValueError(f"reward {kind}:{pattern} is not a regular expression: {error}") from None


def _no_argument(kind: str, argument: str) -> None:
    if argument:
        raise ValueError(f"reward {kind} takes no argument, got {argument!r}")


BUILT_IN: dict[str, Callable[[str], Reward]] = {
    "exact": _exact, "number": _numeric, "label": _label, "regex": _regex, "format": _format, "length": _length,
    "model": _model,
}  # fmt: skip
