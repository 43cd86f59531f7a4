// One turn of an AI SDK agent: `anthropic` over Messages, `openai` over Responses, `compatible`
// over Chat Completions. The conversation is kept in a file, as in toy.py.
import fs from 'node:fs';
import { createRequire } from 'node:module';
import { pathToFileURL } from 'node:url';

// The program lies outside the folder that the packages are installed in.
const require = createRequire(`${process.env.PREFIX}/`);
const load = (name) => import(pathToFileURL(require.resolve(name)));
const { streamText, stepCountIs, tool } = await load('ai');
const { z } = await load('zod');

const { BASE_URL, API_KEY: apiKey, MODEL, SESSION } = process.env;
const [kind, prompt] = process.argv.slice(2);
const headers = { 'X-Session-ID': SESSION };
const mark = { cacheControl: { type: 'ephemeral' } };
const CONVERSATION = 'conversation.json';

const models = {
  anthropic: async () =>
    (await load('@ai-sdk/anthropic')).createAnthropic({ baseURL: `${BASE_URL}/v1`, apiKey, headers })(MODEL),
  openai: async () =>
    (await load('@ai-sdk/openai')).createOpenAI({ baseURL: `${BASE_URL}/v1`, apiKey }).responses(MODEL),
  compatible: async () =>
    (await load('@ai-sdk/openai-compatible')).createOpenAICompatible({
      name: 'cachescope', baseURL: `${BASE_URL}/v1`, apiKey, headers, includeUsage: true,
    })(MODEL),
};
// What each provider takes as a marker; `openaiCompatible` puts its own fields where it stands.
const options = {
  anthropic: { anthropic: mark },
  openai: {},
  compatible: { openaiCompatible: { cache_control: { type: 'ephemeral' } } },
}[kind];

const marked = (parts) => [...parts.slice(0, -1), { ...parts.at(-1), providerOptions: options }];

const messages = fs.existsSync(CONVERSATION) ? JSON.parse(fs.readFileSync(CONVERSATION)) : [];
messages.push({ role: 'user', content: [{ type: 'text', text: prompt }] });
const result = streamText({
  model: await models[kind](),
  system: { role: 'system', content: fs.readFileSync('handbook.txt', 'utf8'), providerOptions: options },
  messages,
  tools: {
    read_file: tool({
      description: 'Returns the text of a file.',
      inputSchema: z.object({ path: z.string().describe('The file.') }),
      execute: ({ path }) => fs.readFileSync(path, 'utf8'),
    }),
  },
  // The latest message carries a marker at each step, on its last part.
  prepareStep: ({ messages }) => ({
    messages: messages.map((message, i) =>
      i === messages.length - 1 ? { ...message, content: marked(message.content) } : message),
  }),
  providerOptions: kind === 'openai' ? { openai: { promptCacheKey: SESSION, store: false } } : {},
  stopWhen: stepCountIs(5),
  onError: ({ error }) => { throw error; },
});
console.log(await result.text);
messages.push(...(await result.response).messages);
fs.writeFileSync(CONVERSATION, JSON.stringify(messages));
