// Requests to the server. A session is {id, secret}; both go into headers or bodies, never into addresses.

export class Refused extends Error {
  constructor(status, error) {
    super(error.fix ? `${error.message}; ${error.fix}` : error.message);
    this.status = status;
    this.code = error.code;
  }
}

const TOKEN = "longtake-token"; // of this tab alone

export const token = () => sessionStorage.getItem(TOKEN);
export const keepToken = (text) => sessionStorage.setItem(TOKEN, text);

async function request(method, path, { session, json, form } = {}) {
  const headers = {};
  if (token()) headers.Authorization = `Bearer ${token()}`;
  if (session) headers["X-Session-Secret"] = session.secret;
  if (json) headers["Content-Type"] = "application/json";
  let answer;
  try {
    answer = await fetch(`/api${path}`, { method, headers, body: json ? JSON.stringify(json) : form });
  } catch {
    throw new Refused(0, { code: "away", message: "the server does not answer", fix: "see whether it still runs" });
  }
  if (answer.ok) return answer;
  const body = await answer.json().catch(() => null);
  throw new Refused(answer.status, body?.error ?? { code: "failed", message: `the server answered ${answer.status}` });
}

function formOf(fields) {
  const form = new FormData();
  for (const [name, value] of Object.entries(fields)) {
    if (value !== null && value !== undefined && value !== "") form.append(name, value);
  }
  return form;
}

const json = async (answer) => (await answer).json();
const of = (session) => `/sessions/${encodeURIComponent(session.id)}`;

export const info = () => json(request("GET", "/info"));
export const create = (fields) => json(request("POST", "/sessions", { form: formOf(fields) }));
export const open = (session, save) => json(request("POST", "/sessions/open", { form: formOf({ ...session, save }) }));
export const state = (session) => json(request("GET", of(session), { session }));
export const remove = (session) => request("DELETE", of(session), { session });
export const prompt = (session, text, drop) =>
  json(request("POST", `${of(session)}/prompt`, { session, json: { prompt: text, drop } }));
export const picture = (session, kind, image, drop) =>
  json(request("POST", `${of(session)}/${kind}`, { session, form: formOf({ image, drop: String(drop) }) }));
export const rewind = (session, where) => json(request("POST", `${of(session)}/rewind`, { session, json: where }));
// pause, resume, fork, save
export const tell = (session, what) => json(request("POST", `${of(session)}/${what}`, { session }));
// recording, script
export const download = async (session, what) => (await request("GET", `${of(session)}/${what}`, { session })).blob();
export const streamAddress = (session) => {
  const scheme = location.protocol === "https:" ? "wss:" : "ws:";
  return `${scheme}//${location.host}/api${of(session)}/stream`;
};
