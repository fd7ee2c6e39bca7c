"""Functions of lists and dictionaries."""

from demo_recipe.coding.families.common import LISTS, WORDS, Family, integers, positive_integers, word

FAMILIES = [
    Family(
        "reverse_list",
        ["flip_list", "reversed_items", "reverse_items"],
        [LISTS],
        "return {a}[::-1]",
        [
            ("[::-1]", "[::1]", "the slice step is 1, so the list is not reversed"),
            ("{a}[::-1]", "{a}", "it returns the list unchanged"),
            ("{a}[::-1]", "sorted({a})", "it sorts instead of reversing"),
        ],
        lambda rng: (integers(rng),),
        "return the list in reverse order",
    ),
    Family(
        "sum_list",
        ["total", "add_all", "sum_values"],
        [LISTS],
        ("result = 0\nfor v in {a}:\n    result += v\nreturn result"),
        [
            ("+= v", "= v", "it overwrites the total instead of adding"),
            ("result = 0", "result = 1", "the total starts at 1 instead of 0"),
            ("+= v", "-= v", "it subtracts instead of adding"),
        ],
        lambda rng: (integers(rng),),
        "return the sum of the numbers",
    ),
    Family(
        "maximum",
        ["find_max", "largest", "max_value"],
        [LISTS],
        ("best = {a}[0]\nfor v in {a}:\n    if v > best:\n        best = v\nreturn best"),
        [
            ("v > best", "v < best", "the comparison finds the smallest number"),
            ("best = {a}[0]", "best = 0", "it starts at 0, so negative lists fail"),
            ("        best = v", "        best = {a}[0]", "it never stores the larger number"),
        ],
        lambda rng: ([x - 12 for x in positive_integers(rng)],),
        "return the largest number",
    ),
    Family(
        "minimum",
        ["find_min", "smallest", "min_value"],
        [LISTS],
        ("best = {a}[0]\nfor v in {a}:\n    if v < best:\n        best = v\nreturn best"),
        [
            ("v < best", "v > best", "the comparison finds the largest number"),
            ("best = {a}[0]", "best = 0", "it starts at 0, so positive lists fail"),
        ],
        lambda rng: (positive_integers(rng),),
        "return the smallest number",
    ),
    Family(
        "average",
        ["mean", "mean_value", "compute_average"],
        [LISTS],
        "return sum({a}) / len({a})",
        [
            ("/ len({a})", "/ 2", "it divides by 2 instead of the length"),
            ("/ len", "* len", "it multiplies by the length"),
            ("/ len({a})", "/ (len({a}) - 1)", "it divides by one less than the length"),
        ],
        lambda rng: ([2 * x for x in positive_integers(rng, 2, 5)],),
        "return the average of the numbers",
    ),
    Family(
        "flatten",
        ["flatten_list", "flat"],
        [["lists", "nested", "rows"]],
        ("result = []\nfor row in {a}:\n    result.extend(row)\nreturn result"),
        [
            ("extend", "append", "append keeps the inner lists"),
            ("result.extend(row)", "result = row", "it keeps only the last row"),
        ],
        lambda rng: ([integers(rng, 1, 3) for _ in range(rng.randint(2, 3))],),
        "return one flat list of all inner items",
    ),
    Family(
        "dedupe",
        ["unique", "remove_duplicates", "unique_items"],
        [LISTS],
        ("result = []\nfor v in {a}:\n    if v not in result:\n        result.append(v)\nreturn result"),
        [
            ("not in", "in", "the membership test is inverted"),
            (
                ("    if v not in result:\n        result.append(v)"),
                "    result.append(v)",
                "duplicates are not skipped",
            ),
        ],
        lambda rng: ([rng.randint(1, 4) for _ in range(6)],),
        "return the items without duplicates, in order",
    ),
    Family(
        "binary_search",
        ["search_sorted", "find_index"],
        [["items", "values", "sorted_list"], ["target", "key", "wanted"]],
        (
            "low, high = 0, len({a}) - 1\n"
            "while low <= high:\n"
            "    mid = (low + high) // 2\n"
            "    if {a}[mid] == {b}:\n"
            "        return mid\n"
            "    if {a}[mid] < {b}:\n"
            "        low = mid + 1\n"
            "    else:\n"
            "        high = mid - 1\n"
            "return -1"
        ),
        [
            ("low <= high", "low < high", "the loop ends before the last item is checked"),
            ("return -1", "return 0", "a missing item must give -1"),
            (
                ("        low = mid + 1\n    else:\n        high = mid - 1"),
                ("        high = mid - 1\n    else:\n        low = mid + 1"),
                "the halves are swapped",
            ),
        ],
        lambda rng: (lambda s: (s, rng.choice(s + [99])))(sorted(set(positive_integers(rng, 4, 7, 30)))),
        "return the index of the target in a sorted list, or -1",
    ),
    Family(
        "running_sum",
        ["prefix_sums", "cumulative"],
        [LISTS],
        ("result = []\ntotal = 0\nfor v in {a}:\n    total += v\n    result.append(total)\nreturn result"),
        [
            ("append(total)", "append(v)", "it appends the number instead of the total"),
            ("total += v", "total = v", "the total is overwritten"),
        ],
        lambda rng: (integers(rng),),
        "return the list of running totals",
    ),
    Family(
        "transpose",
        ["transpose_matrix", "swap_rows_and_columns"],
        [["matrix", "rows", "grid"]],
        "return [list(col) for col in zip(*{a})]",
        [
            ("zip(*{a})", "{a}", "the rows are copied, not turned into columns"),
            ("list(col)", "tuple(col)", "the rows must be lists"),
        ],
        lambda rng: (
            (lambda c: [[rng.randint(0, 9) for _ in range(c)] for _ in range(2)])(rng.randint(2, 3)),
        ),
        "return the matrix with rows and columns swapped",
    ),
    Family(
        "merge_dicts",
        ["combine_dicts", "join_dicts"],
        [["a", "first", "left"], ["b", "second", "right"]],
        ("result = dict({a})\nresult.update({b})\nreturn result"),
        [
            (
                ("dict({a})\nresult.update({b})"),
                ("dict({b})\nresult.update({a})"),
                "the second dict must win",
            ),
            ("result.update({b})\n", "", "the second dict is never added"),
        ],
        lambda rng: ({word(rng): 1, "k": 2}, {"k": rng.randint(3, 9)}),
        "return a dict with the keys of both, the second one wins",
    ),
    Family(
        "count_items",
        ["histogram", "frequencies", "tally"],
        [LISTS],
        ("counts = {{}}\nfor v in {a}:\n    counts[v] = counts.get(v, 0) + 1\nreturn counts"),
        [
            ("get(v, 0)", "get(v, 1)", "every count is one too high"),
            ("+ 1", "+ 2", "every item counts twice"),
        ],
        lambda rng: ([rng.choice("abc") for _ in range(5)],),
        "return a dict that says how often each item occurs",
    ),
    Family(
        "second_largest",
        ["runner_up", "second_max"],
        [LISTS],
        "return sorted(set({a}))[-2]",
        [
            ("[-2]", "[-1]", "it returns the largest number"),
            ("[-2]", "[1]", "it returns the second smallest number"),
            ("set({a})", "{a}", "equal numbers must count once"),
        ],
        lambda rng: ((lambda v: v + [max(v)])(rng.sample(range(1, 30), rng.randint(3, 5))),),
        "return the second largest different number",
    ),
    Family(
        "median",
        ["middle_value", "find_median"],
        [LISTS],
        (
            "s = sorted({a})\n"
            "m = len(s) // 2\n"
            "if len(s) % 2 == 1:\n"
            "    return s[m]\n"
            "return (s[m - 1] + s[m]) / 2"
        ),
        [
            ("s = sorted({a})", "s = {a}", "the numbers are not sorted"),
            ("s[m - 1] + s[m]", "s[m] + s[m]", "the two middle numbers are wrong"),
            ("== 1", "== 0", "odd and even lengths are swapped"),
        ],
        lambda rng: (positive_integers(rng, 3, 6),),
        "return the median of the numbers",
    ),
    Family(
        "squares",
        ["square_all", "squared"],
        [LISTS],
        "return [v * v for v in {a}]",
        [
            ("v * v", "v + v", "it doubles instead of squaring"),
            ("v * v", "v * 2", "it doubles instead of squaring"),
        ],
        lambda rng: (positive_integers(rng, 2, 5, 9),),
        "return the squares of the numbers",
    ),
    Family(
        "only_even",
        ["keep_even", "filter_even", "evens"],
        [LISTS],
        "return [v for v in {a} if v % 2 == 0]",
        [("== 0", "== 1", "it keeps the odd numbers"), (" if v % 2 == 0", "", "nothing is filtered")],
        lambda rng: (positive_integers(rng, 3, 6),),
        "return only the even numbers",
    ),
    Family(
        "only_positive",
        ["keep_positive", "positives"],
        [LISTS],
        "return [v for v in {a} if v > 0]",
        [("v > 0", "v < 0", "it keeps the negative numbers"), ("v > 0", "v >= 0", "zero is not positive")],
        lambda rng: ([rng.randint(-5, 5) for _ in range(6)] + [0],),
        "return only the positive numbers",
    ),
    Family(
        "swap_pair",
        ["swap", "exchange"],
        [["pair", "p", "items"]],
        ("x, y = {a}\nreturn (y, x)"),
        [("(y, x)", "(x, y)", "the order is not changed"), ("(y, x)", "(y, y)", "the first value is lost")],
        lambda rng: ((rng.randint(1, 9), rng.randint(10, 19)),),
        "return the pair with its two values swapped",
    ),
    Family(
        "chunk",
        ["split_chunks", "in_groups"],
        [LISTS, ["size", "n", "k"]],
        "return [{a}[i:i + {b}] for i in range(0, len({a}), {b})]",
        [
            ("range(0, len({a}), {b})", "range(0, len({a}))", "the start must move by the size"),
            ("i:i + {b}", "i:i + 1", "every chunk has one item only"),
        ],
        lambda rng: (positive_integers(rng, 4, 7), rng.randint(2, 3)),
        "split the list into chunks of the given size",
    ),
    Family(
        "rotate_left",
        ["rotate", "shift_left"],
        [LISTS, ["k", "n", "steps"]],
        ("k = {b} % len({a})\nreturn {a}[k:] + {a}[:k]"),
        [
            ("{a}[k:] + {a}[:k]", "{a}[:k] + {a}[k:]", "the two parts are joined in the old order"),
            ("% len({a})", "// len({a})", "it must take the remainder"),
        ],
        lambda rng: (rng.sample(range(1, 20), rng.randint(3, 5)), rng.randint(1, 7)),
        "rotate the list to the left by k steps",
    ),
    Family(
        "common_items",
        ["intersection", "shared_items"],
        [["a", "first", "left"], ["b", "second", "right"]],
        "return [v for v in {a} if v in {b}]",
        [
            ("if v in", "if v not in", "it returns the items that are not shared"),
            ("for v in {a} if v in {b}", "for v in {b}", "it returns the second list"),
        ],
        lambda rng: (rng.sample(range(10), 4), rng.sample(range(10), 5)),
        "return the items of the first list that are also in the second",
    ),
    Family(
        "is_sorted",
        ["check_sorted", "sorted_ascending"],
        [LISTS],
        ("for i in range(len({a}) - 1):\n    if {a}[i] > {a}[i + 1]:\n        return False\nreturn True"),
        [
            ("] > ", "] < ", "the comparison checks the opposite order"),
            (("return False\nreturn True"), ("return True\nreturn False"), "the results are swapped"),
        ],
        lambda rng: (rng.choice([lambda v: sorted(v), lambda v: v])(positive_integers(rng, 3, 5)),),
        "return True if the list is in ascending order",
    ),
    Family(
        "bubble_sort",
        ["sort_list", "simple_sort"],
        [LISTS],
        (
            "result = list({a})\n"
            "for i in range(len(result)):\n"
            "    for j in range(len(result) - 1 - i):\n"
            "        if result[j] > result[j + 1]:\n"
            "            result[j], result[j + 1] = result[j + 1], result[j]\n"
            "return result"
        ),
        [
            ("result[j] > result[j + 1]", "result[j] < result[j + 1]", "it sorts in descending order"),
            ("range(len(result) - 1 - i)", "range(len(result) - 2 - i)", "the last pair is never compared"),
        ],
        lambda rng: (integers(rng, 3, 6),),
        "return the numbers in ascending order",
    ),
    Family(
        "find_first",
        ["index_of", "position"],
        [LISTS, ["target", "key", "wanted"]],
        ("for i, v in enumerate({a}):\n    if v == {b}:\n        return i\nreturn -1"),
        [
            ("v == {b}", "i == {b}", "it compares the index instead of the value"),
            ("return i\n", "return v\n", "it returns the value instead of the index"),
            ("return -1", "return None", "a missing item must give -1"),
        ],
        lambda rng: (lambda s: (s, rng.choice(s + [77])))(positive_integers(rng, 3, 6, 30)),
        "return the index of the first match, or -1",
    ),
    Family(
        "pairwise_diff",
        ["differences", "steps"],
        [LISTS],
        "return [{a}[i + 1] - {a}[i] for i in range(len({a}) - 1)]",
        [
            ("{a}[i + 1] - {a}[i]", "{a}[i] - {a}[i + 1]", "the sign is wrong"),
            ("- {a}[i] for", "+ {a}[i] for", "it adds instead of subtracting"),
        ],
        lambda rng: (integers(rng, 3, 5),),
        "return the differences between neighbours",
    ),
    Family(
        "dot_product",
        ["dot", "inner_product"],
        [["a", "u", "left"], ["b", "v", "right"]],
        "return sum(p * q for p, q in zip({a}, {b}))",
        [
            ("p * q", "p + q", "it adds the pairs instead of multiplying"),
            ("sum(", "max(", "it returns the largest product"),
        ],
        lambda rng: (lambda n: (integers(rng, n, n, 9), integers(rng, n, n, 9)))(rng.randint(2, 4)),
        "return the dot product of two lists",
    ),
    Family(
        "matrix_sum",
        ["add_matrices", "sum_matrices"],
        [["a", "m", "left"], ["b", "n", "right"]],
        "return [[p + q for p, q in zip(x, y)] for x, y in zip({a}, {b})]",
        [
            ("p + q for", "p - q for", "it subtracts instead of adding"),
            ("p + q for", "p * q for", "it multiplies instead of adding"),
        ],
        lambda rng: (
            [[rng.randint(0, 5) for _ in range(2)] for _ in range(2)],
            [[rng.randint(1, 5) for _ in range(2)] for _ in range(2)],
        ),
        "return the sum of two matrices",
    ),
    Family(
        "merge_sorted",
        ["merge_sorted_lists", "merge_lists"],
        [["a", "left", "first"], ["b", "right", "second"]],
        (
            "result = []\n"
            "i = j = 0\n"
            "while i < len({a}) and j < len({b}):\n"
            "    if {a}[i] <= {b}[j]:\n"
            "        result.append({a}[i])\n"
            "        i += 1\n"
            "    else:\n"
            "        result.append({b}[j])\n"
            "        j += 1\n"
            "return result + {a}[i:] + {b}[j:]"
        ),
        [
            ("{a}[i] <= {b}[j]", "{a}[i] >= {b}[j]", "the comparison takes the larger item first"),
            (" + {a}[i:] + {b}[j:]", "", "the rest of the longer list is lost"),
        ],
        lambda rng: (sorted(positive_integers(rng, 2, 4)), sorted(positive_integers(rng, 2, 4))),
        "merge two sorted lists into one sorted list",
    ),
    Family(
        "invert_dict",
        ["swap_keys_and_values", "flip_dict"],
        [["mapping", "d", "table"]],
        "return {{v: k for k, v in {a}.items()}}",
        [
            ("{{v: k for", "{{k: v for", "keys and values are not swapped"),
            ("{{v: k for", "{{v: v for", "the key is lost"),
        ],
        lambda rng: ({w: i for i, w in enumerate(rng.sample(WORDS, 3), rng.randint(1, 9))},),
        "return a dict with keys and values swapped",
    ),
    Family(
        "last_item",
        ["last", "final_item"],
        [LISTS],
        "return {a}[-1]",
        [("[-1]", "[0]", "it returns the first item"), ("[-1]", "[1]", "it returns the second item")],
        lambda rng: (rng.sample(range(1, 30), rng.randint(3, 5)),),
        "return the last item of the list",
    ),
]
