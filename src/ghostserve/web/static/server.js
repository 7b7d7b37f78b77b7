// One question to the server, with the key if there is one. Addresses are relative, so that the page works behind a
// path prefix. The keys live in this tab only.

const KEY = "ghostserve-key", ADMIN_KEY = "ghostserve-admin-key";
export const ASK_TIMEOUT_MS = 5000;

let entered = Promise.withResolvers();

export class KeyWanted extends Error {}

// A fault was refused; `offered`: with an admin key, which is forgotten then.
export class AdminKeyWanted extends Error {
  constructor(offered) {
    super(offered ? "the server refused this admin key" : "faults on this server want its admin key");
    this.offered = offered;
  }
}

export function useKey(key) {
  sessionStorage.setItem(KEY, key);
  entered.resolve();
  entered = Promise.withResolvers();
}

export const useAdminKey = (key) => sessionStorage.setItem(ADMIN_KEY, key);

// Resolves when the next key is entered.
export const keyEntered = () => entered.promise;

export function headers(more = {}, key = sessionStorage.getItem(KEY)) {
  return {...more, ...(key ? {Authorization: "Bearer " + key} : {})};
}

// What the server says is wrong, in OpenAI's form or in FastAPI's.
export async function sentenceOf(answer) {
  const value = await answer.json().catch(() => ({}));
  return value.error?.message || value.error || value.detail || `the server answered HTTP ${answer.status}`;
}

async function send(path, body, key) {
  const answer = await fetch(path, {
    method: body ? "POST" : "GET",
    headers: headers(body ? {"Content-Type": "application/json"} : {}, key),
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

export const ask = (path, body) => send(path, body);

// What injects faults, for which a server may want a key of its own. Who may not even look is asked for the other key
// by the live status, so what is refused here is the admin key.
export async function inject(path, body) {
  const key = sessionStorage.getItem(ADMIN_KEY);
  try {
    return await send(path, body, key ?? undefined);
  } catch (error) {
    if (!(error instanceof KeyWanted)) throw error;
    sessionStorage.removeItem(ADMIN_KEY);
    throw new AdminKeyWanted(key !== null);
  }
}
