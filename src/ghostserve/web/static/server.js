// One question to the server, with the key if there is one. Addresses are relative, so that the page works behind a
// path prefix. The key lives in this tab only.

const KEY = "ghostserve-key";
export const ASK_TIMEOUT_MS = 5000;

let entered = Promise.withResolvers();

export class KeyWanted extends Error {}

export function useKey(key) {
  sessionStorage.setItem(KEY, key);
  entered.resolve();
  entered = Promise.withResolvers();
}

// Resolves when the next key is entered.
export const keyEntered = () => entered.promise;

export function headers(more = {}) {
  const key = sessionStorage.getItem(KEY);
  return {...more, ...(key ? {Authorization: "Bearer " + key} : {})};
}

// What the server says is wrong, in OpenAI's form or in FastAPI's.
export async function sentenceOf(answer) {
  const value = await answer.json().catch(() => ({}));
  return value.error?.message || value.error || value.detail || `the server answered HTTP ${answer.status}`;
}

export async function ask(path, body) {
  const answer = await fetch(path, {
    method: body ? "POST" : "GET",
    headers: headers(body ? {"Content-Type": "application/json"} : {}),
    body: body && JSON.stringify(body),
    cache: "no-store",
    signal: AbortSignal.timeout(ASK_TIMEOUT_MS),
  });
  if (answer.status === 401) throw new KeyWanted(await sentenceOf(answer));
  if (!answer.ok) {
    const error = new Error(await sentenceOf(answer));
    error.status = answer.status;
    throw error;
  }
  return answer.json();
}
