// What this browser keeps of sessions: saves, to be opened again another day, and those that play in this tab.
const SAVES = "longtake-saves";
const PLAYING = "longtake-playing";
const MOST = 12;

function read(storage, key) {
  try {
    return JSON.parse(storage.getItem(key)) ?? [];
  } catch {
    return [];
  }
}

const write = (list) => localStorage.setItem(SAVES, JSON.stringify(list.slice(0, MOST)));
const isOther = (one) => ({ id, save }) => id !== one.id || save !== one.save;

export const all = () => read(localStorage, SAVES);
export const keep = (one) => write([one, ...all().filter(isOther(one))]);
export const forget = (one) => write(all().filter(isOther(one)));

const writePlaying = (list) => sessionStorage.setItem(PLAYING, JSON.stringify(list));
const others = ({ id }) => playing().filter((one) => one.id !== id);

export const playing = () => read(sessionStorage, PLAYING);
export const plays = ({ id, secret }) => writePlaying([...others({ id }), { id, secret }]);
export const playsNoMore = (session) => writePlaying(others(session));
