"""The 60 slowest test items of the gate, as pytest reports them; bench/tests.txt has them before and after the house.

OMP_NUM_THREADS=1 python -m pytest -m "not slow" -n 2 --dist loadgroup --durations=60 -q | python bench/tests.py
"""

import re
import sys


def main() -> None:
    for line in sys.stdin:
        match = re.match(r"\s*([\d.]+)s (call|setup|teardown)\s+(\S+)", line)
        if match is not None:
            print(f"{float(match[1]):6.2f} s  {match[2]:8s}  {match[3]}")
        elif " passed" in line:
            print(line.strip())


if __name__ == "__main__":
    main()
