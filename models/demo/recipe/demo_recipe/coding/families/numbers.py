"""Functions of numbers."""

from demo_recipe.coding.families.common import FIRST, NUMBERS, SECOND, Family

FAMILIES = [
    Family(
        "factorial",
        ["fact", "compute_factorial"],
        [NUMBERS],
        ("result = 1\nfor i in range(2, {a} + 1):\n    result *= i\nreturn result"),
        [
            ("{a} + 1", "{a}", "the range stops one number too early"),
            ("result = 1", "result = 0", "the product starts at 0, so it is always 0"),
            ("*=", "+=", "it adds instead of multiplying"),
        ],
        lambda rng: (rng.randint(0, 8),),
        "return the factorial of the number",
    ),
    Family(
        "fibonacci",
        ["fib", "nth_fibonacci"],
        [NUMBERS],
        ("a, b = 0, 1\nfor _ in range({a}):\n    a, b = b, a + b\nreturn a"),
        [
            ("return a", "return b", "it returns the next number of the sequence"),
            ("a + b", "a - b", "it subtracts instead of adding"),
            ("range({a})", "range({a} - 1)", "the loop runs one time too few"),
        ],
        lambda rng: (rng.randint(0, 15),),
        "return the nth Fibonacci number, starting with 0 and 1",
    ),
    Family(
        "is_even",
        ["check_even", "even"],
        [NUMBERS],
        "return {a} % 2 == 0",
        [("== 0", "== 1", "it is true for odd numbers"), ("% 2", "% 3", "it checks division by 3")],
        lambda rng: (rng.randint(0, 50),),
        "return True if the number is even",
    ),
    Family(
        "is_odd",
        ["check_odd", "odd"],
        [NUMBERS],
        "return {a} % 2 == 1",
        [("== 1", "== 0", "it is true for even numbers"), ("% 2", "% 3", "it checks the remainder of 3")],
        lambda rng: (rng.randint(0, 50),),
        "return True if the number is odd",
    ),
    Family(
        "is_prime",
        ["check_prime", "prime"],
        [NUMBERS],
        (
            "if {a} < 2:\n"
            "    return False\n"
            "for i in range(2, int({a} ** 0.5) + 1):\n"
            "    if {a} % i == 0:\n"
            "        return False\n"
            "return True"
        ),
        [
            ("{a} < 2", "{a} < 1", "1 is treated as a prime"),
            ("** 0.5) + 1", "** 0.5)", "the range leaves out the square root itself"),
            ("== 0", "!= 0", "the division check is inverted"),
        ],
        lambda rng: (rng.choice([1, 2, 3, 4, 5, 7, 9, 11, 13, 15, 17, 21, 23, 25, 29, 33, 49]),),
        "return True if the number is prime",
    ),
    Family(
        "gcd",
        ["greatest_common_divisor", "common_divisor"],
        [FIRST, SECOND],
        ("while {b}:\n    {a}, {b} = {b}, {a} % {b}\nreturn {a}"),
        [
            ("{a} % {b}", "{a} // {b}", "it divides instead of taking the remainder"),
            ("return {a}", "return {b}", "it returns the wrong variable, which is 0 at the end"),
        ],
        lambda rng: (rng.randint(1, 12) * 6, rng.randint(1, 12) * 4),
        "return the greatest common divisor of two numbers",
    ),
    Family(
        "lcm",
        ["least_common_multiple"],
        [FIRST, SECOND],
        ("x, y = {a}, {b}\nwhile y:\n    x, y = y, x % y\nreturn {a} * {b} // x"),
        [
            ("* {b} // x", "* {b}", "it does not divide by the greatest common divisor"),
            ("{a} * {b}", "{a} + {b}", "it adds the numbers instead of multiplying them"),
        ],
        lambda rng: (rng.randint(1, 12), rng.randint(1, 12)),
        "return the least common multiple of two numbers",
    ),
    Family(
        "add",
        ["add_numbers", "plus"],
        [FIRST, SECOND],
        "return {a} + {b}",
        [("+", "-", "it subtracts instead of adding"), ("+", "*", "it multiplies instead of adding")],
        lambda rng: (rng.randint(1, 50), rng.randint(1, 50)),
        "return the sum of two numbers",
    ),
    Family(
        "subtract",
        ["difference", "minus"],
        [FIRST, SECOND],
        "return {a} - {b}",
        [
            ("-", "+", "it adds instead of subtracting"),
            ("{a} - {b}", "{b} - {a}", "the operands are swapped"),
        ],
        lambda rng: (rng.randint(1, 50), rng.randint(1, 50)),
        "return the first number minus the second",
    ),
    Family(
        "multiply",
        ["product_of_two", "times"],
        [FIRST, SECOND],
        "return {a} * {b}",
        [
            ("*", "+", "it adds instead of multiplying"),
            ("*", "**", "it raises to a power instead of multiplying"),
        ],
        lambda rng: (rng.randint(2, 9), rng.randint(3, 9)),
        "return the product of two numbers",
    ),
    Family(
        "power",
        ["raise_to", "pow_int"],
        [FIRST, SECOND],
        ("result = 1\nfor _ in range({b}):\n    result *= {a}\nreturn result"),
        [
            ("*=", "+=", "it adds instead of multiplying"),
            ("result = 1", "result = 0", "the product starts at 0"),
            ("range({b})", "range({b} + 1)", "the loop runs once too often"),
        ],
        lambda rng: (rng.randint(2, 5), rng.randint(0, 5)),
        "return the first number raised to the power of the second",
    ),
    Family(
        "fizzbuzz",
        ["fizz_buzz", "fizz"],
        [NUMBERS],
        (
            "if {a} % 15 == 0:\n"
            '    return "FizzBuzz"\n'
            "if {a} % 3 == 0:\n"
            '    return "Fizz"\n'
            "if {a} % 5 == 0:\n"
            '    return "Buzz"\n'
            "return str({a})"
        ),
        [
            ("% 15", "% 10", "FizzBuzz needs a multiple of 15"),
            ("return str({a})", "return {a}", "the number must be returned as text"),
            (
                ('% 3 == 0:\n    return "Fizz"'),
                ('% 3 == 0:\n    return "Buzz"'),
                "multiples of 3 must give Fizz",
            ),
        ],
        lambda rng: (rng.choice([1, 2, 3, 5, 6, 9, 10, 15, 20, 22, 30, 45, 7]),),
        "return Fizz for multiples of 3, Buzz for multiples of 5, FizzBuzz for both, else the number as text",
    ),
    Family(
        "clamp",
        ["limit", "bound"],
        [["value", "x", "n"], ["low", "lower", "minimum"], ["high", "upper", "maximum"]],
        "return max({b}, min({a}, {c}))",
        [
            ("max({b}, min({a}, {c}))", "min({b}, max({a}, {c}))", "min and max are swapped"),
            ("max({b}, min({a}, {c}))", "min({a}, {c})", "the lower bound is not applied"),
        ],
        lambda rng: (rng.randint(-10, 30), 0, rng.randint(8, 20)),
        "return the value limited to the range from low to high",
    ),
    Family(
        "celsius_to_fahrenheit",
        ["c_to_f", "to_fahrenheit"],
        [["celsius", "c", "degrees"]],
        "return {a} * 9 / 5 + 32",
        [
            ("+ 32", "- 32", "it subtracts 32 instead of adding"),
            ("* 9 / 5", "* 5 / 9", "the factor is inverted"),
        ],
        lambda rng: (rng.choice([-10, 0, 5, 10, 20, 25, 30, 100]),),
        "convert degrees Celsius to Fahrenheit",
    ),
    Family(
        "fahrenheit_to_celsius",
        ["f_to_c", "to_celsius"],
        [["fahrenheit", "f", "degrees"]],
        "return ({a} - 32) * 5 / 9",
        [
            ("({a} - 32)", "({a} + 32)", "it adds 32 instead of subtracting"),
            ("* 5 / 9", "* 9 / 5", "the factor is inverted"),
        ],
        lambda rng: (rng.choice([14, 32, 41, 50, 68, 77, 86, 212]),),
        "convert degrees Fahrenheit to Celsius",
    ),
    Family(
        "is_leap_year",
        ["leap_year", "leap"],
        [["year", "y"]],
        "return {a} % 4 == 0 and ({a} % 100 != 0 or {a} % 400 == 0)",
        [
            (
                " and ({a} % 100 != 0 or {a} % 400 == 0)",
                "",
                "centuries are not leap years unless divisible by 400",
            ),
            ("% 400 == 0", "% 400 != 0", "the rule for 400 is inverted"),
        ],
        lambda rng: (rng.choice([1900, 2000, 2004, 2023, 2024, 2100, 1996, 2019, 2400]),),
        "return True for leap years",
    ),
    Family(
        "digit_sum",
        ["sum_digits", "sum_of_digits"],
        [NUMBERS],
        "return sum(int(d) for d in str({a}))",
        [
            ("int(d)", "1", "it counts the digits instead of adding them"),
            ("sum(int(d)", "max(int(d)", "it returns the largest digit"),
        ],
        lambda rng: (rng.randint(10, 9999),),
        "return the sum of the digits",
    ),
    Family(
        "absolute",
        ["abs_value", "magnitude"],
        [NUMBERS],
        ("if {a} < 0:\n    return -{a}\nreturn {a}"),
        [
            ("{a} < 0", "{a} > 0", "the comparison is inverted"),
            ("return -{a}", "return {a}", "the sign is not changed"),
        ],
        lambda rng: (rng.randint(-20, 20),),
        "return the absolute value",
    ),
    Family(
        "to_binary",
        ["binary", "int_to_binary"],
        [NUMBERS],
        (
            "if {a} == 0:\n"
            '    return "0"\n'
            'digits = ""\n'
            "n = {a}\n"
            "while n > 0:\n"
            "    digits = str(n % 2) + digits\n"
            "    n //= 2\n"
            "return digits"
        ),
        [
            ("str(n % 2) + digits", "digits + str(n % 2)", "the digits come out in the wrong order"),
            ("n //= 2", "n -= 2", "the number must be halved"),
        ],
        lambda rng: (rng.randint(0, 40),),
        "return the binary digits of the number as text",
    ),
    Family(
        "range_sum",
        ["sum_to", "sum_up_to"],
        [NUMBERS],
        "return {a} * ({a} + 1) // 2",
        [
            ("({a} + 1)", "({a} - 1)", "the formula needs n plus 1"),
            ("// 2", "// 3", "the formula divides by 2"),
        ],
        lambda rng: (rng.randint(1, 30),),
        "return the sum of the numbers from 1 to n",
    ),
    Family(
        "safe_divide",
        ["divide", "ratio"],
        [FIRST, SECOND],
        ("if {b} == 0:\n    return None\nreturn {a} / {b}"),
        [
            ("return None", "return 0", "division by zero must give None"),
            ("{a} / {b}", "{b} / {a}", "the operands are swapped"),
            ("{a} / {b}", "{a} // {b}", "it must be true division"),
        ],
        lambda rng: (rng.randint(1, 9) * 3, rng.choice([0, 2, 4, 5])),
        "divide the first number by the second, or return None for zero",
    ),
    Family(
        "divisors",
        ["factors", "all_divisors"],
        [NUMBERS],
        "return [i for i in range(1, {a} + 1) if {a} % i == 0]",
        [("{a} + 1", "{a}", "the number itself is missing"), ("== 0", "!= 0", "the test is inverted")],
        lambda rng: (rng.choice([6, 8, 9, 10, 12, 15, 16, 18, 20, 7, 13]),),
        "return all divisors of the number",
    ),
    Family(
        "is_power_of_two",
        ["power_of_two", "check_power_of_two"],
        [NUMBERS],
        "return {a} > 0 and {a} & ({a} - 1) == 0",
        [
            ("({a} - 1)", "({a} + 1)", "it must test the number below"),
            (" and {a} & ({a} - 1) == 0", "", "only the sign is tested"),
        ],
        lambda rng: (rng.choice([1, 2, 3, 4, 6, 8, 12, 16, 31, 32, 64, 100]),),
        "return True if the number is a power of two",
    ),
]
