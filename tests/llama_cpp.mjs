// llama.cpp's reading of GGUF files: node llama_cpp.mjs FOLDER JOBS RESULTS
// FOLDER has node_modules; a job is {path, texts, prompts, count}, its result {ids, answers}: the
// texts' ids, and the most likely `count` ids after each prompt of ids.
import fs from "fs";
import {createRequire} from "module";
import {pathToFileURL} from "url";

const [folder, jobsFile, resultsFile] = process.argv.slice(2);
const found = createRequire(`${folder}/`).resolve("node-llama-cpp");
const {getLlama} = await import(pathToFileURL(found).href);
const llama = await getLlama({gpu: false, build: "never", progressLogs: false, logLevel: "error"});
const results = [];
for (const {path, texts, prompts, count, special} of JSON.parse(fs.readFileSync(jobsFile, "utf8"))) {
    const model = await llama.loadModel({modelPath: path});
    const ids = texts.map((text) => model.tokenize(text, special ?? false));
    const context = await model.createContext({contextSize: 128, batchSize: 128, threads: 1});
    const sequence = context.getSequence();
    const answers = [];
    for (const prompt of prompts) {
        await sequence.clearHistory();
        const answer = [];
        const options = {temperature: 0, yieldEogTokens: true};
        for await (const token of sequence.evaluate(prompt, options)) {
            answer.push(token);
            if (answer.length >= count)
                break;
        }
        answers.push(answer);
    }
    results.push({ids, answers});
    await context.dispose();
    await model.dispose();
}
fs.writeFileSync(resultsFile, JSON.stringify(results));
process.exit(0);
