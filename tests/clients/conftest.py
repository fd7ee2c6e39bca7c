"""A real server's address comes in CONCLAVE_URL, without a key, and in CONCLAVE_KEYED_URL, where one is needed."""

import json
import os
import sys
from pathlib import Path

import anthropic
import openai
import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY / "examples/agent"))

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the current weather for a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "City name"},
                "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
            },
            "required": ["city"],
        },
    },
}
WEATHER_RESULT = '{"city": "Lisbon", "temperature": 21, "condition": "cloudy"}'


@pytest.fixture(scope="session")
def url():
    return os.environ["CONCLAVE_URL"]


@pytest.fixture(scope="session")
def keyed_url():
    return os.environ["CONCLAVE_KEYED_URL"]


@pytest.fixture(scope="session")
def client(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0, timeout=120)


@pytest.fixture(scope="session")
def claude(url):
    return anthropic.Anthropic(base_url=url, api_key="unused", max_retries=0, timeout=120)


@pytest.fixture(scope="session")
def recorded():
    lines = (REPOSITORY / "tests/data/demo/prompts.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]
