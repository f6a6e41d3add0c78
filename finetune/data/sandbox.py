"""A jinja environment for templates from strangers: transformers' sandbox, and bounds on time and memory.

A chat template is a program that came with a model. The sandbox keeps it from Python's internals; here it is also kept
from running or growing without end. Loop bodies and macros count their turns, and every operation that can make a long
text checks sizes before it runs:

    loop turns and macro calls      1,000,000 a rendering
    processor time                  10 s a rendering
    any one text                    20,000,000 characters, also before it is printed
    any number handed to a call     1,000,000 (a width, an indent, a repetition)
"""

import json
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import wraps
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MAX_TURNS = 1_000_000
MAX_SECONDS = 10.0
MAX_CHARACTERS = 20_000_000
MAX_NUMBER = 1_000_000
MAX_SOURCE = 1_000_000  # characters of the template itself


# Filters whose result is no longer than what goes in.
_SMALL_FILTERS = {
    "length", "count", "first", "last", "select", "reject", "selectattr", "rejectattr", "items", "default", "d", "attr",
}  # fmt: skip


class TemplateLimitError(jinja2.TemplateError):
    """A template passed one of this module's bounds."""


class Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}`: what the model is to learn to write, handed to `environment.mark`."""

    tags = {"generation"}  # noqa: RUF012 (jinja's own declaration)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: jinja2.runtime.Macro) -> str:
        return self.environment.mark(caller())  # pyright: ignore[reportAttributeAccessIssue]


class _Bounded(NodeTransformer):
    """Puts a call of `environment.tick` into each loop and macro, and makes `~` a call of `environment.join_texts`."""

    def visit_For(self, node: jinja2.nodes.For) -> jinja2.nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, _tick(node))
        if node.test is not None:  # a filtered loop also turns where its test is false
            node.test = jinja2.nodes.And(_call("tick", [], node), node.test, lineno=node.lineno)
        return node

    def visit_Macro(self, node: jinja2.nodes.Macro) -> jinja2.nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, _tick(node))
        return node

    def visit_CallBlock(self, node: jinja2.nodes.CallBlock) -> jinja2.nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, _tick(node))
        return node

    def visit_Concat(self, node: jinja2.nodes.Concat) -> jinja2.nodes.Node:
        self.generic_visit(node)
        return _call("join_texts", node.nodes, node)


def _call(name: str, arguments: list[jinja2.nodes.Expr], node: jinja2.nodes.Node) -> jinja2.nodes.Call:
    attribute = jinja2.nodes.EnvironmentAttribute(name, lineno=node.lineno)
    return jinja2.nodes.Call(attribute, arguments, [], None, None, lineno=node.lineno)


def _tick(node: jinja2.nodes.Node) -> jinja2.nodes.ExprStmt:
    return jinja2.nodes.ExprStmt(_call("tick", [], node), lineno=node.lineno)


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """transformers' options and helpers. `restart` opens a rendering: it clears the counts."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, mark: Callable[[str], str]):
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[Generation, "jinja2.ext.loopcontrols"],
            finalize=self._checked_output,
            optimized=False,  # the optimizer runs constant expressions while it compiles
        )
        self.mark = mark
        self._count = threading.local()
        self.filters = {name: self._checked_filter(name, function) for name, function in self.filters.items()}
        self.filters["tojson"] = self._checked_filter("tojson", _tojson)
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now
        self.globals.pop("lipsum", None)
        self.restart()

    def restart(self) -> None:
        """Forget the turns and the time of this thread's last rendering."""
        self._count.turns, self._count.started = 0, time.thread_time()

    def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
        return _Bounded().visit(super()._parse(source, name, filename))

    def tick(self) -> bool:
        """One turn of a loop; always True."""
        self._count.turns += 1
        if self._count.turns > MAX_TURNS:
            raise TemplateLimitError(f"it loops more than {MAX_TURNS:,} times")
        if self._count.turns % 256 == 0:
            self._check_time()
        return True

    def _check_time(self) -> None:
        if time.thread_time() - self._count.started > MAX_SECONDS:
            raise TemplateLimitError(f"it runs longer than {MAX_SECONDS:.0f} s")

    def join_texts(self, *values: object) -> str:
        """jinja's `~`."""
        self._check_total(values)
        return "".join(map(str, values))

    def call(self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        if __obj == self.tick or __obj == self.join_texts:  # our own, put in by _Bounded
            return __obj(*args)
        bound_to = getattr(__obj, "__self__", None)
        owner = (bound_to,) if isinstance(bound_to, str | list | tuple) else ()
        self.check_sizes((*owner, *args, *kwargs.values()))
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            if bits > 10_000:
                raise TemplateLimitError("it makes a number of more than 10,000 bits")
        elif isinstance(left, str | list | tuple) or isinstance(right, str | list | tuple):
            self._check_total((left, right))
        if operator == "*":
            n, other = (left, right) if isinstance(left, int) else (right, left)
            if isinstance(n, int) and isinstance(other, str | list | tuple) and n * len(other) > MAX_CHARACTERS:
                raise TemplateLimitError(f"it makes a text of {n * len(other):,} characters")
        if operator == "%" and isinstance(left, str):
            _check_widths(left)
        return super().call_binop(context, operator, left, right)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is not None:
            _check_widths(value.__self__)
        return wrapped

    def _check_total(self, values: Sequence[object]) -> None:
        """Raise TemplateLimitError where joining the values would make too long a text."""
        self._check_time()
        total = sum(_weight(value) for value in values)
        if total > MAX_CHARACTERS:
            raise TemplateLimitError(f"it makes a text of more than {MAX_CHARACTERS:,} characters")

    def check_sizes(self, values: Sequence[object]) -> None:
        """Raise TemplateLimitError for arguments from which a call could make more than the bounds."""
        self._check_time()
        lengths: list[int] = []
        for value in values:
            if isinstance(value, int):
                if abs(value) > MAX_NUMBER:
                    shown = f"the number {value:,}" if abs(value) < 10**20 else f"a number of {value.bit_length()} bits"
                    raise TemplateLimitError(f"it uses {shown}, above {MAX_NUMBER:,}")
            elif isinstance(value, str):
                lengths.append(len(value))
            elif isinstance(value, list | tuple | Mapping):
                lengths.append(_weight(value))
        lengths.sort()
        if lengths and lengths[-1] > MAX_CHARACTERS:
            raise TemplateLimitError(f"it makes a text of more than {MAX_CHARACTERS:,} characters")
        # 'a...'.replace('a', 'b...') and join can grow by the product of two lengths
        if len(lengths) > 1 and lengths[-1] * lengths[-2] > 100 * MAX_CHARACTERS:
            raise TemplateLimitError(f"it combines texts of {lengths[-2]:,} and {lengths[-1]:,} characters")
        numbers = [value for value in values if isinstance(value, int) and not isinstance(value, bool)]
        if numbers and lengths and max(map(abs, numbers)) * lengths[-1] > 1000 * MAX_CHARACTERS:
            raise TemplateLimitError(f"it combines {max(numbers):,} with a text of {lengths[-1]:,} characters")

    def _checked_output(self, value: object) -> object:
        if isinstance(value, str):
            if len(value) > MAX_CHARACTERS:
                raise TemplateLimitError(f"it writes a text of {len(value):,} characters")
        elif isinstance(value, list | tuple | Mapping):
            self.check_sizes((value,))
        return value

    def _checked_filter(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        if name in _SMALL_FILTERS:
            return function

        @wraps(function)  # jinja reads which context a filter wants from its attributes
        def checked(*args: Any, **kwargs: Any) -> Any:
            self.check_sizes((*args, *kwargs.values()))
            if name == "format":
                _check_widths(str(args[0]))
            return function(*args, **kwargs)

        return checked


def _check_widths(text: str) -> None:
    """Refuse a format whose width could be large: '%1000000000d', '{:1000000000}', '%*d'."""
    if re.search(r"[0-9]{7}", text) or re.search(r"%[-+ #0-9.]*\*", text):
        raise TemplateLimitError(f"the width in {text!r:.40} is above {MAX_NUMBER:,}")


def _weight(value: object) -> int:
    """Characters that a nested value would print as, each shared part counted as often as it is printed."""
    known: dict[int, int] = {}

    def weigh(part: object, depth: int) -> int:
        if isinstance(part, str):
            return len(part) + 2
        if not isinstance(part, list | tuple | Mapping):
            return 8
        if id(part) not in known:
            if depth > 200:
                raise TemplateLimitError("it nests lists more than 200 deep")
            known[id(part)] = MAX_CHARACTERS + 1  # for a list that holds itself
            items = [*part.keys(), *part.values()] if isinstance(part, Mapping) else part
            known[id(part)] = 2 + sum(weigh(item, depth + 1) + 2 for item in items)
        return known[id(part)]

    return weigh(value, 0)


# --- what templates may call ---------------------------------------------------------------------------------------


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """json.dumps: jinja's own filter escapes HTML characters."""
    if isinstance(indent, int) and indent > 1000:
        raise TemplateLimitError(f"it indents JSON by {indent:,}")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)
