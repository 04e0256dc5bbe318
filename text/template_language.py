"""Jinja as chat templates use it: in a sandbox, with bounds, by the rules of transformers."""

import datetime
import json
from collections.abc import Callable
from typing import Any

from engine.errors import DataError, SettingsError, first_line

MOST_CHARACTERS = 1 << 20  # of a template


def compile_template(source: str) -> Callable[..., str]:
    """A function that renders a template with the variables that it is given.

    Raises SettingsError without the library jinja2, DataError for an invalid template; the
    function raises DataError for what the template refuses.
    """
    try:
        import jinja2
    except ImportError:
        raise SettingsError(
            "this model's chat template needs a library: pip install jinja2"
        ) from None
    try:
        template = _environment().from_string(source)
    except jinja2.TemplateError as error:
        raise DataError(f"the chat template can't be read: {first_line(error)}") from None

    def render(**variables: Any) -> str:
        try:
            return template.render(tools=None, documents=None, **variables)
        except Exception as error:
            raise DataError(f"the chat template refuses this: {first_line(error)}") from None

    return render


def _environment() -> Any:
    import jinja2
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """The tags around what a model generates, which change no text."""

        tags = {"generation"}  # noqa: RUF012  as the library has it

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body).set_lineno(line)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment
