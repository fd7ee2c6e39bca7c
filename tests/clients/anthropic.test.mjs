// The official `@anthropic-ai/sdk` npm package: messages, streams, tools, counting, errors.
import assert from "node:assert/strict";
import { test } from "node:test";
import Anthropic from "@anthropic-ai/sdk";

const client = new Anthropic({ baseURL: process.env.CONCLAVE_URL, apiKey: "unused", maxRetries: 0 });
const model = "conclave-demo";
const greedy = { model, max_tokens: 500, temperature: 0 };
const askSum = [{ role: "user", content: "What is 27 + 45?" }];
const askWeather = [{ role: "user", content: "What is the weather in Lisbon?" }];
const tool = {
  name: "get_weather",
  description: "Get the current weather for a city.",
  input_schema: {
    type: "object",
    properties: {
      city: { type: "string", description: "City name" },
      unit: { type: "string", enum: ["celsius", "fahrenheit"] },
    },
    required: ["city"],
  },
};
const result = '{"city": "Lisbon", "temperature": 21, "condition": "cloudy"}';
const textOf = (message) => message.content.filter((block) => block.type === "text").map((block) => block.text).join("");

test("messages", async () => {
  const message = await client.messages.create({ ...greedy, messages: askSum });
  assert.match(textOf(message), /72/);
  assert.equal(message.stop_reason, "end_turn");
});

test("the stream helper collects the whole message", async () => {
  const whole = await client.messages.create({ ...greedy, messages: askSum });
  const stream = client.messages.stream({ ...greedy, messages: askSum });
  let text = "";
  stream.on("text", (piece) => (text += piece));
  const final = await stream.finalMessage();
  assert.equal(text, textOf(whole));
  assert.equal(final.usage.output_tokens, whole.usage.output_tokens);
});

test("tool use and its result", async () => {
  const first = await client.messages.stream({ ...greedy, messages: askWeather, tools: [tool] }).finalMessage();
  const use = first.content.find((block) => block.type === "tool_use");
  assert.deepEqual(use.input, { city: "Lisbon" });
  assert.equal(first.stop_reason, "tool_use");
  const messages = [
    ...askWeather,
    { role: "assistant", content: first.content },
    { role: "user", content: [{ type: "tool_result", tool_use_id: use.id, content: result }] },
  ];
  const answer = await client.messages.create({ ...greedy, messages, tools: [tool] });
  assert.equal(textOf(answer), "The weather in Lisbon is cloudy, 21 degrees.");
});

test("counting and models", async () => {
  const count = await client.messages.countTokens({ model, messages: askSum });
  assert.ok(count.input_tokens > 0);
  const ids = [];
  for await (const found of client.models.list()) ids.push(found.id);
  assert.deepEqual(ids, [model]);
});

test("errors are typed", async () => {
  const missing = client.messages.create({ ...greedy, model: "claude-9", messages: askSum });
  await assert.rejects(missing, Anthropic.NotFoundError);
  const stranger = new Anthropic({ baseURL: process.env.CONCLAVE_KEYED_URL, apiKey: "wrong", maxRetries: 0 });
  await assert.rejects(stranger.messages.create({ ...greedy, messages: askSum }), Anthropic.AuthenticationError);
});
