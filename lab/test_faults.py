"""Two kills and single faults of lab/faults.py, on VRF; the script itself prints the table."""

import argparse

import faults


def test_a_killed_or_damaged_run_loses_its_last_interval_at_most():
    chosen = ["Ctrl-C", "cache cut in half", "two runs, one folder", "a loader process killed"]
    options = argparse.Namespace(kills=2, script=["vrf"], faults=chosen)
    with faults.small_digits() as folder:
        rows, found = faults.tables(options, folder)
    (row,) = rows
    assert row[2:4] == [2, 2], row
    assert [line for line in found if line[2] == "WRONG"] == [] and len(found) == len(chosen)
