"""No register operand of a running wgmma is written before the product has been waited for.

    python3 tests/gpu/operand_registers.py kernels/src/ops/linear/wide.cu ...

Needs nvcc and nvdisasm on PATH (PyPI: nvidia-cuda-nvcc, nvidia-cuda-nvdisasm), and no GPU. The compiler knows only inside one turn of a loop which registers a
running product still reads; this walks the machine code of every kernel, each loop's turn included, and prints what is written too early.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PRODUCT = re.compile(r"GMMA\S* R\d+, R(\d+), gdesc")
BRANCH = re.compile(r"BRA(?:\.\S+)? .*?`\((\.L_x_\d+)\)")


def kernels(source):
    nvcc = shutil.which("nvcc")
    with tempfile.TemporaryDirectory() as folder:
        cubin = f"{folder}/kernel.cubin"
        include = Path(nvcc).resolve().parent.parent / "include"
        architecture = "-gencode=arch=compute_90a,code=sm_90a"
        subprocess.run([nvcc, "-std=c++17", "-O3", "-cubin", architecture, f"-I{include}", "-o", cubin, source], check=True)
        text = subprocess.run(["nvdisasm", "-c", cubin], check=True, capture_output=True, text=True).stdout
    found, code = {}, None
    for line in text.splitlines():
        if start := re.match(r"\.text\.(\w+):", line):
            code = found.setdefault(start.group(1), [])
        elif line.startswith("\t.section"):
            code = None
        elif code is None:
            continue
        elif label := re.match(r"(\.L_x_\d+):", line):
            code.append((label.group(1), None, ""))
        elif instruction := re.match(r"\s+/\*([0-9a-f]+)\*/\s+(.*?)\s*;?\s*$", line):
            code.append((None, instruction.group(1), instruction.group(2)))
    return found


def written(text):
    words = text.split(None, 2)[1:] if text.startswith("@") else text.split(None, 1)
    if len(words) < 2 or words[0].startswith(("ST", "RED", "BRA", "SYNCS", "WARP", "BAR", "HGMMA", "QGMMA", "UI", "R2UR", "ISETP", "FSETP")):
        return range(0)
    target = re.match(r"(?:P\d, )?R(\d+)\b", words[1])
    if not target:
        return range(0)
    first = int(target.group(1))
    return range(first, first + (4 if ".128" in words[0] else 2 if ".64" in words[0] or "WIDE" in words[0] else 1))


def last_groups(running, left):
    """Of the running products those of the last groups; a group ends with a product that says so."""
    groups = [[]]
    for product in running:
        groups[-1].append(product)
        if product[2]:
            groups.append([])
    if not groups[-1]:
        groups.pop()
    return tuple(product for group in groups[len(groups) - min(left, len(groups)) :] for product in group)


def early_writes(code):
    """(address, instruction, the product's address), and how many products run at most."""
    places = {label: i for i, (label, _, _) in enumerate(code) if label}
    seen, found, most, todo = set(), set(), 0, [(0, ())]
    while todo:
        i, running = todo.pop()
        while i < len(code):
            _, address, text = code[i]
            branch = BRANCH.search(text)
            if address is None or branch:
                if (i, running) in seen:
                    break
                seen.add((i, running))
            i += 1
            if product := PRODUCT.search(text):
                running += ((address, int(product.group(1)), "gsb0" in text),)
                most = max(most, len(running))
            elif "WARPGROUP.DEPBAR.LE" in text:
                running = last_groups(running, int(text.split(",")[1], 16))
            else:
                for by, operand, _ in running:
                    if any(operand <= register < operand + 4 for register in written(text)):
                        found.add((address, text, by))
            if branch and branch.group(1) in places:
                todo.append((places[branch.group(1)], running))
                if not text.startswith("@") and "UP" not in text.split("`")[0]:
                    break
            if text.startswith("EXIT"):
                break
    return sorted(found), most


failed = 0
for source in sys.argv[1:]:
    for name, code in kernels(source).items():
        early, most = early_writes(code)
        failed += len(early)
        print(f"{'FAILED' if early else 'ok':7}{name}: at most {most} products with register operands run")
        for address, text, by in early:
            print(f"       {address}: {text}  (product at {by})")
sys.exit(failed > 0)
