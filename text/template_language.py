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
from collections.abc import Callable, ItemsView, Iterable, KeysView, Sized, ValuesView
from typing import Any

from engine.errors import DataError, SettingsError, first_line

OLDEST = (3, 1, 6)  # of jinja2: older ones let a template out of the sandbox
MOST_SOURCE = 1 << 18  # characters of a template; the longest known ones have 20,000
BUDGET = 1 << 24  # characters; a usual conversation costs less than a hundredth
STEP = 512  # what a call costs, in characters
ITEM = 16  # what an item of a new list costs, in characters
WIDEST = 64  # characters to indent by
MOST_DIGITS = 100  # to round to
LONGEST_TIME = 256  # characters of a time's format
MOST_BITS = 1000  # of a number that is computed
FILTERS = (  # of Jinja's, those that templates use
    *("abs", "attr", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first"),
    *("float", "groupby", "int", "items", "join", "last", "length", "list", "lower", "map", "max"),
    *("min", "reject", "rejectattr", "replace", "reverse", "round", "safe", "select"),
    *("selectattr", "sort", "string", "sum", "title", "trim", "unique", "upper", "wordcount"),
)
# filters that read all that a list holds, and those that make a list of a text
_DEEP = ("dictsort", "groupby", "max", "min", "sort", "string", "sum", "unique")
_LISTING = ("groupby", "list", "max", "min", "sort", "unique", "wordcount")
# methods that make long texts of short ones, or bytes
_REFUSED = (
    *("center", "encode", "expandtabs", "format", "format_map", "ljust", "rjust", "to_bytes"),
    *("translate", "zfill"),
)
# methods whose time is the product of both lengths
_STRIPPING = ("lstrip", "rfind", "rindex", "rpartition", "rsplit", "rstrip", "strip")
_SPLITTING = ("rsplit", "split", "splitlines")
_HOLDERS = (list, tuple, dict, ItemsView, KeysView, ValuesView)
_LINE_ENDS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"
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

    def write(self, value: Any, width: int = 0, depth: int = 1) -> None:
        """Pay for all that a value's text has, which may hold one list a million times.

        width is what is written beside each item besides, at each level.
        """
        self.paid(value)
        if isinstance(value, _HOLDERS):
            self.spend(STEP + width * depth * len(value))
            for item in value.items() if isinstance(value, dict) else value:
                self.write(item, width, depth + 1)

    def written(self, value: Any) -> Any:
        """A value whose text is paid for."""
        self.write(value)
        return value

    def paid(self, value: Any) -> Any:
        """A value whose size is paid for."""
        if isinstance(value, int):
            _check_digits(value.bit_length())
        elif isinstance(value, (str, range, *_HOLDERS)):
            self.spend(len(value))
        return value

    def listed(self, items: Iterable[Any], cost: int = ITEM) -> Any:
        """The items of anything, in what has a length; each is paid for before it is kept."""
        if isinstance(items, Sized) and not isinstance(items, str):
            self.spend(cost * len(items))
            return items
        kept = []
        for item in items:
            self.spend(cost)
            kept.append(item)
        return kept


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

        def visit_Compare(self, node: Any) -> Any:
            self.generic_visit(node)
            node.expr = paying(node.expr, "_written")
            for operand in node.ops:
                operand.expr = paying(operand.expr, "_written")
            return node

        def visit_Getitem(self, node: Any) -> Any:
            self.generic_visit(node)
            if isinstance(node.arg, jinja2.nodes.Slice):
                node.node = paying(node.node, "_paid")
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
    filters |= _own_filters(budget, filters["join"], filters["replace"])
    filters = {name: _paying(budget, name, function) for name, function in filters.items()}
    filters |= {"_counted": functools.partial(_counted, budget)}
    filters |= {"_written": budget.written, "_paid": budget.paid}
    environment.filters.clear()
    environment.filters.update(filters)
    tests = {name: _paying_test(budget, test) for name, test in environment.tests.items()}
    environment.tests.update(tests)
    safe_range = environment.globals["range"]
    environment.globals.clear()
    environment.globals.update(
        range=safe_range,
        namespace=_namespace(),
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

        intercepted_binops = frozenset(["+", "*", "**", "%", "//", "/"])

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
                if __obj.__name__ == "join" and args:
                    args = (budget.listed(args[0]), *args[1:])
                _check_method(budget, __obj.__name__, owner, args)
            return budget.written(super().call(__context, __obj, *args, **kwargs))

    return Sandbox


def _counted(budget: _Budget, items: Iterable[Any]) -> Any:
    """The items of a loop, paid for."""
    return budget.listed(items, budget.step)


def _namespace() -> type:
    import jinja2.utils

    class Namespace(jinja2.utils.Namespace):
        """Jinja's own, whose text is short."""

        def __repr__(self) -> str:
            return "<Namespace>"

    return Namespace


def _check_operands(budget: _Budget, operator: str, left: Any, right: Any) -> None:
    """Pay beforehand for the operands, and for what an operator makes much longer than them."""
    budget.paid(left)
    budget.paid(right)
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
        budget.spend(STEP * left.count("%"))
        if "%(" in left:
            raise OverBudget("it formats by names")
        if _WIDE.search(left):
            raise OverBudget("it formats with a width of hundreds of characters")


def _check_digits(n_bits: int) -> None:
    if n_bits > MOST_BITS:
        raise OverBudget("it computes a number of hundreds of digits")


def _check_method(budget: _Budget, name: str, text: str, arguments: tuple[Any, ...]) -> None:
    """Pay beforehand for a method of a text whose result may be much longer."""
    budget.spend(len(text))
    first = arguments[0] if arguments and isinstance(arguments[0], str) else ""
    if name in _STRIPPING:
        budget.spend(len(text) * len(first))
    if name in _SPLITTING:
        budget.spend(ITEM * (text.count(first) if first else len(text) // 2))
    elif name == "replace" and len(arguments) >= 2 and isinstance(arguments[1], str):
        budget.spend(text.count(first) * len(arguments[1]))
    elif name == "join" and arguments:
        budget.write(arguments[0])
        budget.spend(len(text) * len(arguments[0]))


def _paying(budget: _Budget, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that pays for what it is given, and for its result."""

    @functools.wraps(function)
    def paying(*arguments: Any, **named: Any) -> Any:
        budget.spend(STEP)
        # of those that get the environment first, the value is the second
        values = arguments[int(hasattr(function, "jinja_pass_arg")) :]
        for value in (*values, *named.values()):
            budget.paid(value)
        if name in _DEEP:
            budget.write(values[0])
        if name in _LISTING and isinstance(values[0], str):
            budget.spend(ITEM * len(values[0]))
        if name == "trim":
            for chars in (*values[1:], *named.values()):
                _check_method(budget, "strip", str(values[0]), (chars,))
        if name == "sum" and (len(values) > 2 or "start" in named):
            raise OverBudget("it adds to a start of its own")
        return budget.paid(function(*arguments, **named))

    return paying


def _paying_test(budget: _Budget, test: Callable[..., bool]) -> Callable[..., bool]:
    """A test that pays for what it is given; one of two values compares all that they hold."""

    @functools.wraps(test)
    def paying(*values: Any, **named: Any) -> bool:
        for value in (*values, *named.values()):
            if len(values) > 1:
                budget.write(value)
            else:
                budget.paid(value)
        return test(*values, **named)

    return paying


def _own_filters(
    budget: _Budget, join: Callable[..., str], replace: Callable[..., str]
) -> dict[str, Callable[..., Any]]:
    """The filters whose results may be much longer than what they are given, or take long.

    They are called by Jinja's arguments, and pay beforehand; join and replace are Jinja's.
    """
    import jinja2
    from jinja2.filters import do_round, make_attrgetter

    @jinja2.pass_eval_context
    def joined(context: Any, value: Any, d: Any = "", attribute: Any = None) -> str:
        items = budget.listed(value)
        if attribute is not None:
            items = map(make_attrgetter(context.environment, attribute), items)
            items = budget.listed(items)
        budget.write(d)
        _check_method(budget, "join", str(d), (items,))
        return join(context, items, d)

    @jinja2.pass_eval_context
    def replaced(context: Any, s: Any, old: Any, new: Any, count: int | None = None) -> str:
        for value in (s, old, new):
            budget.write(value)
        _check_method(budget, "replace", str(s), (str(old), str(new)))
        return replace(context, s, old, new, count)

    def rounded(value: Any, precision: int = 0, method: Any = "common") -> Any:
        if not isinstance(precision, int) or abs(precision) > MOST_DIGITS:
            raise OverBudget(f"it rounds to more than {MOST_DIGITS} digits")
        return do_round(value, precision, method)

    return {
        "join": joined,
        "replace": replaced,
        "round": rounded,
        "tojson": functools.partial(_to_json, budget),
        "indent": functools.partial(_indented, budget),
    }


def _to_json(
    budget: _Budget,
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as transformers has it, without the escapes of HTML that Jinja's own has."""
    if isinstance(indent, str) or (isinstance(indent, int) and indent > WIDEST):
        raise OverBudget(f"it indents by more than {WIDEST} characters")
    budget.write(value, (indent or 0) + sum(map(len, separators or ())))
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _indented(
    budget: _Budget, text: str, width: int = 4, first: bool = False, blank: bool = False
) -> str:
    """Jinja's filter of this name, for widths of at most WIDEST."""
    from jinja2.filters import do_indent

    if not isinstance(width, int) or width > WIDEST:
        raise OverBudget(f"it indents by more than {WIDEST} characters")
    text = str(budget.written(text))
    budget.spend((max(0, width) + ITEM) * sum(map(text.count, _LINE_ENDS)))
    return do_indent(text, width, first, blank)
