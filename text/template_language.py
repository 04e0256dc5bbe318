"""Jinja as chat templates use it: by the rules of transformers, in a sandbox, with bounds.

A template comes from elsewhere with its model. It can reach nothing but the messages, and whatever
it does ends: each item of a loop, call, character of an intermediate result and of the output costs
of one budget.
"""

import datetime
import functools
import json
import re
import threading
import types
from collections.abc import Callable, Iterable, Sized
from typing import Any

from engine.errors import DataError, SettingsError, first_line

OLDEST = (3, 1, 6)  # of jinja2: older ones let a template out of the sandbox
MOST_SOURCE = 1 << 18  # characters of a template; the longest known ones have 20,000
BUDGET = 1 << 27  # characters; a usual conversation costs less than a thousandth
STEP = 512  # what a call costs, in characters
WIDEST = 64  # characters to indent by
LONGEST_TIME = 256  # characters of a time's format
MOST_BITS = 1000  # of a number that is computed
FILTERS = (  # of Jinja's, those that templates use; the results are hardly longer than the inputs
    *("abs", "attr", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first"),
    *("float", "groupby", "int", "items", "join", "last", "length", "list", "lower", "map", "max"),
    *("min", "reject", "rejectattr", "replace", "reverse", "round", "safe", "select"),
    *("selectattr", "sort", "string", "sum", "title", "trim", "unique", "upper", "wordcount"),
)
# methods that make long texts of short ones
_REFUSED = ("center", "expandtabs", "format", "format_map", "ljust", "rjust", "translate", "zfill")
_WIDE = re.compile(r"%[^a-zA-Z%]*(\*|\d{3})")


class OverBudget(Exception):
    """A template that does more than any conversation needs."""


class _Budget(threading.local):
    """What is left to spend while this thread renders."""

    left = 0
    step = STEP  # what an item of a loop costs, in which all of the template's text may be written

    def spend(self, amount: int) -> None:
        """Pay, or raise OverBudget."""
        self.left -= amount
        if self.left < 0:
            raise OverBudget("it takes more steps, or more memory, than any conversation needs")

    def write(self, value: Any) -> None:
        """Pay for all that a value's text has, which may hold one list a million times."""
        self.paid(value)
        if isinstance(value, list | tuple | dict):
            self.spend(STEP)
            for item in value.items() if isinstance(value, dict) else value:
                self.write(item)

    def written(self, value: Any) -> Any:
        """A value whose text is paid for."""
        self.write(value)
        return value

    def paid(self, value: Any) -> Any:
        """A value whose size is paid for."""
        if isinstance(value, int):
            self.spend(value.bit_length() >> 3)
        elif isinstance(value, str | list | tuple | dict | range):
            self.spend(len(value))
        return value


def compile_template(source: str) -> Callable[..., str]:
    """A function that renders a template with the variables that it is given.

    Raises SettingsError without the library jinja2, DataError for an invalid template; the function
    raises DataError for what the template refuses, and where it exceeds its budget.
    """
    try:
        import jinja2
    except ImportError:
        raise SettingsError(
            "this model's chat template needs a library: pip install jinja2"
        ) from None
    found = tuple(int(number) for number in re.findall(r"\d+", jinja2.__version__)[:3])
    if found < OLDEST:
        raise SettingsError(
            f"a chat template needs jinja2 {'.'.join(map(str, OLDEST))} or newer, and this is "
            f"{jinja2.__version__}: pip install -U jinja2"
        )
    if len(source) > MOST_SOURCE:
        raise DataError(
            f"the chat template has {len(source):,} characters; at most {MOST_SOURCE:,} are read."
        )
    budget = _Budget()
    environment = _environment(budget)
    budget.left = BUDGET  # constants are computed here
    try:
        tree = _counting_loops(environment, environment.parse(source))
        code = environment.compile(tree)
        template = jinja2.Template.from_code(environment, code, environment.make_globals(None))
    except Exception as error:  # Python's compiler refuses some that Jinja's takes
        raise DataError(f"the chat template can't be read: {first_line(error)}") from None

    def render(**variables: Any) -> str:
        budget.left, budget.step = BUDGET, STEP + len(source)
        try:
            pieces = template.generate(tools=None, documents=None, **variables)
            return "".join(budget.paid(piece) for piece in pieces)
        except Exception as error:
            raise DataError(f"the chat template refuses this: {first_line(error)}") from None

    return render


def _counting_loops(environment: Any, tree: Any) -> Any:
    """A template's tree in which loops and lists pay for their items, and joined texts for both."""
    import jinja2
    from jinja2.visitor import NodeTransformer

    def paying(node: Any, name: str) -> Any:
        return jinja2.nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)

    class Counting(NodeTransformer):
        def visit_For(self, node: Any) -> Any:
            if node.recursive:
                raise jinja2.TemplateError("it has a recursive loop")
            self.generic_visit(node)
            node.iter = paying(node.iter, "_counted")
            return node

        def visit_Concat(self, node: Any) -> Any:
            self.generic_visit(node)
            node.nodes = [paying(part, "_written") for part in node.nodes]
            return node

        def visit_List(self, node: Any) -> Any:
            self.generic_visit(node)
            return paying(node, "_written")

        def visit_Dict(self, node: Any) -> Any:
            self.generic_visit(node)
            return paying(node, "_written")

        def visit_Tuple(self, node: Any) -> Any:
            self.generic_visit(node)
            return paying(node, "_written") if node.ctx == "load" else node

    return Counting().visit(tree).set_environment(environment)


