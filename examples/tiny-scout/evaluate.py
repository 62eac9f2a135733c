"""Examines a checkpoint of tiny-scout on held-out digits, whole and with its experts taken away.

.venv/bin/python examples/tiny-scout/evaluate.py [folder]
"""

import argparse
from pathlib import Path

from rich.console import Console
from tiny_scout.report import print_report

CHECKPOINT = Path(__file__).with_name("checkpoint")

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=CHECKPOINT, help="(%(default)s)")
    print_report(parser.parse_args().folder, Console())
