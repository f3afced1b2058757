"""olmo2-export VERB: the command line of the exporter. The verbs are in `verbs/`, a file each."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

from olmo2_export.verbs import bench, build, debug, evaluate, export, fp16, inspect, report, sweep, verify
from runtimes.errors import DISK_FULL, Olmo2ExportError, UsageError
from runtimes.signals import BROKEN_PIPE_EXIT, Interrupted, interruptible

# In the order of a package's life.
VERBS = {
    "export": export,
    "fp16": fp16,
    "verify": verify,
    "evaluate": evaluate,
    "sweep": sweep,
    "build": build,
    "debug": debug,
    "bench": bench,
    "report": report,
    "inspect": inspect,
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line.

    Raises:
        UsageError: bad usage, before anything is imported or written.
    """
    parser = _Parser(prog="olmo2-export", description="OLMo 2 from checkpoint to verified inference.")
    common = _Parser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show tracebacks and debug logging")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    for name, module in VERBS.items():
        verb = verbs.add_parser(name, parents=[common], help=module.HELP, description=module.__doc__)
        module.declare(verb)
        verb.set_defaults(handler=module.run)
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> int:
    """Run one verb; return 0, or 1 if a check failed. Errors are raised."""
    handler: Callable[[argparse.Namespace], int] = args.handler
    return handler(args)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `olmo2-export`: 0 done, 1 ran but failed a check or a resource, 2 bad usage or input."""
    debug = "--debug" in (sys.argv[1:] if argv is None else argv)
    level = logging.DEBUG if debug else logging.WARNING
    logging.basicConfig(level=level, format="olmo2-export: %(levelname)s: %(message)s")
    try:
        with interruptible():
            code = run(parse_args(argv))
            sys.stdout.flush()
            return code
    except Interrupted as interruption:
        return _report("interrupted; what was there before is untouched", interruption.exit_code, debug=False)
    except Olmo2ExportError as error:
        return _report(str(error), error.exit_code, debug)
    except ModuleNotFoundError as error:
        return _report(f"{error.name} is not installed; run: pip install 'olmo2-export[export]'", 2, debug)
    except BrokenPipeError:  # a reader like head has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE_EXIT
    except OSError as error:  # a file that cannot be read or written
        return _report(str(error), 1 if error.errno in DISK_FULL else 2, debug)
    except MemoryError:
        return _report("out of memory", 1, debug)
    except Exception as error:  # the last resort: a user gets one line, and --debug the rest
        return _report(f"internal error: {type(error).__name__}: {error}; run with --debug and report it", 1, debug)


def _report(message: str, exit_code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(f"olmo2-export: error: {' '.join(message.split())}", file=sys.stderr)
    return exit_code
