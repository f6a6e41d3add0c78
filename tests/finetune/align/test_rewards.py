"""Worked by hand and law: what each reward gives, how specs are read, and what a failing reward says."""

import math
import os
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import pytest

from graft.finetune.align import rewards
from graft.finetune.align.reward_child import ChildReward
from graft.finetune.align.rewards import Sample, Term, final_answer, parse_rewards, row_answer, score, to_number

MODULE = """
import os, sys, time

def tail(prompt, completion, row):
    print("printed, which must not spoil the replies")
    return len(completion) + row.get("bonus", 0)

def raises(prompt, completion, row):
    raise KeyError("units")

def hangs(prompt, completion, row):
    if "wait" in completion:
        time.sleep(600)
    return 1

def nothing(prompt, completion, row): pass
def nan(prompt, completion, row): return float("nan")
def text(prompt, completion, row): return "1.0"
def dies(prompt, completion, row): os._exit(3)
def quits(prompt, completion, row): sys.exit()
number = 5
"""


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch) -> str:
    """The name of a user's module in the working directory."""
    (tmp_path / "own_rewards.py").write_text(MODULE)
    (tmp_path / "broken_rewards.py").write_text("import no_such_package_of_anyone")
    (tmp_path / "quitting.py").write_text("import sys; sys.exit()")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield "own_rewards"
    for name in ("own_rewards", "broken_rewards", "quitting"):
        sys.modules.pop(name, None)


def give(spec: str, text: str, **row: object) -> float:
    return score(parse_rewards(spec), [Sample("", text, row, "data.jsonl line 7")]).totals[0]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("She has 3 + 4 = 7.\n#### 7", "7"),
        ("#### 5\nno:\n#### 1,234.50\nend", "1,234.50"),
        ("#### 18 dollars", "18"),
        ("#### the red one", "the red one"),
        (r"so \boxed{\frac{1}{2}} it is", r"\frac{1}{2}"),
        (r"\boxed{1}, no, \boxed{2}. #### 3", "2"),
        (r"\boxed{4} and \boxed{unfinished", "4"),
        (" 12 \n", "12"),
        ("####", ""),
    ],
)
def test_final_answer(text, answer):
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1,234.50", Fraction(2469, 2)), ("$5", 5), (r"\$5.", 5), ("3/4", Fraction(3, 4)), ("12%", 12), (r"12\%", 12),
        ("-2e3", -2000), (".5", Fraction(1, 2)), ("7.", 7), ("0.1", Fraction(1, 10)),
        ("", None), ("seven", None), ("1/0", None), ("7 apples", None), ("1e9999999", None), ("9" * 5000, None), ("--1", None),
    ],
)  # fmt: skip
def test_to_number(text, value):
    assert to_number(text) == value


def test_exact():
    """GSM8K: the number after #### decides, however it is written; a question without a marker is compared as a whole."""
    gold = {"answer": "6 * 12 = 72\n#### 72"}
    assert give("exact", "72 clips.\n#### 72.0", **gold) == 1
    assert give("exact", r"\boxed{72}", **gold) == 1
    assert give("exact", "72", **gold) == 1
    assert give("exact", "72 is wrong\n#### 71", **gold) == 0
    assert give("exact", "the answer is 72", **gold) == 0
    assert give("exact", " Paris ", completion="Paris") == 1
    assert give("exact", "paris", completion="Paris") == 0


def test_number():
    assert give("number", "so it costs $3,000 in all", answer=3000) == 1
    assert give("number", "3/4", answer="0.75") == 1
    assert give("number", "1 or 2", answer="#### 2") == 1
    assert give("number", "no idea", answer=2) == 0
    assert give("number:0.01", "3.14", answer="3.1415926") == 1
    assert give("number:0.0001", "3.14", answer="3.1415926") == 0
    with pytest.raises(ValueError, match=r"line 7: reward number failed .* the row's answer 'red' holds no number"):
        give("number", "3", answer="red")


def test_label_regex_format_length():
    assert give("label", " Spam\n", label="spam") == 1
    assert give("label", "ham", label="spam") == 0
    assert give(r"regex:\bcat\b", "a cat.") == 1
    assert give(r"regex:\bcat\b", "concat") == 0
    assert give("format", "<think>\n2 + 2\n</think>\n<answer>4</answer>") == 1
    assert give("format", "<answer>4</answer>") == 0
    assert give("format", "x <think></think><answer></answer>") == 0
    assert give(r"format:\d+", "123") == 1
    assert give(r"format:\d+", "123 ") == 0
    assert [give("length:4", "x" * n) for n in (0, 4, 5, 6, 8, 99)] == [0, 0, -0.25, -0.5, -1, -1]


def test_weighted_sum():
    """1 * exact + 0.2 * format - 0.5 * length:1: 1 + 0 + (-0.5)(-1) = 1.5, and each part without its weight."""
    samples = [Sample("", "42", {"answer": "42"}), Sample("", "4", {"answer": "42"})]
    got = score(parse_rewards("exact + 0.2 * format + -0.5 * length:1"), samples)
    assert got.totals == [1.5, 0.0]
    assert got.parts == {"exact": [1, 0], "format": [0, 0], "length:1": [-1, 0]}
    assert score(parse_rewards({"regex:a + 2 * b": -2, "exact": 1}), samples).totals == [1.0, 0.0]
    assert [(t.name, t.weight) for t in parse_rewards("1e-3 * regex:a*b + exact")] == [
        ("regex:a*b", 1e-3),
        ("exact", 1.0),
    ]


