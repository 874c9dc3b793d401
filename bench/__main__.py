"""`python -m bench [NAME]...`: run the benchmarks, print a table or JSON; status 1 for a missed goal."""

import argparse
import json
import sys
from collections.abc import Callable, Iterator

from bench import basic, enable, explore, fuzz, image, load, redirect, sched, sites, transition, verify
from bench.measure import Result, as_json, table
from klpemu import stock_kernel

BENCHES: dict[str, Callable[[], Iterator[Result]]] = {
    "basic": basic.run,
    "redirect": redirect.run,
    "enable": enable.run,
    "transition": transition.run,
    "sched": sched.run,
    "sites": sites.run,
    "load": load.run,
    "explore": explore.run,
    "fuzz": fuzz.run,
    "image": image.run,
    "verify": verify.run,
}
NEED_STOCK_KERNEL = ("sites", "load", "image")


def main() -> int:
    """Run what was asked for; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench", description="The benchmarks of klpemu.")
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"one of {', '.join(BENCHES)}; all by default"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - BENCHES.keys()
    if unknown:
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(BENCHES)}")
    results: list[Result] = []
    for name in arguments.names or BENCHES:
        if name in NEED_STOCK_KERNEL and stock_kernel.find() is None:
            print(f"{name}: skipped, {stock_kernel.why_not() or 'there is no stock kernel'}", file=sys.stderr)
            continue
        found = []
        for result in BENCHES[name]():
            found.append(result)
            print(".", end="", flush=True, file=sys.stderr)
        print(f"\r{' ' * len(found)}\r", end="", file=sys.stderr)
        results += found
        if not arguments.json:
            print(table(found), flush=True)
    if arguments.json:
        print(json.dumps(as_json(results), indent=1))
    return 0 if all(result.holds for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