def _environment(budget: _Budget) -> Any:
    """The environment that a template runs in."""
    import jinja2

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def finalize(value: Any) -> str:
        return str(budget.written(value))

    environment = _sandbox(budget)(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_generation_tag(), "jinja2.ext.loopcontrols"],
        finalize=finalize,
    )
    filters = {name: environment.filters[name] for name in FILTERS}
    filters |= {"tojson": _to_json, "indent": _indented}
    filters = {name: _paying(budget, name, function) for name, function in filters.items()}
    filters |= {"_counted": functools.partial(_counted, budget), "_written": budget.written}
    environment.filters.clear()
    environment.filters.update(filters)
    kept = {name: environment.globals[name] for name in ("namespace", "range")}
    environment.globals.clear()
    environment.globals.update(
        kept,
        dict=lambda *arguments, **named: dict(*arguments, **named),
        raise_exception=raise_exception,
        strftime_now=lambda form: datetime.datetime.now().strftime(form[:LONGEST_TIME]),
    )
    return environment


def _generation_tag() -> type:
    import jinja2
    import jinja2.ext

    class Generation(jinja2.ext.Extension):
        """The tags around what a model generates, which change no text."""

        tags = {"generation"}  # noqa: RUF012  as the library has it

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body).set_lineno(line)

    return Generation


def _sandbox(budget: _Budget) -> type:
    import jinja2
    import jinja2.sandbox

    class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
        """Jinja's own, in which calls and operators pay from a budget."""

        intercepted_binops = frozenset(["+", "*", "**", "%"])

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            _check_operands(budget, operator, left, right)
            return budget.written(super().call_binop(context, operator, left, right))

        def wrap_str_format(self, value: Any) -> None:
            """str.format is not to be had: is_safe_attribute() refuses it."""

        def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
            return attr not in _REFUSED and super().is_safe_attribute(obj, attr, value)

        def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
            is_macro = isinstance(__obj, jinja2.runtime.Macro)
            budget.spend(budget.step if is_macro else STEP)
            owner = getattr(__obj, "__self__", None)
            if isinstance(__obj, types.BuiltinMethodType) and isinstance(owner, str):
                _check_method(budget, __obj.__name__, owner, args)
            return budget.written(super().call(__context, __obj, *args, **kwargs))

    return Sandbox


def _counted(budget: _Budget, items: Iterable[Any]) -> Any:
    """The items of a loop, paid for."""
    known = items if isinstance(items, Sized) else list(items)
    budget.spend(budget.step * len(known))
    return known


def _check_operands(budget: _Budget, operator: str, left: Any, right: Any) -> None:
    """Pay beforehand for what an operator makes much longer than its operands."""
    if operator == "*":
        for items, count in ((left, right), (right, left)):
            if isinstance(items, str | list | tuple) and isinstance(count, int):
                budget.spend(len(items) * max(0, count))
        if isinstance(left, int) and isinstance(right, int):
            _check_digits(left.bit_length() + right.bit_length())
    elif operator == "**" and isinstance(left, int) and isinstance(right, int):
        _check_digits(left.bit_length() * right)
    elif operator == "%" and isinstance(left, str):
        budget.write(right)
        if _WIDE.search(left):
            raise OverBudget("it formats with a width of hundreds of characters")


def _check_digits(n_bits: int) -> None:
    if n_bits > MOST_BITS:
        raise OverBudget("it computes a number of hundreds of digits")


def _check_method(budget: _Budget, name: str, text: str, arguments: tuple[Any, ...]) -> None:
    """Pay beforehand for a method of a text whose result may be much longer."""
    if name == "replace" and len(arguments) >= 2:
        old, new = arguments[:2]
        if isinstance(old, str) and isinstance(new, str):
            budget.spend(len(text) + text.count(old) * len(new))
    elif name == "join" and arguments and isinstance(arguments[0], list | tuple):
        budget.write(arguments[0])
        budget.spend(len(text) * len(arguments[0]))


def _paying(budget: _Budget, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that pays for its result; what is longer than its input is paid beforehand."""

    @functools.wraps(function)
    def paying(*arguments: Any, **named: Any) -> Any:
        budget.spend(STEP)
        values = list(arguments)
        # of filters that get the environment first, the value is the second
        at = int(hasattr(function, "jinja_pass_arg"))
        if name in ("join", "string", "tojson"):
            budget.write(values[at])
        if name == "replace":
            text, *others = (str(value) for value in (*values[at:], *named.values()))
            _check_method(budget, name, text, tuple(others))
        elif name == "join":
            values[at] = list(values[at])
            between = next(iter([*values[at + 1 :], *named.values()]), "")
            _check_method(budget, name, str(between), (values[at],))
        return budget.paid(function(*values, **named))

    return paying


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as transformers has it, without the escapes of HTML that Jinja's own has."""
    if isinstance(indent, str) or (isinstance(indent, int) and indent > WIDEST):
        raise OverBudget(f"it indents by more than {WIDEST} characters")
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _indented(text: str, width: int = 4, first: bool = False, blank: bool = False) -> str:
    """Jinja's filter of this name, for widths of at most WIDEST."""
    from jinja2.filters import do_indent

    if not isinstance(width, int) or width > WIDEST:
        raise OverBudget(f"it indents by more than {WIDEST} characters")
    return do_indent(str(text), width, first, blank)
