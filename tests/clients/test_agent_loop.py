"""The agent's loop against a server that misbehaves as models do: what it must give up on, and what it must ask last."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import openai
import pytest

from agent_loop import MAX_ITERATIONS, AgentError, is_stalled, run_agent


class Scripted(BaseHTTPRequestHandler):
    """Answers every request with the next of the server's choices, or the last one."""

    def do_POST(self):
        self.server.requests.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
        choices = self.server.choices
        choice = choices.pop(0) if len(choices) > 1 else choices[0]
        body = json.dumps(
            {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [dict(choice, index=0)]}
        ).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def scripted():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Scripted)
    server.requests, server.choices = [], []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def call(name, arguments, finish="tool_calls"):
    function = {"name": name, "arguments": arguments}
    calls = [{"id": "call_1", "type": "function", "function": function}]
    return {"message": {"role": "assistant", "content": None, "tool_calls": calls}, "finish_reason": finish}


def say(text, finish="stop"):
    return {"message": {"role": "assistant", "content": text}, "finish_reason": finish}


class Tools:
    def __init__(self, *results):
        self.results = list(results)

    def call(self, name, arguments):
        return self.results.pop(0) if len(self.results) > 1 else self.results[0]


def run(server, tools):
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.server_port}/v1", api_key="unused", max_retries=0)
    return run_agent(client, "m", [{"role": "user", "content": "Mend it."}], tools)


def test_arguments_that_are_no_json_end_it(scripted):
    scripted.choices = [call("code_exec", '{"code": "1')]
    with pytest.raises(AgentError, match="code_exec are not JSON"):
        run(scripted, Tools({}))


def test_an_answer_cut_at_its_length_ends_it(scripted):
    scripted.choices = [call("code_exec", '{"code": "1"}', finish="length")]
    with pytest.raises(AgentError, match="cut"):
        run(scripted, Tools({}))


def test_the_same_failure_twice_is_a_stall(scripted):
    scripted.choices = [call("test_runner", "{}")]
    with pytest.raises(AgentError, match="stalled"):
        run(scripted, Tools({"failed": 1}))
    assert len(scripted.requests) == 3


def test_other_tools_that_repeat_themselves_are_no_stall():
    def turn(name, content):
        calls = [{"id": name, "function": {"name": name}}]
        return [{"role": "assistant", "tool_calls": calls}, {"role": "tool", "tool_call_id": name, "content": content}]

    same = turn("code_exec", "2 failures")
    assert not is_stalled([*same, *same])
    assert not is_stalled([*turn("test_runner", "1"), *same, *turn("test_runner", "2")])
    assert is_stalled([*turn("test_runner", "1"), *same, *turn("test_runner", "1")])


def test_after_the_last_iteration_a_word_is_asked_for(scripted):
    scripted.choices = [*[call("test_runner", "{}")] * MAX_ITERATIONS, say("I could not mend it.")]
    results = [{"failed": count} for count in range(MAX_ITERATIONS, 0, -1)]
    assert run(scripted, Tools(*results)) == "I could not mend it."
    *turns, last = scripted.requests
    assert [turn["tool_choice"] for turn in turns] == ["auto"] * MAX_ITERATIONS
    assert last["tool_choice"] == "none" and last["messages"][-1]["role"] == "tool"
    # As appended with model_dump(exclude_none=True): no field of a message is null.
    assert all(value is not None for message in last["messages"] for value in message.values())
