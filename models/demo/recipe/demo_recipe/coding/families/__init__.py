"""Small Python functions: the right body, plausible bugs, inputs for tests, and what each should do."""

from demo_recipe.coding.families import numbers, sequences, texts

FAMILIES = numbers.FAMILIES + texts.FAMILIES + sequences.FAMILIES
