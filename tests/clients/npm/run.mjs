// The npm packages openai and ai (with @ai-sdk/openai-compatible): chat, a stream, tools, structured output.

import assert from "node:assert/strict";

import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { embedMany, generateText, isStepCount, Output, streamText, tool } from "ai";
import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";

const [url, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0 });
const provider = createOpenAICompatible({
  name: "orcaserve",
  baseURL: `${url}/v1`,
  apiKey: "none",
  includeUsage: true,
  supportsStructuredOutputs: true,
});
const question = "What is a whale?";
const messages = [{ role: "user", content: question }];
const chat = { model, messages, temperature: 0, max_tokens: 600 };
const asked = { model: provider(model), prompt: question, temperature: 0, maxOutputTokens: 600, maxRetries: 0 };

const Animal = z.object({
  name: z.string().max(20),
  legs: z.number().int().min(0).max(8),
  home: z.enum(["sea", "forest", "sky"]),
});
const city = z.object({ city: z.string().max(12) });
const weather = {
  type: "function",
  function: { name: "weather", description: "In a city", parameters: z.toJSONSchema(city) },
};

const checks = {
  async openai_models() {
    const names = [];
    for await (const one of client.models.list()) names.push(one.id);
    assert(names.includes(model));
    assert.equal((await client.models.retrieve(model)).id, model);
  },
  async openai_chat_and_stream() {
    const whole = await client.chat.completions.create(chat);
    const parts = [];
    for await (const chunk of await client.chat.completions.create({ ...chat, stream: true }))
      parts.push(chunk.choices[0].delta.content ?? "");
    assert(whole.choices[0].message.content);
    assert.equal(parts.join(""), whole.choices[0].message.content);
    const helper = await client.chat.completions.stream(chat).finalChatCompletion();
    assert.equal(helper.choices[0].message.content, whole.choices[0].message.content);
  },
  async openai_aborts() {
    const stream = await client.chat.completions.create({ ...chat, stream: true, ignore_eos: true });
    for await (const _ of stream) break;
    assert(stream.controller.signal.aborted);
  },
  async openai_tools() {
    for (const tool_choice of ["required", { type: "function", function: { name: "weather" } }]) {
      const body = { ...chat, tools: [weather], tool_choice, parallel_tool_calls: false };
      const { message, finish_reason } = (await client.chat.completions.create(body)).choices[0];
      assert.equal(finish_reason, "tool_calls");
      assert.deepEqual(Object.keys(JSON.parse(message.tool_calls[0].function.arguments)), ["city"]);
      const streamed = await client.chat.completions.stream(body).finalChatCompletion();
      const [call] = streamed.choices[0].message.tool_calls;
      assert.equal(call.function.arguments, message.tool_calls[0].function.arguments);
    }
  },
  async openai_structured_output() {
    const body = { ...chat, response_format: zodResponseFormat(Animal, "animal") };
    const { message } = (await client.chat.completions.parse(body)).choices[0];
    assert(Animal.safeParse(message.parsed).success);
  },
  async openai_responses() {
    const body = { model, input: question, temperature: 0, max_output_tokens: 100 };
    const whole = await client.responses.create(body);
    const stream = client.responses.stream(body);
    assert.equal((await stream.finalResponse()).output_text, whole.output_text);
  },
  async openai_completions_and_embeddings() {
    const text = await client.completions.create({ model, prompt: "Once upon a time", max_tokens: 8, temperature: 0 });
    assert(text.choices[0].text);
    const { data } = await client.embeddings.create({ model, input: ["a fox", "a lake"] }); // base64 by itself
    assert.equal(data[0].embedding.length, data[1].embedding.length);
    assert(Math.abs(data[0].embedding.reduce((sum, value) => sum + value * value, 0) - 1) < 1e-3);
  },
  async openai_errors() {
    await assert.rejects(client.chat.completions.create({ ...chat, temperature: 3 }), OpenAI.BadRequestError);
    await assert.rejects(client.chat.completions.create({ ...chat, model: "other" }), OpenAI.NotFoundError);
  },
  async ai_text_and_stream() {
    const whole = await generateText(asked);
    const stream = streamText(asked);
    const parts = [];
    for await (const part of stream.textStream) parts.push(part);
    assert(whole.text);
    assert.equal(parts.join(""), whole.text);
    assert.equal(await stream.finishReason, whole.finishReason);
    assert.equal((await stream.usage).outputTokens, whole.usage.outputTokens);
  },
  async ai_tools() {
    const rain = tool({ description: "In a city", inputSchema: city, execute: async (where) => `rain in ${where.city}` });
    for (const toolChoice of ["required", { type: "tool", toolName: "rain" }]) {
      const one = { ...asked, tools: { rain }, toolChoice, stopWhen: isStepCount(1) };
      const whole = await generateText(one);
      assert.equal(whole.toolCalls[0].toolName, "rain");
      assert.match(whole.toolResults[0].output, /^rain in /);
      const stream = streamText(one);
      await stream.consumeStream();
      assert.deepEqual((await stream.toolCalls)[0].input, whole.toolCalls[0].input);
    }
  },
  async ai_tools_in_two_steps() {
    const rain = tool({ description: "In a city", inputSchema: city, execute: async () => "rain" });
    const prepareStep = ({ stepNumber }) => ({ toolChoice: stepNumber ? "none" : "required" });
    const { steps, text } = await generateText({ ...asked, tools: { rain }, prepareStep, stopWhen: isStepCount(2) });
    assert.equal(steps.length, 2);
    assert(text);
  },
  async ai_structured_output() {
    const { output } = await generateText({ ...asked, output: Output.object({ schema: Animal }) });
    assert(Animal.safeParse(output).success);
    const stream = streamText({ ...asked, output: Output.object({ schema: Animal }) });
    assert.deepEqual(await stream.output, output);
  },
  async ai_embeddings() {
    const { embeddings } = await embedMany({ model: provider.embeddingModel(model), values: ["a fox", "a lake"] });
    assert.equal(embeddings[0].length, embeddings[1].length);
  },
};

let failed = 0;
for (const [name, check] of Object.entries(checks)) {
  try {
    await check();
    console.log(`passed ${name}`);
  } catch (error) {
    failed += 1;
    console.log(error, `\nFAILED ${name}`);
  }
}
console.log(`passed ${Object.keys(checks).length - failed}, failed ${failed}, deselected 0`);
process.exit(failed ? 1 : 0);
