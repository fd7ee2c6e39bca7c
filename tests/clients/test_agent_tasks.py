"""The agent of examples/agent mends the broken functions of the recorded tasks, word for word and token for token."""

import json

import openai
import pytest

from agent_loop import TOOLS, run_agent
from conftest import REPOSITORY
from sandbox import Sandbox, SandboxError

MODEL = "conclave-demo"
# Tokens of a page of the prefix cache: cached tokens end at one.
PAGE = 16
# Of the demo model's vocabulary: `<think>` and a line break, `</think>`, and the end of a turn.
THINK, END_OF_THINK, END_OF_TURN = [3063, 198], 3064, 3071


def tasks():
    lines = (REPOSITORY / "tests/data/demo/prompts.jsonl").read_text().splitlines()
    cases = [json.loads(line) for line in lines]
    return [case for case in cases if case["kind"].startswith("agent")]


class Recorder:
    """A client whose answers are kept, with their token ids."""

    def __init__(self, client):
        self.chat = self.completions = self
        self.client = client
        self.answers = []

    def create(self, **ask):
        answer = self.client.chat.completions.create(**ask, extra_body={"return_token_ids": True})
        self.answers.append(answer)
        return answer


def as_sent(transcript):
    """A recorded conversation as OpenAI's clients send it: call ids, and arguments as JSON text."""
    messages, ids = [], []
    for message in transcript:
        message = dict(message)
        if message["role"] == "tool":
            message["tool_call_id"] = ids.pop(0)
        calls = []
        for call in message.get("tool_calls") or []:
            ids.append(f"call_{len(messages)}_{len(calls)}")
            function = dict(call["function"], arguments=json.dumps(call["function"]["arguments"]))
            calls.append({"id": ids[-1], "type": "function", "function": function})
        if calls:
            message["tool_calls"] = calls
        messages.append(message)
    return messages


def plain(message):
    """What a recorded message says, without what only the wire needs."""
    calls = [
        (call["function"]["name"], json.loads(call["function"]["arguments"]))
        for call in message.get("tool_calls") or []
    ]
    return message["role"], message.get("reasoning_content") or "", message.get("content") or "", calls


def sandbox(folder):
    try:
        return Sandbox(folder)
    except SandboxError:
        # What runs here is what the recorded answers run.
        return Sandbox(folder, confined=False)


def tokens(client, messages, generation_prompt):
    """Ids of a conversation, as the server renders it."""
    body = {"messages": messages, "tools": TOOLS, "add_generation_prompt": generation_prompt}
    root = str(client.base_url).removesuffix("/v1/")
    return client.post(f"{root}/tokenize", body=body, cast_to=object)["tokens"]


@pytest.mark.parametrize("task", tasks(), ids=lambda task: next(iter(task["files"])))
def test_the_function_is_mended_as_recorded(client, tmp_path, task):
    for path, text in task["files"].items():
        target = tmp_path / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
    tools = sandbox(tmp_path)
    [test_file] = [path for path in task["files"] if "test" in path]
    assert tools.call("test_runner", {"test_file": test_file})["failed"] > 0, "it is broken"

    recorded = as_sent(task["transcript"])
    given = task.get("given", 1)
    messages = recorded[:given]
    recorder = Recorder(client)
    answer = run_agent(recorder, MODEL, messages, tools)

    assert tools.call("test_runner", {"test_file": test_file})["failed"] == 0, "it is mended"
    assert [plain(message) for message in messages] == [plain(message) for message in recorded]
    assert answer == recorded[-1]["content"]

    before = 0
    places = [at for at, message in enumerate(recorded) if at >= given and message["role"] == "assistant"]
    for at, made in zip(places, recorder.answers, strict=True):
        prompt = tokens(client, messages[:at], True)
        usage = made.usage
        assert usage.prompt_tokens == len(prompt)
        # The recorded answer as tokens: what it adds to the prompt, up to the end of its turn.
        whole = tokens(client, recorded[: at + 1], False)
        ids = made.choices[0].model_extra["token_ids"]
        if recorded[at]["reasoning_content"]:
            assert whole[: len(prompt)] == prompt and whole[len(prompt) :][: len(ids)] == ids
        else:
            # Rendered again, an answer without reasoning has no `<think>`, with which the prompt ends, nor its end.
            begun = len(prompt) - len(THINK)
            assert prompt[begun:] == THINK and whole[:begun] == prompt[:begun]
            content = whole[begun : whole.index(END_OF_TURN, begun) + 1]
            assert ids[-len(content) :] == content and END_OF_THINK in ids[: -len(content)]
        # Only what the last answer's prompt and tokens did not hold is computed.
        cached = usage.prompt_tokens_details.cached_tokens if usage.prompt_tokens_details else 0
        if before:
            assert cached > before - 1 - PAGE, f"{cached} of {before} tokens cached"
        before = usage.prompt_tokens + usage.completion_tokens
