"""olmo2-export bench: what a package costs and how fast it is, alone or beside other runtimes in the same run.

Generating text has two phases, and they are bound by different things.

Prefill reads the whole prompt in one call (or a few). All its tokens are multiplied with each weight that is read, so
that the time goes into arithmetic: it is bound by compute, grows with the prompt, and a batch makes it longer. It ends
with the first new token: the time to first token (TTFT).

Decode makes one token a call for every sequence. To multiply a single vector each weight is still read once, and so is
the KV cache of all tokens before: it is bound by memory bandwidth. That is why fewer bits a weight make it faster; why
a batch helps (the rows of a step share one reading of the weights, until arithmetic or their caches cost as much); and
why context costs (every row reads its own cache, which grows by a token a step). Its time per token is the inter-token
latency (ITL).

bytes_per_token is what such a step must read for one token: weights / rows + the row's KV cache. Multiplied by decode
tokens/s it is set against what this machine's memory gives, measured in the same run before and after, as the faster of
a copy and a sum of 512 MB with as many threads (on a GPU: the data sheet, or a copy or sum). Peak memory is the largest
resident set of the process that ran all points; on a GPU that is the host's. Decode tokens/s come from the mean of all
steps, so that one that was disturbed counts; the p50 of ITL leaves it out. Load is from files that the system has in
its cache, with libraries imported before.
"""

from __future__ import annotations

import argparse
import json

from olmo2_export.bench.arguments import declare_setting
from olmo2_export.verbs.arguments import declare_target, package_folder

HELP = "time to first token, inter-token latency, tokens/s, memory; beside other runtimes: exit 1 if ours fails"


def declare(verb: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    verb.formatter_class = argparse.RawDescriptionHelpFormatter
    verb.add_argument("package", type=package_folder, metavar="PACKAGE")
    declare_target(verb, variant="default: all that the backend runs there; may be repeated", many=True)
    verb.add_argument("--reference", metavar="MODEL", help="the checkpoint it was exported from, for the peers")
    verb.add_argument("--revision", metavar="REV", help="of the reference, if it is a Hub id")
    declare_setting(verb)


def run(args: argparse.Namespace) -> int:
    """Run it; return the exit code."""
    from olmo2_export.bench.command import check_out, run_comparison, work_folder, write_out
    from olmo2_export.bench.compare import ours_failed
    from olmo2_export.bench.processes import check_system
    from olmo2_export.weights.checkpoint import open_checkpoint

    check_system()
    check_out(args.out)
    reference = open_checkpoint(args.reference, args.revision) if args.reference else None
    with work_folder(None, args.keep) as work:
        document, text = run_comparison(args, args.package, reference, work, backend=args.backend, device=args.device)
    print(text)
    print(json.dumps(document), flush=True)
    write_out(args.out, document)
    return 1 if ours_failed(document) else 0
