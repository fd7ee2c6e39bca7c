"""The official `openai` package: chat, streams, tools, completions, responses, parse helpers, raw answers, errors."""

import asyncio
import json
from typing import Literal

import openai
import pytest
from pydantic import BaseModel

from conftest import WEATHER, WEATHER_RESULT

MODEL = "conclave-demo"
ASK_WEATHER = [{"role": "user", "content": "What is the weather in Lisbon?"}]
ASK_SUM = [{"role": "user", "content": "What is 27 + 45?"}]


def test_models(client):
    model = client.models.list().data[0]
    assert model.id == MODEL and client.models.retrieve(MODEL).id == MODEL


def test_chat(client):
    answer = client.chat.completions.create(model=MODEL, messages=ASK_SUM, temperature=0)
    choice = answer.choices[0]
    assert "72" in choice.message.content and choice.finish_reason == "stop"
    assert choice.message.role == "assistant" and not choice.message.tool_calls
    assert choice.message.reasoning_content
    usage = answer.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.completion_tokens_details.reasoning_tokens > 0


def test_streamed_chat_adds_up_to_the_whole_one(client):
    ask = {"model": MODEL, "messages": ASK_SUM, "temperature": 0}
    whole = client.chat.completions.create(**ask)
    content, reasoning, finish, usage = "", "", None, None
    for chunk in client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            content += choice.delta.content or ""
            reasoning += getattr(choice.delta, "reasoning_content", None) or ""
            finish = choice.finish_reason or finish
    message = whole.choices[0].message
    assert (content, reasoning) == (message.content, message.reasoning_content)
    assert finish == "stop" and usage.completion_tokens == whole.usage.completion_tokens


def test_stream_helper_accumulates(client):
    with client.chat.completions.stream(model=MODEL, messages=ASK_WEATHER, tools=[WEATHER], temperature=0) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert "chunk" in kinds and "tool_calls.function.arguments.done" in kinds
    call = final.choices[0].message.tool_calls[0]
    assert call.function.name == "get_weather" and json.loads(call.function.arguments) == {"city": "Lisbon"}


