// SPDX-License-Identifier: MIT
// llama_cpp.mjs MODEL.gguf PROMPT_TOKENS DECODE_TOKENS: times llama.cpp's Vulkan backend as the npm package node-llama-cpp brings it
// prebuilt. Prints one JSON object. Needs, in the current folder: npm install node-llama-cpp @node-llama-cpp/linux-x64-vulkan
import {createRequire} from "node:module";
import {pathToFileURL} from "node:url";

const require = createRequire(`${process.cwd()}/`);
const {getLlama} = await import(pathToFileURL(require.resolve("node-llama-cpp")).href);
const [,, path, nPrompt, nDecode] = process.argv;
const llama = await getLlama({gpu: "vulkan", build: "never", logLevel: "error"});
if ((await llama.getGpuDeviceNames()).length === 0) {
    console.error("llama.cpp found no Vulkan device and would run on its own CPU code; it takes a CPU driver if GGML_VK_VISIBLE_DEVICES=0 names it");
    process.exit(1);
}
const model = await llama.loadModel({modelPath: path, gpuLayers: 99});
const context = await model.createContext({contextSize: 1024, batchSize: 512});
const sequence = context.getSequence();
const text = "The quick brown fox jumps over the lazy dog and then runs across the wide green field to the old stone bridge. ";
const tokens = model.tokenize(text.repeat(40)).slice(0, Number(nPrompt) + 3);
const seconds = () => performance.now() / 1000;

await sequence.evaluateWithoutGeneratingNewTokens(tokens.slice(0, 2)); // compiles pipelines
let start = seconds();
await sequence.evaluateWithoutGeneratingNewTokens(tokens.slice(2, -1));
const prefill = seconds() - start;
const decode = [];
start = seconds();
for await (const _ of sequence.evaluate([tokens.at(-1)], {temperature: 0})) {
    decode.push(seconds() - start);
    start = seconds();
    if (decode.length > Number(nDecode)) {
        break;
    }
}
decode.shift(); // the first compiles the shaders of a single token
console.log(JSON.stringify({device: await llama.getGpuDeviceNames(), prefill: Number(nPrompt) / prefill, decode: decode.length / decode.reduce((a, b) => a + b)}));
process.exit(0);
