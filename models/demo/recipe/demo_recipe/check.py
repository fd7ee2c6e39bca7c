"""Draws conversations and code and checks that they are well formed; needs the standard library only.

python -m demo_recipe.check [--draws 2000] [--show 0]
"""

import argparse
import json
import random

from demo_recipe import render
from demo_recipe.chat import conversation
from demo_recipe.chat.paragraphs import paragraphs
from demo_recipe.coding import answers, dialogue
from demo_recipe.coding.families import FAMILIES
from demo_recipe.coding.task import draw_function


def check_conversation(drawn):
    """Calls name offered tools with allowed arguments, every call has a result, the assistant speaks last."""
    messages, tools = drawn["messages"], drawn["tools"] or []
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in tools}
    assert len(schemas) == len(tools), "two tools of one name"
    open_calls = 0
    for message in messages:
        assert isinstance(message["content"], str), message
        assert message["content"] or message.get("tool_calls"), message
        assert "{h}" not in message["content"] and "{o}" not in message["content"], message
        open_calls -= message["role"] == "tool"
        for call in message.get("tool_calls", []):
            function = call["function"]
            schema = schemas[function["name"]]
            given = set(function["arguments"])
            assert set(schema["required"]) <= given <= set(schema["properties"]), (call, schema)
            open_calls += 1
    assert open_calls == 0 and messages[-1]["role"] == "assistant", messages


def check_family(rng, family):
    """Its body runs, and each of its bugs fails one of many tests."""
    function = draw_function(rng, family)
    assert function.tests, family.name
    for bug in family.bugs:
        draws = (draw_function(rng, family) for _ in range(50))
        assert any(other.failure(bug, other.tests) for other in draws), (family.name, bug)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=2000)
    parser.add_argument("--show", type=int, default=0, help="conversations to print")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    rng = random.Random(given.seed)
    makers = [conversation.sample, dialogue.agent, answers.code, answers.linked_list]
    for maker in makers:
        for _ in range(given.draws // len(makers)):
            drawn = maker(rng)
            check_conversation(drawn)
            assert list(render.documents(drawn))
    for _ in range(given.draws // 10):
        assert paragraphs(rng) and answers.plain_code(rng)
    for family in FAMILIES:
        check_family(rng, family)
    for _ in range(given.show):
        print(json.dumps(conversation.sample(rng), indent=1, ensure_ascii=False))
    print(f"{given.draws} conversations and {len(FAMILIES)} families are well formed")


if __name__ == "__main__":
    main()