def test_choices_logprobs_and_sampling(client):
    answer = client.chat.completions.create(
        model=MODEL, messages=ASK_SUM, n=2, seed=5, temperature=0.3, max_tokens=8, logprobs=True, top_logprobs=3,
        stop=["zzz"], user="someone", metadata={"a": "b"}, service_tier="auto", frequency_penalty=0.1,
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    token = answer.choices[0].logprobs.content[0]
    assert token.logprob <= 0 and len(token.top_logprobs) == 3 and bytes(token.bytes)
    assert all(choice.finish_reason == "length" for choice in answer.choices)


def test_tool_call_and_its_result(client):
    messages = list(ASK_WEATHER)
    ask = {"model": MODEL, "tools": [WEATHER], "temperature": 0}
    choice = client.chat.completions.create(messages=messages, tool_choice="auto", **ask).choices[0]
    call = choice.message.tool_calls[0]
    assert choice.finish_reason == "tool_calls" and call.type == "function" and call.id
    assert json.loads(call.function.arguments) == {"city": "Lisbon"}
    messages.append(choice.message.model_dump(exclude_none=True))
    messages.append({"role": "tool", "tool_call_id": call.id, "content": WEATHER_RESULT})
    answer = client.chat.completions.create(messages=messages, **ask).choices[0]
    assert answer.message.content == "The weather in Lisbon is cloudy, 21 degrees."
    refused = client.chat.completions.create(messages=ASK_WEATHER, tool_choice="none", **ask).choices[0]
    assert not refused.message.tool_calls


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_forced_calls(client, choice):
    # A question that the model would answer without a call.
    answer = client.chat.completions.create(
        model=MODEL, messages=ASK_SUM, tools=[WEATHER], tool_choice=choice, temperature=0, max_tokens=400
    ).choices[0]
    assert answer.message.tool_calls[0].function.name == "get_weather"
    assert isinstance(json.loads(answer.message.tool_calls[0].function.arguments)["city"], str)


def test_streamed_tool_call(client):
    stream = client.chat.completions.create(
        model=MODEL, messages=ASK_WEATHER, tools=[WEATHER], temperature=0, stream=True
    )
    name, ids, pieces, finish = "", set(), [], None
    for chunk in stream:
        for call in chunk.choices[0].delta.tool_calls or []:
            assert call.index == 0
            ids.update([call.id] if call.id else [])
            name += call.function.name or ""
            pieces += [call.function.arguments] if call.function.arguments else []
        finish = chunk.choices[0].finish_reason or finish
    arguments = json.loads("".join(pieces))
    assert (name, arguments, finish, len(ids)) == ("get_weather", {"city": "Lisbon"}, "tool_calls", 1)
    # The city came in pieces, as it was generated.
    assert not any("Lisbon" in piece for piece in pieces)


class Sum(BaseModel):
    left: int
    operation: Literal["plus", "minus"]
    result: int


def test_parse_helper(client):
    parsed = client.chat.completions.parse(
        model=MODEL, messages=ASK_SUM, response_format=Sum, temperature=0, max_tokens=400
    ).choices[0].message.parsed
    assert isinstance(parsed, Sum)


def test_parse_helper_with_strict_tools(client):
    tool = openai.pydantic_function_tool(Sum, name="tell_sum")
    choice = client.chat.completions.parse(
        model=MODEL, messages=ASK_SUM, tools=[tool], tool_choice="required", temperature=0, max_tokens=400
    ).choices[0]
    assert isinstance(choice.message.tool_calls[0].function.parsed_arguments, Sum)


def test_json_object(client):
    answer = client.chat.completions.create(
        model=MODEL, messages=ASK_SUM, response_format={"type": "json_object"}, temperature=0, max_tokens=300
    ).choices[0]
    assert answer.finish_reason == "length" or isinstance(json.loads(answer.message.content), dict)


def test_completions(client):
    answer = client.completions.create(
        model=MODEL, prompt=["def add(a, b):", "def sub(a, b):"], max_tokens=8, temperature=0, logprobs=2, echo=True
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.choices[1].text.startswith("def sub(a, b):")
    assert len(answer.choices[0].logprobs.tokens) == len(answer.choices[0].logprobs.token_logprobs)
    ids = client.completions.create(model=MODEL, prompt=[1, 2, 3], max_tokens=2)
    assert ids.usage.prompt_tokens == 3
    text = ""
    for chunk in client.completions.create(model=MODEL, prompt="def", max_tokens=4, temperature=0, stream=True):
        text += chunk.choices[0].text
    assert text


def test_responses(client):
    first = client.responses.create(model=MODEL, input="What is 27 + 45?", temperature=0)
    assert first.status == "completed" and "72" in first.output_text
    assert {item.type for item in first.output} == {"reasoning", "message"}
    second = client.responses.create(
        model=MODEL, input="What is 3 + 4?", previous_response_id=first.id, temperature=0
    )
    assert "7" in second.output_text and second.previous_response_id == first.id
    assert client.responses.retrieve(first.id).output_text == first.output_text
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)


def test_streamed_responses(client):
    tool = {"type": "function", **WEATHER["function"], "strict": False}
    with client.responses.stream(model=MODEL, input=ASK_WEATHER, tools=[tool], temperature=0) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert kinds[0] == "response.created" and kinds[-1] == "response.completed"
    assert "response.function_call_arguments.delta" in kinds
    call = next(item for item in final.output if item.type == "function_call")
    assert (call.name, json.loads(call.arguments)) == ("get_weather", {"city": "Lisbon"})
    result = {"type": "function_call_output", "call_id": call.call_id, "output": WEATHER_RESULT}
    answer = client.responses.create(
        model=MODEL, input=[result], previous_response_id=final.id, tools=[tool], temperature=0
    )
    assert "Lisbon is cloudy" in answer.output_text


def test_responses_parse(client):
    parsed = client.responses.parse(
        model=MODEL, input="What is 27 + 45?", text_format=Sum, temperature=0, max_output_tokens=400
    )
    assert isinstance(parsed.output_parsed, Sum)


def test_raw_and_streaming_response(client):
    raw = client.chat.completions.with_raw_response.create(model=MODEL, messages=ASK_SUM, max_tokens=2)
    assert raw.status_code == 200 and raw.headers["x-request-id"] and raw.request_id
    assert raw.parse().choices[0].finish_reason == "length"
    with client.chat.completions.with_streaming_response.create(
        model=MODEL, messages=ASK_SUM, max_tokens=2, extra_headers={"X-Request-Id": "mine"}
    ) as response:
        assert response.headers["x-request-id"] == "mine"
        assert json.loads(response.read())["usage"]["completion_tokens"] == 2


def test_errors_are_typed(client, keyed_url):
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model=MODEL, messages=ASK_SUM, temperature=-1)
    assert bad.value.param == "temperature" and bad.value.type == "invalid_request_error"
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-9", messages=ASK_SUM)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="tool role"):
        client.chat.completions.create(
            model=MODEL, messages=[{"role": "tool", "tool_call_id": "x", "content": "orphan"}]
        )
    stranger = openai.OpenAI(base_url=f"{keyed_url}/v1", api_key="wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        stranger.models.list()
    friend = openai.OpenAI(base_url=f"{keyed_url}/v1", api_key="key of the tests", max_retries=0)
    assert friend.models.list().data


def test_a_call_cut_at_max_tokens_is_told_apart(client):
    ask = {"model": MODEL, "messages": ASK_WEATHER, "tools": [WEATHER], "temperature": 0}
    whole = client.chat.completions.create(**ask).choices[0].message.tool_calls[0].function.arguments
    seen = set()
    for limit in range(20, 45):
        choice = client.chat.completions.create(**ask, max_tokens=limit).choices[0]
        for call in choice.message.tool_calls or []:
            assert whole.startswith(call.function.arguments)
            seen.add(call.function.arguments)
        if choice.finish_reason == "tool_calls":
            break
        assert choice.finish_reason == "length"
    assert whole in seen and len(seen) > 2, seen


def test_async_client(url):
    async def ask():
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as client:
            calls = [
                client.chat.completions.create(model=MODEL, messages=ASK_SUM, temperature=0, stream=True)
                for _ in range(4)
            ]
            return [[chunk async for chunk in await call] for call in calls]

    assert all("".join(chunk.choices[0].delta.content or "" for chunk in chunks) for chunks in asyncio.run(ask()))
