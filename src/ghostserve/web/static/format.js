// Numbers for people. Pure.

const STEPS = ["B", "KiB", "MiB", "GiB", "TiB"];

export function bytes(count) {
  let at = 0;
  while (count >= 1024 && at < STEPS.length - 1) { count /= 1024; at++; }
  return `${count.toFixed(at ? 1 : 0)} ${STEPS[at]}`;
}

// Both in the unit of the whole, which is named once.
export function bytesOf(part, whole) {
  const [number, unit] = bytes(whole).split(" ");
  return `${(part / 1024 ** STEPS.indexOf(unit)).toFixed(1)} of ${number} ${unit}`;
}

// From 10 s on in seconds: nobody compares 41250 ms with 512 ms.
export function duration(ms) {
  if (ms >= 10000) return `${(ms / 1000).toFixed(0)} s`;
  return ms >= 100 ? `${ms.toFixed(0)} ms` : `${ms.toFixed(1)} ms`;
}

export function age(seconds) {
  if (seconds < 1) return `${Math.round(seconds * 1000)} ms ago`;
  return seconds < 100 ? `${seconds.toFixed(0)} s ago` : `${(seconds / 60).toFixed(0)} min ago`;
}

export const count = (number, noun) => `${number} ${noun}${number === 1 ? "" : "s"}`;
