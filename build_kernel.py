"""Kaggle datasets from this clone: `python build_kernel.py --username you`. kaggle_datasets/README.md says what is in them."""

import argparse
import sys
from pathlib import Path

from arc_kernel import bundle
from arc_kernel.errors import ArcKernelError
from arc_kernel.kaggle.templates import Origin


def main() -> int:
    """Build both bundles; the exit status is 0, or 1 after one line on stderr."""
    parser = argparse.ArgumentParser(description="Make the Kaggle datasets: the package, and the weights of a model.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="model folder, or smollm2-135m (embedded)")
    parser.add_argument("--out", type=Path, default="kaggle_datasets", help="folder for the bundles")
    parser.add_argument("--username", default=bundle.USERNAME, help="Kaggle user name, for the ids of the datasets")
    parser.add_argument("--licence", default="", help="licence of the model, where its README.md does not say (license: apache-2.0)")
    parser.add_argument("--source", default="", help="where the model comes from, where its README.md does not say (base_model: ...)")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")
    options = parser.parse_args()
    say = (lambda line: None) if options.quiet else print
    try:
        bundle.build_code(options.out, options.username, say)
        bundle.build_weights(options.out, options.model, options.username, say, Origin(options.licence, options.source))
    except ArcKernelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
