"""What racecheck reports beyond bulk copies: python3 tests/gpu/races.py LOG... --code FOLDER [--cuobjdump cuobjdump]

    compute-sanitizer --tool racecheck gpu_check --small --only sample > LOG

The tool does not follow a bulk copy's arrival on an mbarrier: each read behind that barrier is reported as a race with the copy.
So of every report the two instructions are looked up in the code (FOLDER: the fatbins of a build, target/release/build/
conclave-kernels-*/out). Races with a bulk copy are counted by kernel; all others are printed, and end this with status 1.
"""
import argparse
import collections
import pathlib
import re
import subprocess
import sys

ACCESS = r"(Read|Write) access at (\w+)(?:\([^+]*\))?\+(0x[0-9a-f]+)"
FIRST = re.compile("Race reported between " + ACCESS)
# One line or more for each first one.
OTHER = re.compile("and " + ACCESS)
# Copies by the engine, which end on an mbarrier.
BULK = ("UBLKCP", "UTMALDG")


def instructions(cuobjdump, folder):
    """Of every kernel: offset -> instruction."""
    code = collections.defaultdict(dict)
    for path in sorted(pathlib.Path(folder).glob("*bin")):
        listing = subprocess.run([cuobjdump, "-sass", path], capture_output=True, text=True, check=True).stdout
        kernel = None
        for line in listing.splitlines():
            if "Function :" in line:
                kernel = line.split(":")[1].strip()
            found = re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?(\S+)", line)
            if found and kernel:
                code[kernel][int(found[1], 16)] = found[2].rstrip(";")
    return code


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("logs", nargs="+", type=pathlib.Path)
    parser.add_argument("--code", required=True)
    parser.add_argument("--cuobjdump", default="cuobjdump")
    arguments = parser.parse_args()
    code = instructions(arguments.cuobjdump, arguments.code)
    explained, others = collections.Counter(), collections.defaultdict(set)

    def end(found):
        access, kernel, at = found.groups()
        return access, kernel, code[kernel].get(int(at, 16), "unknown"), at

    for log in arguments.logs:
        pairs, first = 0, None
        for line in log.read_text(errors="replace").splitlines():
            first = end(found) if (found := FIRST.search(line)) else first
            if found := OTHER.search(line):
                pairs += 1
                ends = (first, end(found)) if first else (end(found),)
                if any(access == "Write" and operation.startswith(BULK) for access, _, operation, _ in ends):
                    explained[ends[0][1]] += 1
                    continue
                what = " and ".join(f"{access.lower()} {operation} in {kernel}" for access, kernel, operation, _ in ends)
                others[what].add("-".join(at for *_, at in ends))
            elif "RACECHECK SUMMARY" in line:
                print(f"{log}: {line.strip('= ')}")
        print(f"{log}: {pairs} pairs")
    for kernel, count in sorted(explained.items()):
        print(f"  bulk copies against reads behind their barrier: {kernel}, {count} pairs")
    for what, places in others.items():
        print(f"  {what}, at {' '.join(sorted(places))}")
    print(f"{sum(map(len, others.values()))} pairs that are no bulk copies" if others else "nothing else")
    sys.exit(bool(others))


main()
