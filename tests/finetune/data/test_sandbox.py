"""Templates from strangers: each ends within its bounds with one line that says why; good ones pass untouched."""

import time

import pytest

from graft.finetune.data import sandbox
from graft.finetune.data.render import ChatTemplate

CHAT = ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"})
GROW = "{% set ns = namespace(x=START) %}{% for i in range(60) %}{% set ns.x = STEP %}{% endfor %}{{ ns.x }}"

# What a template may try -> what the message names.
HOSTILE = {
    "{{ 'a' * 10**10 }}": "10,000,000,000 characters",
    "{{ 10**9 * 'a' }}": "1,000,000,000 characters",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}": "loops more than 1,000,000 times",
    "{% for i in range(99999) if false %}{% endfor %}" * 50: "loops more than 1,000,000 times",
    "{% for i in range(10**9) %}{% endfor %}": "1,000,000,000, above 1,000,000",
    "{% for i in range(999999) %}{% endfor %}": "Range too big",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "calls itself without end",
    "{% for i in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}": "calls itself without end",
    GROW.replace("START", "'aaaa'").replace("STEP", "ns.x ~ ns.x"): "more than 20,000,000 characters",
    GROW.replace("START", "'aaaa'").replace("STEP", "ns.x + ns.x"): "more than 20,000,000 characters",
    GROW.replace("START", "[1]").replace("STEP", "[ns.x, ns.x]"): "more than 20,000,000 characters",
    GROW.replace("START", "[1]").replace("STEP", "[ns.x, ns.x]").replace("ns.x }}", "ns.x | tojson }}"): "20,000,000",
    GROW.replace("START", "7").replace("STEP", "ns.x * ns.x"): "more than 10,000 bits",
    "{% for i in range(99999) %}{{ 'a' * 10**6 }}{% endfor %}": "more than 20,000,000 characters",
    "{{ 'a' | center(10**9) }}": "above 1,000,000",
    "{{ 'a'.ljust(10**9) }}": "above 1,000,000",
    "{{ '%1000000000d' % 1 }}": "the width in",
    "{{ '%1000000000d' | format(1) }}": "the width in",
    "{{ '%*d' % (10**9, 1) }}": "the width in",
    "{{ '{:1000000000}'.format(1) }}": "the width in",
    "{{ (1).to_bytes(10**9, 'big') }}": "above 1,000,000",
    "{{ ('a' * 10**7).replace('a', 'b' * 10**7) }}": "combines texts",
    "{{ ('a' * 10**6).join('b' * 10**6) }}": "combines texts",
    "{{ ('\t' * 10**6).expandtabs(10**6) }}": "combines 1,000,000",
    "{{ 1 / 0 }}": "ZeroDivisionError: division by zero",
    "{{ {}.a.b }}": "has no attribute 'a'",
    "{{ ''.__class__.__mro__ }}": "unsafe",
    "{% include 'x' %}": "no loader",
    "{{ messages[0].content | no_such_filter }}": "",
    "{{ raise_exception('no') }}": "no",
    "{{ raise_exception('a\n' * 10**6) }}": "a a a",
    "{{ [9**99] | join(9**99) }}": "a number of 314 bits, above 1,000,000",
}


@pytest.mark.parametrize("source", list(HOSTILE), ids=lambda source: source[:40])
def test_a_hostile_template_is_one_line_in_bounded_time(source: str) -> None:
    started = time.process_time()
    with pytest.raises(ValueError, match="the chat template") as caught:
        ChatTemplate(source).render(CHAT)
    assert HOSTILE[source] in str(caught.value)
    assert "\n" not in str(caught.value)
    assert time.process_time() - started < 8


@pytest.mark.parametrize("source", ["{% break %}", "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "{{ " + "9" * 5000 + " }}"])
def test_a_template_that_does_not_compile_is_one_line(source: str) -> None:
    with pytest.raises(ValueError, match="the chat template does not compile: "):
        ChatTemplate(source)


def test_a_template_of_a_million_characters_is_refused() -> None:
    with pytest.raises(ValueError, match="the chat template has 1,000,001 characters, the limit is 1,000,000"):
        ChatTemplate("a" * 1_000_001)


def test_time_is_bounded_where_nothing_else_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """A macro that calls itself twice, 60 deep: 2**60 calls, none of them deep."""
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 0.2)
    source = "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}"
    with pytest.raises(ValueError, match="the chat template was stopped: it runs longer than"):
        ChatTemplate(source).render(CHAT)


def test_the_counts_start_anew_with_each_rendering() -> None:
    """Law: what one rendering used up is not missing in the next."""
    template = ChatTemplate("{% for i in range(99999) %}{% endfor %}{{ messages[0].content }}")
    assert [template.render(CHAT) for _ in range(12)] == ["hi"] * 12


def test_long_conversations_pass() -> None:
    """Law: 2,000 turns of 1,000 characters are no attack."""
    chat = ({"role": "user", "content": "word " * 200}, {"role": "assistant", "content": "7654321 " * 125}) * 1000
    source = "{% for m in messages %}{{ m.role ~ ': ' ~ m.content.split('</think>')[-1] | trim + '\n' }}{% endfor %}"
    text = ChatTemplate(source).render(chat)
    assert text == "".join(f"{m['role']}: {m['content'].strip()}\n" for m in chat)
