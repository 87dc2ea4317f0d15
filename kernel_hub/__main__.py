"""``python -m kernel_hub OUT --repo_id OWNER/NAME`` writes the kernel's folder and says how to load it."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from . import tree


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; its exit status."""
    parser = argparse.ArgumentParser(prog="python -m kernel_hub", description=__doc__)
    parser.add_argument("out", type=Path, metavar="OUT", help="a new or empty folder")
    parser.add_argument(
        "--repo_id", required=True, metavar="OWNER/NAME", help="what the kernel is called on the hub"
    )
    given = parser.parse_args(arguments)
    try:
        variants = tree.write(given.out, given.repo_id)
    except (ValueError, OSError) as error:
        print(f"kernel_hub: {error}", file=sys.stderr)
        return 2
    print(f"wrote {', '.join(str(path) for path in variants)}")
    print(f"kernels.get_local_kernel(Path({str(given.out)!r})) loads it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
