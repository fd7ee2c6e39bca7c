// The official `openai` npm package: chat, streams, tools, completions, responses, errors.
import assert from "node:assert/strict";
import { test } from "node:test";
import OpenAI from "openai";

const url = process.env.CONCLAVE_URL;
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "unused", maxRetries: 0 });
const model = "conclave-demo";
const askSum = [{ role: "user", content: "What is 27 + 45?" }];
const askWeather = [{ role: "user", content: "What is the weather in Lisbon?" }];
const parameters = {
  type: "object",
  properties: {
    city: { type: "string", description: "City name" },
    unit: { type: "string", enum: ["celsius", "fahrenheit"] },
  },
  required: ["city"],
};
const description = "Get the current weather for a city.";
const weather = { type: "function", function: { name: "get_weather", description, parameters } };
const result = '{"city": "Lisbon", "temperature": 21, "condition": "cloudy"}';

test("models", async () => {
  const ids = [];
  for await (const found of client.models.list()) ids.push(found.id);
  assert.deepEqual(ids, [model]);
});

test("chat", async () => {
  const answer = await client.chat.completions.create({ model, messages: askSum, temperature: 0 });
  assert.match(answer.choices[0].message.content, /72/);
  assert.equal(answer.choices[0].finish_reason, "stop");
  assert.ok(answer._request_id);
});

test("a streamed chat adds up to the whole one", async () => {
  const ask = { model, messages: askSum, temperature: 0 };
  const whole = await client.chat.completions.create(ask);
  let content = "";
  let reasoning = "";
  const stream = await client.chat.completions.create({ ...ask, stream: true });
  for await (const chunk of stream) {
    content += chunk.choices[0]?.delta.content ?? "";
    reasoning += chunk.choices[0]?.delta.reasoning_content ?? "";
  }
  assert.equal(content, whole.choices[0].message.content);
  assert.equal(reasoning, whole.choices[0].message.reasoning_content);
});

test("the stream helper collects a tool call", async () => {
  const stream = client.chat.completions.stream({ model, messages: askWeather, tools: [weather], temperature: 0 });
  const final = await stream.finalChatCompletion();
  const call = final.choices[0].message.tool_calls[0];
  assert.equal(call.function.name, "get_weather");
  assert.deepEqual(JSON.parse(call.function.arguments), { city: "Lisbon" });
});

test("runTools calls the function and answers", async () => {
  const asked = [];
  const tool = {
    ...weather,
    function: {
      ...weather.function,
      parse: JSON.parse,
      function: (given) => {
        asked.push(given);
        return result;
      },
    },
  };
  const runner = client.chat.completions.runTools({ model, messages: askWeather, tools: [tool], temperature: 0 });
  assert.equal(await runner.finalContent(), "The weather in Lisbon is cloudy, 21 degrees.");
  assert.deepEqual(asked, [{ city: "Lisbon" }]);
});

test("completions", async () => {
  const answer = await client.completions.create({ model, prompt: "def add(a, b):", max_tokens: 6, temperature: 0 });
  assert.equal(answer.usage.completion_tokens, 6);
});

test("responses, whole and streamed", async () => {
  const first = await client.responses.create({ model, input: "What is 27 + 45?", temperature: 0 });
  assert.match(first.output_text, /72/);
  const tools = [{ type: "function", name: "get_weather", description, parameters, strict: false }];
  const kinds = [];
  let last;
  for await (const event of await client.responses.create({
    model,
    input: askWeather,
    tools,
    temperature: 0,
    stream: true,
  })) {
    kinds.push(event.type);
    last = event;
  }
  assert.equal(kinds[0], "response.created");
  assert.equal(last.type, "response.completed");
  const call = last.response.output.find((item) => item.type === "function_call");
  assert.deepEqual(JSON.parse(call.arguments), { city: "Lisbon" });
});

test("errors are typed", async () => {
  const bad = client.chat.completions.create({ model, messages: askSum, temperature: -1 });
  await assert.rejects(bad, (error) => error instanceof OpenAI.BadRequestError && error.param === "temperature");
  const missing = client.chat.completions.create({ model: "gpt-9", messages: askSum });
  await assert.rejects(missing, OpenAI.NotFoundError);
  const stranger = new OpenAI({ baseURL: `${process.env.CONCLAVE_KEYED_URL}/v1`, apiKey: "wrong", maxRetries: 0 });
  await assert.rejects(stranger.models.retrieve(model), OpenAI.AuthenticationError);
});

test("an aborted stream ends", async () => {
  const stream = await client.chat.completions.create({ model, messages: askSum, stream: true });
  for await (const chunk of stream) {
    assert.ok(chunk.id);
    stream.controller.abort();
  }
});
