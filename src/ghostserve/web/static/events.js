// Server-sent events over fetch, because EventSource can send no key; and a stream that is taken up again by itself.

import {headers, keyEntered, sentenceOf} from "./server.js";

const CONNECT_MS = 5000, SILENCE_MS = 15000, BACKOFF_MS = 250, BACKOFF_MAX_MS = 2000;

const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

function orSilence(promise, ms) {
  const silence = Promise.withResolvers();
  const timer = setTimeout(() => silence.reject(new Error(`nothing came for ${ms / 1000} s`)), ms);
  return Promise.race([promise, silence.promise]).finally(() => clearTimeout(timer));
}

// The `data` of each event, as text. Comments are signs of life only. Throws when nothing at all comes for `silenceMs`.
export async function* readEvents(body, silenceMs) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "", data = [];
  try {
    for (;;) {
      const {done, value} = await orSilence(reader.read(), silenceMs);
      if (done) return;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines.map((text) => text.replace(/\r$/, ""))) {
        if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
        if (line === "" && data.length) { yield data.join("\n"); data = []; }
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

async function open(path) {
  const control = new AbortController(), timer = setTimeout(() => control.abort(), CONNECT_MS);
  try {
    return await fetch(path, {
      headers: headers({Accept: "text/event-stream"}), cache: "no-store", signal: control.signal,
    });
  } finally {
    clearTimeout(timer);
  }
}

// Follow a stream for ever. `onState(state, sentence)`: "open", "lost" (tried again soon), "key" (wanted), "refused".
export async function follow(path, {onData, onState}) {
  for (let failures = 0; ; failures++) {
    try {
      const wanted = keyEntered(), answer = await open(path);
      if (answer.status === 401) {
        onState("key", await sentenceOf(answer));
        await wanted;
        failures = -1;
        continue;
      }
      if (!answer.ok) {
        onState("refused", await sentenceOf(answer));
      } else {
        onState("open", "");
        for await (const data of readEvents(answer.body, SILENCE_MS)) {
          failures = 0;
          onData(JSON.parse(data));
        }
        onState("lost", "the server ended the stream");
      }
    } catch (error) {
      onState("lost", error.message);
    }
    await pause(Math.min(BACKOFF_MS * 2 ** failures, BACKOFF_MAX_MS));
  }
}
