// Let transformers.js continue prompts: jobs as JSON on stdin, tokens or what it raised as JSON on stdout.
// The argument is the folder of node_modules, which is not above this file.
import { readFileSync } from "node:fs";
import { basename, dirname, resolve } from "node:path";
import { pathToFileURL } from "node:url";

const library = resolve(process.argv[2], "@huggingface/transformers/dist/transformers.node.mjs");
const { AutoModelForCausalLM, AutoTokenizer, Tensor, env } = await import(pathToFileURL(library));
env.allowRemoteModels = false;

const tensor = (rows) => new Tensor("int64", BigInt64Array.from(rows.flat().map(BigInt)), [rows.length, rows[0].length]);

async function run(job) {
  try {
    env.localModelPath = dirname(job.package);
    const name = basename(job.package);
    const result = {};
    if (job.chat) {
      const tokenizer = await AutoTokenizer.from_pretrained(name);
      result.text = tokenizer.apply_chat_template(job.chat, { tokenize: false, add_generation_prompt: true });
    }
    const options = job.dtype ? { dtype: job.dtype } : {};
    const model = await AutoModelForCausalLM.from_pretrained(name, options);
    const width = Math.max(...job.rows.map((row) => row.length));
    const ids = job.rows.map((row) => [...Array(width - row.length).fill(job.pad), ...row]);
    const mask = job.rows.map((row) => [...Array(width - row.length).fill(0), ...row.map(() => 1)]);
    const found = await model.generate({
      input_ids: tensor(ids), attention_mask: tensor(mask),
      max_new_tokens: job.count, min_new_tokens: job.count, do_sample: false,
    });
    return { ...result, tokens: found.tolist().map((row) => row.slice(width).map(Number)) };
  } catch (error) {
    return { error: String(error) };
  }
}

const results = [];
for (const job of JSON.parse(readFileSync(0, "utf8"))) results.push(await run(job));
console.log(JSON.stringify(results));