def test_row_answer():
    assert row_answer({"answer": None, "solution": 5, "label": "x"}) == "5"
    with pytest.raises(
        ValueError, match=r"line 7: reward exact failed on 'a': .* the row has no answer; .* it has question"
    ):
        give("exact", "a", question="?")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "no reward given; choose exact, number, label, regex, format, length, model, or module:function"),
        ({}, "no reward given"),
        ("exakt", "unknown reward 'exakt'; choose exact"),
        ("exact:answer", "reward exact takes no argument, got 'answer'"),
        ("regex", "reward regex needs a pattern"),
        ("regex:(", r"reward regex:\( is not a regular expression: missing \)"),
        ("number:x", "reward number:x needs a relative error >= 0"),
        ("length:0", "reward length:0 needs a number of characters >= 1"),
        ("exact + exact", "reward 'exact' stands twice"),
        ("1.2.3 * exact", "'1.2.3' before reward 'exact' is not a number"),
        ({"exact": math.inf}, "reward 'exact' has weight inf"),
        ({"exact": True}, "reward 'exact' has weight True"),
        ("2x:y", "unknown reward '2x:y'"),
    ],
)
def test_bad_specs(spec, message):
    with pytest.raises(ValueError, match=message):
        parse_rewards(spec)


def test_backtracking_ends(monkeypatch):
    """Law: a pattern that would run for years is an error that names the row."""
    monkeypatch.setattr(rewards, "REGEX_TIMEOUT_S", 0.1)
    with pytest.raises(ValueError, match=r"data.jsonl line 7: reward regex:.* failed on 'aaaa.*TimeoutError"):
        give("regex:(a|aa)+$", "a" * 200 + "!")


@pytest.mark.parametrize("timeout_s", [None, 20.0])
def test_user_functions(user_module, timeout_s):
    """Law: here and in a child process alike, a function's number counts, and what goes wrong names reward and row."""
    samples = [Sample("p", "abc", {"bonus": 0.5}, "x.csv row 3")]
    assert score(parse_rewards(f"2 * {user_module}:tail", timeout_s=timeout_s), samples).totals == [7.0]
    for function, message in (
        ("raises", r"x.csv row 3: reward own_rewards:raises failed on 'abc': .*KeyError: 'units'"),
        ("quits", r"x.csv row 3: reward own_rewards:quits failed on 'abc': .*SystemExit"),
        ("nothing", r"x.csv row 3: reward own_rewards:nothing gave None, not a number"),
        ("text", r"x.csv row 3: reward own_rewards:text gave '1.0', not a number"),
        ("nan", r"x.csv row 3: reward own_rewards:nan gave nan on 'abc'; return a finite float"),
    ):
        with pytest.raises(ValueError, match=message):
            score(parse_rewards(f"{user_module}:{function}", timeout_s=timeout_s), samples)
    for spec, message in (
        (
            "broken_rewards:f",
            "reward broken_rewards:f can't be imported: ModuleNotFoundError: No module named 'no_such_pack",
        ),
        ("quitting:f", "reward quitting:f can't be imported: SystemExit"),
        ("not_there:f", "reward not_there:f can't be imported: ModuleNotFoundError"),
        (f"{user_module}:absent", "module own_rewards has no function 'absent'; give module:function"),
        (f"{user_module}:number", "module own_rewards has no function 'number'"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_rewards(spec, timeout_s=timeout_s)


def test_a_hanging_child_is_killed(user_module):
    """Law: a call over the limit is a TimeoutError that names the row, its process is gone, and the next call is answered."""
    [term] = parse_rewards(f"{user_module}:hangs", timeout_s=1.0)
    assert isinstance(term.function, ChildReward)
    assert term.function("", "fast", {}) == 1
    child = term.function._child.pid
    began = time.monotonic()
    with pytest.raises(
        ValueError, match=r"row 9: reward own_rewards:hangs failed on 'wait.*TimeoutError: no result within 1 s"
    ):
        score([term], [Sample("", "wait", {}, "row 9")])
    assert time.monotonic() - began < 20
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
    assert term.function("", "fast", {}) == 1
    term.function.close()


def test_a_dying_child(user_module):
    [term] = parse_rewards(f"{user_module}:dies", timeout_s=20.0)
    with pytest.raises(
        ValueError, match=r"reward own_rewards:dies failed .*RuntimeError: its process ended with exit code 3"
    ):
        score([term], [Sample("", "a", {})])
    with pytest.raises(ValueError, match=r"timeout_s=0 must be > 0"):
        parse_rewards(f"{user_module}:tail", timeout_s=0)


def test_a_child_that_dies_while_it_imports(tmp_path, monkeypatch):
    (tmp_path / "deadly.py").write_text("import os; os._exit(3)", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match=r"reward deadly:f can't be imported: its process ended with exit code 3"):
        parse_rewards("deadly:f", timeout_s=20.0)


def test_scoring_needs_no_torch():
    """Law: a child starts without torch."""
    code = "import sys, graft.finetune.align.reward_child, graft.finetune.align.rewards; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_any_function_is_a_term():
    assert score([Term("own", 3.0, lambda p, c, r: c == "a")], [Sample("", "a", {})]).totals == [3.0]
