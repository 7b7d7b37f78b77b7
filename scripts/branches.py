"""Reads `coverage json`: how many of all branches were taken. Exit status 1 below the percentage that is asked for."""

from __future__ import annotations

import json
import sys

if __name__ == "__main__":
    totals = json.load(sys.stdin)["totals"]
    taken, branches = totals["covered_branches"], totals["num_branches"]
    share = 100 * taken / branches
    print(f"{taken} of {branches} branches were taken: {share:.1f} %")
    sys.exit(share < float(sys.argv[1]))
