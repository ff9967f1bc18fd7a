// Runs where OpenAI's package for Node is installed: `node node.mjs PACKAGE URL KEY MODEL PROMPT`; prints JSON.
const [packagePath, baseURL, apiKey, model, prompt] = process.argv.slice(2);
const { default: OpenAI, toFile, NotFoundError } = await import(packagePath);
const client = new OpenAI({ baseURL, apiKey });
const options = { model, messages: [{ role: "user", content: prompt }], temperature: 0, max_tokens: 48 };

const whole = (await client.chat.completions.create(options)).choices[0].message.content;

let streamed = "";
for await (const chunk of await client.chat.completions.create({ ...options, stream: true })) {
  streamed += chunk.choices[0]?.delta?.content ?? "";
}

const helper = await client.chat.completions.stream(options).finalContent();
const response = (await client.responses.create({ model, input: prompt, temperature: 0, max_output_tokens: 48 })).output_text;
const models = (await client.models.list()).data.map((one) => one.id);

let refused = "nothing";
try {
  await client.chat.completions.create({ ...options, model: "nobody" });
} catch (error) {
  refused = error instanceof NotFoundError ? error.code : String(error);
}

const line = { custom_id: "one", method: "POST", url: "/v1/chat/completions", body: options };
const file = await client.files.create({ file: await toFile(Buffer.from(JSON.stringify(line)), "in.jsonl"), purpose: "batch" });
let batch = await client.batches.create({ input_file_id: file.id, endpoint: "/v1/chat/completions", completion_window: "24h" });
while (!["completed", "failed"].includes(batch.status)) {
  await new Promise((resolve) => setTimeout(resolve, 50));
  batch = await client.batches.retrieve(batch.id);
}
const output = JSON.parse(await (await client.files.content(batch.output_file_id)).text());
const batched = output.response.body.choices[0].message.content;
await client.files.delete(file.id);

console.log(JSON.stringify({ whole, streamed, helper, response, models, refused, batched }));
