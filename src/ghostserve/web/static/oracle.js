// How a faulted answer differs from the unfailed one: the definition of ghostserve/testing/oracle.py, which a test
// compares with this one on many answers. Pure.

const RESYNC_TOKENS = 8, SHIFT_TOKENS_MAX = 1024;

function sameRun(left, leftAt, right, rightAt, length) {
  for (let i = 0; i < length; i++) if (left[leftAt + i] !== right[rightAt + i]) return false;
  return true;
}

// Whether both go on alike from here: for RESYNC_TOKENS tokens, or both to their end.
function agree(left, leftAt, right, rightAt) {
  const leftRest = left.length - leftAt, rightRest = right.length - rightAt;
  if (Math.min(leftRest, rightRest) < RESYNC_TOKENS && leftRest !== rightRest) return false;
  const length = Math.min(leftRest, RESYNC_TOKENS);
  return length > 0 && sameRun(left, leftAt, right, rightAt, length);
}

// How many tokens from `gotAt` on say again what was said `shift` tokens before; 0 if that explains nothing.
function repeat(ref, got, refAt, gotAt, shift) {
  const length = Math.min(shift, got.length - gotAt);
  if (!sameRun(got, gotAt, got, gotAt - shift, length)) return 0;
  const cutOff = gotAt + length === got.length && length >= RESYNC_TOKENS;
  return cutOff || agree(ref, refAt, got, gotAt + length) ? length : 0;
}

// The smallest [lost, duplicated] that explains a difference here.
function explain(ref, got, refAt, gotAt) {
  const ahead = ref.length - refAt, behind = gotAt;
  for (let shift = 1; shift <= Math.min(SHIFT_TOKENS_MAX, Math.max(ahead, behind)); shift++) {
    if (shift < ahead && agree(ref, refAt + shift, got, gotAt)) return [shift, 0];
    const repeated = shift <= behind ? repeat(ref, got, refAt, gotAt, shift) : 0;
    if (repeated) return [0, repeated];
  }
  return [0, 0];
}

// Judge the token ids `got` against those of the unfailed answer; `first` is the first that differs, null if none does.
export function compare(ref, got) {
  let lost = 0, duplicated = 0, changed = 0, refAt = 0, gotAt = 0, first = null;
  while (refAt < ref.length && gotAt < got.length) {
    if (ref[refAt] === got[gotAt]) { refAt++; gotAt++; continue; }
    first ??= gotAt;
    const [gap, repeated] = explain(ref, got, refAt, gotAt);
    if (gap || repeated) { lost += gap; duplicated += repeated; refAt += gap; gotAt += repeated; }
    else { changed++; refAt++; gotAt++; }
  }
  lost += ref.length - refAt;
  const rest = got.length - gotAt;
  if (rest && rest <= gotAt && sameRun(got, gotAt, got, gotAt - rest, rest)) duplicated += rest;
  else changed += rest;
  if (first === null && ref.length !== got.length) first = Math.min(ref.length, got.length);
  const identical = ref.length === got.length && sameRun(ref, 0, got, 0, ref.length);
  return {identical, lost, duplicated, changed, first};
}
