"""`python -m tomoscale_portable BUNDLE INPUT.nii.gz OUTPUT.nii.gz`: prediction without the project or a registry.

Of a classifier or a regressor OUTPUT is a CSV file.
"""

import argparse
import sys
from pathlib import Path

from .errors import TomoscaleError
from .head.assess import assess, write_table
from .predictor import Predictor, check_target


def main() -> int:
    """Predict one file; exit codes as everywhere in the project."""
    parser = argparse.ArgumentParser(prog="tomoscale_portable", description=__doc__)
    parser.add_argument("bundle")
    parser.add_argument("input")
    parser.add_argument("output")
    parser.add_argument("--device", default=None)
    parser.add_argument("--overwrite", action="store_true", help="replace OUTPUT where it is there")
    parser.add_argument("--force", action="store_true", help="predict what is far from all that the model learned from")
    arguments = parser.parse_args()
    try:
        predictor = Predictor(arguments.bundle, arguments.device, lambda note: print(f"note: {note}", file=sys.stderr))
        if predictor.head is not None:
            check_target(arguments.input, arguments.output, overwrite=arguments.overwrite, endings=(".csv",))
            row = assess(predictor, arguments.input, force=arguments.force)
            write_table(Path(arguments.output), predictor.head, [(Path(arguments.input).name, row)])
            print(f"{arguments.output}: {row}")
            return 0
        mask = predictor.predict_file(
            arguments.input, arguments.output, overwrite=arguments.overwrite, force=arguments.force
        )
    except TomoscaleError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{arguments.output}: {mask.shape}, {int((mask != 0).sum())} voxels labelled")
    return 0


if __name__ == "__main__":
    sys.exit(main())
