"""The official `anthropic` package: messages, streams, tools, thinking, counting, errors."""

import anthropic
import pytest

from conftest import WEATHER, WEATHER_RESULT

MODEL = "conclave-demo"
ASK_SUM = [{"role": "user", "content": "What is 27 + 45?"}]
ASK_WEATHER = [{"role": "user", "content": "What is the weather in Lisbon?"}]
# This SDK has no `temperature` any more.
GREEDY = {"temperature": 0}
THINKING = {"type": "enabled", "budget_tokens": 1024}
TOOL = {
    "name": "get_weather",
    "description": WEATHER["function"]["description"],
    "input_schema": WEATHER["function"]["parameters"],
}


def kinds(message):
    return [block.type for block in message.content]


def test_messages_with_thinking(claude):
    message = claude.messages.create(
        model=MODEL, max_tokens=2000, messages=ASK_SUM, extra_body=GREEDY, thinking=THINKING
    )
    assert kinds(message) == ["thinking", "text"] and "72" in message.content[1].text
    assert message.stop_reason == "end_turn" and message.usage.output_tokens > 0
    assert message.content[0].thinking


def test_a_conversation_with_system_and_cache_control(claude):
    ask = {
        "model": MODEL,
        "max_tokens": 2000,
        "extra_body": GREEDY,
        "system": [
            {"type": "text", "text": "You are a helpful assistant. " * 20, "cache_control": {"type": "ephemeral"}}
        ],
        "messages": [{"role": "user", "content": [{"type": "text", "text": "What is 3 + 4?"}]}],
    }
    claude.messages.create(**ask)
    again = claude.messages.create(**ask)
    assert again.usage.cache_read_input_tokens > 0
    whole = claude.messages.count_tokens(model=MODEL, system=ask["system"], messages=ask["messages"])
    assert again.usage.input_tokens + again.usage.cache_read_input_tokens == whole.input_tokens


def test_stream(claude):
    whole = claude.messages.create(model=MODEL, max_tokens=500, messages=ASK_SUM, extra_body=GREEDY)
    with claude.messages.stream(model=MODEL, max_tokens=500, messages=ASK_SUM, extra_body=GREEDY) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == "".join(block.text for block in whole.content if block.type == "text")
    assert final.stop_reason == "end_turn" and final.usage.output_tokens == whole.usage.output_tokens


def test_raw_events(claude):
    events = claude.messages.create(model=MODEL, max_tokens=500, messages=ASK_SUM, extra_body=GREEDY, stream=True)
    names = [event.type for event in events if event.type != "ping"]
    assert names[0] == "message_start" and names[-2:] == ["message_delta", "message_stop"]
    assert names.count("content_block_start") == names.count("content_block_stop")


def test_tool_use_and_result(claude):
    ask = {"model": MODEL, "max_tokens": 2000, "extra_body": GREEDY, "tools": [TOOL], "thinking": THINKING}
    message = claude.messages.create(messages=ASK_WEATHER, **ask)
    use = next(block for block in message.content if block.type == "tool_use")
    assert message.stop_reason == "tool_use" and (use.name, use.input) == ("get_weather", {"city": "Lisbon"})
    messages = [
        *ASK_WEATHER,
        {"role": "assistant", "content": message.content},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": use.id, "content": WEATHER_RESULT}]},
    ]
    answer = claude.messages.create(messages=messages, **ask)
    assert answer.content[-1].text == "The weather in Lisbon is cloudy, 21 degrees."


def test_streamed_tool_use(claude):
    pieces = []
    with claude.messages.stream(
        model=MODEL, max_tokens=500, messages=ASK_WEATHER, tools=[TOOL], extra_body=GREEDY
    ) as stream:
        for event in stream:
            if event.type == "input_json":
                pieces.append(event.partial_json)
        final = stream.get_final_message()
    use = next(block for block in final.content if block.type == "tool_use")
    assert use.input == {"city": "Lisbon"} and len(pieces) > 1


def test_tool_choice_any(claude):
    forced = claude.messages.create(
        model=MODEL, max_tokens=500, messages=ASK_SUM, tools=[TOOL], extra_body=GREEDY, tool_choice={"type": "any"}
    )
    assert "tool_use" in kinds(forced)


def test_tool_choice_none(claude):
    none = claude.messages.create(
        model=MODEL, max_tokens=500, messages=ASK_WEATHER, tools=[TOOL], extra_body=GREEDY, tool_choice={"type": "none"}
    )
    assert "tool_use" not in kinds(none)


def test_stop_sequences_and_max_tokens(claude):
    stopped = claude.messages.create(
        model=MODEL, max_tokens=500, messages=ASK_SUM, extra_body=GREEDY, stop_sequences=["72."]
    )
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "72.")
    cut = claude.messages.create(model=MODEL, max_tokens=2, messages=ASK_SUM)
    assert cut.stop_reason == "max_tokens" and cut.usage.output_tokens == 2


def test_count_tokens(claude):
    few = claude.messages.count_tokens(model=MODEL, messages=ASK_SUM).input_tokens
    more = claude.messages.count_tokens(model=MODEL, messages=ASK_SUM, tools=[TOOL]).input_tokens
    assert 0 < few < more


def test_models(claude):
    assert MODEL in [model.id for model in claude.models.list()]


def test_raw_response(claude):
    raw = claude.messages.with_raw_response.create(model=MODEL, max_tokens=2, messages=ASK_SUM)
    assert raw.headers["request-id"] and raw.parse().stop_reason == "max_tokens"


def test_errors_are_typed(claude, keyed_url):
    with pytest.raises(anthropic.BadRequestError, match="temperature"):
        claude.messages.create(model=MODEL, max_tokens=5, messages=ASK_SUM, extra_body={"temperature": -1})
    with pytest.raises(anthropic.NotFoundError):
        claude.messages.create(model="claude-9", max_tokens=5, messages=ASK_SUM)
    stranger = anthropic.Anthropic(base_url=keyed_url, api_key="wrong", max_retries=0)
    with pytest.raises(anthropic.AuthenticationError):
        stranger.messages.create(model=MODEL, max_tokens=5, messages=ASK_SUM)
    friend = anthropic.Anthropic(base_url=keyed_url, api_key="key of the tests", max_retries=0)
    assert friend.messages.create(model=MODEL, max_tokens=2, messages=ASK_SUM).stop_reason == "max_tokens"
