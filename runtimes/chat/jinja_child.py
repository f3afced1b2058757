"""The process that renders chat templates: it reads requests and writes replies, a line of JSON each, until stdin ends.

A template comes with a checkpoint, from anywhere. It runs here, in jinja2's sandbox, with limits of memory, time and
output, so that neither an endless loop nor a way out of the sandbox is one in the program that asked. Needs jinja2 and
the standard library; it is run as a script and imported by nobody, so that a runner never imports jinja2.

| request                                   | reply                                             |
|-------------------------------------------|---------------------------------------------------|
| (none, at the start)                      | {"jinja2": version}, or null where there is none  |
| {"template", "seconds", "variables"}      | {"text": what it renders}                         |
| {"template", "seconds", "words"}          | {"found": those that stand in the template's text}|
| any, where the template fails             | {"error": kind, "message", "line"}                |
| any that takes more seconds of a CPU      | (SIGPROF ends the process)                        |

Source: the environment is that of transformers' `apply_chat_template`, utils/chat_template_utils.py of 5.23.
"""

from __future__ import annotations

import json
import signal
import sys
import textwrap  # jinja2 imports it when a template wraps words, and by then no memory may be left
from datetime import datetime
from functools import lru_cache
from typing import Any

try:
    import resource
except ImportError:  # Windows: the parent's clock is the only limit there
    resource = None  # type: ignore[assignment]

MEMORY = 256 << 20  # bytes of address space
OUTPUT = 8 << 20  # characters
OLDEST = (3, 1, 6)  # older ones have known ways out of the sandbox
del textwrap


def _limit() -> None:
    """Bound this process: no memory beyond, no files, no core."""
    if resource is None:
        return
    for kind, most in ((resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0)):
        resource.setrlimit(kind, (most, most))


def _limit_request(seconds: float) -> None:
    """Let a signal end this process after so many seconds of a CPU; 0: let none."""
    if hasattr(signal, "setitimer"):  # not on Windows
        signal.setitimer(signal.ITIMER_PROF, seconds)


def _environment() -> Any:
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(Extension):
        """`{% generation %}` marks what the model said; it changes no text."""

        tags = {"generation"}  # noqa: RUF012, as jinja2 declares it

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body).set_lineno(line)

    class PlainNamespace(Namespace):
        def __init__(*args: Any, **given: Any) -> None:
            self, *rest = args
            for name in (attributes := dict(*rest, **given)):
                _refuse_private(name)
            Namespace.__init__(self, attributes)

        def __setitem__(self, name: str, value: Any) -> None:
            _refuse_private(name)
            Namespace.__setitem__(self, name, value)

    def _refuse_private(name: object) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}")

    class PlainDict:
        def __call__(self, *args: Any, **given: Any) -> dict[Any, Any]:
            return dict(*args, **given)

        def fromkeys(self, *args: Any) -> dict[Any, Any]:
            return dict.fromkeys(*args)

    class Refusal(jinja2.TemplateError):
        """What `raise_exception` raises."""

    def raise_exception(message: object) -> None:
        raise Refusal(str(message))

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: Any = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals.update(
        raise_exception=raise_exception,
        strftime_now=lambda format: datetime.now().strftime(format),
        dict=PlainDict(),
        namespace=PlainNamespace,
    )
    return environment


class _Answers:
    """Answers requests; a template is compiled once."""

    def __init__(self, environment: Any) -> None:
        self._compiled = lru_cache(maxsize=16)(environment.from_string)
        self._words = lru_cache(maxsize=16)(lambda template: _literal_text(environment, template))

    def __call__(self, request: dict[str, Any]) -> dict[str, Any]:
        template = request["template"]
        if "words" in request:
            text = self._words(template)
            return {"found": [word for word in request["words"] if word in text]}
        pieces, length = [], 0
        for piece in self._compiled(template).generate(request["variables"]):
            length += len(piece)
            if length > OUTPUT:
                return {"error": "output", "message": f"it writes more than {OUTPUT} characters", "line": None}
            pieces.append(piece)
        return {"text": "".join(pieces)}


def _literal_text(environment: Any, template: str) -> str:
    """Return a template's own texts, NUL between them so that no word is found across two."""
    import jinja2

    tree = environment.parse(template)
    texts = {node.data for node in tree.find_all(jinja2.nodes.TemplateData)}
    texts |= {node.value for node in tree.find_all(jinja2.nodes.Const) if isinstance(node.value, str)}
    return "\0".join(texts)


def _line_of(error: BaseException) -> int | None:
    """Return the template's line that an error came from, where it is known."""
    found: int | None = getattr(error, "lineno", None)
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<template>":
            found = trace.tb_lineno  # jinja2 rewrites it to the line of the template
        trace = trace.tb_next
    return found


def _failed(error: BaseException, kind: str) -> dict[str, Any]:
    return {"error": kind, "message": f"{error}"[:500] or type(error).__name__, "line": _line_of(error)}


def _write(reply: object) -> None:
    sys.stdout.buffer.write(json.dumps(reply).encode() + b"\n")
    sys.stdout.buffer.flush()


def main() -> None:
    """Answer requests until stdin ends."""
    _limit()
    try:
        import jinja2
    except ImportError:
        _write(None)
        return
    datetime.now().strftime("%Z")  # reads the time zone
    _write({"jinja2": jinja2.__version__})
    answer = _Answers(_environment())
    for line in sys.stdin.buffer:
        request = json.loads(line)
        _limit_request(request["seconds"])
        try:
            reply = answer(request)
        except MemoryError:
            reply = {"error": "memory", "message": f"it needs more than {MEMORY >> 20} MB", "line": None}
        except jinja2.TemplateSyntaxError as error:
            reply = _failed(error, "syntax")
        except jinja2.exceptions.SecurityError as error:
            reply = _failed(error, "sandbox")
        except jinja2.TemplateError as error:
            reply = _failed(error, "refused" if type(error).__name__ == "Refusal" else "template")
        except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as e:
            reply = _failed(
                e, "template"
            )  # whatever a template's operations raise; what else there is ends the process
        _limit_request(0)
        _write(reply)


if __name__ == "__main__":
    main()
