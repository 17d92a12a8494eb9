"""What the two commands, `concord` and `concord-node`, have in common: options, output, exit codes.

Exit codes: 0 ok; 1 a run or an input failed, or a person stopped it; 2 wrong use. A message and no stack trace.
"""

import json
import signal
import sys
from collections.abc import Callable
from typing import Annotated, Any, NoReturn

import typer

from concord_shared.errors import ConcordError
from concord_shared.text import printable

__all__ = ["Json", "SystemCa", "new_app", "readable", "run_app", "show"]

INTERRUPTED = 130
"""What typer returns where Ctrl-C ended a command."""

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object to standard output.")]
SystemCa = Annotated[
    bool,
    typer.Option(
        "--system-ca",
        help="Also trust this system's authorities: where the coordinator's certificate is of a public one.",
    ),
]


def new_app(name: str, description: str) -> typer.Typer:
    return typer.Typer(
        name=name,
        help=description,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="markdown",
    )


def run_app(app: typer.Typer) -> NoReturn:
    """Runs a command and ends the process with its exit code."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        code = app(standalone_mode=False)  # of a `typer.Exit`; a command itself returns nothing
        if code == INTERRUPTED:
            _fail("stopped", 1)
        sys.exit(code or 0)
    except ConcordError as error:
        _fail(str(error), error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        _fail("stopped", 1)
    except BrokenPipeError:
        sys.exit(0)  # the reader, such as `head`, has seen enough
    except Exception as error:
        if hasattr(error, "format_message"):  # the command line's own usage errors
            error.show()  # type: ignore[attr-defined]
            sys.exit(2)
        raise


def show(value: Any, as_json: bool, show_text: Callable[[Any], object]) -> None:
    """Prints a result: as one JSON object, or as `show_text` does."""
    if as_json:
        sys.stdout.write(json.dumps(value) + "\n")  # ASCII: no other party's text reaches a terminal as control codes
    else:
        show_text(value)


def readable(fingerprint: str) -> str:
    """A fingerprint in groups of four, as people read it to each other."""
    return " ".join(fingerprint[start : start + 4] for start in range(0, len(fingerprint), 4))


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _fail(message: str, code: int) -> NoReturn:
    plain = printable(message, keep="\n")
    sys.stderr.write(f"error: {plain}\n")
    sys.exit(code)
