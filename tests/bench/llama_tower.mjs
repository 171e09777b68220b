// SPDX-License-Identifier: MIT
// llama_tower.mjs MODEL.gguf MMPROJ.gguf IMAGE vulkan|default: llama.cpp's mtmd encodes an image, as the npm package @fugood/llama.node
// brings it prebuilt (node-llama-cpp takes no images). llama.cpp's log on stderr says how long that took and where.
// Needs, in the current folder: npm install @fugood/llama.node @fugood/node-llama-linux-x64-vulkan
import {createRequire} from "node:module";
import {resolve} from "node:path";

const require = createRequire(`${process.cwd()}/`);
const {loadModel, toggleNativeLog} = require("@fugood/llama.node");
const [,, model, mmproj, image, variant] = process.argv;
const gpu = variant === "vulkan";
await toggleNativeLog(true);
const context = await loadModel({model: resolve(model), n_ctx: 1024, n_gpu_layers: gpu ? 99 : 0, n_threads: 2, lib_variant: variant});
if (!await context.initMultimodal({path: resolve(mmproj), use_gpu: gpu})) {
    console.error("llama.cpp does not take this tower");
    process.exit(1);
}
await context.completion({prompt: "<__media__> What is it?", media_paths: [resolve(image)], n_predict: 1, temperature: 0});
process.exit(0);
