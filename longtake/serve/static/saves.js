// Sessions that were saved from this browser: what is needed to open them again.
const KEY = "longtake-saves";
const MOST = 12;

export function all() {
  try {
    return JSON.parse(localStorage.getItem(KEY)) ?? [];
  } catch {
    return [];
  }
}

const write = (list) => localStorage.setItem(KEY, JSON.stringify(list.slice(0, MOST)));

export const keep = (one) => write([one, ...all().filter(({ id, save }) => id !== one.id || save !== one.save)]);
export const forget = (one) => write(all().filter(({ id, save }) => id !== one.id || save !== one.save));
