// llama.cpp's reading of GGUF files: node llama_cpp.mjs FOLDER JOBS RESULTS
// FOLDER has node_modules; a job is {path, texts, prompts, chats, count, special}, its result {ids,
// answers, chats, begin}: the texts' ids, with special also the names of special tokens as their ids; the
// most likely `count` ids after each prompt of ids; and the ids of each conversation, a list of
// {role, content}, by the template in the file, up to where an answer begins; begin is the token that
// llama.cpp puts before each text, null for none.
import fs from "fs";
import {createRequire} from "module";
import {pathToFileURL} from "url";

const [folder, jobsFile, resultsFile] = process.argv.slice(2);
const found = createRequire(`${folder}/`).resolve("node-llama-cpp");
const {getLlama, JinjaTemplateChatWrapper} = await import(pathToFileURL(found).href);
const llama = await getLlama({gpu: false, build: "never", progressLogs: false, logLevel: "error"});
const results = [];
const item = ({role, content}) =>
    role === "assistant" ? {type: "model", response: [content]} : {type: role, text: content};
const jobs = JSON.parse(fs.readFileSync(jobsFile, "utf8"));
for (const {path, texts, prompts, chats, count, special} of jobs) {
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
    const {chat_template: template} = model.fileInfo.metadata.tokenizer;
    const wrapper = chats.length > 0 ? new JinjaTemplateChatWrapper({template}) : null;
    const read = chats.map((messages) => {
        const chatHistory = [...messages.map(item), {type: "model", response: [""]}];
        return wrapper.generateContextState({chatHistory}).contextText.tokenize(model.tokenizer);
    });
    const begin = model.tokens.shouldPrependBosToken ? model.tokens.bos : null;
    results.push({ids, answers, chats: read, begin});
    await context.dispose();
    await model.dispose();
}
fs.writeFileSync(resultsFile, JSON.stringify(results));
process.exit(0);
